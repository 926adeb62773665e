"""The embedded checkpoint: the stories it learns from, how it is trained, and what it is."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from circuit import wire
from documents import ANSWER_WEIGHT, Batch, Data, Wanted, made_ahead
from helpers import WEIGHTS
from hypothesis import given, settings
from hypothesis import strategies as st
from train import (
    STAGES,
    Llama,
    Muon,
    Run,
    Shape,
    build_parser,
    export,
    quicker_in_bf16,
    recall,
    train,
    weighted_loss,
)

from minipyramid import LLM, RequestError
from minipyramid.cli.terminal import DEFAULT_TEXT
from minipyramid.eval.__main__ import main as evaluate
from minipyramid.eval.stories import story


def words(text: str) -> int:
    return len(text.split())


@given(seed=st.integers(0, 10_000), tokens=st.integers(60, 1500))
@settings(max_examples=60, deadline=None)
def test_every_answer_stands_in_the_story_and_nothing_contradicts_it(seed: int, tokens: int) -> None:
    tale = story(random.Random(seed), tokens, words)
    questions = [question for question, _ in tale.asked]
    assert tale.asked
    assert len(set(questions)) == len(questions)
    for question, answer in tale.asked:
        stem = question.split("Answer: ")[1]
        sentence = stem + answer.removesuffix(".")
        assert tale.text.count(sentence) == 1
        # A second sentence with this stem would be a second answer.
        assert tale.text.count(stem + " ") == 1
    assert words(tale.text) + sum(words(q + a) for q, a in tale.asked) <= tokens


def test_a_seed_writes_the_same_story() -> None:
    assert story(random.Random(3), 300, words) == story(random.Random(3), 300, words)
    assert story(random.Random(3), 300, words) != story(random.Random(4), 300, words)


def test_made_up_stories_are_those_that_were_measured() -> None:
    """Figures in the documentation are of these; a draw more or less would make others of all of them."""
    digest = hashlib.sha256()
    for seed, asked_within in itertools.product(range(20), (False, True)):
        tale = story(random.Random(seed), 300, words, asked_within=asked_within)
        digest.update(repr((tale.text, tale.asked)).encode())
    assert digest.hexdigest()[:16] == "efbe0a1279ab0633"


@pytest.fixture(scope="module")
def data(tiny_dir: Path) -> Data:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tiny_dir / "tokenizer.model"))
    book = [f"In the year {i} nothing happened that anybody wrote down." for i in range(200)]
    return Data(pieces, (3 + np.arange(1200) % 317).astype(np.uint16), book, seed=0)


@pytest.mark.parametrize("length", [128, 512])
def test_rows_weigh_answers_and_leave_what_cannot_be_known(data: Data, length: int) -> None:
    for kind in (data.story, data.drill, data.copy, data.book):
        ids, weights = kind(length)
        assert (len(ids), len(weights)) == (length + 1, length)
    ids, weights = data.story(length)
    answers = "".join(
        data.tokenizer.decode([i]) + " " for i, w in zip(ids[1:], weights, strict=True) if w == ANSWER_WEIGHT
    )
    assert answers.strip().endswith(".")
    ids, weights = data.copy(length)
    assert set(weights) == {0.0, 1.0}
    first = weights.index(1.0)  # the first target that a repetition makes known
    assert weights[first:] == [1.0] * (length - first)
    assert ids[1 : 1 + length - first] == ids[1 + first :]


def test_a_story_lies_in_a_stretch_of_a_book_half_of_the_time(data: Data) -> None:
    """A checkpoint that had seen made-up filler alone lost a sixth of its answers in a book."""
    kinds = []
    for _ in range(400):
        some = list(itertools.islice(data.among(2000), 8))
        years = [int(sentence.split()[3]) for sentence in some if sentence in data.sentences]
        in_order = years == list(range(years[0], years[0] + 8)) if years else False
        kinds.append("stretch" if in_order else "mixed" if years else "made up")
    assert 160 < kinds.count("stretch") < 240
    assert 70 < kinds.count("mixed") < 130


def shares_of(length: int) -> tuple[int, int, dict[str, float]]:
    return 2, length, {"copy": 0.2, "drill": 0.2, "story": 0.3, "book": 0.3}


def test_batches_of_the_second_process_are_those_that_were_asked_for(data: Data) -> None:
    lengths = itertools.cycle([64, 128])
    with made_ahead(data, "a seed", lambda: shares_of(next(lengths))) as batches:
        made = list(itertools.islice(batches, 6))
    here = Data(data.tokenizer, data.prose, data.sentences, "a seed")
    for length, (ids, weights) in zip(itertools.cycle([64, 128]), made, strict=False):
        expected_ids, expected_weights = here.batch(*shares_of(length))
        assert torch.equal(ids, expected_ids)
        assert torch.equal(weights, expected_weights)


def test_the_second_process_outlives_ctrl_c_and_ends_with_the_run(data: Data) -> None:
    """Ctrl-C reaches every process of a terminal; what the run dies of must leave none behind."""
    for dies_of in (KeyboardInterrupt, ValueError):
        with pytest.raises(dies_of), made_ahead(data, "", lambda: shares_of(64)) as batches:
            next(batches)
            (process,) = multiprocessing.active_children()
            os.kill(process.pid or 0, signal.SIGINT)
            for _ in range(10):
                next(batches)
            raise dies_of
        assert multiprocessing.active_children() == []


def test_a_second_process_that_dies_ends_the_run(data: Data) -> None:
    """Its batches would otherwise be waited for without end."""
    lengths = itertools.chain([64] * 7, itertools.repeat(10**9))  # longer than the prose
    with (
        pytest.raises(RuntimeError, match="makes documents has ended"),
        made_ahead(data, "", lambda: (1, next(lengths), {"book": 1.0})) as batches,
    ):
        assert len(list(batches)) == 7
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("slower", [False, True])
def test_what_is_quicker_here_is_measured(slower: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are instructions for bf16, float32 may be quicker all the same."""
    now, linear = 0.0, torch.nn.functional.linear

    def timed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        nonlocal now
        product = linear(x, weight)
        now += 2.0 if (product.dtype == torch.bfloat16) == slower else 1.0
        return product

    monkeypatch.setattr("train.F.linear", timed)
    monkeypatch.setattr("train.time.perf_counter", lambda: now)
    assert quicker_in_bf16(torch.device("cpu"), TINY) == (not slower)


