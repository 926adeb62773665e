"""Every policy's choice against a slow version of itself, and every policy through the engine."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from helpers import STEEP, by_name, prompts_of, say
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minipyramid import LLM, ConfigError, Conversation, Policy, PyramidConfig, Request, SamplingParams
from minipyramid.config import ModelConfig
from minipyramid.policies import POLICIES
from minipyramid.policies.h2o import H2O
from minipyramid.policies.held_share import HeldShare
from minipyramid.policies.keydiff import KeyDiff
from minipyramid.policies.pyramidkv import STEEPNESS, PyramidKV
from minipyramid.policies.random import Random
from minipyramid.policies.snapkv import WINDOW, SnapKV
from minipyramid.policies.split import Split
from minipyramid.policies.streaming import Streaming
from minipyramid.policy import FULL, Compute, Generation, Seen

CHOICES: list[Policy] = [Streaming(), H2O(), SnapKV(), PyramidKV(), KeyDiff(), Random()]
SPLITS = [f"{name}-split" for name in ("streaming", "h2o", "snapkv", "pyramidkv", "keydiff", "random")]


def name_of(policy: Policy) -> str:
    return type(policy).__name__


def seen_of(tokens: int, former: int = 0, seed: int = 0) -> Seen:
    """What a layer of 4 heads and 2 key/value heads might have at hand."""
    generator = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(tokens, 4, 8, generator=generator)
    keys, values = torch.randn(2, 2, former + tokens, 8, generator=generator)
    scores = q.transpose(0, 1) @ keys.repeat_interleave(2, 0).mT / math.sqrt(8)  # [H, T, n]
    unseen = torch.ones(tokens, former + tokens, dtype=torch.bool).triu(former + 1)
    logsumexp = scores.masked_fill(unseen, -math.inf).logsumexp(-1)
    rotation = torch.ones(1, 1, 4), torch.zeros(1, 1, 4)
    return Seen(q, keys, values, logsumexp, rotation, q, q, layer=1, prompt_tokens=tokens, seed=seed)


def looked_at(seen: Seen, head: int, voters: range) -> list[float]:
    """What the queries of a key/value head's group look at, added up, one probability at a time."""
    (T, H, D), (K, n, _) = seen.q.shape, seen.keys.shape
    former = n - T
    total = [0.0] * n
    for h in range(head * H // K, (head + 1) * H // K):
        for i in voters:
            scores = [float(seen.q[i, h] @ seen.keys[head, j]) / math.sqrt(D) for j in range(former + i + 1)]
            top = max(scores)
            exps = [math.exp(s - top) for s in scores]
            for j, e in enumerate(exps):
                total[j] += e / sum(exps)
    return total[former:]


def highest(vote: list[float], count: int, always: set[int]) -> list[int]:
    order = sorted(range(len(vote)), key=lambda j: (j not in always, -vote[j], j))
    return sorted(order[:count])


# --- which tokens ---


def test_streaming_holds_four_sinks_and_the_newest() -> None:
    assert Streaming().hold(seen_of(60), 20).tolist() == [0, 1, 2, 3, *range(44, 60)]


@pytest.mark.parametrize("former", [0, 25])
def test_heavy_hitters_are_those_that_all_queries_looked_at_most(former: int) -> None:
    seen = seen_of(60, former)
    for head, row in enumerate(H2O().hold(seen, 21).tolist()):
        assert row == highest(looked_at(seen, head, range(60)), 21, set(range(50, 60)))


def test_heavy_hitters_of_a_prompt_longer_than_a_block_of_voters() -> None:
    """Voters are taken 64 at a time; the votes are those of the whole matrix."""
    seen = seen_of(300)
    scores = seen.q.transpose(0, 1) @ seen.keys.repeat_interleave(2, 0).mT / math.sqrt(8)
    unseen = torch.ones(300, 300, dtype=torch.bool).triu(1)
    probs = scores.masked_fill(unseen, -math.inf).softmax(-1)  # [H, T, n]
    for head, row in enumerate(H2O().hold(seen, 30).tolist()):
        vote = probs[2 * head : 2 * head + 2].sum((0, 1)).tolist()
        assert row == highest(vote, 30, set(range(285, 300)))


@pytest.mark.parametrize("policy", [SnapKV(), PyramidKV()], ids=name_of)
@pytest.mark.parametrize("former", [0, 25])
def test_snapkv_pools_the_votes_of_its_window(policy: Policy, former: int) -> None:
    """Over neighbours, but not from the window or a former turn into what stands between them."""
    seen = seen_of(60, former)
    for head, row in enumerate(policy.hold(seen, 40).tolist()):
        vote = looked_at(seen, head, range(28, 60))[:28]
        near = [vote[max(0, j - 2) : j + 3] for j in range(28)]
        assert row == highest([sum(v) / len(v) for v in near] + [0.0] * 32, 40, set(range(28, 60)))


def test_snapkv_leaves_room_for_votes_where_few_are_held() -> None:
    """Of 20 tokens 19 are the window, and one is the highest-voted."""
    seen = seen_of(60)
    for head, row in enumerate(SnapKV().hold(seen, 20).tolist()):
        vote = looked_at(seen, head, range(41, 60))[:41]
        near = [vote[max(0, j - 2) : j + 3] for j in range(41)]
        assert row == highest([sum(v) / len(v) for v in near] + [0.0] * 19, 20, set(range(41, 60)))


def test_random_differs_by_layer_head_and_prompt_and_repeats() -> None:
    """A fixed draw would be a policy of its own, good or bad by luck."""
    chosen = [tuple(row) for seed in range(6) for row in Random().hold(seen_of(60, seed=seed), 20).tolist()]
    assert len(set(chosen)) == len(chosen)
    assert all(row[:4] == (0, 1, 2, 3) for row in chosen)
    again = Random().hold(replace(seen_of(60), seed=3), 20)
    assert torch.equal(again, Random().hold(seen_of(60, seed=3), 20))


def test_the_engine_gives_each_layer_and_prompt_a_seed_of_its_own(tiny: LLM) -> None:
    prompts = prompts_of([60, 60, 41])
    prompts[1][0] += 1
    layers = []
    for prompt, prefill in zip(prompts, tiny.under("random").prefill(prompts), strict=True):
        for layer, kept in enumerate(prefill.kept_positions):
            seen = replace(seen_of(len(prompt)), seed=3 * sum(prompt) + layer)
            assert kept == Random().hold(seen, prefill.kv_lengths[layer]).tolist()
            layers += [tuple(head) for head in cast("list[list[int]]", kept)]
    assert len(set(layers)) == len(layers)


@pytest.mark.parametrize("policy", [*CHOICES, Split(STEEP, SnapKV())], ids=name_of)
@pytest.mark.parametrize("former", [0, 25])
def test_a_policy_holds_so_many_ascending_tokens_of_every_head(policy: Policy, former: int) -> None:
    """Of the new tokens: those of former turns are nobody's to choose among."""
    for count in (1, 5, 33, 60):
        kept = policy.hold(seen_of(60, former), count)
        assert kept.shape in ((count,), (2, count))
        for row in kept.expand(2, -1).tolist():
            assert sorted(set(row)) == row
            assert 0 <= row[0] <= row[-1] < 60


@pytest.mark.parametrize("policy", CHOICES, ids=name_of)
@pytest.mark.parametrize("former", [0, 25])
def test_a_choice_needs_no_logsumexp(policy: Policy, former: int) -> None:
    """Attention does not always tell it; the votes are then computed with a softmax of their own."""
    seen = seen_of(90, former)
    for count in (7, 40):
        told, untold = (policy.hold(s, count) for s in (seen, replace(seen, logsumexp=None)))
        assert torch.equal(told, untold)


@pytest.mark.parametrize("former", [0, 25])
def test_the_pyramid_needs_none_either(former: int) -> None:
    seen = seen_of(90, former)
    told, untold = (STEEP.pass_on(s, 40) for s in (seen, replace(seen, logsumexp=None)))
    assert torch.equal(told, untold)
    assert sorted(set(told.tolist())) == told.tolist()
    assert told[-10:].tolist() == list(range(80, 90))


def test_full_chooses_nothing_and_cannot_be_split() -> None:
    for choice in (Policy(), PyramidConfig()):
        with pytest.raises(ConfigError, match="does not choose what is held"):
            Split(STEEP, choice)
    no_policy: Any = 5
    with pytest.raises(TypeError, match="like is 5"):
        Split(no_policy, Random())


# --- how many ---


@given(tokens=st.integers(1, 2000), layers=st.integers(1, 80), share=st.floats(0.1, 1.0))
@settings(max_examples=200, deadline=None)
def test_room_is_split_to_the_token_and_falls_with_depth(tokens: int, layers: int, share: float) -> None:
    total = max(layers, int(share * tokens * layers))
    for policy in (HeldShare(), PyramidKV()):
        counts = policy.spread(total, tokens, layers)
        assert sum(counts) == total
        assert all(0 <= count <= tokens for count in counts)
    even, falling = (policy.spread(total, tokens, layers) for policy in (HeldShare(), PyramidKV()))
    assert max(even) - min(even) <= 1
    window = min(WINDOW, total // (2 * layers))
    mean = total / layers - window
    if layers > 1 and mean * (2 - 1 / STEEPNESS) <= tokens - window:  # not more than there is
        deepest = window + mean / STEEPNESS
        assert falling[-1] == pytest.approx(deepest, abs=mean / 10 / layers + mean / layers * 2 + 2)
        assert falling[0] - falling[-1] == pytest.approx(1.9 * mean, abs=2 * mean / layers * 2 + 2)
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(falling))


@given(
    tokens=st.integers(1, 500), new=st.integers(0, 100), layers=st.integers(1, 40), share=st.floats(0.3, 1.0)
)
@settings(max_examples=200, deadline=None)
def test_a_budget_is_held_to_the_token(tokens: int, new: int, layers: int, share: float) -> None:
    """Whoever rounds up would be favoured, whoever rounds down in every layer be at a loss."""
    most = int(share * layers * (tokens + new) * (1 + 1e-9))
    if most < layers * (1 + new):
        return
    for policy in CHOICES:
        held = policy.within(share, tokens, new, layers).kv_lengths(tokens, new, layers)
        assert sum(held) == min(most, layers * (tokens + new))


def test_split_holds_in_each_layer_what_the_other_holds(tiny: LLM) -> None:
    (prompt,) = prompts_of([100])
    like = STEEP.within(0.6, 100, 20, 3)
    pruned, split = tiny.under(like), tiny.under(Split(STEEP, Random()), kv_budget=0.6)
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    lengths = [llm.generate([prompt], params)[0].kv_lengths for llm in (pruned, split)]
    assert lengths[0] == lengths[1]
    assert lengths[0][0] > lengths[0][-1]


# --- through the engine ---


@dataclass(frozen=True)
class Uneven(Policy):
    """The first head holds the newest ten, the second the first ten."""

    def held(self, prompt_tokens: int, layers: int) -> list[int]:
        return [10] * layers

    def hold(self, seen: Seen, count: int) -> Tensor:
        places = torch.arange(len(seen.q))
        return torch.stack([places[-count:], places[:count]])


def test_the_cache_drops_what_a_policy_does_not_choose(tiny: LLM) -> None:
    """Keys and values of the chosen positions, by head, and no others."""
    (prompt,) = prompts_of([30])
    whole, pruned = Conversation(), Conversation()
    tiny.prefill(prompt, whole)
    tiny.under(Uneven()).prefill(prompt, pruned)
    assert whole.held
    assert pruned.held
    for (all_keys, all_values, _), (keys, values, positions) in zip(
        whole.held.layers, pruned.held.layers, strict=True
    ):
        assert torch.equal(keys[0], all_keys[0, 20:])
        assert torch.equal(values[1], all_values[1, :10])
        assert positions.tolist() == [list(range(20, 30)), list(range(10))]


def every_policy() -> list[Any]:
    """Each as it is, and held to half of the full cache; `full` has nothing to give up."""
    names = [*POLICIES, *SPLITS]
    return [(name, None) for name in names] + [(name, 0.5) for name in names if name != "full"]


@pytest.mark.parametrize(("name", "budget"), every_policy())
def test_a_mixed_batch_gives_what_single_runs_give(name: str, budget: float | None, tiny: LLM) -> None:
    prompts, new = prompts_of([90, 40, 55, 40, 130]), [20, 9, 1, 5, 24]
    llm = tiny.under(by_name(name), kv_budget=budget)
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in new]
    together = llm.generate(prompts, params)
    for prompt, one, completion in zip(prompts, params, together, strict=True):
        (alone,) = llm.generate([prompt], one)
        assert completion.token_ids == alone.token_ids
        assert completion.kept_positions == alone.kept_positions
        plan = llm.plan([len(prompt)], one.max_new_tokens)
        assert plan.kv_lengths == [completion.kv_lengths]
        assert plan.kv_bytes == completion.kv_bytes
        for layer, length in zip(completion.kept_positions, completion.kv_lengths, strict=True):
            heads: list[Any] = layer if isinstance(layer[0], list) else [layer]
            assert all(len(set(head)) == length and sorted(head) == head for head in heads)
        if budget is not None:
            assert completion.kv_bytes <= budget * completion.kv_bytes_full


