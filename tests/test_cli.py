"""The command: text on stdout and nothing else, one line on stderr for what is wrong, and its exit status."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import WEIGHTS

from minipyramid import LLM, PyramidConfig, RequestError, SamplingParams, __version__
from minipyramid.cli.terminal import LoadingLine, write_whole
from minipyramid.generate import build_parser, main

FIELDS = [
    "text", "token_ids", "finish_reason", "prompt_tokens", "new_tokens", "kv_lengths", "kv_bytes",
    "kv_bytes_full", "kv_share", "prefill_s", "decode_s", "tokens_per_s", "policy", "pyramid",
    "kept_positions",
]  # fmt: skip


@pytest.fixture
def run(tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Call the command on the tiny checkpoint; returns (exit status, stdout, stderr)."""

    def call(*argv: str) -> tuple[int, str, str]:
        status = main(["--policy", "full", *argv, "--model", str(tiny_dir)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_stdout_is_the_text(run: Any, tiny: LLM) -> None:
    flags = [
        "--max-new-tokens",
        "20",
        "--temperature",
        "1.5",
        "--seed",
        "3",
        "--top-k",
        "40",
        "--top-p",
        "0.9",
    ]
    flags += [
        "--min-p",
        "0.01",
        "--repetition-penalty",
        "1.1",
        "--stop",
        "fox",
        "--stop",
        "qq",
        "--ignore-eos",
    ]
    params = SamplingParams(
        max_new_tokens=20, temperature=1.5, seed=3, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.1,
        stop=("fox", "qq"), ignore_eos=True,
    )  # fmt: skip
    assert run("the fox", *flags) == (0, tiny.generate("the fox", params)[0].text + "\n", "")


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--temperature", "3"), ("--top-k", "1"), ("--top-p", "0.01"), ("--min-p", "1"),
     ("--repetition-penalty", "9"), ("--seed", "4"), ("--max-new-tokens", "5")],
)  # fmt: skip
def test_every_sampling_flag_changes_the_text(run: Any, flag: str, value: str) -> None:
    """No flag is parsed and ignored."""
    base = ["the fox", "--temperature", "1", "--seed", "3", "--max-new-tokens", "100", "--ignore-eos"]
    assert run(*base)[1] != run(*base, flag, value)[1]


def test_json_holds_the_fields_of_the_contract(run: Any, tiny: LLM) -> None:
    status, out, err = run("the fox", "--json", "--max-new-tokens", "7", "--ignore-eos")
    figures = json.loads(out)
    (completion,) = tiny.generate("the fox", SamplingParams(max_new_tokens=7, ignore_eos=True))
    assert (status, err, list(figures)) == (0, "", FIELDS)
    assert figures["text"] == completion.text
    assert figures["token_ids"] == completion.token_ids
    assert figures["kv_lengths"] == [figures["prompt_tokens"] + 7] * 3
    assert figures["kv_bytes"] == figures["kv_bytes_full"] == sum(figures["kv_lengths"]) * 2 * 2 * 8 * 4
    assert (figures["kv_share"], figures["pyramid"], figures["finish_reason"]) == (1.0, "full", "length")
    assert figures["tokens_per_s"] == pytest.approx(7 / figures["decode_s"])


def test_several_prompts_come_in_order(run: Any, tiny: LLM, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("a time\n")
    prompts = ["the fox", "once", "a time\n"]
    status, out, _ = run(
        "the fox", "--prompt", "once", "--prompt-file", str(tmp_path / "prompt.txt"), "--json"
    )
    texts = [completion["text"] for completion in json.loads(out)["completions"]]
    assert status == 0
    assert texts == [c.text for c in tiny.generate(prompts)]
    assert run("the fox", "--prompt", "once")[1] == "\n\n".join(texts[:2]) + "\n"


def test_a_prompt_from_stdin(run: Any, monkeypatch: pytest.MonkeyPatch, tiny: LLM) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("caf\u00e9 fox".encode())))
    assert run("--prompt-file", "-")[1] == tiny.generate("caf\u00e9 fox")[0].text + "\n"


