"""Policies at equal bytes, asked the same.

A budget is a share of the full cache's bytes of a context. Settings of PyramidInfer are solved for it; what
they come to is a little less than the budget, so the other policies are given exactly as many tokens as the
first of them holds.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minipyramid import LLM, MiniPyramidError, Policy, PyramidConfig, RequestError
from minipyramid.eval.context import HeldContext
from minipyramid.eval.tasks import Figures, Task, Text
from minipyramid.policies import POLICIES, SPLIT, class_of, pick_policy
from minipyramid.policies.split import Split
from minipyramid.policy import FULL

# By policy and budget: a figure's name, and a value of each sample.
Samples = dict[tuple[str, float], dict[str, list[float]]]


def no_samples() -> Samples:
    """To be filled by `compare`."""
    return defaultdict(lambda: defaultdict(list))


@dataclass(frozen=True)
class Comparison:
    """Which policies are compared, by the name of their rows, and at which budgets."""

    policies: dict[str, Policy]
    budgets: list[float]
    left_out: frozenset[tuple[str, float]] = frozenset()  # a row's name and a budget that it cannot hold

    def check(self, lengths: list[int], layers: int) -> None:
        """Raise `RequestError` where a policy cannot hold a budget of a context of one of these lengths."""
        for tokens in lengths:
            list(self.at(tokens, layers))

    def at(self, tokens: int, layers: int) -> Iterator[tuple[str, float, Policy]]:
        """Every row for a context of so many tokens: its name, its budget, and the policy that holds so much.

        Raises `RequestError` where a policy cannot hold it.
        """
        for name, policy in self.policies.items():
            if policy == FULL:
                yield name, 1.0, policy
        for budget in self.budgets:
            first = self.first_pyramid(budget, tokens, layers)
            total = sum(first.held(tokens, layers)) if first else int(budget * tokens * layers)
            for name, policy in self.policies.items():
                if (name, budget) in self.left_out:
                    continue
                if isinstance(policy, PyramidConfig):
                    yield name, budget, within(name, policy, budget, tokens, layers)
                elif first and isinstance(policy, Split) and isinstance(policy.like, PyramidConfig):
                    yield name, budget, replace(policy, like=first)
                elif policy != FULL:
                    share = total / (tokens * layers)
                    yield name, budget, within(name, policy, share, tokens, layers)

    def first_pyramid(self, budget: float, tokens: int, layers: int) -> Policy | None:
        """PyramidInfer's settings in the first row that has some, else those of the first split with some."""
        rows = list(self.policies.items())
        splits = [(name, policy.like) for name, policy in rows if isinstance(policy, Split)]
        for name, policy in rows + splits:
            if isinstance(policy, PyramidConfig) and (name, budget) not in self.left_out:
                return within(name, policy, budget, tokens, layers)
        return None


def within(name: str, policy: Policy, share: float, tokens: int, layers: int) -> Policy:
    """The policy that holds such a share of a context; the error names the policy."""
    try:
        return policy.within(share, tokens, 0, layers)
    except MiniPyramidError as error:
        raise RequestError(f"--policies has {name}, but {error}") from error


def pick_policies(names: Sequence[str], directory: Path, layers: int) -> dict[str, Policy]:
    """Policies by the name of their rows, which for a file is its stem.

    Raises what `pick_policy` does, and `RequestError` where a row's name would not say what it is.
    """
    picked: dict[str, Policy] = {}
    for name in dict.fromkeys(names):
        is_file = name.endswith(".json")
        label = Path(name).stem if is_file else name
        shown = f"--policies {name} would be shown as {label!r}, which"
        if label in picked:
            raise RequestError(f"{shown} another row is; rename the file")
        policy = pick_policy(name, directory, layers)
        named = label.removesuffix(SPLIT)
        if is_file and named in POLICIES and type(policy) is not class_of(named):
            raise RequestError(f"{shown} is another policy; rename the file")
        picked[label] = policy
    return picked


def compare(llm: LLM, tasks: Sequence[Task], comparison: Comparison, samples: Samples) -> None:
    """Ask one sample's tasks of every policy at every budget; several values of a figure count as their mean.

    `llm` is under the policy `full`.
    """
    sample = no_samples()
    for task in tasks:
        full = HeldContext(llm, FULL, task.context)
        expected = task.ask(full)
        for name, budget, policy in comparison.at(len(task.context), llm.config.num_hidden_layers):
            held = full if policy == FULL else HeldContext(llm, policy, task.context)
            answer = expected if held is full else task.ask(held)
            figures = task.figures(answer, expected)
            if isinstance(task, Text):  # these alone have contexts of one length
                figures |= costs(held, full)
            for key, value in figures.items():
                sample[name, budget][key].append(value)
    for row, by_name in sample.items():
        for key, values in by_name.items():
            samples[row][key].append(statistics.fmean(values))


def costs(held: HeldContext, full: HeldContext) -> Figures:
    """Bytes that are held of a context, and the shares of the full cache's that are held and computed."""
    return {
        "kv_bytes": held.kv_bytes,
        "kv_share": held.kv_bytes / full.kv_bytes,
        "computed": held.computed / full.computed,
    }