@pytest.mark.parametrize("name", [*POLICIES, *SPLITS])
def test_a_second_turn_is_pruned_among_itself(name: str, tiny: LLM) -> None:
    """What the first turn left stays, to the token; of the second as much is held as of a lone prompt."""
    llm, conversation = tiny.under(by_name(name)), Conversation()
    first, second = prompts_of([60, 45])
    say(llm, first, SamplingParams(max_new_tokens=9, ignore_eos=True), conversation)
    assert conversation.held
    before = [positions.expand(2, -1).tolist() for _, _, positions in conversation.held.layers]
    (prefill,) = llm.prefill(second, conversation)
    plan = llm.plan([45], 1)
    for layer, kept in enumerate(prefill.kept_positions):
        heads: list[Any] = kept if isinstance(kept[0], list) else [kept, kept]
        for head, former in zip(heads, before[layer], strict=True):
            assert head[: len(former)] == former
            assert all(position >= 69 for position in head[len(former) :])
            assert len(head) - len(former) == plan.at(0)[0][layer]


def test_a_draw_is_the_same_in_every_run_and_other_for_other_prompts(tiny: LLM) -> None:
    llm = tiny.under("random")
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 320) for _ in range(40)] for _ in range(3)]
    once, again = llm.prefill(prompts), llm.prefill(prompts)
    assert [p.kept_positions for p in once] == [p.kept_positions for p in again]
    assert once[0].kept_positions != once[1].kept_positions