def test_a_byte_order_mark_is_no_part_of_a_prompt(run: Any, tmp_path: Path, tiny: LLM) -> None:
    """Editors on Windows write one; it became the prompt's first character, and what follows no beginning."""
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfthe fox\nonce \xef\xbb\xbfupon")
    expected = tiny.generate("the fox\nonce \ufeffupon")[0].text
    assert run("--prompt-file", str(tmp_path / "prompt.txt"))[1] == expected + "\n"


def test_a_prompt_without_end_is_refused_and_the_largest_is_read(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device, or a pipe that never ends, was read until the memory was full."""
    monkeypatch.setattr("minipyramid.cli.prompts.MOST_BYTES", 1 << 20)
    largest, larger = tmp_path / "largest.txt", tmp_path / "larger.txt"
    largest.write_bytes(b"the fox" + b"\n" * ((1 << 20) - 7))
    larger.write_bytes(b"the fox" + b"\n" * ((1 << 20) - 6))
    assert run("--prompt-file", str(largest), "--lines")[0] == 0
    for name in (str(larger), "-"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(larger.open("rb")))
        status, out, err = run("--prompt-file", name, "--lines")
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert f"--prompt-file {name} is larger than 1 MiB" in err


def test_the_version_is_printed_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version", "--model", "/no/such/model"]) == 0
    assert capsys.readouterr().out == f"minipyramid {__version__}\n"


def test_stats_go_to_stderr(run: Any) -> None:
    status, out, err = run("the fox", "--stats", "--max-new-tokens", "4", "--ignore-eos")
    assert status == 0
    assert "kv_bytes" not in out
    assert [line.split(":")[0] for line in err.splitlines()] == FIELDS[2:-1]


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ([], "no prompt"),
        ([""], "empty"),
        (["fox", "--temperature", "-1"], "temperature"),
        (["fox", "--temperature", "nan"], "temperature"),
        (["fox", "--temperature", "hot"], "temperature"),
        (["fox", "--top-p", "0"], "top_p"),
        (["fox", "--top-k", "-1"], "top_k"),
        (["fox", "--min-p", "2"], "min_p"),
        (["fox", "--repetition-penalty", "0"], "repetition_penalty"),
        (["fox", "--max-new-tokens", "0"], "max_new_tokens"),
        (["fox", "--seed", "-1"], "seed"),
        (["fox", "--stop", ""], "stop"),
        (["fox", "--max-new-tokens", "1000"], "context of 256"),
        (["fox", "--dtype", "float8"], "float8"),
        (["fox", "--device", "tpu"], "tpu"),
        (["fox", "--threads", "0"], "--threads"),
        (["fox", "--threads", "9999999999"], "--threads"),
        (["fox", "--policy", "llama9"], "llama3-8b"),
        (["fox", "--policy", "none.json"], "none.json is missing; expected a policy's settings"),
        (["fox", "--policy", "auto-split"], "no policy 'auto' for 'auto-split'; expected one of streaming"),
        (["fox", "--policy", "snapk-split"], "did you mean 'snapkv'?"),
        (["--max-tokens", "5", "fox"], "there is no flag --max-tokens; did you mean --max-new-tokens?"),
        (["--zzz=5", "fox"], "there is no flag --zzz; --help lists them"),
        (["fox", "fox"], "unrecognized arguments: fox"),
        (
            ["fox", "--policy", "llama2-7b-split"],
            "no policy 'llama2-7b' for 'llama2-7b-split'; expected one of",
        ),
        (["--prompt-file", "/dev/zero"], "/dev/zero is larger than 64 MiB"),
        (["fox", "--prompt-file", "/no/such/file"], "/no/such/file"),
        (["fox", "--pyramids", "auto"], "--pyramids"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    run: Any, capsys: pytest.CaptureFixture[str], argv: list[str], word: str
) -> None:
    try:
        status, out, err = run(*argv)
    except SystemExit as exit_:  # argparse's own
        captured = capsys.readouterr()
        status, out, err = exit_.code, captured.out, captured.err
    assert (status, out) == (2, "")
    assert err.startswith("minipyramid: error: ")
    assert word in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "argv", [["", "--json"], ["fox", "--prompt", ""], ["fox", "--json", "--max-new-tokens", "999"]]
)
def test_bad_input_prints_nothing_on_stdout(run: Any, argv: list[str]) -> None:
    """An empty JSON object or line would look like a result."""
    status, out, _ = run(*argv)
    assert (status, out) == (2, "")


def test_an_error_is_one_line_whatever_it_names(run: Any, tmp_path: Path) -> None:
    status, _, err = run("--prompt-file", str(tmp_path / "no\nsuch"))
    assert (status, err.count("\n")) == (2, 1)


def test_a_name_that_is_too_long_is_no_output_that_cannot_be_written(run: Any, tmp_path: Path) -> None:
    status, _, err = run("--batch", "x" * 300, "--output", str(tmp_path / "out"))
    assert (status, err.count("\n")) == (2, 1)
    assert "a file cannot be read or written" in err


def test_a_shape_has_no_weights(capsys: pytest.CaptureFixture[str]) -> None:
    """It was told to be no repository id, where the README has just planned it."""
    assert main(["the fox", "--model", "shape:llama2-13b"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "shape:llama2-13b has no weights" in line


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("flags", [["the fox"], ["--version"], ["--help"]], ids=str)
def test_a_full_disk_is_one_line(tiny_dir: Path, flags: list[str], unbuffered: str) -> None:
    """What argparse prints itself was lost without a word, with exit status 0."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    argv = [sys.executable, "-m", "minipyramid.generate", *flags, "--model", str(tiny_dir)]
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            argv, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=120, env=env
        )
    assert done.returncode == 2
    assert done.stderr.startswith("minipyramid: error: the output cannot be written")
    assert done.stderr.count("\n") == 1


