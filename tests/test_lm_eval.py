"""The harness's model: its scores are those of the evaluation here, and those of transformers."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import STEEP, WEIGHTS, write_checkpoint
from tokenizer_files import SPECIALS, write_json

from minipyramid import LLM, ConfigError, RequestError, SamplingParams
from minipyramid.eval.context import HeldContext
from minipyramid.eval.tasks import RecallInside, Text, planted, texts
from minipyramid.policy import FULL

model_of = pytest.importorskip("minipyramid.lm_eval.model", reason="needs the extra lm-eval")
MiniPyramidLM, sampling_of = model_of.MiniPyramidLM, model_of.sampling_of

needs_weights = pytest.mark.skipif(not WEIGHTS.exists(), reason="no embedded checkpoint in this tree")
PUBLISHED = str(Path(__file__).parent.parent / "docs/settings/published.json")
BOOK = WEIGHTS.parent / "books-sample.txt"
PROSE = "The fox said: who is there? and went home again. Once upon a time there was a little fox. " * 3


def asked(*args: Any) -> Any:
    return SimpleNamespace(args=args)


@pytest.fixture(scope="module")
def steep(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A settings file that prunes hard."""
    file = tmp_path_factory.mktemp("settings") / "steep.json"
    names = ("recent_ratio", "prefill_decay_ratio", "min_context_length")
    file.write_text(json.dumps({name: getattr(STEEP, name) for name in names}))
    return str(file)


@pytest.mark.parametrize("policy", ["full", "streaming", "steep"])
def test_scores_and_the_greedy_flag_are_those_of_the_engine(tiny_dir: Path, steep: str, policy: str) -> None:
    model = MiniPyramidLM(str(tiny_dir), policy=steep if policy == "steep" else policy)
    context = model.tok_encode(PROSE)
    pairs = [(None, context, [5, 9, 11]), (None, context[:2], [7])]
    held = LLM(tiny_dir, policy=steep if policy == "steep" else policy)
    expected = [
        sum(held.score(context[:-1], [context[-1], *following])[1:])
        if len(context) > 2 else held.score(context[:1], [context[1], *following])[1]
        for _, context, following in pairs
    ]  # fmt: skip
    scored = model._loglikelihood_tokens(pairs)
    assert [score for score, _ in scored] == pytest.approx(expected, abs=1e-4)
    logits = held.logits(context[:-1], [context[-1]])[1]
    best = int(logits.argmax())
    worse = (best + 1) % 320
    flags = [
        flag for _, flag in model._loglikelihood_tokens([(None, context, [best]), (None, context, [worse])])
    ]
    assert flags == [True, False]
    assert model.held.requests == 4
    assert (model.held.kv_share == 1) == (policy == "full")


def test_scores_equal_the_harness_s_transformers_model(tiny_dir: Path) -> None:
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    reference = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32).eval()
    ours = MiniPyramidLM(str(tiny_dir), policy="full", dtype="float32")
    ids = ours.tok_encode(PROSE)
    stand_in = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(), eos_token="w2", bos_token="w1")
    theirs = HFLM(pretrained=reference, tokenizer=stand_in, batch_size=2, device="cpu", max_length=256)
    pairs = [(("a", "b"), ids[:n], ids[n : n + k]) for n, k in ((1, 5), (20, 1), (40, 30), (7, 12))]
    left = ours._loglikelihood_tokens(pairs)
    right = theirs._loglikelihood_tokens(pairs, disable_tqdm=True)
    for (score, greedy), (score_theirs, greedy_theirs) in zip(left, right, strict=True):
        assert score == pytest.approx(score_theirs, abs=1e-3)
        assert greedy == greedy_theirs


def test_texts_are_scored_and_continued_as_by_the_harness_s_transformers_model(tmp_path: Path) -> None:
    """From a checkpoint's directory and by the names that a command line gives, texts and not ids."""
    pytest.importorskip("accelerate")
    from lm_eval.api.registry import get_model

    size = write_json(tmp_path)
    write_checkpoint(tmp_path, vocab_size=size, max_position_embeddings=512)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[0],
        "eos_token": SPECIALS[1],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = get_model("minipyramid").create_from_arg_string(
        f"pretrained={tmp_path},policy=full,dtype=float32", {"batch_size": 4, "device": "cuda:0"}
    )
    theirs = get_model("hf").create_from_arg_string(
        f"pretrained={tmp_path},dtype=float32,add_bos_token=True,max_length=512",
        {"batch_size": 1, "device": "cpu"},
    )
    texts = [
        ("The fox said:", " who is there?"),
        ("Once upon a", " time"),
        (PROSE, " And then"),
        ("", "The fox"),
    ]
    scored = [model.loglikelihood([asked(*pair) for pair in texts]) for model in (ours, theirs)]
    for (score, greedy), (score_theirs, greedy_theirs) in zip(*scored, strict=True):
        assert score == pytest.approx(score_theirs, abs=1e-3)
        assert greedy == greedy_theirs
    how = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    told = [model.generate_until([asked("The fox said:", dict(how))]) for model in (ours, theirs)]
    assert told[0] == told[1]
    theirs.add_bos_token = False  # it would stand there twice, for a window begins with it
    rolled = [model.loglikelihood_rolling([asked(PROSE)]) for model in (ours, theirs)]
    assert rolled[0] == pytest.approx(rolled[1], abs=1e-2)


