"""The benchmark counts what was generated, for equal work, and its floors are what the definition says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import TINY

from minipyramid import PyramidConfig
from minipyramid.bench import COLUMNS, Work, build_parser, floors, main, make_work, our_method
from minipyramid.config import ModelConfig
from minipyramid.generate import DEFAULT_TEXT
from minipyramid.model import Model
from minipyramid.plan import Policy
from minipyramid.tokenizer import Tokenizer

CONFIG = ModelConfig.from_dict(TINY)


def test_rows_hold_the_contracts_fields_and_count_generated_tokens_only(
    tiny_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Defect 8 of the published code: its demo counts the prompt's tokens as throughput."""
    size = ["--batch-size", "3", "--prompt-tokens", "40", "--max-new-tokens", "6", "--runs", "1", "--threads", "1"]
    flags = ["--model", str(tiny_dir), *size, "--kv-budget", "0.8", "--versus", "transformers", "--json"]
    assert main(flags) == 0
    lines = capfd.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == ["full", "auto", "budget 0.8", "transformers"]
    for row in rows.values():
        assert list(row) == COLUMNS
        assert row["tokens_per_s"] * row["total_s"] == pytest.approx(3 * 6)
        assert row["total_s"] == pytest.approx(row["prefill_s"] + row["decode_s"])
        assert min(row["prefill_s"], row["decode_s"], row["peak_rss_mb"]) > 0
    assert rows["full"]["kv_bytes"] == rows["transformers"]["kv_bytes"] == 3 * 46 * 3 * CONFIG.kv_bytes_per_token(4)
    assert rows["budget 0.8"]["kv_share"] <= 0.8 < rows["full"]["kv_share"] == 1
    assert result["machine"]["threads"] == 1
    assert len([line for line in lines if line.startswith(tuple(rows))]) == 4


def test_compiled_steps_are_a_method_of_their_own(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(Model, "compile_step", lambda model: compiled.append(type(model).__name__))
    size = ["--batch-size", "2", "--prompt-tokens", "40", "--max-new-tokens", "3", "--kv-budget", "0.8"]
    args = build_parser().parse_args(["--model", str(tiny_dir), *size, "--compile"])
    plain, other = (our_method(name, args)() for name in ("budget", "compiled budget"))
    assert compiled == ["Model"]
    assert plain["kv_bytes"] == other["kv_bytes"]


def test_prompts_differ(tiny_dir: Path) -> None:
    """Defect 8, the other half: one prompt copied over the batch."""
    shape = ["--model", "shape:llama-125m"]
    args = build_parser().parse_args([*shape, "--batch-size", "20", "--prompt-tokens", "30"])
    work = make_work(args, CONFIG)
    assert len({tuple(prompt) for prompt in work.prompts}) == 20
    assert {len(prompt) for prompt in work.prompts} == {30}
    ragged = build_parser().parse_args([*shape, "--batch-size", "50", "--prompt-tokens", "150", "--ragged"])
    work = make_work(ragged, CONFIG)
    assert len({len(prompt) for prompt in work.prompts}) > 20
    assert min(map(len, work.prompts)) >= 20
    assert min(work.new_tokens) >= 16
    assert make_work(ragged, CONFIG) == work


def test_prompts_are_pieces_of_a_book_where_there_is_a_tokenizer(tiny_dir: Path) -> None:
    args = build_parser().parse_args(["--model", str(tiny_dir), "--batch-size", "4", "--prompt-tokens", "40"])
    tokenizer = Tokenizer(tiny_dir, CONFIG.vocab_size)
    book = tokenizer.encode(DEFAULT_TEXT.read_text(encoding="utf-8"), continues=True)
    for prompt in make_work(args, CONFIG).prompts:
        assert tokenizer.decode(prompt) in tokenizer.decode(book + book)


def test_floors_of_a_model_that_can_be_counted_by_hand() -> None:
    """3 layers, hidden 32, 4 heads of 8, 2 of keys and values, feed-forward 48, vocabulary 320; 10 + 2 tokens."""
    rates = {"flops": 1.0, "bytes_per_s": 1.0}
    work = Work([[5] * 10], [2])
    received, kept, head = 32 * (4 + 2 * 2) * 8, 32 * 32 + 3 * 32 * 48, 32 * 320
    prefill, decode = floors(CONFIG, Policy(None), work, 4, rates)
    attention = 2 * (2 * 10 * 10 * 32) + 4 * 10 * 32
    assert prefill == 3 * 2 * 10 * received + 2 * (10 + 10 + 1) * kept + attention + 2 * head
    weights = 4 * (3 * (received + kept) + head)
    assert decode == sum(weights + 3 * (10 + step) * CONFIG.kv_bytes_per_token(4) for step in (1, 2))
    pruned = Policy(PyramidConfig(prefill_decay_ratio=0.5, min_context_length=0, prefill_decay_strategy="constant"))
    less = floors(CONFIG, pruned, work, 4, rates)
    assert less[0] < prefill
    assert less[1] < decode


def test_growth_counts_the_bytes_of_a_step(tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All weights but the embedding's, once, and the keys and values of every sequence."""
    assert main(["--model", str(tiny_dir), "--growth", "--batch-size", "2", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(lines[-1])["rows"]
    assert [row["held_tokens"] for row in rows] == [512, 1024, 2048, 4096, 8192]
    assert len(lines) == 2 + len(rows) + 1
    vectors, head = 7 * 32, 320 * 32
    weights = 4 * (3 * (32 * (4 + 2 * 2) * 8 + 32 * 32 + 3 * 32 * 48) + vectors + head)
    for row in rows:
        assert row["read_bytes"] == weights + 2 * 3 * row["held_tokens"] * CONFIG.kv_bytes_per_token(4)
        assert row["step_s"] > 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "shape:llama-9b"], "no shape"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--fixed", "-1"], "--fixed is -1"),
        (["--growth", "--batch-size", "0"], "--batch-size is 0"),
        (["--growth", "--batch-size", "100000000"], "smaller --batch-size"),
        (["--growth", "--ragged"], "no use for --ragged"),
        (["--growth", "--compile"], "no use for --compile"),
        (["--pyramid", "auto,compiled auto"], "'compiled auto'"),
        (["--pyramid", "budget"], "'budget'"),
        (["--pyramid", "llama2-7", "--prompt-tokens", "9"], "'llama2-7b'"),
        (["--model", "shape:llama2-7b", "--prompt-tokens", "4096"], "context"),
        (["--model", "shape:llama-125m", "--kv-budget", "0.01"], "smallest"),
    ],
)
def test_nonsense_is_one_line_before_anything_loads(
    flags: list[str], words: str, tiny_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags if "--model" in flags else ["--model", str(tiny_dir), *flags]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