def test_flags_are_not_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fox", "--temp", "1"])
    assert "--temp" in capsys.readouterr().err


@pytest.mark.skipif(not WEIGHTS.exists(), reason="no embedded checkpoint in this tree")
def test_the_main_job_streams_text_in_any_locale() -> None:
    """The README's command in a process of its own: text on stdout piece by piece, nothing on stderr."""
    argv = [
        sys.executable,
        "-m",
        "minipyramid.generate",
        "Once upon a time",
        "--max-new-tokens",
        "200",
        "--ignore-eos",
    ]
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": ""}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 1 << 16)
        rest, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, b"")
    assert first
    assert len(rest) > len(first)
    assert len((first + rest).decode().split()) > 50


def test_a_missing_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fox", "--model", "/no/such/model"]) == 2
    assert capsys.readouterr().err.startswith("minipyramid: error: /no/such/model does not exist")


def test_an_undecodable_prompt_file_is_one_line(run: Any, tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    status, _, err = run("--prompt-file", str(tmp_path / "latin1.txt"))
    assert (status, err.count("\n")) == (2, 1)
    assert "UTF-8" in err


def test_interrupted_keeps_what_was_finished(run: Any, monkeypatch: pytest.MonkeyPatch, tiny: LLM) -> None:
    """Ctrl-C after the first of two prompts has ended prints its text and exits with 130."""
    completions, expected = LLM.completions, tiny.generate("the fox")[0].text

    def interrupted(self: LLM, *args: Any) -> Iterator[Any]:
        yield next(completions(self, *args))
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "completions", interrupted)
    status, out, err = run("the fox", "--prompt", "once", "--json")
    assert status == 130
    assert [c["text"] for c in json.loads(out)["completions"]] == [expected]
    assert "interrupted" in err


def test_interrupted_while_streaming(tiny_dir: Path) -> None:
    """A real SIGINT in a real process: the text so far stands on stdout, and no traceback on stderr."""
    argv = [sys.executable, "-m", "minipyramid.generate", "the fox", "--model", str(tiny_dir), "--ignore-eos"]
    argv += ["--max-new-tokens", "250", "--temperature", "1", "--seed", "1"]
    slow = "import time, minipyramid.engine as e; c = e.choose; "
    slow += "e.choose = lambda *a: (time.sleep(0.05), c(*a))[1];"
    code = f"{slow} import sys; from minipyramid.generate import main; sys.exit(main({argv[3:]!r}))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert first
    assert rest.endswith(b"\n")
    assert b"Traceback" not in err


