"""`minipyramid --batch IN.jsonl --output OUT.jsonl`: the flags, signals, and what is told at the end."""

import argparse
from pathlib import Path

from minipyramid import LLM, RequestError, SamplingParams
from minipyramid.batch.job import run
from minipyramid.cli.terminal import RunningLine, Signals, tell

# Flags that are for prompts on the command line, by what the parser calls them.
OTHERS = {
    "prompt": "PROMPT",
    "prompts": "--prompt",
    "prompt_file": "--prompt-file",
    "lines": "--lines",
    "json": "--json",
    "stats": "--stats",
    "plan": "--plan",
    "prompt_tokens": "--prompt-tokens",
}


def check_flags(args: argparse.Namespace) -> None:
    """Refuse what does not go together, before weights are loaded."""
    if args.output is None:
        raise RequestError("--batch needs --output; name the file for the records")
    for name, flag in OTHERS.items():
        if vars(args)[name]:
            raise RequestError(f"{flag} does not go with --batch; leave one of them out")
    if not Path(args.batch).exists():
        raise RequestError(
            f"--batch {args.batch} does not exist; give a file with a JSON object on each line"
        )


def run_batch(llm: LLM, params: SamplingParams, args: argparse.Namespace) -> None:
    """Generate for the whole file; a signal ends it after the step that is being computed."""
    with Signals() as signals, RunningLine(quiet=args.quiet) as line:
        counts = run(
            llm,
            args.batch,
            args.output,
            params,
            resume=args.resume,
            strict=args.strict,
            stop=signals.came,
            on_step=line.update,
        )
    if not args.quiet:
        skipped = f", {counts.skipped} were there already" if counts.skipped else ""
        failed = f", {counts.failed} of them with an error" if counts.failed else ""
        done = counts.finished + counts.failed
        tell(f"minipyramid: {done} records written{failed}{skipped}")
