"""What pruning costs: policies against slow versions of themselves, equal bytes, and what the figures mean."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch
from conftest import WEIGHTS
from hypothesis import given, settings
from hypothesis import strategies as st
from published_defect import recall as recall_behind
from torch import Tensor

from minipyramid import LLM, PyramidConfig, SamplingParams
from minipyramid import baselines as b
from minipyramid import eval as command
from minipyramid.plan import Policy

CLOSE = {"atol": 2e-4, "rtol": 2e-4}
SETTINGS = PyramidConfig(recent_ratio=0.1, min_context_length=8, prefill_decay_ratio=0.5)


def ids_of(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 320) for _ in range(n)]


def looked_at(seen: b.Seen, head: int, voters: range) -> list[float]:
    """What the queries of a key/value head's group look at, added up, one probability at a time."""
    n, H, D = seen.q.shape
    group = H // len(seen.keys)
    total = [0.0] * n
    for h in range(head * group, (head + 1) * group):
        for i in voters:
            scores = [float(seen.q[i, h] @ seen.keys[head, j]) / math.sqrt(D) for j in range(i + 1)]
            top = max(scores)
            exps = [math.exp(s - top) for s in scores]
            for j, e in enumerate(exps):
                total[j] += e / sum(exps)
    return total


def highest(vote: list[float], count: int, always: set[int]) -> list[int]:
    order = sorted(range(len(vote)), key=lambda j: (j not in always, -vote[j], j))
    return sorted(order[:count])


@pytest.fixture(scope="module")
def seen(tiny: LLM) -> b.Seen:
    return b.observe(tiny, ids_of(60)).layers[1]


def test_streaming_keeps_four_sinks_and_the_newest(seen: b.Seen) -> None:
    for row in b.sinks_and_window(seen, 20).tolist():
        assert row == [0, 1, 2, 3, *range(44, 60)]


def test_heavy_hitters_are_those_that_all_queries_looked_at_most(seen: b.Seen) -> None:
    for head, row in enumerate(b.heavy_hitters(seen, 21).tolist()):
        assert row == highest(looked_at(seen, head, range(60)), 21, set(range(50, 60)))


def test_heavy_hitters_of_a_prompt_longer_than_a_block(tiny: LLM) -> None:
    """Queries are taken 256 at a time; the votes are those of the whole matrix."""
    long = b.Seen(torch.randn(300, 2, 8), torch.randn(1, 300, 8), torch.randn(1, 300, 8))
    vote = long.probs(0).sum((1, 2))
    assert torch.equal(b.heavy_hitters(long, 30), b.best_of(vote, 30, last=15))


def test_snapkv_pools_the_votes_of_its_window(seen: b.Seen) -> None:
    for head, row in enumerate(b.observed(seen, 40).tolist()):
        vote = looked_at(seen, head, range(28, 60))
        near = [vote[max(0, j - 3) : j + 4] for j in range(60)]
        assert row == highest([sum(v) / len(v) for v in near], 40, set(range(28, 60)))


@given(tokens=st.integers(20, 2000), layers=st.integers(1, 80), share=st.floats(0.1, 1.0))
@settings(max_examples=200, deadline=None)
def test_room_is_split_to_the_token_and_falls_with_depth(tokens: int, layers: int, share: float) -> None:
    total = max(layers, int(share * tokens * layers))
    for split in (b.evenly, b.falling):
        counts = split(total, layers, tokens)
        assert sum(counts) == total
        assert all(0 <= count <= tokens for count in counts)
    falling = b.falling(total, layers, tokens)
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(falling))


@pytest.mark.parametrize("name", list(b.POLICIES))
def test_a_policy_keeps_so_many_ascending_positions_of_every_head(name: str, seen: b.Seen) -> None:
    for count in (1, 5, 33, 60):
        kept = b.POLICIES[name].choose(seen, count)
        assert kept.shape == (2, count)
        assert all(sorted(set(row)) == row and row[-1] < 60 for row in kept.tolist())


