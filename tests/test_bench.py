"""The benchmark counts what was generated, for equal work, and its floors are what the definition says."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PROFILE, TINY, guesses_of, lines_of

from minipyramid import Policy, PyramidConfig, RequestError, compiled
from minipyramid.bench.__main__ import build_parser, main
from minipyramid.bench.floors import Rates, best_of, floors
from minipyramid.bench.methods import our_method, our_methods
from minipyramid.bench.table import COLUMNS
from minipyramid.bench.work import Work, make_work
from minipyramid.bench.workers import Worker, peak_mb
from minipyramid.cache import KVCache
from minipyramid.calibrate.settings import write_profile
from minipyramid.cli.terminal import DEFAULT_TEXT
from minipyramid.formats.huggingface import config_of
from minipyramid.need import Planner
from minipyramid.policies import POLICIES
from minipyramid.policies.levels import Level
from minipyramid.policies.profile import Profile
from minipyramid.policy import FULL, Seen
from minipyramid.tokenizer import load_tokenizer

CONFIG = config_of(TINY)


def test_rows_hold_the_contracts_fields_and_count_generated_tokens_only(
    tiny_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Defect 8 of the published code: its demo counts the prompt's tokens as throughput."""
    size = "--batch-size 3 --prompt-tokens 40 --max-new-tokens 6 --runs 1 --threads 1".split()
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
    assert (
        rows["full"]["kv_bytes"]
        == rows["transformers"]["kv_bytes"]
        == 3 * 46 * 3 * CONFIG.kv_bytes_per_token(4)
    )
    assert rows["budget 0.8"]["kv_share"] <= 0.8 < rows["full"]["kv_share"] == 1
    assert result["machine"]["threads"] == 1
    assert len([line for line in lines if line.startswith(tuple(rows))]) == 4


@dataclass(frozen=True)
class Newest(Policy):
    """A user's own: the last layers hold only the newest tokens. It has nothing to give up for a budget."""

    def held(self, prompt_tokens: int, layers: int) -> list[int]:
        return [prompt_tokens] + [min(8, prompt_tokens)] * (layers - 1)

    def hold(self, seen: Seen, count: int) -> torch.Tensor:
        return torch.arange(len(seen.q) - count, len(seen.q))


