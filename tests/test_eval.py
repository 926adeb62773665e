"""What pruning costs: policies against slow versions of themselves, equal bytes, and what the figures mean."""

from __future__ import annotations

import itertools
import json
import lzma
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import WEIGHTS
from hypothesis import given, settings
from hypothesis import strategies as st
from published_defect import Size
from published_defect import losses as losses_behind
from published_defect import recall as recall_behind
from torch import Tensor

from minipyramid import LLM, PyramidConfig, SamplingParams
from minipyramid import baselines as b
from minipyramid import eval as command
from minipyramid.plan import Policy
from minipyramid.stories import story

CLOSE = {"atol": 2e-4, "rtol": 2e-4}
SETTINGS = PyramidConfig(recent_ratio=0.1, min_context_length=8, prefill_decay_ratio=0.5)


needs_weights = pytest.mark.skipif(not WEIGHTS.exists(), reason="no embedded checkpoint in this tree")


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
    return b.observe(tiny, ids_of(60))[1]


def test_streaming_keeps_four_sinks_and_the_newest(seen: b.Seen) -> None:
    for row in b.streaming(seen, 20).tolist():
        assert row == [0, 1, 2, 3, *range(44, 60)]


def test_heavy_hitters_are_those_that_all_queries_looked_at_most(seen: b.Seen) -> None:
    for head, row in enumerate(b.h2o(seen, 21).tolist()):
        assert row == highest(looked_at(seen, head, range(60)), 21, set(range(50, 60)))


def test_heavy_hitters_of_a_prompt_longer_than_a_block(tiny: LLM) -> None:
    """Queries are taken 256 at a time; the votes are those of the whole matrix."""
    long = b.Seen(torch.randn(300, 2, 8), torch.randn(1, 300, 8), torch.randn(1, 300, 8))
    vote = long.probs(0).sum((1, 2))
    assert torch.equal(b.h2o(long, 30), b.best_of(vote, 30, last=15))


def test_snapkv_pools_the_votes_of_its_window(seen: b.Seen) -> None:
    """Over neighbours, but not from the window itself into what stands before it."""
    for head, row in enumerate(b.snapkv(seen, 40).tolist()):
        vote = looked_at(seen, head, range(28, 60))[:28]
        near = [vote[max(0, j - 2) : j + 3] for j in range(28)]
        assert row == highest([sum(v) / len(v) for v in near] + [0.0] * 32, 40, set(range(28, 60)))


def test_random_differs_by_layer_head_and_prompt_and_repeats(tiny: LLM) -> None:
    """A fixed draw would be a policy of its own, good or bad by luck."""
    first, other = (b.observe(tiny, ids_of(60), draw) for draw in (1, 2))
    chosen = [tuple(row) for layer in (*first, *other) for row in b.random(layer, 20).tolist()]
    assert len(set(chosen)) == len(chosen)
    assert torch.equal(b.random(first[0], 20), b.random(b.observe(tiny, ids_of(60), 1)[0], 20))
    assert all(row[:4] == (0, 1, 2, 3) for row in chosen)


@given(tokens=st.integers(20, 2000), layers=st.integers(1, 80), share=st.floats(0.1, 1.0))
@settings(max_examples=200, deadline=None)
def test_room_is_split_to_the_token_and_falls_with_depth(tokens: int, layers: int, share: float) -> None:
    total = max(layers, int(share * tokens * layers))
    for split in (b.evenly, b.falling):
        counts = split(total, layers, tokens)
        assert sum(counts) == total
        assert all(0 <= count <= tokens for count in counts)
    falling = b.falling(total, layers, tokens)
    window = min(b.WINDOW, total // (2 * layers))
    mean = total / layers - window
    if layers > 1 and mean * (2 - 1 / b.STEEPNESS) <= tokens - window:  # not more than there is
        assert falling[-1] == pytest.approx(window + mean / b.STEEPNESS, abs=mean / 10 / layers + mean / layers * 2 + 2)
        assert falling[0] - falling[-1] == pytest.approx(1.9 * mean, abs=2 * mean / layers * 2 + 2)
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(falling))