def test_all_policies_hold_equal_bytes(tiny: LLM) -> None:
    """A comparison at equal budgets would favour whoever rounds up."""
    figures: command.Figures = command.no_figures()
    for task in next(command.texts(tiny, ids_of(300), 100, 8, random.Random(0))):
        command.compare(LLMWith(tiny, SETTINGS), task, list(command.NAMES), [0.8, 0.6, 0.45], figures)
    for budget in (0.8, 0.6, 0.45):
        held = {name: figures[name, budget]["kv_bytes"] for name in command.NAMES if name != "full"}
        assert len({tuple(bytes_) for bytes_ in held.values()}) == 1
        assert held["pyramid"][0] <= budget * figures["full", 1.0]["kv_bytes"][0]


def LLMWith(llm: LLM, pyramid: PyramidConfig) -> LLM:
    """The same weights under other settings."""
    other = object.__new__(LLM)
    vars(other).update(vars(llm), policy=Policy(pyramid))
    return other


def test_the_full_policy_scores_as_the_engine_does(tiny: LLM) -> None:
    prompt, continuation = ids_of(50), ids_of(12, seed=1)
    held = b.hold(tiny, b.observe(tiny, prompt), b.POLICIES["full"], 50 * 3, 12)
    ours = command.follow(tiny, held, continuation)
    scores = ours.gather(1, torch.tensor(continuation)[:, None])[:, 0]
    torch.testing.assert_close(scores, torch.tensor(tiny.score(prompt, continuation)), **CLOSE)


def test_the_pyramid_scores_as_the_engine_does(tiny: LLM) -> None:
    pruned = LLMWith(tiny, SETTINGS)
    prompt, continuation = ids_of(80), ids_of(12, seed=1)
    held = b.hold_pyramid(pruned, prompt, SETTINGS, 12)
    ours = command.follow(pruned, held, continuation).gather(1, torch.tensor(continuation)[:, None])[:, 0]
    torch.testing.assert_close(ours, torch.tensor(pruned.score(prompt, continuation)), **CLOSE)
    full = torch.tensor(tiny.score(prompt, continuation))
    assert not torch.allclose(ours, full, atol=1e-3)


def test_asking_leaves_the_cache_as_it_was(tiny: LLM) -> None:
    """The second question would otherwise read the first."""
    held = b.hold_pyramid(tiny, ids_of(80), SETTINGS, 12)
    first = command.follow(tiny, held, ids_of(12, seed=1))
    command.follow(tiny, held, ids_of(12, seed=2))
    assert torch.equal(command.follow(tiny, held, ids_of(12, seed=1)), first)


def test_generation_is_the_engines(tiny: LLM) -> None:
    pruned = LLMWith(tiny, SETTINGS)
    held = b.hold_pyramid(pruned, ids_of(80), SETTINGS, 0, new_tokens=40)
    (completion,) = pruned.generate([ids_of(80)], SamplingParams(max_new_tokens=40))
    assert command.generate(pruned, held, 40) == completion.token_ids
    # The engine also takes in the last token.
    assert held.kv_bytes <= completion.kv_bytes


def test_a_policy_drops_what_it_does_not_choose(tiny: LLM) -> None:
    """Keys and values of the chosen positions, by head, and no others; the model without a cache is the oracle."""
    observed = b.observe(tiny, ids_of(30))

    def uneven(seen: b.Seen, count: int) -> Tensor:
        return torch.stack([torch.arange(30)[-count:], torch.arange(30)[:count]])

    held = b.hold(tiny, observed, b.Policy(uneven), 3 * 10, 0)
    for layer, seen in enumerate(observed.layers):
        assert torch.equal(held.cache.keys[layer][0, 0], seen.keys[0, 20:])
        assert torch.equal(held.cache.values[layer][0, 1], seen.values[1, :10])