# --- a policy of one's own that goes wrong ---


WRONG_CHOICES: dict[str, Any] = {
    "a list": lambda T, count: list(range(count)),
    "too many": lambda T, count: torch.arange(count + 1),
    "twice the same": lambda T, count: torch.arange(count).clamp(max=count - 2),
    "unsorted": lambda T, count: torch.arange(count).flip(0),
    "below the first": lambda T, count: torch.arange(-1, count - 1),
    "behind the last": lambda T, count: torch.arange(T - count + 1, T + 1),
    "a head too many": lambda T, count: torch.arange(count).expand(3, -1),
    "one head": lambda T, count: torch.arange(count)[None],
    "one wrong of two heads": lambda T, count: torch.stack([torch.arange(count), torch.arange(count) - 1]),
    "three axes": lambda T, count: torch.arange(count).expand(2, 2, -1),
    "small integers": lambda T, count: torch.arange(count, dtype=torch.int32),
    "a mask": lambda T, count: torch.arange(T) < count,
    "elsewhere": lambda T, count: torch.arange(count, device="meta"),
}


@pytest.mark.parametrize("choice", WRONG_CHOICES)
@pytest.mark.parametrize("method", ["hold", "pass_on"])
def test_a_choice_that_cannot_be_is_refused_by_its_policy_s_name(choice: str, method: str, tiny: LLM) -> None:
    """What was out of range or chosen twice ran, and read other keys than its author meant."""

    @dataclass(frozen=True)
    class Strange(Policy):
        def computed(self, prompt_tokens: int, layers: int) -> list[int]:
            return [prompt_tokens] + [prompt_tokens if method == "hold" else 10] * (layers - 1)

        def held(self, prompt_tokens: int, layers: int) -> list[int]:
            return [10] * layers if method == "hold" else self.computed(prompt_tokens, layers)

    def chosen(self: Policy, seen: Seen, count: int) -> Any:
        return WRONG_CHOICES[choice](len(seen.q), count)

    setattr(Strange, method, chosen)
    with pytest.raises(ConfigError, match=r"^Strange has chosen .*expected ascending indices") as error:
        tiny.under(Strange()).prefill(prompts_of([30]))
    assert "[10]" in str(error.value)


