"""The checkpoint that a command's flags name."""

import argparse
from typing import Any

from minipyramid import LLM
from minipyramid.cli.terminal import LoadingLine, set_quiet, set_threads


def load(args: argparse.Namespace) -> LLM:
    """Load it as the flags say, which are named as the arguments of `LLM`, with a line of progress."""
    set_threads(args.threads)
    set_quiet(args.quiet)
    with LoadingLine(quiet=args.quiet) as line:
        return LLM(
            args.model,
            policy=args.policy,
            kv_budget=args.kv_budget,
            kv_memory=args.kv_memory,
            dtype=args.dtype,
            kv_dtype=args.kv_dtype,
            quantize=args.quantize,
            device=args.device,
            chat_format=args.chat_format,
            compile=args.compile,
            revision=args.revision,
            progress=None if args.quiet else line.update,
        )


def load_full(args: argparse.Namespace, **more: Any) -> LLM:
    """The same under the policy `full`, for a command that compares policies; without a line of progress."""
    how = {"dtype": args.dtype, "device": args.device, "quantize": args.quantize, "revision": args.revision}
    return LLM(args.model, policy="full", **how, **more)