@pytest.mark.parametrize("name", list(b.BASELINES))
def test_a_policy_keeps_so_many_ascending_positions_of_every_head(name: str, seen: b.Seen) -> None:
    for count in (1, 5, 33, 60):
        kept = b.BASELINES[name].choose(seen, count)
        assert kept.shape == (2, count)
        assert all(sorted(set(row)) == row and row[-1] < 60 for row in kept.tolist())


def test_all_policies_hold_equal_bytes(tiny: LLM) -> None:
    """Of every kind of context, before anything follows; whoever rounds up would be favoured."""
    rng = random.Random(0)
    kinds = [command.texts(tiny, ids_of(300), 100, 8, rng), command.openings(tiny, ids_of(300), 90, 8, rng)]
    kinds.append(command.planted(tiny, 200, rng))
    others = [name for name in command.NAMES if name != "full"]
    for task, *_ in map(next, kinds):
        seen = b.observe(tiny, task.context)
        compared = command.Comparison(others, [0.8, 0.6, 0.45], {"pyramid": Policy(SETTINGS)})
        caches = command.caches(tiny, task, seen, compared)
        held = {(name, share): b.kv_bytes(cache) for name, share, cache in caches if cache}
        full = 3 * len(task.context) * tiny.config.kv_bytes_per_token(4)
        for budget in (0.8, 0.6, 0.45):
            assert len({held[name, budget] for name in others}) == 1
            assert 0.9 * budget * full <= held["random", budget] <= budget * full


def LLMWith(llm: LLM, pyramid: PyramidConfig) -> LLM:
    """The same weights under other settings."""
    other = object.__new__(LLM)
    vars(other).update(vars(llm), policy=Policy(pyramid))
    return other


def full_cache(llm: LLM, ids: list[int], room: int) -> command.KVCache:
    return b.hold(llm, b.observe(llm, ids), b.BASELINES["full"], [len(ids)] * llm.config.num_hidden_layers, room)


def test_the_full_policy_scores_as_the_engine_does(tiny: LLM) -> None:
    *prompt, last = ids_of(50)
    continuation = ids_of(12, seed=1)
    ours = command.follow(tiny, full_cache(tiny, prompt, 12), [last, *continuation[:-1]])
    scores = ours.gather(1, torch.tensor(continuation)[:, None])[:, 0]
    torch.testing.assert_close(scores, torch.tensor(tiny.score([*prompt, last], continuation)), **CLOSE)


def test_the_pyramid_scores_as_the_engine_does(tiny: LLM) -> None:
    pruned = LLMWith(tiny, SETTINGS)
    prompt, (first, *continuation) = ids_of(80), ids_of(12, seed=1)
    cache = b.hold_pyramid(pruned, prompt, SETTINGS, 12)
    ours = command.follow(pruned, cache, [first, *continuation[:-1]]).gather(1, torch.tensor(continuation)[:, None])
    torch.testing.assert_close(ours[:, 0], torch.tensor(pruned.score(prompt, [first, *continuation])[1:]), **CLOSE)
    full = torch.tensor(tiny.score(prompt, [first, *continuation])[1:])
    assert not torch.allclose(ours[:, 0], full, atol=1e-3)


def test_asking_leaves_the_cache_as_it_was(tiny: LLM) -> None:
    """The second question would otherwise read the first."""
    cache = b.hold_pyramid(tiny, ids_of(80), SETTINGS, 12)
    first = command.follow(tiny, cache, ids_of(12, seed=1))
    command.follow(tiny, cache, ids_of(12, seed=2))
    assert torch.equal(command.follow(tiny, cache, ids_of(12, seed=1)), first)


def test_generation_is_the_engines(tiny: LLM) -> None:
    *prompt, last = ids_of(80)
    (completion,) = tiny.generate([[*prompt, last]], SamplingParams(max_new_tokens=40))
    assert command.write(tiny, full_cache(tiny, prompt, 41), last, 40) == completion.token_ids


def test_generated_tokens_are_judged_under_the_pyramid(tiny: LLM) -> None:
    """As many as planned stay; what the engine does with a prompt is done with a text that is written on."""
    cache = b.hold_pyramid(tiny, ids_of(80), SETTINGS, 1, new_tokens=60)
    command.write(tiny, cache, 5, 60)
    assert cache.rows[0].lengths == SETTINGS.kv_lengths(80, 60, 3)
    assert max(cache.rows[0].lengths) < 140


