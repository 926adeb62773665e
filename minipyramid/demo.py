"""The command behind `train_free_demo.py`: the same prompts with the full cache and with the pyramid, and a picture.

Both sides run the same weights in the same process, one after the other, over prompts that all differ, and generate
equally many tokens (the end of text is passed over, and what follows it is not shown). Only generated tokens count as
throughput. It is one run of each and says what happens; for how fast it is, `python -m minipyramid.bench` takes turns.
"""

import argparse
import codecs
import copy
import io
import os
import random
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minipyramid import LLM, BudgetError, RequestError, SamplingParams, TokenizerError
from minipyramid.errors import check_number
from minipyramid.generate import (
    DEFAULT_MODEL,
    LoadingLine,
    Parser,
    RunningLine,
    exit_status,
    read_prompts,
    set_threads,
)
from minipyramid.picture import Picture, Side, Style, Token, load_matplotlib, page, plot, screen
from minipyramid.plan import Policy
from minipyramid.stories import filler, story
from minipyramid.tokenizer import Tokenizer

PROMPT_TOKENS, NEW_TOKENS, KV_BUDGET = 512, 64, 0.5
WARM_UP = 128  # tokens; first calls are slower, and neither side should pay for that
OF_STORIES = {"batch_size": (1, 1024), "prompt_tokens": (64, 10**7), "seed": (0, 2**63 - 1)}  # flags and their limits
MOST_COLUMNS = 110  # longer lines are hard to read


@dataclass(frozen=True)
class Case:
    """A prompt, and the answer that its story knows."""

    prompt: str
    answer: str | None = None