def test_heads_are_nothing_to_pass_on(tiny: LLM) -> None:
    """A hidden state belongs to all heads alike."""

    @dataclass(frozen=True)
    class ByHead(PyramidConfig):
        def pass_on(self, seen: Seen, count: int) -> Tensor:
            return torch.arange(count).expand(2, -1)

    with pytest.raises(ConfigError, match="ByHead has chosen"):
        tiny.under(ByHead(min_context_length=4, prefill_decay_strategy="constant")).prefill(prompts_of([60]))


WRONG_GENERATIONS = {
    "no Generation": "all",
    "a group of none": Generation(30, 0.2, 0, (0, 0, 0), 1.0),
    "half a group": Generation(30, 0.2, 1.5, (0, 0, 0), 1.0),  # type: ignore[arg-type]
    "a layer too few": Generation(30, 0.2, 4, (1, 1), 1.0),
    "more than there are": Generation(30, 0.2, 4, (1, 5, 1), 1.0),
    "less than none": Generation(30, 0.2, 4, (1, -1, 1), 1.0),
    "a share": Generation(30, 0.2, 4, (1, 0.5, 1), 1.0),  # type: ignore[arg-type]
    "no list": Generation(30, 0.2, 4, 2, 1.0),  # type: ignore[arg-type]
    "a truth": Generation(30, 0.2, True, (1, 1, 1), 1.0),
    "no ratio": Generation(30, math.nan, 4, (1, 1, 1), 1.0),
    "a ratio above 1": Generation(30, 1e308, 4, (1, 1, 1), 1.0),
    "a weight without end": Generation(30, 0.2, 4, (1, 1, 1), math.inf),
    "a text for a weight": Generation(30, 0.2, 4, (1, 1, 1), "x"),  # type: ignore[arg-type]
    "fewer than none": Generation(30, 0.2, 4, (1, 1, 1), 1.0, -100),
}


