"""What pruning costs: equal bytes, what is asked of a cache, and what the figures mean."""

from __future__ import annotations

import itertools
import json
import lzma
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PROFILE, WEIGHTS

from minipyramid import LLM, Policy, PyramidConfig, RequestError, SamplingParams
from minipyramid.cli.terminal import DEFAULT_TEXT
from minipyramid.cli.texts import read_text
from minipyramid.eval import __main__ as command
from minipyramid.eval.books import sentences
from minipyramid.eval.compare import Comparison, compare, no_samples, pick_policies
from minipyramid.eval.context import HeldContext
from minipyramid.eval.published_defect import Size
from minipyramid.eval.published_defect import losses as losses_behind
from minipyramid.eval.published_defect import recall as recall_behind
from minipyramid.eval.report import BY_PART, COLUMNS, interval, perplexity, rows_of
from minipyramid.eval.stories import story
from minipyramid.eval.tasks import RecallAfter, RecallInside, Text, Writing, openings, part_of, planted, texts
from minipyramid.model import Layer
from minipyramid.policies.levels import Level
from minipyramid.policies.profile import Profile
from minipyramid.policy import FULL

CLOSE: dict[str, Any] = {"atol": 2e-4, "rtol": 2e-4}
SETTINGS = PyramidConfig(recent_ratio=0.1, min_context_length=8, prefill_decay_ratio=0.5)


needs_weights = pytest.mark.skipif(not WEIGHTS.exists(), reason="no embedded checkpoint in this tree")


def ids_of(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 320) for _ in range(n)]


def policies_of(names: list[str], pyramid: PyramidConfig = SETTINGS) -> dict[str, Policy]:
    """By name in their order, `pyramid` with these settings, and `PROFILE` without a checkpoint."""
    given: dict[str, Policy] = {"pyramid": pyramid, "profile": PROFILE}
    others = pick_policies([name for name in names if name not in given], Path("nowhere"), 3)
    return {name: (given | others)[name] for name in names}


def test_all_policies_hold_equal_bytes(tiny: LLM) -> None:
    """Of every kind of context, before anything follows; whoever rounds up would be favoured."""
    rng = random.Random(0)
    kinds: list[Iterator[list[Any]]] = [texts(tiny, ids_of(300), 100, 8, rng)]
    kinds += [openings(tiny, ids_of(300), 90, 8, rng), planted(tiny, 200, rng)]
    others = [name for name in command.NAMES if name != "full"]
    compared = Comparison(policies_of(others), [0.8, 0.6, 0.45])
    for task, *_ in map(next, kinds):
        held = {
            (name, budget): HeldContext(tiny, policy, task.context).kv_bytes
            for name, budget, policy in compared.at(len(task.context), 3)
        }
        assert [name for name, budget in held if budget == 0.6] == others
        full = 3 * len(task.context) * tiny.config.kv_bytes_per_token(4)
        for budget in (0.8, 0.6, 0.45):
            assert len({held[name, budget] for name in others}) == 1
            assert 0.9 * budget * full <= held["random", budget] <= budget * full


def test_without_a_pyramid_the_budget_is_held_to_the_token(tiny: LLM) -> None:
    compared = Comparison(policies_of(["full", "streaming", "pyramidkv"]), [0.5, 0.33])
    held = {(name, budget): sum(policy.held(77, 3)) for name, budget, policy in compared.at(77, 3)}
    assert held == {
        ("full", 1.0): 231,
        ("streaming", 0.5): 115,
        ("pyramidkv", 0.5): 115,
        ("streaming", 0.33): 76,
        ("pyramidkv", 0.33): 76,
    }


def test_of_several_pyramids_the_first_says_how_much_the_others_hold() -> None:
    gentle = PyramidConfig(recent_ratio=0.5, streamingllm_sink_len=20)
    policies = {"random-split": policies_of(["pyramid", "random-split"])["random-split"]}
    policies |= {"steep": SETTINGS, "gentle": gentle, "random": policies_of(["random"])["random"]}
    rows = {name: policy.held(100, 3) for name, _, policy in Comparison(policies, [0.6]).at(100, 3)}
    assert list(rows) == list(policies)
    assert rows["random-split"] == rows["steep"] != rows["gentle"]
    assert sum(rows["random"]) == sum(rows["steep"])