def build_parser() -> Parser:
    """A flag that `generate` has by the same name means the same."""
    parser = Parser(
        prog="train_free_demo.py",
        allow_abbrev=False,
        description="Run the full cache and the pyramid on the same prompts and show what was kept, and what it costs.",
    )
    parser.set_defaults(prompt=None)  # no positional one, for `read_prompts`
    parser.add_argument(
        "--prompt",
        dest="prompts",
        metavar="TEXT",
        action="append",
        default=[],
        help="may be given several times, the first is drawn (default: a story with a question about it)",
    )
    parser.add_argument("--prompt-file", metavar="FILE", help="read a prompt from a file; - is stdin")
    parser.add_argument("--batch-size", type=int, metavar="N", help="so many different stories (1); the first is drawn")
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help=f"length of a story ({PROMPT_TOKENS})")
    parser.add_argument("--seed", type=int, metavar="N", help="which stories are told (0)")
    parser.add_argument("--max-new-tokens", type=int, default=NEW_TOKENS, metavar="N", help=f"({NEW_TOKENS})")
    parser.add_argument(
        "--model",
        default=str(DEFAULT_MODEL),
        metavar="PATH_OR_REPO",
        help="checkpoint directory or hub repository (default: the embedded checkpoint)",
    )
    parser.add_argument(
        "--pyramid",
        metavar="NAME_OR_FILE",
        help="auto, a preset or a JSON file; as it is, unless --kv-budget is given as well",
    )
    parser.add_argument(
        "--kv-budget",
        type=float,
        metavar="SHARE",
        help=f"hold at most this share of the full cache (default without --pyramid: {KV_BUDGET})",
    )
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument(
        "--html", metavar="FILE", help="write a page on which each token of the prompt can be looked at"
    )
    parser.add_argument("--plot", metavar="FILE.png", help="draw what was kept (needs the extra plot)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = build_parser().parse_args(argv)
    return exit_status(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Compare, then print and write what was asked for."""
    given = check(args)
    picture = compare(args, given)
    write(args, picture)  # first, for whoever reads the screen may leave before its end
    print("\n".join(screen(picture, style_of_stdout())))


def write(args: argparse.Namespace, picture: Picture) -> None:
    """The files that were asked for."""
    if args.html is not None:
        try:
            Path(args.html).write_text(page(picture), encoding="utf-8", newline="")
        except OSError as error:
            raise RequestError(f"--html {args.html} cannot be written: {error}") from error
    if args.plot is not None:
        try:
            plot(picture, Path(args.plot))
        except OSError as error:
            raise RequestError(f"--plot {args.plot} cannot be written: {error}") from error


def check(args: argparse.Namespace) -> list[str]:
    """Refuse what can be refused before anything is loaded; returns the prompts that were given, if any."""
    for flag, (lowest, highest) in OF_STORIES.items():
        if vars(args)[flag] is not None:
            check_number(option(flag), vars(args)[flag], (int, lowest, highest), RequestError, TypeError)
    SamplingParams(max_new_tokens=args.max_new_tokens)
    if args.pyramid == "off":
        raise RequestError(
            "--pyramid is off, which is the other side of the comparison; leave it out, or name a preset"
        )
    check_files(args)
    prompts = read_prompts(args, needed=False)
    for i, prompt in enumerate(prompts):
        name = "the prompt" if len(prompts) == 1 else f"prompt {i}"
        if not prompt:
            raise RequestError(f"{name} is empty; give at least one token")
        if "\0" in prompt:
            raise RequestError(f"{name} holds a NUL character, as binary files do; give a text")
    for flag in OF_STORIES:
        if prompts and vars(args)[flag] is not None:
            raise RequestError(f"{option(flag)} is for stories, and prompts are given; leave it out, or the prompts")
    return prompts


def check_files(args: argparse.Namespace) -> None:
    """What is to be written can be."""
    taken: dict[Path, str] = {}
    for flag in ("prompt_file", "pyramid", "html", "plot"):
        path = Path(vars(args)[flag] or "-")
        if path != Path("-") and (other := taken.setdefault(Path(os.path.realpath(path)), flag)) != flag:
            raise RequestError(f"{option(other)} and {option(flag)} are both {path}; give two names")
    if args.plot is not None:
        if Path(args.plot).suffix != ".png":
            raise RequestError(f"--plot is {args.plot}, expected a name that ends with .png")
        load_matplotlib()
    for flag in ("html", "plot"):
        if vars(args)[flag] is not None:
            check_writable(option(flag), Path(vars(args)[flag]))


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_writable(flag: str, path: Path) -> None:
    """Opening it is the one check that tells; nothing is left behind. (A pipe's reader would take it for the end.)"""
    try:
        new = not path.exists()
        if not path.is_fifo():
            path.open("ab").close()
        if new:
            path.resolve().unlink()  # where a link leads
    except (OSError, RuntimeError) as error:
        raise RequestError(f"{flag} {path} cannot be written: {error}") from error


def compare(args: argparse.Namespace, given: list[str]) -> Picture:
    """Load once, run both sides, and collect what is drawn."""
    set_threads(args.threads)
    budget = KV_BUDGET if args.pyramid is None and args.kv_budget is None else args.kv_budget
    pyramid = "auto" if args.pyramid is None else args.pyramid
    with LoadingLine(quiet=False) as line:
        pruned = LLM(args.model, pyramid=pyramid, kv_budget=budget, dtype=args.dtype, progress=line.update)
    tokenizer = pruned.tokenizer
    if tokenizer is None:
        raise TokenizerError(f"{args.model} has no tokenizer.model, and the prompts here are texts; add it")
    full = under(Policy(None), pruned)
    cases = [Case(prompt) for prompt in given] or tell(args, pruned, tokenizer)
    names = ["the prompt" if len(cases) == 1 else f"prompt {i}" for i in range(len(cases))]
    ids = [tokenizer.encode(case.prompt, name) for case, name in zip(cases, names, strict=True)]
    for name, prompt in zip(names, ids, strict=True):
        pruned.config.check_length(len(prompt), args.max_new_tokens, name)
    try:
        plan = pruned.plan(map(len, ids), args.max_new_tokens)
    except BudgetError as error:
        default = "" if budget == args.kv_budget else f" (the demo's default is {budget})"
        raise RequestError(f"{error}; give that as --kv-budget{default}, or longer prompts") from error
    settings = plan.requests[0][0]
    for llm in (full, under(Policy(settings), pruned)):  # by settings: so few tokens may not come down to a budget
        llm.generate([ids[0][:WARM_UP]], SamplingParams(max_new_tokens=1))
    return Picture(
        title=f"{Path(args.model).name}, {pruned.config.num_hidden_layers} layers, "
        f"{str(pruned.dtype).removeprefix('torch.')} on {pruned.device.type}, threads: {torch.get_num_threads()}; "
        f"prompts: {len(cases)}, of {sum(map(len, ids))} tokens; generated: {args.max_new_tokens} tokens each",
        tokens=tokens_of(tokenizer, cases[0].prompt, ids[0], []),
        layers=pruned.config.num_hidden_layers,
        newest=1 + settings.recent(len(ids[0])) if settings else 0,
        sinks=settings.streamingllm_sink_len if settings else 0,
        answer=cases[0].answer,
        prompts=len(cases),
        full=run_side("full cache", full, tokenizer, cases, args.max_new_tokens),
        pruned=run_side("pyramid", pruned, tokenizer, cases, args.max_new_tokens),
    )


def under(policy: Policy, llm: LLM) -> LLM:
    """The same weights with another policy."""
    other = copy.copy(llm)
    other.policy = policy
    return other


def tell(args: argparse.Namespace, llm: LLM, tokenizer: Tokenizer) -> list[Case]:
    """Different stories, each followed by a question about it."""
    tokens = PROMPT_TOKENS if args.prompt_tokens is None else args.prompt_tokens
    llm.config.check_length(tokens, args.max_new_tokens, f"a story of --prompt-tokens {tokens}")
    rng = random.Random(args.seed or 0)
    return [tell_one(rng, tokens, tokenizer) for _ in range(args.batch_size or 1)]


def tell_one(rng: random.Random, tokens: int, tokenizer: Tokenizer) -> Case:
    """A story leaves room for several questions; one is asked here, and the story goes on for as long instead."""

    def count(text: str) -> int:
        return len(tokenizer.encode(text, continues=True))

    tale = story(rng, tokens, count)
    (question, answer), text = tale.asked[0], tale.text
    left = tokens - len(tokenizer.encode(text + question))
    if left < 0:
        raise RequestError(
            f"--prompt-tokens {tokens} is too few for a story in these tokens, which has {tokens - left}"
        )
    while (left := left - count(sentence := " " + filler(rng))) >= 0:
        text += sentence
    return Case(text + question, answer)


def run_side(name: str, llm: LLM, tokenizer: Tokenizer, cases: list[Case], new_tokens: int) -> Side:
    """Continue all prompts, and add up what it took and held."""
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)  # so that both do equal work
    with RunningLine(quiet=False) as line:
        began = time.perf_counter()
        done = dict(llm.completions([case.prompt for case in cases], params, line.update))
        total = time.perf_counter() - began
    completions = [done[i] for i in range(len(cases))]
    prompt_s = sum({completion.prefill_s for completion in completions})  # those that started together share it
    first, prompt_ids = completions[0], completions[0].prompt_token_ids
    ended = [i for i, token in enumerate(first.token_ids) if token in llm.config.eos_token_ids]
    token_ids = first.token_ids[: ended[0] + 1 if ended else None]
    right = [case.answer is not None and done[i].text.startswith(case.answer) for i, case in enumerate(cases)]
    return Side(
        name=name,
        prompt_s=prompt_s,
        decode_s=total - prompt_s,
        generated=sum(len(completion.token_ids) for completion in completions),
        kv_bytes=sum(completion.kv_bytes for completion in completions),
        kv_bytes_full=sum(completion.kv_bytes_full for completion in completions),
        right=sum(right),
        token_ids=token_ids,
        tokens=tokens_of(tokenizer, cases[0].prompt, prompt_ids, token_ids)[len(prompt_ids) :],
        depth=depth_of(first.kept_positions, len(prompt_ids)),
    )


def tokens_of(tokenizer: Tokenizer, prompt: str, prompt_ids: list[int], new_ids: list[int]) -> list[Token]:
    """Each token's part of the text; of a prompt they join to the prompt.

    A character of several byte tokens is the last one's part. A special token's part is what it is written as, if it
    stands in the prompt itself, and nothing if it was put there.
    """
    specials = {token: content for content, token in tokenizer._special.items()}
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    start, tokens = int(tokenizer.add_bos), []
    for i, token in enumerate(prompt_ids + new_ids):
        data = tokenizer.token_bytes(token)
        written = specials.get(token, "") if start <= i < len(prompt_ids) else ""
        text = decoder.decode(data) or written
        tokens.append(Token(text, text or specials.get(token) or "".join(f"<0x{byte:02X}>" for byte in data)))
    # sentencepiece sets a space before a text.
    if "".join(token.text for token in tokens[: len(prompt_ids)]) == " " + prompt:
        tokens[start] = replace(tokens[start], text=tokens[start].text[1:])
    return tokens


def depth_of(kept_positions: list[list[int]], prompt_tokens: int) -> list[int]:
    """How many layers kept each token of the prompt; as what is dropped stays away, these are the first so many."""
    layers = Counter(position for layer in kept_positions for position in layer)
    return [layers[position] for position in range(prompt_tokens)]


def style_of_stdout() -> Style:
    """What the terminal, or the file that stands for it, can show."""
    stream = sys.stdout or io.StringIO()  # there may be none
    try:
        "█▏".encode(stream.encoding or "ascii")
        blocks = True
    except (UnicodeEncodeError, LookupError):
        blocks = False
    colour = stream.isatty() and "NO_COLOR" not in os.environ
    return Style(min(MOST_COLUMNS, max(40, shutil.get_terminal_size().columns - 1)), blocks, colour)
