"""`python -m minipyramid.generate`: text to stdout, everything else to stderr, one line for what is wrong.

Exit status 0; 2 for bad input; 130 after Ctrl-C, with what was finished kept; 1 for a defect of ours.
"""

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from minipyramid import LLM, Completion, MiniPyramidError, RequestError, SamplingParams
from minipyramid.plan_table import as_dict, plan_of, table
from minipyramid.schedule import Scheduler

DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "weights" / "storyteller"
DEFAULT_TEXT = DEFAULT_MODEL.parent / "books-sample.txt"  # to measure by
SLOW_S, REFRESH_S = 1.0, 0.1  # what is quicker shows no progress, and how often it is written
Line = TypeVar("Line", bound="ProgressLine")
MOST_THREADS = 1024  # beyond, starting them fails


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line without the usage above it."""

    def error(self, message: str) -> NoReturn:
        print_error(message)
        self.exit(2)


def print_error(error: object) -> None:
    """One line on stderr, also where what it names holds a line break."""
    print("minipyramid: error:", " ".join(str(error).split()), file=sys.stderr)


def discard_output() -> None:
    """Python flushes stdout once more at exit; what could not be written must not fail there again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser() -> Parser:
    """The flags; those of sampling have the names and defaults of `SamplingParams`."""
    parser = Parser(prog="minipyramid", allow_abbrev=False, description="Continue a prompt with a Llama checkpoint.")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="text to continue")
    parser.add_argument(
        "--prompt", dest="prompts", metavar="TEXT", action="append", default=[], help="may be given several times"
    )
    parser.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a file; - is stdin")
    parser.add_argument(
        "--model",
        default=str(DEFAULT_MODEL),
        metavar="PATH_OR_REPO",
        help="checkpoint directory or hub repository (default: the embedded checkpoint)",
    )
    parser.add_argument("--compile", action="store_true", help="compile decode steps; slow to start")
    parser.add_argument("--revision", help="branch, tag or commit of a hub repository")
    parser.add_argument(
        "--pyramid",
        default="auto",
        metavar="NAME_OR_FILE",
        help="off, auto (the checkpoint's pyramid.json, else the preset for so many layers), a preset, or a JSON file",
    )
    parser.add_argument(
        "--kv-budget", type=float, metavar="SHARE", help="hold at most this share of the full cache, as 0.454"
    )
    parser.add_argument(
        "--kv-memory",
        metavar="SIZE",
        help="for keys and values of all that runs, as 2GiB (default: half of what is free)",
    )
    parser.add_argument(
        "--plan", action="store_true", help="print what each layer will hold and exit, without loading weights"
    )
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="with --plan: a prompt of so many tokens")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    default = SamplingParams()
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-new-tokens", type=int, metavar="N", help=f"default {default.max_new_tokens}")
    sampling.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default)")
    sampling.add_argument("--top-k", type=int, metavar="K")
    sampling.add_argument("--top-p", type=float, metavar="P")
    sampling.add_argument("--min-p", type=float, metavar="P")
    sampling.add_argument("--repetition-penalty", type=float, metavar="R")
    sampling.add_argument("--seed", type=int, metavar="N")
    sampling.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be given several times"
    )
    sampling.add_argument("--ignore-eos", action="store_true", default=None, help="go on past the end of text")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object on stdout instead of text")
    output.add_argument("--stats", action="store_true", help="the same figures on stderr after the text")
    output.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = build_parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # whatever the terminal's own is, so that texts can be piped
    return exit_status(lambda: run(args))


def exit_status(command: Callable[[], None]) -> int:
    """Run what a command does; what goes wrong is told in one line, and by the status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a text or a name may hold what the terminal's own encoding lacks
    try:
        command()
        print(end="", flush=True)  # here, where a failure can still be told
    except MiniPyramidError as error:
        print_error(error)
        return 2
    except BrokenPipeError:  # the reader has seen enough, as in `minipyramid ... | head`
        discard_output()
    except OSError as error:  # a full disk behind a redirection, say
        discard_output()
        print_error(f"the output cannot be written ({error})")
        return 2
    except KeyboardInterrupt:
        print("\nminipyramid: interrupted", file=sys.stderr)
        return 130
    return 0


def run(args: argparse.Namespace) -> None:
    """Load, generate, print; a single prompt is streamed."""
    params = read_params(args)
    if args.plan:
        plan = plan_of(args, read_prompts(args, needed=False), params.max_new_tokens)
        print(json.dumps(as_dict(plan, args.kv_memory)) if args.json else table(plan, args.kv_memory))
        return
    if args.prompt_tokens is not None:
        raise RequestError("--prompt-tokens is for --plan; give a prompt to generate from")
    prompts = read_prompts(args)
    set_threads(args.threads)
    with LoadingLine(quiet=args.quiet) as line:
        llm = LLM(
            args.model,
            pyramid=args.pyramid,
            kv_budget=args.kv_budget,
            kv_memory=args.kv_memory,
            dtype=args.dtype,
            device=args.device,
            compile=args.compile,
            revision=args.revision,
            progress=None if args.quiet else line.update,
        )
    done: dict[int, Completion] = {}
    if len(prompts) == 1 and not args.json:
        done[0] = stream(llm, prompts[0], params)
    else:
        try:
            with RunningLine(quiet=args.quiet) as running:
                done.update(llm.completions(prompts, params, running.update))
        finally:  # also after Ctrl-C: what was finished is kept
            print_all([done[i] for i in sorted(done)], args, single=len(prompts) == 1)
    if args.stats:
        for i in sorted(done):
            print_stats(done[i], args.pyramid)


def set_threads(threads: int | None) -> None:
    """Use so many CPU threads; None leaves torch's own number."""
    if threads is not None:
        if not 1 <= threads <= MOST_THREADS:
            raise RequestError(f"--threads is {threads}, expected 1 to {MOST_THREADS}")
        torch.set_num_threads(threads)


