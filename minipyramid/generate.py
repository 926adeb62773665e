"""`python -m minipyramid.generate`: what is asked for to stdout, all else to stderr, one line for an error.

Exit status 0; 2 for bad input; 130 after Ctrl-C (a batch: 143 after SIGTERM), with what was finished kept; 1
for a defect of ours.
"""

import argparse
import io
import json
import sys
from dataclasses import fields
from typing import Any

from minipyramid import LLM, Completion, RequestError, SamplingParams, __version__
from minipyramid.cli.chat import TerminalChat
from minipyramid.cli.loading import load
from minipyramid.cli.plan_table import as_dict, plan_of, table
from minipyramid.cli.prompts import read_prompts
from minipyramid.cli.terminal import DEFAULT_MODEL, Parser, RunningLine, exit_status, tell
from minipyramid.policies import POLICIES


def build_parser() -> Parser:
    """The flags; those of sampling have the names and defaults of `SamplingParams`."""
    parser = Parser(
        prog="minipyramid", allow_abbrev=False, description="Continue a prompt with a Llama checkpoint."
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="text to continue")
    parser.add_argument(
        "--prompt",
        dest="prompts",
        metavar="TEXT",
        action="append",
        default=[],
        help="may be given several times",
    )
    parser.add_argument("--prompt-file", metavar="FILE", help="read a prompt from a file; - is stdin")
    parser.add_argument(
        "--lines", action="store_true", help="each line of --prompt-file is a prompt of its own"
    )
    chat = parser.add_argument_group("chat")
    chat.add_argument("--chat", action="store_true", help="a conversation; a line of stdin is a turn")
    chat.add_argument("--system", metavar="TEXT", help="with --chat: what the model is told first")
    chat.add_argument(
        "--chat-format",
        metavar="NAME",
        help="with --chat or --batch: llama2, llama3, zephyr, chatml, vicuna, or one of the checkpoint's "
        "named templates (default: its own)",
    )
    parser.add_argument(
        "--batch", metavar="FILE", help="a JSON object on each line: id, prompt, and any sampling fields"
    )
    parser.add_argument("--output", metavar="FILE", help="with --batch: where a record goes for each line")
    parser.add_argument("--resume", action="store_true", help="with --batch: go on with what --output holds")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="with --batch: refuse a file with a bad line before it starts, and name the first",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument(
        "--model",
        default=str(DEFAULT_MODEL),
        metavar="PATH_OR_REPO",
        help="checkpoint directory or hub repository (default: the embedded checkpoint)",
    )
    parser.add_argument("--compile", action="store_true", help="compile decode steps; slow to start")
    parser.add_argument("--revision", help="branch, tag or commit of a hub repository")
    parser.add_argument(
        "--policy",
        default="auto",
        metavar="NAME_OR_FILE",
        help="what the layers hold: auto (the checkpoint's pyramid.json, else the published settings nearest "
        f"in depth), {', '.join(POLICIES)}, a preset, a JSON file, or package.module:Name",
    )
    parser.add_argument(
        "--kv-budget",
        type=float,
        metavar="SHARE",
        help="hold at most this share of the full cache at the end of --max-new-tokens, as 0.454",
    )
    parser.add_argument(
        "--kv-memory",
        metavar="SIZE",
        help="for keys and values of all that runs, as 2GiB (default: half of what is free)",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print what each layer will hold and exit, without loading weights",
    )
    parser.add_argument(
        "--prompt-tokens", type=int, metavar="N", help="with --plan: a prompt of so many tokens"
    )
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument(
        "--kv-dtype", default="auto", metavar="NAME", help="int8 holds keys and values in 8 bits"
    )
    parser.add_argument("--quantize", metavar="int8", help="keep the weights of linear layers in 8 bits")
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
    sampling.add_argument(
        "--ignore-eos", action="store_true", default=None, help="go on past the end of text"
    )
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


def run(args: argparse.Namespace) -> None:
    """Load, generate, print; a single prompt is streamed."""
    if args.version:
        print(f"minipyramid {__version__}")
        return
    check_chat(args)
    params = read_params(args)
    if args.batch is not None:
        from minipyramid.batch.command import check_flags, run_batch

        check_flags(args)
        run_batch(load(args), params, args)
        return
    for flag in ("output", "resume", "strict"):
        if vars(args)[flag]:
            raise RequestError(f"--{flag} is for --batch; give a file of prompts, or leave it out")
    if args.plan:
        plan = plan_of(args, read_prompts(args, needed=False), params.max_new_tokens)
        print(json.dumps(as_dict(plan, args.kv_memory)) if args.json else table(plan, args.kv_memory))
        return
    if args.prompt_tokens is not None:
        raise RequestError("--prompt-tokens is for --plan; give a prompt to generate from")
    prompts = [] if args.chat else read_prompts(args)
    llm = load(args)
    if args.chat:
        llm.chat_format()  # what is wrong with it is told before the first turn
        chat = TerminalChat(llm, params, args.system)
        chat.run(lambda answer: print_stats(answer, args.policy) if args.stats else None)
        return
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
            print_stats(done[i], args.policy)


def check_chat(args: argparse.Namespace) -> None:
    """Refuse flags that mean nothing with --chat, or without it."""
    if args.chat:
        others = {"a prompt": args.prompt is not None or args.prompts, "--prompt-file": args.prompt_file}
        others |= {"--plan": args.plan, "--json": args.json, "--batch": args.batch, "--lines": args.lines}
        for name, given in others.items():
            if given:
                raise RequestError(f"--chat takes turns from stdin; leave {name} out")
    elif args.system is not None:
        raise RequestError("--system is for --chat; give --chat too, or leave --system out")
    elif args.chat_format is not None and args.batch is None:
        raise RequestError(
            "--chat-format is for --chat and --batch; give one of these, or leave --chat-format out"
        )


def print_all(completions: list[Completion], args: argparse.Namespace, single: bool) -> None:
    """Texts with an empty line between them, or one JSON object; nothing where nothing was finished."""
    if args.json and completions:
        figures = [describe(completion, args.policy) for completion in completions]
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


def read_params(args: argparse.Namespace) -> SamplingParams:
    """Sampling fields that were given; the others keep their defaults."""
    names = [field.name for field in fields(SamplingParams)]
    return SamplingParams(**{name: vars(args)[name] for name in names if vars(args).get(name) is not None})


def describe(completion: Completion, policy: str) -> dict[str, Any]:
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
        "policy": policy,
        "pyramid": policy,  # the same, by the name that it had first
        "kept_positions": completion.kept_positions,
    }


def print_stats(completion: Completion, policy: str) -> None:
    """The same figures on stderr, a line each, without the text and the long lists."""
    for name, value in describe(completion, policy).items():
        if name not in ("text", "token_ids", "kept_positions"):
            shown = f"{value:.4g}" if isinstance(value, float) else value
            tell(f"{name + ':':15}{shown}")


if __name__ == "__main__":
    sys.exit(main())