WRONG_ENTRIES: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "nothing": lambda k, v: None,
    "one": lambda k, v: k,
    "shorter": lambda k, v: (k[:, 1:], v[:, 1:]),
    "of other numbers": lambda k, v: (k.double(), v),
    "lists": lambda k, v: (k.tolist(), v.tolist()),
    "elsewhere": lambda k, v: (k, v.to("meta")),
}


@pytest.mark.parametrize("wrong", WRONG_ENTRIES)
def test_entries_that_cannot_be_are_refused_by_their_policy_s_name(wrong: str, tiny: LLM) -> None:
    @dataclass(frozen=True)
    class Strange(Policy):
        def entries(self, seen: Seen, chosen: torch.Tensor) -> Any:
            return WRONG_ENTRIES[wrong](*super().entries(seen, chosen))

    with pytest.raises(ConfigError, match=r"^Strange has entries .*expected two tensors \[2, 30, 8\]"):
        tiny.under(Strange()).prefill(prompts_of([30]))


def test_the_cache_gets_the_entries_that_a_policy_gives(tiny: LLM) -> None:
    @dataclass(frozen=True)
    class Silent(Policy):
        def entries(self, seen: Seen, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            k, v = super().entries(seen, chosen)
            return k, torch.zeros_like(v)

    (prompt,), llm = prompts_of([30]), tiny.under(Silent())
    conversation = Conversation()
    say(llm, prompt, SamplingParams(max_new_tokens=2, ignore_eos=True), conversation)
    assert conversation.held
    for k, v, _ in conversation.held.layers:
        assert k.abs().min() > 0
        assert not v[:, :30].any()
        assert v[:, 30:].any()
    full, silent = (x.logits(prompt, [5]) for x in (tiny, llm))
    assert torch.equal(full[0], silent[0])  # the prompt itself sees its own values
    assert not torch.allclose(full[1], silent[1])


@pytest.mark.parametrize("wrong", WRONG_GENERATIONS)
def test_a_generation_that_cannot_be_is_refused_before_anything_runs(wrong: str, tiny: LLM) -> None:
    @dataclass(frozen=True)
    class Strange(Policy):
        def generation(self, prompt_tokens: int, layers: int) -> Any:
            return WRONG_GENERATIONS[wrong]

    with pytest.raises(ConfigError, match=r"^Strange drops by .*expected a Generation"):
        tiny.under(Strange()).engine.prepare(Request(prompts_of([30])[0]))


def test_a_generation_may_drop_whole_groups_and_none(tiny: LLM) -> None:
    @dataclass(frozen=True)
    class Whole(Policy):
        def generation(self, prompt_tokens: int, layers: int) -> Generation:
            return Generation(prompt_tokens, 0.1, 4, (0, 4, 2), 1.0)

    (completion,) = tiny.under(Whole()).generate(
        prompts_of([30]), SamplingParams(max_new_tokens=20, ignore_eos=True)
    )
    assert completion.kv_lengths == [30 + 20 - 3 * 4, 50, 30 + 20 - 3 * 2]


@pytest.mark.parametrize("numbers", [None, [30.0] * 3, "30", [[30]] * 3, ["30"] * 3])
def test_lengths_are_whole_numbers_in_a_list(numbers: Any, tiny: LLM) -> None:
    @dataclass(frozen=True)
    class Strange(Policy):
        def held(self, prompt_tokens: int, layers: int) -> Any:
            return numbers

    with pytest.raises(ConfigError, match=r"^Strange computes .* and holds "):
        tiny.under(Strange()).prefill(prompts_of([30]))


def test_what_a_policy_does_not_choose_is_named(tiny: LLM) -> None:
    """`HeldShare` is there to be derived from; by itself it was a NotImplementedError."""
    with pytest.raises(ConfigError, match="HeldShare holds less than it computes, so it needs hold"):
        tiny.under(HeldShare()).prefill(prompts_of([30]))

    @dataclass(frozen=True)
    class Narrow(Policy):
        def computed(self, prompt_tokens: int, layers: int) -> list[int]:
            return [prompt_tokens, 10, 10]

    with pytest.raises(ConfigError, match="Narrow computes less with depth, so it needs pass_on"):
        tiny.under(Narrow()).prefill(prompts_of([30]))


@pytest.mark.parametrize("code", ["import sys; sys.exit()", "raise SystemExit(0)", "1 / 0"])
def test_a_module_that_ends_the_program_is_named(
    code: str, tiny: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script without `if __name__ == ...` that exits ended the command with status 0 and no word."""
    (tmp_path / "exits.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"'exits:Mine' cannot be imported .*(SystemExit|ZeroDivision)"):
        tiny.under("exits:Mine")


def test_a_policy_of_ones_own_may_refuse_a_model(tiny: LLM) -> None:
    class Shallow(Policy):
        def check_model(self, config: ModelConfig) -> None:
            if config.num_hidden_layers > 2:
                raise ConfigError(f"two layers at most, not {config.num_hidden_layers}")

    with pytest.raises(ConfigError, match="not 3"):
        tiny.under(Shallow())
    for policy in (Split(Shallow(), KeyDiff()), Split(FULL, Deep())):
        with pytest.raises(ConfigError, match="not 3"):
            tiny.under(policy)


@dataclass(frozen=True)
class Deep(KeyDiff):
    """Chooses as KeyDiff, in deeper models only."""

    def check_model(self, config: ModelConfig) -> None:
        if config.num_hidden_layers < 9:
            raise ConfigError(f"nine layers at least, not {config.num_hidden_layers}")


@dataclass(frozen=True)
class LooksTwice(Policy):
    """Reads the prompt once before it is computed, under a policy that holds what it computes."""

    def look_over(self, ids: list[int], compute: Compute) -> list[Tensor] | None:
        compute(ids, FULL)
        return None


def test_what_was_held_while_a_prompt_was_looked_over_is_let_go(tiny: LLM) -> None:
    """Its slots stayed taken, and the error that came of it ended everybody who ran."""
    prompt = prompts_of([20])[0]
    params = SamplingParams(max_new_tokens=5, ignore_eos=True)
    plain, twice = Conversation(), Conversation()
    for _ in range(2):  # a turn holds what those before it have left, and no more
        done = []
        for policy, conversation in (("full", plain), (LooksTwice(), twice)):
            engine = tiny.under(policy).engine
            sequence = engine.prepare(Request(prompt, params, conversation))
            list(engine.run([sequence]))
            done.append(sequence.completion)
        assert done[0].token_ids == done[1].token_ids
        assert done[0].kept_positions == done[1].kept_positions


@pytest.mark.parametrize("found", ["x", [1, 2, 3], [torch.zeros(1, 1)], torch.zeros(2, 20)])
def test_what_a_look_over_cannot_have_found_is_refused(found: Any, tiny: LLM) -> None:
    """A tensor for one token was an IndexError, in the middle of a prompt."""

    @dataclass(frozen=True)
    class Strange(HeldShare):
        def look_over(self, ids: list[int], compute: Compute) -> Any:
            return found

        def hold(self, seen: Seen, count: int) -> Tensor:
            return torch.arange(count)

    with pytest.raises(ConfigError, match=r"^Strange has looked over 20 tokens and found "):
        tiny.under(Strange()).prefill(prompts_of([20]))


def test_a_class_that_cannot_be_made_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: LLM
) -> None:
    """Whatever but a TypeError its making raised was a traceback."""
    (tmp_path / "never.py").write_text(
        "from minipyramid import Policy\nclass Never(Policy):\n    def __init__(self):\n        1 / 0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"policy 'never:Never' cannot be made \(ZeroDivisionError"):
        tiny.under("never:Never")