def print_all(completions: list[Completion], args: argparse.Namespace, single: bool) -> None:
    """Texts with an empty line between them, or one JSON object; nothing where nothing was finished."""
    if args.json and completions:
        figures = [describe(completion, args.pyramid) for completion in completions]
        print(json.dumps(figures[0] if single else {"completions": figures}))
    elif completions:
        print("\n\n".join(completion.text for completion in completions))


def stream(llm: LLM, prompt: str, params: SamplingParams) -> Completion:
    """Print the text of one prompt as it comes."""
    pieces = llm.stream(prompt, params)
    try:
        while True:
            try:
                print(next(pieces), end="", flush=True)
            except StopIteration as end:
                completion: Completion = end.value
                return completion
    finally:
        print(flush=True)


def read_prompts(args: argparse.Namespace, needed: bool = True) -> list[str]:
    """PROMPT, every --prompt and --prompt-file, in this order."""
    prompts: list[str] = ([args.prompt] if args.prompt is not None else []) + args.prompts
    if args.prompt_file is not None:
        try:
            if args.prompt_file == "-" and sys.stdin is None:
                raise OSError("stdin is closed")
            data = sys.stdin.buffer.read() if args.prompt_file == "-" else Path(args.prompt_file).read_bytes()
            prompts.append(data.decode("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"--prompt-file {args.prompt_file} cannot be read as UTF-8 text: {error}") from error
    if needed and not prompts:
        raise RequestError("no prompt; give one as an argument, with --prompt, or with --prompt-file")
    return prompts


def read_params(args: argparse.Namespace) -> SamplingParams:
    """Sampling fields that were given; the others keep their defaults."""
    names = [field.name for field in fields(SamplingParams)]
    return SamplingParams(**{name: vars(args)[name] for name in names if vars(args).get(name) is not None})


def describe(completion: Completion, pyramid: str) -> dict[str, Any]:
    """The figures of one completion, as `--json` prints them."""
    new = len(completion.token_ids)
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(completion.prompt_token_ids),
        "new_tokens": new,
        "kv_lengths": completion.kv_lengths,
        "kv_bytes": completion.kv_bytes,
        "kv_bytes_full": completion.kv_bytes_full,
        "kv_share": completion.kv_bytes / completion.kv_bytes_full,
        "prefill_s": completion.prefill_s,
        "decode_s": completion.decode_s,
        "tokens_per_s": new / completion.decode_s,
        "pyramid": pyramid,
        "kept_positions": completion.kept_positions,
    }


def print_stats(completion: Completion, pyramid: str) -> None:
    """The same figures on stderr, a line each; what stdout shows already is left out."""
    for name, value in describe(completion, pyramid).items():
        if name not in ("text", "token_ids", "kept_positions"):
            shown = f"{value:.4g}" if isinstance(value, float) else value
            print(f"{name + ':':15}{shown}", file=sys.stderr)


class ProgressLine:
    """A line on a terminal's stderr that is written over, if it takes longer than a second, and wiped at the end."""

    def __init__(self, quiet: bool) -> None:
        self.wanted = sys.stderr is not None and sys.stderr.isatty() and not quiet
        self.began = self.written = time.monotonic()

    def write(self, text: str) -> None:
        now = time.monotonic()
        if self.wanted and now - self.began > SLOW_S and now - self.written > REFRESH_S:
            self.written = now
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)

    def __enter__(self: Line) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        if self.written > self.began:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class LoadingLine(ProgressLine):
    """How much of a checkpoint is loaded."""

    def update(self, loaded: int, of: int) -> None:
        self.write(f"loading weights {100 * loaded // of:3d} %")


class RunningLine(ProgressLine):
    """How many requests wait, run and are finished, and how fast tokens come."""

    def update(self, now: Scheduler) -> None:
        running, rate = len(now.running), now.generated / (time.monotonic() - self.began)
        self.write(f"{len(now.waiting)} waiting, {running} running, {now.finished} finished, {rate:.0f} tokens/s")


if __name__ == "__main__":
    sys.exit(main())