def test_differences_from_the_full_cache_are_none_for_itself(tiny: LLM) -> None:
    figures = command.no_figures()
    rng = random.Random(0)
    windows = command.texts(tiny, ids_of(300), 60, 8, rng)
    written = command.openings(tiny, ids_of(300), 60, 12, rng)
    for task in [*next(windows), *next(windows), *next(written), *next(written)]:
        command.compare(LLMWith(tiny, SETTINGS), task, ["full", "random"], [0.5], figures)
    (full, _) = rows = command.rows_of(figures, 60, 0)
    assert full["kl"] == pytest.approx([0, 0, 0], abs=1e-6)
    assert full["agreement"] == [1, 1, 1]
    assert full["perplexity_ratio"] == [1, 1, 1]
    assert full["length_drift"] == [0, 0, 0]
    assert rows[1]["kl"][0] > 0.001


def test_an_interval_holds_its_mean_and_repeats() -> None:
    values = [random.Random(i).gauss(3, 1) for i in range(50)]
    mean, low, high = command.interval(values, seed=1)
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(50), rel=0.4)
    assert command.interval(values, seed=1) == [mean, low, high]
    assert command.interval([2.0] * 5, seed=1, of=math.exp) == pytest.approx([math.exp(2)] * 3)


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    status = command.main([*args, "--quiet"])
    out, err = capsys.readouterr()
    return status, out, err


QUICK = [
    "--samples",
    "2",
    "--context",
    "128",
    "--continuation",
    "16",
    "--budgets",
    "0.5",
    "--recall",
    "--generate",
    "4",
]


def test_the_command_reports_every_policy(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, *QUICK, "--json")
    rows = json.loads(out)["rows"]
    assert status == 0
    assert [row["policy"] for row in rows] == list(command.NAMES)
    for row in rows:
        assert {"kv_bytes", "kv_share", *command.COLUMNS} <= {*row}
        assert any(key.startswith("after_part_") for key in row)
        assert all(low <= mean <= high for mean, low, high in [row["perplexity"], row["kl"], row["inside"]])
    full = rows[0]
    assert full["inside"][0] > 0.5
    status, out, _ = run(capsys, *QUICK)
    assert (status, len(out.splitlines())) == (0, 1 + len(command.NAMES))


def test_recall_falls_without_the_facts(capsys: pytest.CaptureFixture[str]) -> None:
    """A recall that does not need the story would measure nothing."""
    wanted = ["--policies", "full,streaming", "--budgets", "0.1", "--samples", "4", "--context", "256", "--recall"]
    _, out, _ = run(capsys, *wanted, "--continuation", "4", "--json", "--pyramid", "llama2-7b")
    full, streaming = json.loads(out)["rows"]
    assert streaming["after"][0] < full["after"][0] - 0.3


def test_the_published_defect_loses_what_was_said() -> None:
    """Dropping 16 tokens of a pruned layer at every step empties the prompt, whoever votes for what."""
    llm = LLM(WEIGHTS, pyramid="llama2-7b")
    assert llm.policy.pyramid is not None
    hits = [recall_behind(llm, llm.policy.pyramid, 1000, 64, 3, defect=defect) for defect in (False, True)]
    assert sum(hits[1]) < sum(hits[0])


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--policies", "full,best"], "'best'"),
        (["--budgets", "0"], "kv_budget"),
        (["--budgets", "1.5"], "kv_budget"),
        (["--context", "3"], "--context"),
        (["--context", "50", "--recall"], "--context"),
        (["--context", "2040"], "context of 2048"),
        (["--continuation", "0"], "--continuation"),
        (["--generate", "-1"], "--generate"),
        (["--samples", "1"], "--samples"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--pyramid", "off"], "pyramid is off"),
        (["--plot", "nowhere/at.png"], "--plot"),
    ],
)
def test_nonsense_is_one_line(args: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *args)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert told in err


def test_a_text_that_is_too_short_or_not_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for data, told in ((b"short", "expected 640"), (b"\xff\xfe\x00", "UTF-8")):
        (tmp_path / "a.txt").write_bytes(data)
        status, _, err = run(capsys, "--text", str(tmp_path / "a.txt"))
        assert status == 2
        assert told in err


def test_a_plot_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "quality.png"
    status, _, _ = run(capsys, *QUICK, "--policies", "full,pyramid,random", "--plot", str(file))
    assert status == 0
    assert file.read_bytes().startswith(b"\x89PNG")