TINY = Shape(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=256)  # fmt: skip


def test_what_is_trained_is_what_the_engine_runs(tmp_path: Path) -> None:
    """Two implementations of one model, the trainer's and the engine's, agree on an exported checkpoint."""
    torch.manual_seed(0)
    model = Llama(TINY)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p * (4.0 if p.dim() == 2 else 1.0)).bfloat16())
    export(model, TINY, tmp_path)
    ids = list(range(3, 100))
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0, -1]
    torch.testing.assert_close(
        LLM(tmp_path, policy="full", dtype="float32").prefill([ids])[0].logits, expected, atol=2e-4, rtol=2e-4
    )


def test_the_optimiser_learns(data: Data) -> None:
    torch.manual_seed(0)
    model = Llama(TINY)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    optimisers = [
        Muon(matrices, lr=5e-3, weight_decay=0.01),
        torch.optim.AdamW([model.embed_tokens.weight], lr=1e-2),
    ]
    ids, weights = data.batch(8, 64, {"book": 1.0})
    losses = []
    for _ in range(30):
        loss, _ = weighted_loss(model, ids, weights)
        torch.autograd.backward(loss)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert recall(model, data, 128, 2) < 0.5  # it has seen no story


def repeated(model: Llama, rows: int) -> float:
    """Share of random tokens that are foretold the second time."""
    torch.manual_seed(0)
    ids = torch.randint(3, 4096, (rows, 48)).repeat(1, 2)
    with torch.no_grad():
        said = model(ids[:, :-1]).argmax(-1)
    return float((said[:, 47:] == ids[:, 48:]).float().mean())


def test_the_first_weights_repeat_what_was_said() -> None:
    """A circuit that is put in by hand and does nothing would only show in what the training never learns."""
    torch.manual_seed(0)
    model = Llama(Shape())
    before = repeated(model, 8)
    wire(list(model.layers), model.embed_tokens.weight, Shape().rope_theta)
    assert before < 0.05
    assert repeated(model, 8) > 0.6