def test_a_checkpoint_without_a_beginning_of_text_begins_with_an_end(tmp_path: Path) -> None:
    """The harness was given -1 for what stands before a text."""
    size = write_json(tmp_path)
    write_checkpoint(tmp_path, vocab_size=size, eos_token_id=7)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**spec, "post_processor": None}))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    model = MiniPyramidLM(str(tmp_path), policy="full")
    assert model.prefix_token_id == 7
    assert model.loglikelihood_rolling([asked("The fox")])[0] < 0
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    with pytest.raises(ConfigError, match="names no token that begins or ends a text"):
        MiniPyramidLM(str(tmp_path), policy="full")


def word_tokenizer() -> Any:
    """transformers wants one beside a model; the ids that are compared are given."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return Tokenizer(WordLevel({f"w{i}": i for i in range(320)}, unk_token="w0"))


def test_a_text_is_scored_whole_in_windows(tiny_dir: Path) -> None:
    """Each token once: with everything held, the sum is that of one context per token."""
    model = MiniPyramidLM(str(tiny_dir), policy="full", max_length=64)
    ids = model.tok_encode(PROSE, add_special_tokens=False)
    assert len(ids) > 120
    (rolled,) = model.loglikelihood_rolling([asked(PROSE)])
    expected, done = 0.0, 0
    while done < len(ids):
        count = min(63 if not done else 32, len(ids) - done)
        start = max(0, done + count - 63)
        before = ids[start - 1 : done] if start else [1, *ids[:done]]
        expected += sum(model.llm.score(before, ids[done : done + count]))
        done += count
    assert rolled == pytest.approx(expected, abs=1e-2)


def test_generation_ends_at_a_text_and_heeds_the_task(tiny_dir: Path, tiny: LLM) -> None:
    model = MiniPyramidLM(str(tiny_dir), policy="full")
    whole = tiny.generate("the fox", SamplingParams(max_new_tokens=30))[0].text
    stop = whole[5:8]
    answers = model.generate_until(
        [asked("the fox", {"until": [stop, ""], "max_gen_toks": 30, "do_sample": False, "temperature": 0.7}),
         asked("the fox", {"until": [], "max_gen_toks": 30})]
    )  # fmt: skip
    assert answers == [whole[: whole.index(stop)], whole]
    with pytest.raises(RequestError, match="num_beams"):
        sampling_of({"num_beams": 4}, 5)


def test_what_is_too_short_for_a_budget_runs_without_and_is_counted(tiny_dir: Path) -> None:
    model = MiniPyramidLM(str(tiny_dir), policy="streaming", kv_budget=0.5)
    ids = model.tok_encode(PROSE)
    model._loglikelihood_tokens([(None, ids, [5]), (None, ids[:2], [5])])
    assert (model.held.requests, model.held.over_budget) == (2, 1)
    assert model.held.kv_share < 0.6


@needs_weights
@pytest.mark.parametrize("policy", ["auto", PUBLISHED])
def test_a_task_of_ours_gives_what_the_evaluation_gives(policy: str) -> None:
    """Recall inside stories by the greedy flag, and a book's window by its log-likelihood."""
    model = MiniPyramidLM(str(WEIGHTS), policy=policy, dtype="float32")
    full, rng = model.llm.under("full"), random.Random(1)
    held, policy_of = HeldContext, model.llm.engine.planner.policy
    inside = [task for task in next(planted(full, 256, rng)) if isinstance(task, RecallInside)]
    book = full.engine.need_tokenizer().encode(PROSE * 4, continues=True)
    (window,) = next(texts(full, book, 128, 32, rng))
    assert isinstance(window, Text)
    pairs = [(None, t.context + t.question.question[-1:], t.question.answer) for t in inside]
    pairs.append((None, window.context + window.following[:1], window.following[1:]))
    *recall, (score, _) = model._loglikelihood_tokens(pairs)
    assert [float(greedy) for _, greedy in recall] == [
        t.ask(held(full, policy_of, t.context)) for t in inside
    ]
    figures = window.figures(
        window.ask(held(full, policy_of, window.context)), window.ask(held(full, FULL, window.context))
    )
    assert -score / len(window.following[1:]) == pytest.approx(figures["loss"], abs=1e-3)
    assert math.isfinite(score)