def rows_of(flags: list[str], capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The rows of `--json` by their methods."""
    size = ["--batch-size", "2", "--prompt-tokens", "100", "--max-new-tokens", "4", "--runs", "1"]
    assert main([*size, *flags, "--threads", "1", "--json"]) == 0
    rows = json.loads(capfd.readouterr().out.splitlines()[-1])["rows"]
    return {row["method"]: row for row in rows}


class InThisProcess:
    """Stands for a `Worker` where the rows are the point, not the processes, which take seconds to start."""

    def __init__(self, name: str, argv: list[str]) -> None:
        self.name, self.method = name, our_method(name, build_parser().parse_args(argv))

    def answer(self) -> dict[str, Any]:
        return {"ready": True}

    def run(self) -> dict[str, Any]:
        return {**self.method(), "peak_rss_mb": peak_mb(cuda=False)}

    def close(self) -> None:
        """There is nothing to end."""


def test_every_policy_has_a_row(
    tiny_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is, and held to the budget."""
    monkeypatch.setattr("minipyramid.bench.workers.Worker", InThisProcess)
    model = shutil.copytree(tiny_dir, tmp_path / "profiled")
    write_profile(model / "pyramid.json", list(PROFILE.levels), lines_of(3), {})
    flags = ["--model", str(model), "--policy", ",".join(POLICIES), "--kv-budget", "0.5"]
    rows = rows_of(flags, capfd)
    solved = [f"{name} 0.5" for name in POLICIES if name != "full"]
    assert list(rows) == [*POLICIES, *solved, "budget 0.5"]
    for name in [*solved, "budget 0.5"]:
        assert 0.45 < rows[name]["kv_share"] <= 0.5
        assert rows[name]["prefill_floor_share"] > 0


def test_the_full_cache_beside_a_budget_alone(tiny_dir: Path) -> None:
    flags = "--policy full --kv-budget 0.454 --compile --fixed 2".split()
    methods = our_methods(build_parser().parse_args(["--model", str(tiny_dir), *flags]))
    assert list(methods) == ["full", "budget 0.454", "fixed budget", "compiled budget"]


def test_a_policy_of_ones_own_has_a_row(
    tiny_dir: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its module is found where the command finds it, for every method runs in a process of its own."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    own = "test_bench:Newest"
    rows = rows_of(["--model", str(tiny_dir), "--policy", own], capfd)
    assert list(rows) == ["full", own]
    assert rows[own]["kv_bytes"] == 2 * (104 + 2 * 12) * CONFIG.kv_bytes_per_token(4)
    flags = ["--model", str(tiny_dir), "--policy", own, "--kv-budget", "0.5", "--prompt-tokens", "40"]
    assert main(flags) == 2
    assert f"'{own} 0.5' cannot be run" in capfd.readouterr().err


def test_what_is_held_only_by_some_layers_is_counted_by_the_floors() -> None:
    """All of the prompt is computed, as for the full cache, and less of it is read in every step."""
    rates, work = Rates(flops=1.0, bytes_per_s=1.0), Work([[5] * 20], [2])
    full, newest = (floors(planner_for(policy), work, 4, rates) for policy in (FULL, Newest()))
    assert newest[0] == full[0]
    assert full[1] - newest[1] == 2 * 2 * (20 - 8) * CONFIG.kv_bytes_per_token(4)


def test_ctrl_c_is_one_line_and_leaves_no_process(
    tiny_dir: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The methods' processes are not in the terminal's group, so they have nothing to say about it."""
    workers: list[Worker] = []

    def interrupted(worker: Worker) -> None:
        workers.append(worker)
        assert os.getpgid(worker.process.pid) != os.getpgid(0)
        raise KeyboardInterrupt

    monkeypatch.setattr(Worker, "answer", interrupted)
    assert main(["--model", str(tiny_dir), "--prompt-tokens", "40", "--policy", "full"]) == 130
    assert capfd.readouterr().err == "\nminipyramid: interrupted\n"
    assert [worker.process.poll() for worker in workers] == [-signal.SIGKILL]


def test_a_method_that_ends_early_is_told(tiny_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    worker = Worker("full", ["--model", str(tiny_dir), "--prompt-tokens", "40"])
    assert worker.answer() == {"ready": True}
    worker.close()
    with pytest.raises(RequestError, match="'full' has ended"):
        worker.run()


@dataclass(frozen=True)
class Raises(Newest):
    """It runs into an error of its own in every prompt."""

    def hold(self, seen: Seen, count: int) -> torch.Tensor:
        raise ZeroDivisionError("nothing\nto divide by")


def test_a_policy_that_raises_is_one_line(
    tiny_dir: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback of the method's process stood above it."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    own = "test_bench:Raises"
    with pytest.raises(SystemExit) as ended:
        main(["--model", str(tiny_dir), "--prompt-tokens", "40", "--max-new-tokens", "2", "--policy", own])
    assert ended.value.code == 2
    told = f"minipyramid: error: {own!r} has failed (ZeroDivisionError: nothing to divide by)\n"
    assert capfd.readouterr().err == told


def test_damaged_weights_are_one_line(
    tiny_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every method would find them damaged, and the process that finds it says so."""
    (tmp_path / "config.json").write_bytes((tiny_dir / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(SystemExit) as ended:
        main(["--model", str(tmp_path), "--prompt-tokens", "40", "--policy", "auto,snapkv"])
    assert ended.value.code == 2
    error = capfd.readouterr().err
    assert "model.safetensors is truncated" in error
    assert error.count("\n") == 1


def test_compiled_steps_are_a_method_of_their_own(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[str] = []
    monkeypatch.setattr(compiled, "compile_step", lambda model: models.append(type(model).__name__))
    size = ["--batch-size", "2", "--prompt-tokens", "40", "--max-new-tokens", "3", "--kv-budget", "0.8"]
    args = build_parser().parse_args(["--model", str(tiny_dir), *size, "--compile"])
    plain, other = (our_method(name, args)() for name in ("budget 0.8", "compiled budget"))
    assert models == ["Model"]
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
    tokenizer = load_tokenizer(tiny_dir, CONFIG.vocab_size)
    assert tokenizer is not None
    book = tokenizer.encode(DEFAULT_TEXT.read_text(encoding="utf-8"), continues=True)
    for prompt in make_work(args, CONFIG).prompts:
        assert tokenizer.decode(prompt) in tokenizer.decode(book + book)


def planner_for(policy: Policy) -> Planner:
    return Planner(CONFIG, policy, None, CONFIG.kv_bytes_per_token(4))


def test_floors_of_a_model_that_can_be_counted_by_hand() -> None:
    """3 layers, hidden 32, 4 heads of 8, 2 of keys and values, feed-forward 48, vocabulary 320; 10 + 2."""
    rates = Rates(flops=1.0, bytes_per_s=1.0)
    work = Work([[5] * 10], [2])
    received, kept, head = 32 * (4 + 2 * 2) * 8, 32 * 32 + 3 * 32 * 48, 32 * 320
    prefill, decode = floors(planner_for(FULL), work, 4, rates)
    attention = 2 * (2 * 10 * 10 * 32) + 4 * 10 * 32
    assert prefill == 3 * 2 * 10 * received + 2 * (10 + 10 + 1) * kept + attention + 2 * head
    weights = 4 * (3 * (received + kept) + head)
    assert decode == sum(weights + 3 * (10 + step) * CONFIG.kv_bytes_per_token(4) for step in (1, 2))
    pruned = PyramidConfig(prefill_decay_ratio=0.5, min_context_length=0, prefill_decay_strategy="constant")
    less = floors(planner_for(pruned), work, 4, rates)
    assert less[0] < prefill
    assert less[1] < decode


def test_a_guess_costs_one_product() -> None:
    """Of a hidden state of 32, 32 that attention found, and 1, with 2 heads of 8 for keys and for values."""
    rates, work = Rates(flops=1.0, bytes_per_s=1.0), Work([[5] * 10], [2])
    shares = ((1.0, 0.8, 0.5), (1.0, 0.5, 0.5))
    levels = [Level((1.0, 0.5, 0.5), held, ("newest",) * 3, (1.0,) * 3) for held in shares]
    guessing, plain = (
        floors(planner_for(Profile((level,), level.share, fewest=0, guesses=guesses_of(1))), work, 4, rates)
        for level in levels
    )
    assert guessing[0] - plain[0] == 2 * 3 * (32 + 32 + 1) * (2 * 2 * 8)


def test_a_repository_is_measured_where_its_files_are(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its name was taken for a directory, as in the commands of examples/llama-3.1-8b.sh."""
    monkeypatch.setattr("minipyramid.bench.__main__.locate", {"acme/tiny": tiny_dir}.get)
    flags = ["--growth", "--batch-size", "1", "--runs", "1", "--json", "--model"]
    assert main([*flags, "acme/tiny"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]


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


def test_a_server_s_clients_generate_the_same_work(
    tiny_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ["--batch-size", "3", "--prompt-tokens", "20", "--max-new-tokens", "5", "--runs", "1"]
    assert main(["--served", "--model", str(tiny_dir), *size, "--ragged", "--threads", "1", "--json"]) == 0
    *lines, result = capsys.readouterr().out.splitlines()
    rows = {row["way"]: row for row in json.loads(result)["rows"]}
    assert list(rows) == ["generate", "served", "streamed"]
    assert len(lines) == 1 + len(rows)
    counts = {round(row["tokens_per_s"] * row["seconds"]) for row in rows.values()}
    assert counts == {15}
    assert rows["generate"]["of_generate"] == rows["generate"]["of_generate_by_cpu"] == 1
    assert min(row["cpu_s"] for row in rows.values()) > 0


def test_a_client_that_is_refused_ends_the_measurement(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An answer without tokens must not pass for a quick one."""
    refused = [{"prompt": [5], "max_tokens": 5, "temperature": -1}]
    monkeypatch.setattr("minipyramid.bench.served.bodies", lambda work, stream: refused)
    flags = ["--batch-size", "1", "--prompt-tokens", "8", "--max-new-tokens", "5", "--threads", "1"]
    assert main(["--served", "--model", str(tiny_dir), *flags]) == 2
    assert "temperature is -1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "shape:llama-9b"], "no shape"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--fixed", "-1"], "--fixed is -1"),
        (["--growth", "--batch-size", "0"], "--batch-size is 0"),
        (["--batch-size", "100000000000"], "--batch-size is 100000000000, expected at most 10000"),
        (["--growth", "--ragged"], "no use for --ragged"),
        (["--growth", "--compile"], "no use for --compile"),
        (["--served", "--growth"], "no use for --growth"),
        (["--served", "--fixed", "2"], "no use for --fixed"),
        (["--served", "--prompt-tokens", "400"], "context"),
        (["--policy", "auto,compiled auto"], "'compiled auto'"),
        (["--policy", "budget"], "'budget'"),
        (["--policy", "llama2-7", "--prompt-tokens", "9"], "'llama2-7b'"),
        (["--model", "shape:llama2-7b", "--prompt-tokens", "4096"], "context"),
        (["--model", "shape:llama-125m", "--kv-budget", "0.01"], "smallest"),
        (["--policy", ""], "no policy or preset ''"),
        (["--policy", "snapkw"], "'snapkv'"),
        (["--policy", "no.such:Thing"], "'no.such:Thing'"),
        (["--policy", "json:JSONDecoder"], "'json:JSONDecoder'"),
        (["--policy", "snapkv", "--kv-budget", "0.02", "--prompt-tokens", "40"], "'snapkv 0.02'"),
        (["--kv-budget", "1.5"], "1.5"),
        (["--kv-memory", "1x"], "'1x'"),
        (["--growth", "--policy", "snapkv"], "no use for --policy"),
    ],
)
def test_nonsense_is_one_line_before_anything_loads(
    flags: list[str], words: str, tiny_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags if "--model" in flags else ["--model", str(tiny_dir), *flags]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_the_machine_counts_as_it_is_at_its_best() -> None:
    """Its rates were measured once, in a slow moment, and a prompt came out quicker than its floor."""
    assert best_of([Rates(3.0, 1.0), Rates(1.0, 4.0), Rates(2.0, 2.0)]) == Rates(3.0, 4.0)


def test_a_cache_that_finds_no_memory_is_one_line(
    tiny_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> KVCache:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(KVCache, "allot", refuse)
    assert main(["--model", str(tiny_dir), "--growth", "--batch-size", "10000"]) == 2
    err = capsys.readouterr().err
    assert re.search(r"10000 sequences of \d+ tokens do not fit .*; give a smaller --batch-size", err)