def test_split_policies_hold_in_each_layer_what_the_pyramid_does(tiny: LLM) -> None:
    task = next(texts(tiny, ids_of(300), 100, 8, random.Random(0)))[0]
    compared = Comparison(policies_of(["pyramid", "random-split"]), [0.6])
    held = []
    for _, _, policy in compared.at(len(task.context), 3):
        context = HeldContext(tiny, policy, task.context)
        assert context.conversation.held
        held.append(context.conversation.held.lengths)
    pyramid, split = held
    assert pyramid == split
    assert pyramid[0] > pyramid[-1]


def test_the_full_policy_scores_as_the_engine_does(tiny: LLM) -> None:
    *prompt, last = ids_of(50)
    continuation = ids_of(12, seed=1)
    ours = HeldContext(tiny, FULL, prompt).follow([last], continuation[:-1])
    scores = ours.gather(1, torch.tensor(continuation)[:, None])[:, 0]
    torch.testing.assert_close(scores, torch.tensor(tiny.score([*prompt, last], continuation)), **CLOSE)


def test_the_pyramid_scores_as_the_engine_does(tiny: LLM) -> None:
    pruned = tiny.under(SETTINGS)
    prompt, (first, *continuation) = ids_of(80), ids_of(12, seed=1)
    ours = HeldContext(tiny, SETTINGS, prompt).follow([first], continuation[:-1])
    scores = ours.gather(1, torch.tensor(continuation)[:, None])[:, 0]
    torch.testing.assert_close(
        scores, torch.tensor(pruned.score(prompt, [first, *continuation])[1:]), **CLOSE
    )
    full = torch.tensor(tiny.score(prompt, [first, *continuation])[1:])
    assert not torch.allclose(scores, full, atol=1e-3)


def test_asking_leaves_the_cache_as_it_was(tiny: LLM) -> None:
    """The second question would otherwise read the first."""
    context = HeldContext(tiny, SETTINGS, ids_of(80))
    first = context.follow(ids_of(4, seed=1), ids_of(8, seed=3))
    context.follow(ids_of(12, seed=2), [])
    assert torch.equal(context.follow(ids_of(4, seed=1), ids_of(8, seed=3)), first)


def test_nothing_of_a_question_is_dropped(tiny: LLM) -> None:
    """A question of 60 tokens would be pruned as a prompt."""
    context, question = HeldContext(tiny, SETTINGS, ids_of(80)), ids_of(60, seed=1)
    whole = context.follow(question[:1], question[1:])[-1:]
    torch.testing.assert_close(context.follow(question, []), whole, **CLOSE)


def test_generation_is_the_engines(tiny: LLM) -> None:
    prompt, params = ids_of(80), SamplingParams(max_new_tokens=40)
    for policy in (FULL, SETTINGS):
        (completion,) = tiny.under(policy).generate([prompt], params)
        assert HeldContext(tiny, policy, prompt).write(40) == completion.token_ids


def test_what_is_computed_and_held_is_told_as_a_share_of_the_full_cache(tiny: LLM) -> None:
    samples = no_samples()
    window = next(texts(tiny, ids_of(300), 101, 8, random.Random(0)))
    compare(tiny, window, Comparison(policies_of(["full", "pyramid", "snapkv"]), [0.6]), samples)
    full, pyramid, snapkv = rows_of(samples, 101, 0)
    assert (full["kv_share"], full["computed"]) == (1, 1)
    held = sum(SETTINGS.within(0.6, 100, 0, 3).held(100, 3))
    assert pyramid["kv_share"] == pyramid["computed"] == snapkv["kv_share"] == held / 300
    assert snapkv["computed"] == 1
    assert pyramid["kv_bytes"] == held * tiny.config.kv_bytes_per_token(4)


