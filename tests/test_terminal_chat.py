"""A conversation at the terminal, with lines of stdin for what a person types."""

from __future__ import annotations

import io
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import write_checkpoint
from tokenizer_files import write_json

from minipyramid import LLM, Conversation, SamplingParams
from minipyramid.generate import main


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat")
    write_checkpoint(path, vocab_size=write_json(path), max_position_embeddings=300)
    (path / "chat_template.jinja").write_text(
        "{% for m in messages %}<|start_header_id|>{{ m.role }}: {{ m.content }}<|eot_id|>{% endfor %}"
        "<|start_header_id|>assistant:"
    )
    return path


@pytest.fixture
def talk(directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give lines (an exception is raised in place of one), get status, stdout and stderr."""

    def run(*lines: str | type[BaseException], flags: str = "--max-new-tokens 10") -> tuple[int, str, str]:
        left = iter(lines)

        def read(typed: bool) -> str:
            line = next(left, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("minipyramid.cli.chat.read_line", read)
        status = main(
            ["--chat", "--model", str(directory), "--policy", "pyramid", "--ignore-eos", *flags.split()]
        )
        return status, *capsys.readouterr()

    return run


def test_a_home_that_is_not_there_leaves_the_conversation(talk: Any) -> None:
    """It was a RuntimeError, and the conversation was lost."""
    status, out, err = talk("Who is there?", "/save ~nosuch/x", "And then?")
    assert status == 0
    assert out.count("\n") == 2
    assert "(~nosuch/x cannot be written" in err


def test_answers_go_to_stdout_and_are_those_of_the_library(talk: Any, directory: Path) -> None:
    llm, conversation = LLM(directory, policy="pyramid"), Conversation()
    params = SamplingParams(max_new_tokens=10, ignore_eos=True)
    expected = []
    for i, text in enumerate(("Who is there?", "And then?")):
        opening = [] if i else [{"role": "system", "content": "brief"}]
        answer = llm.chat([*opening, {"role": "user", "content": text}], params, conversation)
        expected.append(answer.text.lstrip())
    status, out, _ = talk("Who is there?", "", "And then?", flags="--max-new-tokens 10 --system brief")
    assert (status, out) == (0, "".join(f"{text}\n" for text in expected))


def test_commands_reset_save_and_tell(talk: Any, tmp_path: Path) -> None:
    file = tmp_path / "said.json"
    status, out, err = talk("Hello", f"/save {file}", "/stats", "/reset", "/stats", "/what", "/save /no/such")
    assert status == 0
    assert [message["role"] for message in json.loads(file.read_text())] == ["user", "assistant"]
    assert json.loads(file.read_text())[1]["content"] == out.strip()
    assert "2 messages" in err
    assert "of the full cache" in err
    assert "0 messages, 0 of 300 tokens" in err
    assert "/reset begins anew, /save FILE" in err
    assert "/no/such cannot be written" in err


def test_the_end_of_the_context_is_told_before_it_comes(talk: Any) -> None:
    status, out, err = talk("a b c d e f", "x" * 400, "again", "a", flags="--max-new-tokens 120")
    assert "tokens of the context are left; /reset begins anew" in err
    assert "are left of the context; shorten it, or begin anew by /reset" in err
    assert "the context has room for an answer of" in err
    assert out.count("\n") >= 2
    assert status == 2
    assert "of 4 turns were not answered" in err


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(
    talk: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stream_chat, file = LLM.stream_chat, tmp_path / "said.json"

    def interrupted(self: LLM, messages: Any, *args: Any, **how: Any) -> Iterator[str]:
        pieces = stream_chat(self, messages, *args, **how)
        if messages[-1]["content"] == "stop":
            yield next(pieces)
            yield next(pieces)
            raise KeyboardInterrupt
        if messages[-1]["content"] == "stop at once":
            raise KeyboardInterrupt
        yield from pieces

    monkeypatch.setattr(LLM, "stream_chat", interrupted)
    lines = ("Hello", "stop", "/stats", "stop at once", KeyboardInterrupt, "go on", f"/save {file}")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    status, _, err = talk(*lines)
    assert status == 0
    assert "(stopped)" in err
    assert "the question is forgotten" in err
    assert "(Ctrl-D leaves)" in err
    contents = [message["content"] for message in json.loads(file.read_text()) if message["role"] == "user"]
    assert contents == ["Hello", "stop", "go on"]


def test_ctrl_c_ends_a_conversation_that_nobody_types(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer was stopped, and the next line of the file was answered."""

    def interrupted(self: LLM, *args: Any, **how: Any) -> Iterator[str]:
        yield "So"
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "stream_chat", interrupted)
    status, out, err = talk("Hello", "And then?")
    assert (status, out) == (130, "So\n")
    assert err.count("(stopped)") == 1