def test_a_policy_drops_what_it_does_not_choose(tiny: LLM) -> None:
    """Keys and values of the chosen positions, by head, and no others."""
    observed = b.observe(tiny, ids_of(30))

    def uneven(seen: b.Seen, count: int) -> Tensor:
        return torch.stack([torch.arange(30)[-count:], torch.arange(30)[:count]])

    cache = b.hold(tiny, observed, b.Baseline(uneven), [10] * 3, 0)
    for layer, seen in enumerate(observed):
        assert torch.equal(cache.keys[layer][0, 0], seen.keys[0, 20:])
        assert torch.equal(cache.values[layer][0, 1], seen.values[1, :10])


def test_divergence_loss_and_agreement_of_distributions_made_by_hand(
    tiny: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KL is that of the full cache's distribution from the pruned one's, and not the other way round."""
    pruned, full = full_cache(tiny, ids_of(20), 3), full_cache(tiny, ids_of(20), 3)
    p, q = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]), torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.7, 0.1]])
    monkeypatch.setattr(command, "follow", lambda _, cache, ids: (q if cache is pruned else p).log())
    figures = command.read_on(tiny, [7, 0, 1])(pruned, full)
    assert figures["kl"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()))
    assert figures["loss"] == pytest.approx(-(math.log(0.25) + math.log(0.7)) / 2)
    assert figures["agreement"] == 0.5


def test_a_text_that_differs_and_one_that_ends_earlier(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = [full_cache(tiny, ids_of(20), 3) for _ in range(3)]
    said = {id(caches[0]): [5, 6, 7, 8], id(caches[1]): [5, 6, 9, 9], id(caches[2]): [5, 6]}
    monkeypatch.setattr(command, "write", lambda _, cache, last, new: said[id(cache)])
    ask = command.write_on(tiny, 3, 4)
    figures = [ask(cache, caches[0]) for cache in caches]
    assert [f["first_difference"] for f in figures] == [4, 2, 2]
    assert [f["identical"] for f in figures] == [1, 0, 0]
    assert [f["length_drift"] for f in figures] == [0, 0, -2]


@needs_weights
@pytest.mark.parametrize("context", [128, 512, 1024])
def test_a_story_with_its_question_fills_the_context(context: int) -> None:
    """A recall at 1,024 tokens that is measured at 700 would flatter every policy."""
    llm = LLM(WEIGHTS)
    stories = command.planted(llm, context, random.Random(0))
    for after, *inside in itertools.islice(stories, 5):
        for task in (after, *inside):
            assert context - 60 <= len(task.context) <= context
            assert len(task.context) + task.room <= context


def test_a_part_is_where_the_fact_stands() -> None:
    tale = story(random.Random(0), 2000, lambda text: len(text.split()), asked_within=False)
    for question, answer in tale.asked:
        sentence = question.split("Answer: ")[1] + answer.removesuffix(".")
        where = tale.text.index(sentence) / len(tale.text)
        assert command.part_of(tale, question, answer) == min(2, int(4 * where))
    assert len({command.part_of(tale, *asked) for asked in tale.asked}) == 3


def test_differences_from_the_full_cache_are_none_for_itself(tiny: LLM) -> None:
    samples = command.no_samples()
    rng = random.Random(0)
    windows = command.texts(tiny, ids_of(300), 60, 8, rng)
    written = command.openings(tiny, ids_of(300), 60, 12, rng)
    for tasks in (next(windows), next(windows), next(written), next(written)):
        command.compare(tiny, tasks, command.Comparison(["full", "random"], [0.5], {}), samples)
    (full, _) = rows = command.rows_of(samples, 60, 0)
    assert full["kl"] == pytest.approx([0, 0, 0], abs=1e-6)
    assert full["agreement"] == full["perplexity_ratio"] == full["identical"] == [1, 1, 1]
    assert full["length_drift"] == [0, 0, 0]
    assert full["first_difference"] == [12, 12, 12]
    assert rows[1]["kl"][0] > 0.001


def test_questions_of_one_story_are_one_sample(tiny: LLM) -> None:
    """They share a story and a cache; counted apart they would narrow the interval."""
    samples = command.no_samples()
    stories = command.planted(tiny, 200, random.Random(0))
    for _ in range(3):
        command.compare(tiny, next(stories), command.Comparison(["full"], [], {}), samples)
    figures = samples["full", 1.0]
    assert (len(figures["after"]), len(figures["inside"])) == (3, 3)


@needs_weights
def test_settings_are_compared_under_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, sinks in (("some", 4), ("none", 0)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"streamingllm_sink_len": sinks}))
    files = ",".join(str(tmp_path / f"{name}.json") for name in ("some", "none"))
    short = ["--samples", "2", "--context", "128", "--continuation", "8", "--budgets", "0.5", "--json"]
    _, out, _ = run(capsys, *short, "--policies", "full,pyramid,random", "--pyramid", files)
    assert [row["policy"] for row in json.loads(out)["rows"]] == ["full", "some", "none", "random"]


@needs_weights
def test_a_plot_survives_a_name_that_is_no_formula_and_a_reader_who_leaves_early(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "x$\\bad$\u00e9.json").write_text("{}")
    argv = [sys.executable, "-m", "minipyramid.eval", "--samples", "2", "--context", "64", "--continuation", "4"]
    argv += ["--budgets", "0.5", "--policies", "pyramid", "--pyramid", str(tmp_path / "x$\\bad$\u00e9.json") + ",auto"]
    read, write = os.pipe()
    os.close(read)
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for stdout in (write, subprocess.DEVNULL):
        file = tmp_path / f"{stdout}.png"
        done = subprocess.run(
            [*argv, "--quiet", "--plot", str(file)],
            stdout=stdout,
            stderr=subprocess.PIPE,
            env=env,
            cwd=Path(__file__).parent.parent,
            check=False,
            timeout=120,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert file.read_bytes().startswith(b"\x89PNG")
    os.close(write)


def test_a_loss_beyond_what_a_float_holds_is_no_crash() -> None:
    assert command.interval([5000.0, 4000.0], 0, command.perplexity)[0] == math.exp(700)


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


QUICK = "--samples 2 --context 128 --continuation 16 --budgets 0.5 --recall --generate 4".split()


@needs_weights
def test_the_command_reports_every_policy(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, *QUICK, "--json")
    rows = json.loads(out)["rows"]
    assert status == 0
    assert [row["policy"] for row in rows] == list(command.NAMES)
    for row in rows:
        assert {"kv_bytes", "kv_share", "samples", *command.COLUMNS} <= {*row}
        assert any(key in row for key in command.BY_PART)
        assert all(low <= mean <= high for mean, low, high in [row["perplexity"], row["kl"], row["inside"]])
    assert rows[0]["inside"][0] > 0.5
    status, out, _ = run(capsys, *QUICK)
    assert (status, len(out.splitlines())) == (0, 2 * (1 + len(command.NAMES)) + 2)


@needs_weights
def test_half_of_the_bytes_keep_what_readme_says(capsys: pytest.CaptureFixture[str]) -> None:
    """By the settings beside the checkpoint; without them the published ones lose half of the answers."""
    wanted = "--context 1024 --budgets 0.5 --samples 3 --recall --policies full,pyramid,streaming --json".split()
    full, pyramid, streaming = json.loads(run(capsys, *wanted)[1])["rows"]
    assert full["inside"][0] > 0.9
    for asked in ("inside", "after"):
        assert pyramid[asked][0] >= 0.98 * full[asked][0]
        assert pyramid[asked][0] > streaming[asked][0] + 0.3
    assert pyramid["perplexity_ratio"][0] <= 1.02


def test_split_policies_hold_in_each_layer_what_the_pyramid_does(tiny: LLM) -> None:
    task = next(command.texts(tiny, ids_of(300), 100, 8, random.Random(0)))[0]
    compared = command.Comparison(["pyramid", "random-split"], [0.6], {"pyramid": Policy(SETTINGS)})
    made = command.caches(tiny, task, b.observe(tiny, task.context), compared)
    pyramid, split = (cache.rows[0].lengths for _, _, cache in made if cache)
    assert pyramid == split
    assert pyramid[0] > pyramid[-1]


@needs_weights
def test_windows_are_the_same_whatever_else_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    short = "--samples 2 --context 128 --continuation 8 --policies full --json".split()
    alone, beside = (json.loads(run(capsys, *short, *more)[1])["rows"][0] for more in ([], ["--recall"]))
    assert alone["perplexity"] == beside["perplexity"]


@needs_weights
def test_recall_falls_without_the_facts(capsys: pytest.CaptureFixture[str]) -> None:
    """Asked inside as well: a first answer token from the whole prompt's own pass would hide what was dropped."""
    wanted = [
        "--policies",
        "full,streaming,random",
        "--budgets",
        "0.1",
        "--samples",
        "4",
        "--context",
        "256",
        "--recall",
    ]
    _, out, _ = run(capsys, *wanted, "--continuation", "4", "--json")
    full, *others = json.loads(out)["rows"]
    for row in others:
        assert row["after"][0] < full["after"][0] - 0.3
        assert row["inside"][0] < full["inside"][0] - 0.3


@needs_weights
def test_the_published_defect_loses_what_was_said() -> None:
    """Dropping 16 tokens of a pruned layer at every step empties the prompt, whoever votes for what."""
    llm, size = LLM(WEIGHTS, pyramid="off"), Size(context=600, generated=64, samples=3)
    pruned = PyramidConfig(prefill_decay_strategy="constant", prefill_decay_ratio=0.95)
    kept, lost = (recall_behind(llm, pruned, size, defect=defect) for defect in (False, True))
    assert sum(lost) < sum(kept) - 0.5
    whole, cut = (losses_behind(llm, pruned, size, defect=defect) for defect in (False, True))
    assert sum(cut) > sum(whole)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--policies", "full,best"], "'best'"),
        (["--budgets", "0"], "kv_budget"),
        (["--budgets", "1.5"], "kv_budget"),
        (["--context", "3"], "--context"),
        (["--context", "100", "--recall"], "--context"),
        (["--context", "2040"], "context of 2048"),
        (["--continuation", "0"], "--continuation"),
        (["--generate", "-1"], "--generate"),
        (["--samples", "1"], "--samples"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--pyramid", "off"], "pyramid is off"),
        (["--policies", "full", "--pyramid", "nowhere.json"], "--policies has no pyramid"),
        (["--policies", "full,random-split"], "add pyramid"),
        (["--plot", "nowhere/at.png"], "--plot"),
        (["--plot", "/proc/at.png"], "--plot"),
        (["--plot", "at.txt"], ".png"),
        (["--plot", ""], ".png"),
        (["--policies", "full,streaming", "--budgets", "0.001"], "less than a token"),
        (["--pyramid", "auto,elsewhere/auto"], "'auto'"),
        (["--pyramid", "full,auto"], "'full'"),
    ],
)
def test_nonsense_is_one_line(args: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *args)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert told in err


def test_a_text_that_is_too_short_or_not_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, data, told in (("a.txt", b"short", "expected 640"), ("b", b"\xff\xfe", "UTF-8"), ("c.xz", b"d", "UTF-8")):
        (tmp_path / name).write_bytes(data)
        status, _, err = run(capsys, "--text", str(tmp_path / name))
        assert status == 2
        assert told in err


@needs_weights
def test_a_packed_text_is_read_like_a_plain_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = command.DEFAULT_TEXT.read_bytes()[:20000]
    (tmp_path / "a.txt").write_bytes(text)
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(text))
    short = "--samples 2 --context 64 --continuation 8 --policies full --json".split()
    plain, packed = (json.loads(run(capsys, *short, "--text", str(tmp_path / f))[1]) for f in ("a.txt", "a.txt.xz"))
    assert plain["rows"] == packed["rows"]
    assert packed["settings"]["dtype"] in ("float32", "bfloat16")  # what ran, and not "auto"


def test_a_plot_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "quality.png"
    status, _, _ = run(capsys, *QUICK, "--policies", "full,pyramid,random", "--plot", str(file))
    assert status == 0
    assert file.read_bytes().startswith(b"\x89PNG")