def run_task(model: Any, directory: Path, docs: list[dict[str, str]], how: str) -> Any:
    """Write local data and a task file, and let the harness run it; returns its results."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    (directory / "docs.json").write_text("\n".join(map(json.dumps, docs)))
    data = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {directory / 'docs.json'}\n"
    (directory / "ours.yaml").write_text(f"task: ours\n{data}test_split: test\n{how}")
    manager = TaskManager(include_path=str(directory), include_defaults=False)
    return simple_evaluate(model=model, tasks=["ours"], task_manager=manager, bootstrap_iters=0)


@needs_weights
@pytest.mark.parametrize("policy", ["full", PUBLISHED])
def test_recall_by_a_task_file_is_that_of_the_evaluation(tmp_path: Path, policy: str) -> None:
    """Facts of stories, asked within them; and the harness's results tell the bytes."""
    model = MiniPyramidLM(str(WEIGHTS), policy=policy, dtype="float32")
    full, rng = model.llm.under("full"), random.Random(2)
    decode = full.engine.need_tokenizer().decode
    inside = [task for task in next(planted(full, 200, rng)) if isinstance(task, RecallInside)]
    docs = [
        {
            "text": decode(t.context + t.question.question[-1:]),
            "answer": decode(t.question.answer, continues=True),
        }
        for t in inside
    ]
    how = (
        'output_type: loglikelihood\ndoc_to_text: "{{text}}"\ntarget_delimiter: ""\n'
        'doc_to_target: "{{answer}}"\nmetric_list:\n  - metric: acc\n'
    )
    results = run_task(model, tmp_path, docs, how)
    answers = [t.ask(HeldContext(full, model.llm.engine.planner.policy, t.context)) for t in inside]
    assert results["results"]["ours"]["acc,none"] == pytest.approx(sum(answers) / len(answers))
    assert (results["config"]["minipyramid_kv_share"] == 1) == (policy == "full")
    assert results["config"]["minipyramid_requests"] == len(docs)


@needs_weights
@pytest.mark.parametrize(
    ("policy", "kv_budget"), [("full", None), ("auto", None), (PUBLISHED, None), ("snapkv", 0.6)]
)
def test_rolling_perplexity_of_a_book_is_that_of_the_evaluation(
    tmp_path: Path, policy: str, kv_budget: float | None
) -> None:
    """Of a book in one document, each token counts once. What is compared, in windows of 160 tokens:

    The first 159 tokens are scored behind the beginning-of-text token alone. From there on a window is 96
    tokens of context and 64 that are scored (the last one fewer, of more context). Each is a `Text` of
    `minipyramid.eval`: all of its context but the last token is pruned, and its loss is the mean over what is
    scored. The harness adds them up and divides by the words and bytes of the document.
    """
    size, context = 160, 96
    book = BOOK.read_text(encoding="utf-8")[2000:5000]
    model = MiniPyramidLM(
        str(WEIGHTS), policy=policy, kv_budget=kv_budget, dtype="float32",
        max_length=size, rolling_context=context,
    )  # fmt: skip
    how = (
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n"
    )
    told = run_task(model, tmp_path, [{"text": book}], how)["results"]["ours"]

    full, tokenizer = model.without_budget.under("full"), model.llm.engine.need_tokenizer()
    ids, done = tokenizer.encode(book)[1:], size - 1
    loss, windows = -sum(full.score([tokenizer.bos_id], ids[:done])), 1
    while done < len(ids):
        scored = ids[done : done + size - context]
        before = ids[done - (size - len(scored)) : done]
        window = Text(before[:-1], before[-1:] + scored)
        # A budget is of all that a request holds at its end, so also of what is scored.
        pruned_by = model.llm.engine.planner.policy_for(len(before) - 1, 1 + len(scored))
        answer = window.ask(HeldContext(full, pruned_by, window.context))
        loss += window.figures(answer, answer)["loss"] * len(scored)
        done, windows = done + len(scored), windows + 1
    assert windows > 5
    words = len(re.split(r"\s+", book))
    assert told["word_perplexity,none"] == pytest.approx(math.exp(loss / words), rel=1e-4)
    assert told["bits_per_byte,none"] == pytest.approx(loss / len(book.encode()) / math.log(2), rel=1e-4)
    assert model.held.requests == windows
    assert model.held.over_budget == (0 if kv_budget is None else 1)  # the first is too short for one
    assert (model.held.kv_share == 1) == (policy == "full")


@needs_weights
def test_a_generated_task_of_ruler_runs_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A needle in a haystack of 512 tokens, at half of the bytes."""
    pytest.importorskip("wonderwords", reason="RULER's tasks need it")
    pytest.importorskip("nltk", reason="RULER's tasks need it")
    from lm_eval import simple_evaluate

    monkeypatch.setattr("nltk.download", lambda *args, **how: True)  # it would wait for a network
    model = MiniPyramidLM(str(WEIGHTS), policy="streaming", kv_budget=0.5)
    size = {"pretrained": str(WEIGHTS), "max_seq_lengths": [512]}
    results = simple_evaluate(model=model, tasks=["niah_single_1"], limit=2, metadata=size, bootstrap_iters=0)
    assert 0 <= results["results"]["niah_single_1"]["512,none"] <= 1
    assert results["config"]["minipyramid_kv_share"] == pytest.approx(0.5, abs=0.01)
    assert results["config"]["minipyramid_requests"] == 2