def test_progress_shows_only_on_a_terminal_and_only_when_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = {}
    for name, stream, quiet, slow_after in (
        ("slow", Terminal(), False, -1.0),
        ("quick", Terminal(), False, 1e9),
        ("quiet", Terminal(), True, -1.0),
        ("no terminal", io.StringIO(), False, -1.0),
    ):
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.setattr("minipyramid.cli.terminal.SLOW_S", slow_after)
        monkeypatch.setattr("minipyramid.cli.terminal.REFRESH_S", -1.0)
        with LoadingLine(quiet) as line:
            line.update(1, 4)
        shown[name] = stream.getvalue()
    assert shown == {
        "slow": "\rloading weights  25 %\x1b[K\r\x1b[K",
        "quick": "",
        "quiet": "",
        "no terminal": "",
    }


def test_many_prompts_tell_how_many_wait_run_and_are_finished(
    run: Any, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr("minipyramid.cli.terminal.ProgressLine.write", lambda self, text: lines.append(text))
    need = LLM(tiny_dir).plan([4], 3).needs[0].bytes(2 * 2 * 8 * 4)
    flags = ["--max-new-tokens", "3", "--ignore-eos", "--kv-memory", str(2 * need)]
    assert run("the fox", "--prompt", "the fox", "--prompt", "the fox", *flags)[0] == 0
    told = [line.split(", ")[:3] for line in lines if "waiting" in line]
    assert told[0] == ["1 waiting", "2 running", "0 finished"]
    assert told[-1] == ["0 waiting", "0 running", "3 finished"]


def test_the_pyramid_is_heeded(run: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"recent_ratio": 0.1, "exceed_length_to_compress": 4}
    (tmp_path / "p.json").write_text(json.dumps(settings))
    flags = ["the fox", "--json", "--max-new-tokens", "60", "--ignore-eos"]
    full, pruned = (json.loads(run(*flags, "--policy", p)[1]) for p in ("full", str(tmp_path / "p.json")))
    assert pruned["kv_lengths"] == PyramidConfig(**settings).kv_lengths(full["prompt_tokens"], 60, 3)
    assert pruned["kv_lengths"] == [len(kept) for kept in pruned["kept_positions"]]
    assert pruned["kv_share"] < full["kv_share"] == 1
    assert pruned["pyramid"] == str(tmp_path / "p.json")


def test_threads_are_set(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    assert run("the fox", "--threads", "1")[0] == 0
    assert threads == [1]


def test_dtype_is_heeded(run: Any) -> None:
    flags = ["the fox", "--json", "--max-new-tokens", "4", "--ignore-eos"]
    full, half = (
        json.loads(run(*flags, "--dtype", dtype)[1])["kv_bytes"] for dtype in ("float32", "bfloat16")
    )
    assert full == 2 * half


def test_help_names_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        build_parser().parse_args(["--help"])
    assert exit_.value.code == 0
    assert "usage: minipyramid" in capsys.readouterr().out


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full"])
@pytest.mark.parametrize(
    ("flags", "status", "words"), [("Once --stats", 0, True), ("Once --top-k x", 2, False)]
)
def test_where_stderr_cannot_be_written_stdout_has_the_text_alone(
    stderr: str, flags: str, status: int, words: bool, tiny_dir: Path
) -> None:
    """Figures and errors were printed among the text, or ended the command with 1."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    command = (
        f"{sys.executable} -m minipyramid.generate {flags} --model {tiny_dir} --max-new-tokens 3 {stderr}"
    )
    ran = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, check=False)
    assert ran.returncode == status
    assert b"finish_reason" not in ran.stdout
    assert b"error" not in ran.stdout
    assert bool(ran.stdout) == words


def test_a_plan_refuses_the_flags_of_a_batch(run: Any) -> None:
    """They were ignored there, without a word."""
    assert run("--plan", "--prompt-tokens", "5", "--output", "x")[0] == 2


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that was full left the first half of the new picture in place of the old one."""
    file, link = tmp_path / "old.html", tmp_path / "link.html"
    file.write_text("old")
    link.symlink_to(file)
    write_whole("--html", link, b"new")
    assert file.read_text() == "new"
    assert link.is_symlink()
    write = Path.write_bytes

    def half(path: Path, data: bytes) -> int:
        write(path, data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(RequestError, match=r"--html .*old.html cannot be written: .*No space"):
        write_whole("--html", file, b"newer")
    assert file.read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.html", "old.html"]
