"""The checkpoint that a command's flags name."""

import argparse
from pathlib import Path
from typing import Any

from minipyramid import LLM
from minipyramid.cli.terminal import LoadingLine, set_quiet, set_threads
from minipyramid.errors import TokenizerError
from minipyramid.tokenizer import load_tokenizer


def load(args: argparse.Namespace) -> LLM:
    """Load it as the flags say, which are named as the arguments of `LLM`, with a line of progress."""
    set_threads(args.threads)
    set_quiet(args.quiet)
    check_repository(args)
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


def check_repository(args: argparse.Namespace) -> None:
    """Refuse a hub repository that lacks what texts, or `--chat`, need, before its weights are fetched."""
    if "prompt" not in args or args.batch:
        return  # a server's client, or a line of a batch, may give token ids
    from minipyramid.formats.chat import ChatFormat
    from minipyramid.formats.huggingface import read_config
    from minipyramid.hub import locate

    directory = locate(args.model, args.revision, progress=not args.quiet)
    if directory == Path(args.model).expanduser():
        return  # nothing is to be fetched
    tokenizer = load_tokenizer(directory, read_config(directory, args.quantize).vocab_size)
    if tokenizer is None:
        raise TokenizerError(f"{args.model} has no tokenizer.model or tokenizer.json, which texts need")
    if args.chat:
        ChatFormat(directory, tokenizer, args.chat_format)


def load_full(args: argparse.Namespace, **more: Any) -> LLM:
    """The same under the policy `full`, for a command that compares policies; without a line of progress."""
    how = {"dtype": args.dtype, "device": args.device, "quantize": args.quantize, "revision": args.revision}
    return LLM(args.model, policy="full", **how, **more)
