"""A conversation at the terminal: questions from stdin, answers to stdout, everything else to stderr.

The cache is carried on from turn to turn, so a turn costs its own tokens. Ctrl-C stops an answer and keeps
what was said so far, Ctrl-D leaves.
"""

import contextlib
import importlib
import json
import sys
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

from minipyramid import LLM, Completion, Conversation, MiniPyramidError, RequestError, SamplingParams
from minipyramid.cli.terminal import print_error, readable, tell

HELP = "/reset begins anew, /save FILE writes the messages, /stats tells what is held, Ctrl-D leaves"
OnAnswer = Callable[[Completion], None]


class TerminalChat:
    """What was said, and the cache of it."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self.llm, self.params = llm, params
        self.asked = self.answered = 0  # turns
        self.opening = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self.conversation, self.messages = Conversation(), list(self.opening)

    def run(self, on_answer: OnAnswer) -> None:
        """Take turns until the input ends; `on_answer` gets each answer that was finished.

        Raises `RequestError` at the end if turns were read from a file or pipe and one was not answered.
        """
        if sys.stdin is None or sys.stdout is None:  # as by `<&-`
            raise RequestError("a chat reads stdin and writes stdout, and one of them is closed; open both")
        typed = sys.stdin.isatty()
        if typed:
            with contextlib.suppress(ImportError):  # not every system has it
                importlib.import_module("readline")  # `input` then has editing and a history
            tell(f"{HELP}, Ctrl-C stops an answer")
        while True:
            try:
                line = read_line(typed)
            except EOFError:
                break
            except KeyboardInterrupt:
                if not typed:
                    raise
                tell("\n(Ctrl-D leaves)")
                continue
            if line.startswith("/"):
                self.obey(line)
            elif line.strip():
                self.asked += 1
                try:
                    self.answer(line, on_answer)
                except KeyboardInterrupt:  # before the answer began, or while what there is of it is kept
                    if not typed:
                        raise
                    tell("(stopped; the question is forgotten)")
        if typed:
            tell("")
        elif self.answered < self.asked:
            missing = f"{self.asked - self.answered} of {self.asked} turns were not answered"
            raise RequestError(f"{missing}; what stands above says why")

    def obey(self, line: str) -> None:
        """A command."""
        command, _, rest = line.partition(" ")
        if command == "/reset":
            self.reset()
            tell("(begun anew)")
        elif command == "/stats":
            self.tell_stats()
        elif command == "/save" and rest.strip():
            self.save(rest.strip())
        else:
            tell(HELP)

    def answer(self, text: str, on_answer: OnAnswer) -> None:
        """One turn; an error is told, and leaves the conversation as it was."""
        user = {"role": "user", "content": text}
        turn = [user] if self.conversation.token_ids else [*self.opening, user]
        pieces: list[str] = []
        try:
            request = self.llm.chat_request(turn, self.params, self.conversation)
            prompt = self.llm.engine.encode(request.prompt, "the message")
            room = self.room() - len(prompt)
            if room < 1:
                left = f"{self.room()} are left of the context"
                tell(f"(this needs {len(prompt)} tokens, and {left}; shorten it, or begin anew by /reset)")
                return
            params = self.params
            if room < params.max_new_tokens:
                tell(f"(the context has room for an answer of {room} tokens)")
                params = replace(params, max_new_tokens=room)
            stream = self.llm.stream_chat(turn, params, self.conversation)
            try:
                completion = print_pieces(stream, pieces)
            except KeyboardInterrupt:
                print(flush=True)
                self.keep_stopped(prompt, "".join(pieces))
                if not sys.stdin.isatty():  # there is nobody to go on with
                    raise
                if not pieces:
                    return
            else:
                on_answer(completion)
        except MiniPyramidError as error:
            print_error(error)
            return
        self.answered += 1
        self.messages += [user, {"role": "assistant", "content": "".join(pieces).strip()}]
        if self.room() < 2 * self.params.max_new_tokens:
            tell(f"({self.room()} tokens of the context are left; /reset begins anew)")

    def keep_stopped(self, prompt: list[int], text: str) -> None:
        """Put a turn whose answer was stopped into the cache, as far as it got."""
        if not text:
            tell("(stopped; the question is forgotten)")
            return
        tell("(stopped)")
        ids = self.llm.engine.need_tokenizer().encode(text, continues=True, literal=True)
        self.llm.prefill([prompt + ids], self.conversation)

    def room(self) -> int:
        """Tokens that are left of the context."""
        return self.llm.config.max_position_embeddings - len(self.conversation.token_ids)

    def tell_stats(self) -> None:
        """How much was said, and how much of it is held."""
        said, held = len(self.conversation.token_ids), self.conversation.held
        context = self.llm.config.max_position_embeddings
        tell(f"{len(self.messages)} messages, {said} of {context} tokens")
        if held:
            share = sum(held.lengths) / (said * len(held.lengths))
            tell(f"{readable(held.bytes)} held, {100 * share:.1f} % of the full cache")

    def save(self, file: str) -> None:
        """Write the messages as JSON."""
        written = json.dumps(self.messages, indent=1, ensure_ascii=False) + "\n"
        try:
            Path(file).expanduser().write_text(written, encoding="utf-8")
        except (OSError, ValueError, RuntimeError) as error:  # there may be no such home
            tell(f"({file} cannot be written: {error})")
        else:
            tell(f"({len(self.messages)} messages in {file})")


def read_line(typed: bool) -> str:
    """A line of stdin; with a prompt where a person types it. Raises `RequestError` where it is no text."""
    shown = "> " if typed else ""
    if typed and not sys.stdout.isatty():
        tell(shown, end="")  # stdout is for answers
        shown = ""
    try:
        return input(shown)
    except UnicodeDecodeError as error:
        raise RequestError(f"what stdin has is no {error.encoding}; give a text") from error


def print_pieces(stream: Generator[str, None, Completion], pieces: list[str]) -> Completion:
    """Print an answer as it comes, without space before it, and note its pieces."""
    while True:
        try:
            piece = next(stream)
        except StopIteration as end:
            print(flush=True)
            completion: Completion = end.value
            return completion
        print(piece if "".join(pieces).strip() else piece.lstrip(), end="", flush=True)
        pieces.append(piece)