def test_what_a_policy_computes_beforehand_is_counted(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the tokens that really pass a layer; the prompt is said again in two of three layers."""
    level = Level((1.0, 0.5, 0.2), (0.5, 0.5, 0.1), ("newest", "repeat", "newest"), (0.5,) * 3)
    passed, qkv = [], Layer.qkv

    def counted(layer: Layer, x: torch.Tensor, *rotation: torch.Tensor) -> tuple[torch.Tensor, ...]:
        passed.append(len(x))
        return qkv(layer, x, *rotation)

    monkeypatch.setattr(Layer, "qkv", counted)
    context = HeldContext(tiny, Profile((level,), share=level.share, fewest=0), ids_of(100))
    assert context.kv_bytes > 0
    # Past the last layer whose score is wanted one token goes on.
    assert context.computed + 1 == sum(passed) == 2 * 200 + 1 + 100 + 50 + 20


def test_divergence_loss_and_agreement_of_distributions_made_by_hand() -> None:
    """KL is that of the full cache's distribution from the pruned one's, and not the other way round."""
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    q = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.7, 0.1]])
    figures = Text(ids_of(20), [7, 0, 1]).figures(q.log(), p.log())
    assert figures["kl"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()))
    assert figures["loss"] == pytest.approx(-(math.log(0.25) + math.log(0.7)) / 2)
    assert figures["loss_above_full"] == pytest.approx((math.log(2) + math.log(0.8 / 0.7)) / 2)
    assert figures["agreement"] == 0.5


def test_a_text_that_differs_and_one_that_ends_earlier() -> None:
    full = [5, 6, 7, 8]
    figures = [Writing(ids_of(20), 4).figures(text, full) for text in (full, [5, 6, 9, 9], [5, 6])]
    assert [f["first_difference"] for f in figures] == [4, 2, 2]
    assert [f["identical"] for f in figures] == [1, 0, 0]
    assert [f["length_drift"] for f in figures] == [0, 0, -2]


@needs_weights
@pytest.mark.parametrize(("context", "book"), [(128, False), (512, False), (1024, False), (1024, True)])
def test_a_story_with_its_question_fills_the_context(context: int, book: bool) -> None:
    """A recall at 1,024 tokens that is measured at 700 would flatter every policy."""
    llm = LLM(WEIGHTS)
    among = sentences(DEFAULT_TEXT.read_text(encoding="utf-8")) if book else None
    # A book's next sentence may have been too long for what was left.
    left = 60 + (max(len(llm.tokenizer.encode(s)) for s in among) if llm.tokenizer and among else 0)
    for after, *inside in itertools.islice(planted(llm, context, random.Random(0), among), 5):
        assert isinstance(after, RecallAfter)
        for task in (after, *inside):
            assert context - left <= len(task.context) <= context
        for question, task in zip(after.questions, inside, strict=True):
            assert isinstance(task, RecallInside)
            assert len(after.context) + len(question.question) + len(question.answer) <= context
            assert task.context == after.context + question.question[:-1]


def test_a_part_is_where_the_fact_stands() -> None:
    tale = story(random.Random(0), 2000, lambda text: len(text.split()), asked_within=False)
    for question, answer in tale.asked:
        sentence = question.split("Answer: ")[1] + answer.removesuffix(".")
        where = tale.text.index(sentence) / len(tale.text)
        assert part_of(tale, question, answer) == min(2, int(4 * where))
    assert len({part_of(tale, *asked) for asked in tale.asked}) == 3


def test_differences_from_the_full_cache_are_none_for_itself(tiny: LLM) -> None:
    samples = no_samples()
    rng = random.Random(0)
    windows = texts(tiny, ids_of(300), 60, 8, rng)
    written = openings(tiny, ids_of(300), 60, 12, rng)
    compared = Comparison(policies_of(["full", "random"]), [0.5])
    for tasks in (next(windows), next(windows), next(written), next(written)):
        compare(tiny, tasks, compared, samples)
    (full, _) = rows = rows_of(samples, 60, 0)
    assert full["kl"] == pytest.approx([0, 0, 0], abs=1e-6)
    assert full["agreement"] == full["perplexity_ratio"] == full["identical"] == [1, 1, 1]
    assert full["length_drift"] == [0, 0, 0]
    assert full["first_difference"] == [12, 12, 12]
    assert rows[1]["kl"][0] > 0.001


def test_questions_of_one_story_are_one_sample(tiny: LLM) -> None:
    """They share a story and a cache; counted apart they would narrow the interval."""
    samples = no_samples()
    stories = planted(tiny, 200, random.Random(0))
    for _ in range(3):
        compare(tiny, next(stories), Comparison(policies_of(["full"]), []), samples)
    figures = samples["full", 1.0]
    assert (len(figures["after"]), len(figures["inside"])) == (3, 3)


@needs_weights
def test_settings_are_compared_under_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, sinks in (("some", 4), ("none", 0)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"streamingllm_sink_len": sinks}))
    (tmp_path / "half.json").write_text(json.dumps({"policy": "h2o", "share": 0.5}))
    files = ",".join(str(tmp_path / f"{name}.json") for name in ("some", "none", "half"))
    own = "minipyramid.policies.snapkv:SnapKV"
    short = ["--samples", "2", "--context", "128", "--continuation", "8", "--budgets", "0.5", "--json"]
    _, out, _ = run(capsys, *short, "--policies", f"full,{files},random,{own},llama2-7b")
    rows = json.loads(out)["rows"]
    assert [row["policy"] for row in rows] == ["full", "some", "none", "half", "random", own, "llama2-7b"]
    assert rows[1]["kv_bytes"] == rows[3]["kv_bytes"] == rows[4]["kv_bytes"] == rows[5]["kv_bytes"]


def test_a_plot_survives_a_name_that_is_no_formula_and_a_reader_who_leaves_early(
    tiny_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "x$\\bad$\u00e9.json").write_text("{}")
    short = "--samples 2 --context 64 --continuation 4".split()
    argv = [sys.executable, "-m", "minipyramid.eval", "--model", str(tiny_dir), *short]
    argv += ["--budgets", "0.5", "--policies", str(tmp_path / "x$\\bad$\u00e9.json") + ",auto"]
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
    assert interval([5000.0, 4000.0], 0, perplexity)[0] == math.exp(700)


def test_an_interval_holds_its_mean_and_repeats() -> None:
    values = [random.Random(i).gauss(3, 1) for i in range(50)]
    mean, low, high = interval(values, seed=1)
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(50), rel=0.4)
    assert interval(values, seed=1) == [mean, low, high]
    assert interval([2.0] * 5, seed=1, of=math.exp) == pytest.approx([math.exp(2)] * 3)


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    status = command.main([*args, "--quiet"])
    out, err = capsys.readouterr()
    return status, out, err


QUICK = (
    "--samples 2 --context 128 --continuation 16 --budgets 0.5 --recall stories,prose --generate 4".split()
)


@needs_weights
def test_the_command_reports_every_policy(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, *QUICK, "--json")
    rows = json.loads(out)["rows"]
    assert status == 0
    assert [row["policy"] for row in rows] == list(command.NAMES)
    for row in rows:
        assert {"kv_bytes", "kv_share", "computed", "samples", *COLUMNS} <= {*row}
        assert any(key in row for key in BY_PART)
        shown = ("perplexity", "kl", "inside", "prose_after")
        assert all(low <= mean <= high for mean, low, high in (row[key] for key in shown))
    assert rows[0]["inside"][0] > 0.5
    command.report({"rows": rows}, command.build_parser().parse_args(QUICK))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * (1 + len(command.NAMES)) + 2
    assert all(heading in lines[0] for heading, _ in COLUMNS.values())


@needs_weights
def test_half_of_the_bytes_keep_what_readme_says(capsys: pytest.CaptureFixture[str]) -> None:
    """By the profile beside the checkpoint; the published settings lose more than half of the answers."""
    wanted = (
        "--context 1024 --budgets 0.5 --samples 2 --recall --policies full,profile,streaming --json".split()
    )
    full, profile, streaming = json.loads(run(capsys, *wanted)[1])["rows"]
    assert full["inside"][0] > 0.9
    for asked in ("inside", "after"):
        assert profile[asked][0] >= 0.98 * full[asked][0]
        assert profile[asked][0] > streaming[asked][0] + 0.3
    assert profile["perplexity_ratio"][0] <= 1.02


@needs_weights
def test_windows_are_the_same_whatever_else_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    short = "--samples 2 --context 128 --continuation 8 --policies full --json".split()
    flags = ("", "--recall", "--recall stories", "--recall prose", "--recall prose,stories")
    rows = [json.loads(run(capsys, *short, *more.split())[1])["rows"][0] for more in flags]
    alone, stories, named, prose, both = rows
    assert all(row["perplexity"] == alone["perplexity"] for row in rows)
    assert "inside" not in prose
    assert "prose_inside" not in stories
    for key in BY_PART:
        assert stories.get(key) == named.get(key)
        assert (prose if key.startswith("prose") else stories).get(key) == both.get(key)


@needs_weights
def test_recall_falls_without_the_facts(capsys: pytest.CaptureFixture[str]) -> None:
    """Asked inside as well: an answer's first token from the prompt's own pass would hide what is lost."""
    wanted = "--policies full,streaming,random --budgets 0.1 --samples 2 --context 256 --recall".split()
    _, out, _ = run(capsys, *wanted, "--continuation", "4", "--json")
    full, *others = json.loads(out)["rows"]
    for row in others:
        assert row["after"][0] < full["after"][0] - 0.3
        assert row["inside"][0] < full["inside"][0] - 0.3


@needs_weights
def test_the_published_defect_loses_what_was_said() -> None:
    """Dropping 16 tokens of a pruned layer at every step empties the prompt, whoever votes for what."""
    llm, size = LLM(WEIGHTS, policy="full"), Size(context=500, generated=40, samples=2)
    pruned = PyramidConfig(prefill_decay_strategy="constant", prefill_decay_ratio=0.95)
    kept, lost = (recall_behind(llm, pruned, size, defect=defect) for defect in (False, True))
    assert sum(lost) < sum(kept) - 0.5
    whole, cut = (losses_behind(llm, pruned, size, defect=defect) for defect in (False, True))
    assert sum(cut) > sum(whole)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--policies", "full,best"], "'best'"),
        (["--budgets", "0"], "--budgets is 0.0"),
        (["--budgets", "1.5"], "--budgets is 1.5"),
        (["--context", "3"], "--context"),
        (["--context", "100", "--recall"], "--context"),
        (["--recall", "stories,poems"], "--recall has 'poems'"),
        (["--context", "2040"], "context of 2048"),
        (["--continuation", "0"], "--continuation"),
        (["--generate", "-1"], "--generate"),
        (["--samples", "1"], "--samples"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--policies", "full,snapk"], "did you mean"),
        (["--policies", "full,nowhere.json"], "nowhere.json"),
        (["--policies", "full,nowhere.module:Policy"], "nowhere.module"),
        (["--policies", "pyramid,full-split"], "does not choose"),
        (["--policies", "pyramid,best-split"], "'best'"),
        (["--policies", "pyramid", "--budgets", "0.5,0.01"], "the smallest that can"),
        (["--plot", "nowhere/at.png"], "--plot"),
        (["--plot", "/proc/at.png"], "--plot"),
        (["--plot", "at.txt"], ".png"),
        (["--plot", ""], ".png"),
        (["--policies", "full,streaming", "--budgets", "0.001"], "less than a token"),
        (["--policies", "auto,elsewhere/auto.json"], "'auto'"),
        (
            ["--policies", "minipyramid.policy:Policy,test_eval:Stubborn"],
            "--policies has test_eval:Stubborn, but",
        ),
        (["--policies", "test_eval:Stubborn"], "Stubborn has no `within`"),
    ],
)
def test_nonsense_is_one_line(args: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *args)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert told in err


@needs_weights
def test_of_the_default_policies_those_that_cannot_hold_a_budget_are_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """PyramidInfer cannot come down to 8 % here. Nothing was compared because of it, and then it had no row
    at the other budgets.
    """
    sizes = ["--context", "200", "--continuation", "2", "--samples", "2", "--budgets", "0.5,0.08", "--json"]
    status, out, err = run(capsys, *sizes)
    rows = [(row["policy"], row["budget"]) for row in json.loads(out)["rows"]]
    assert status == 0
    assert "pyramid is left out at 0.08: a budget of 0.08 cannot be held" in err
    assert {("full", 1.0), ("keydiff", 0.08), ("pyramid", 0.5), ("streaming-split", 0.08)} < set(rows)
    assert ("pyramid", 0.08) not in rows


@needs_weights
def test_named_policies_need_no_settings_of_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether it has a profile was asked for the default rows only, and then for all."""
    model = tmp_path / "model"
    shutil.copytree(WEIGHTS, model)
    (model / "pyramid.json").write_text("{broken")
    few = ["--context", "64", "--continuation", "2", "--samples", "2"]
    assert run(capsys, "--model", str(model), *few, "--policies", "full,streaming")[0] == 0
    assert run(capsys, "--model", str(model), *few)[0] == 2


@dataclass(frozen=True)
class Stubborn(Policy):
    """It cannot be held to a budget. The error told of kv_budget, which is no flag of the evaluation."""

    def held(self, prompt_tokens: int, layers: int) -> list[int]:
        return [prompt_tokens] * (layers - 1) + [1]


def test_a_file_is_not_shown_under_the_name_of_another_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("full", "snapkv", "random-split"):
        (tmp_path / f"{name}.json").write_text("{}")
        status, _, err = run(capsys, "--policies", f"pyramid,{tmp_path / name}.json")
        assert (status, err.count("\n")) == (2, 1)
        assert f"{name!r}, which is another policy" in err
    (tmp_path / "snapkv.json").write_text('{"policy": "snapkv"}')
    (tmp_path / "pyramid.json").write_text("{}")
    names = [str(tmp_path / name) for name in ("snapkv.json", "pyramid.json")]
    assert list(pick_policies(names, tmp_path, 3)) == ["snapkv", "pyramid"]


def test_a_text_that_is_too_short_or_not_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, data, told in (
        ("a.txt", b"short", "expected 640"),
        ("b", b"\xff\xfe", "UTF-8"),
        ("c.xz", b"d", "UTF-8"),
    ):
        (tmp_path / name).write_bytes(data)
        status, _, err = run(capsys, "--text", str(tmp_path / name))
        assert status == 2
        assert told in err


@needs_weights
def test_a_text_without_sentences_enough_is_refused_before_anything_is_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several contexts the longest comes last, which may be after hours."""
    (tmp_path / "list.txt").write_text("apples and pears\n" * 500 + "They ate all of them.\n")
    monkeypatch.setattr(command, "compare", None)
    wanted = ["--recall", "prose", "--context", "128,256", "--text", str(tmp_path / "list.txt")]
    status, out, err = run(capsys, *wanted)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "give a longer text" in err


@needs_weights
def test_a_packed_text_is_read_like_a_plain_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = DEFAULT_TEXT.read_bytes()[:20000]
    (tmp_path / "a.txt").write_bytes(text)
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(text))
    short = "--samples 2 --context 64 --continuation 8 --policies full --json".split()
    plain, packed = (
        json.loads(run(capsys, *short, "--text", str(tmp_path / f))[1]) for f in ("a.txt", "a.txt.xz")
    )
    assert plain["rows"] == packed["rows"]
    assert packed["settings"]["dtype"] in ("float32", "bfloat16")  # what ran, and not "auto"


def test_a_plot_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "quality.png"
    status, out, _ = run(capsys, *QUICK, "--policies", "full,pyramid,random", "--plot", str(file))
    assert (status, len(out.splitlines())) == (0, 2 * (1 + 3) + 2)
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs a file that never ends")
def test_a_text_that_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was read until the memory was full."""
    monkeypatch.setattr("minipyramid.cli.texts.MOST_BYTES", 1 << 20)
    with pytest.raises(RequestError, match="--text /dev/zero is larger than 1 MiB; give a part of it"):
        read_text("/dev/zero")