def test_a_run_begins_with_another_ones_weights(tmp_path: Path, tiny_dir: Path) -> None:
    """And with its optimisers where they are there, but with a schedule of its own."""
    torch.manual_seed(0)
    first, device = tmp_path / "first", torch.device("cpu")
    first.mkdir()
    run = Run(Shape(), first, 2e-3, device)
    run.learn(run.model(torch.arange(3, 40)[None]).square().mean(), done=0.0)
    run.step, run.tokens, run.stage = 7, 7000, 3
    run.save()
    shutil.copy(tiny_dir / "tokenizer.model", first)
    for name in ("with its state", "from safetensors"):
        out = tmp_path / name
        out.mkdir()
        begun = Run(Shape(), out, 2e-3, device, start=first)
        for (key, ours), theirs in zip(
            begun.model.state_dict().items(), run.model.state_dict().values(), strict=True
        ):
            expected = theirs if name == "with its state" else theirs.bfloat16().float()
            assert torch.equal(ours, expected), key
        assert (begun.step, begun.tokens, STAGES[begun.stage].length) == (0, 0, 256)
        assert bool(begun.muon.state) == (name == "with its state")
        (first / "state.pt").unlink(missing_ok=True)
    (first / "config.json").write_text(json.dumps({**asdict(Shape()), "head_dim": 32}))
    with pytest.raises(RequestError, match="has head_dim 32, expected 64"):
        Run(Shape(), tmp_path, 2e-3, device, start=first)
    with pytest.raises(RequestError, match=r"has no model\.safetensors"):
        Run(Shape(), tmp_path, 2e-3, device, start=tiny_dir / "nowhere")


needs_weights = pytest.mark.skipif(not WEIGHTS.exists(), reason="no embedded checkpoint in this tree")


@needs_weights
def test_a_run_goes_on_where_it_stopped_and_reads_other_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds, out = [], tmp_path / "out"

    @contextmanager
    def noted(data: Data, seed: str, want: Callable[[], Wanted]) -> Iterator[Iterator[Batch]]:
        seeds.append(seed)
        data.rng.seed(seed)
        yield (data.batch(*want()) for _ in itertools.count())

    monkeypatch.setattr("train.made_ahead", noted)
    monkeypatch.setattr("train.prose_loss", lambda *_: 4.0)
    text = ["--text", str(DEFAULT_TEXT), "--test", str(DEFAULT_TEXT)]
    some = ["--batch-tokens", "256", "--eval-rows", "1", "--device", "cpu", "--seed", "5"]
    steps = []
    for tokens in ("0.0005", "0.001"):
        wanted = ["--from", str(WEIGHTS), "--out", str(out), "--tokens", tokens]
        lines = list(train(build_parser().parse_args([*text, *some, *wanted])))
        assert "recall at 256: 1.000" in lines  # the checkpoint's still
        steps.append(torch.load(out / "state.pt", weights_only=True)["state"]["step"])
    assert steps == [2, 4]
    assert seeds == ["5 0", "5 2"]
    assert (out / "tokenizer.model").read_bytes() == (WEIGHTS / "tokenizer.model").read_bytes()
    assert LLM(out).generate(["Once"])[0].text


@needs_weights
def test_the_checkpoint_is_what_its_readme_says() -> None:
    config = LLM(WEIGHTS).config
    assert config.num_hidden_layers >= 12
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.max_position_embeddings >= 2048
    assert config.dtype == "bfloat16"
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) <= 32e6


@needs_weights
def test_the_checkpoint_looks_back(capsys: pytest.CaptureFixture[str]) -> None:
    """The first version did not, and whatever pruning did to it was no evidence."""
    rows = []
    long = "--context 1024 --continuation 64 --samples 2"
    longest = "--context 2000 --continuation 16 --samples 2"
    for wanted in (long, longest):
        flags = ["--policies", "full", "--recall", "stories,prose", "--json", "--quiet"]
        assert evaluate([*wanted.split(), *flags]) == 0
        rows += json.loads(capsys.readouterr().out)["rows"]
    for row, least in zip(rows, (0.95, 0.9), strict=True):
        for recalled in ("inside", "after", "prose_inside", "prose_after"):
            assert row[recalled][0] >= least
    assert rows[0]["perplexity"][0] < 40  # of two windows, so no more than a guard against damaged weights