def test_a_closed_stdin_and_bytes_that_are_no_text_are_one_line(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for stdin, told in (
        (None, "one of them is closed"),
        (io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"), "utf-8"),
    ):
        monkeypatch.setattr("sys.stdin", stdin)
        assert main(["--chat", "--model", str(directory)]) == 2
        assert told in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--chat", "hello"], "leave a prompt out"),
        (["--chat", "--json"], "leave --json out"),
        (["--system", "x", "hello"], "is for --chat"),
        (["--chat-format", "vicuna", "hello"], "is for --chat and --batch"),
        (["--chat", "--chat-format", "lama2"], "did you mean 'llama2'"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(
    argv: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert word in err


class Terminal:
    """A program on a terminal of its own, as a person sees it."""

    def __init__(self, command: list[str]) -> None:
        pty = pytest.importorskip("pty")
        self.end, its_end = pty.openpty()
        # In a session of its own, whose terminal this becomes, so that Ctrl-C reaches it.
        setup = "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        setup += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        whole = [sys.executable, "-c", setup, *command]
        self.process = subprocess.Popen(whole, stdin=its_end, stdout=its_end, stderr=its_end)
        os.close(its_end)
        self.shown = ""

    def type(self, keys: str) -> None:
        self.shown = ""
        os.write(self.end, keys.encode())

    def wait_for(self, text: str, more: int = 0, seconds: float = 60) -> None:
        """Until the text is shown, and so many characters after it."""
        until = time.monotonic() + seconds
        while text not in self.shown or len(self.shown.split(text, 1)[1]) < more:
            ready, _, _ = select.select([self.end], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"{text!r} did not come: {self.shown!r}"
            self.shown += os.read(self.end, 4096).decode(errors="replace")


def test_a_person_at_a_terminal(tmp_path: Path) -> None:
    """A turn, its figures, an answer that Ctrl-C stops, and Ctrl-D.

    Ctrl-C once ended the process that renders templates as well, and no turn could follow.
    """
    write_checkpoint(tmp_path, vocab_size=write_json(tmp_path), max_position_embeddings=4096)
    flags = ["--chat", "--chat-format", "llama3", "--ignore-eos", "--policy", "pyramid"]
    flags += ["--max-new-tokens", "300", "--temperature", "1", "--seed", "1", "--model", str(tmp_path)]
    terminal = Terminal(["-m", "minipyramid.generate", *flags])
    try:
        terminal.wait_for("Ctrl-C stops an answer\r\n> ")
        terminal.type("Hello\n")
        terminal.wait_for("Hello\r\n", more=20)
        terminal.type("\x03")
        terminal.wait_for("(stopped)\r\n> ")
        terminal.type("/stats\n")
        terminal.wait_for("2 messages, ")
        terminal.wait_for("of the full cache\r\n> ")
        terminal.type("And then?\n")
        terminal.wait_for("And then?\r\n", more=20)
        terminal.wait_for("\r\n> ")  # it ends by itself
        terminal.type("/stats\n")
        terminal.wait_for("4 messages, ")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.end)
