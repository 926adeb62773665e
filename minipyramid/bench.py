"""`python -m minipyramid.bench`: prompt and generation timed, against this machine's ceilings and against others.

Every method runs in a process of its own, which holds its weights and waits; the processes take turns, run by run, so
that what disturbs the machine disturbs all alike, and each one's peak of memory is its own. Only generated tokens
count, all prompts differ, and all lengths are equal (the end of text is ignored), so methods do equal work.

The floor of a phase is the time that its arithmetic, or its reading of memory, takes at the rates measured in the same
run: of a prompt, the products of the tokens that each layer really computes; of a decode step, the weights and the
live keys and values read once, or its products, whichever takes longer.
"""

import argparse
import importlib
import json
import math
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipyramid import LLM, MiniPyramidError, RequestError, SamplingParams
from minipyramid.cache import KVCache
from minipyramid.checkpoint import parameter_sources
from minipyramid.config import ModelConfig
from minipyramid.device import pick_device, pick_dtype
from minipyramid.generate import DEFAULT_MODEL, DEFAULT_TEXT, Parser, discard_output, print_error, set_threads
from minipyramid.linear import pack
from minipyramid.model import Model
from minipyramid.plan import Need, Policy, pick_pyramid
from minipyramid.plan_table import readable
from minipyramid.request import parse_bytes
from minipyramid.shapes import PREFIX, shape_config, shape_dict
from minipyramid.tokenizer import Tokenizer

COLUMNS = (
    "method batch prompt_tokens new_tokens prefill_s decode_s total_s tokens_per_s kv_bytes kv_bytes_aux kv_share "
    "peak_rss_mb prefill_floor_share decode_floor_share"
).split()
SPREAD = 0.02  # of random weights
NOT_FOR_GROWTH = "prompt_tokens max_new_tokens ragged pyramid kv_budget kv_memory fixed compile versus".split()
GROWTH, GROWTH_STEPS = (512, 1024, 2048, 4096, 8192), 12  # tokens held, and steps that the median is of


# --- The work ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What all methods are given."""

    prompts: list[list[int]]
    new_tokens: list[int]

    @property
    def generated(self) -> int:
        return sum(self.new_tokens)


def make_work(args: argparse.Namespace, config: ModelConfig) -> Work:
    """Prompts that all differ, of one length, or with `--ragged` of lengths from 20 and 16 upwards.

    They are windows of a book, evenly spaced; of random ids where there is no tokenizer, as of a shape, whose weights
    are random as well.
    """
    rng = random.Random(args.seed)
    lengths, new = [args.prompt_tokens] * args.batch_size, [args.max_new_tokens] * args.batch_size
    if args.ragged:
        lengths = [rng.randint(min(20, n), n) for n in lengths]
        new = [rng.randint(min(16, n), n) for n in new]
    for i, (prompt, n) in enumerate(zip(lengths, new, strict=True)):
        config.check_length(prompt, n, f"prompt {i}")
    directory = Path(args.model)
    if (directory / "tokenizer.model").is_file() and DEFAULT_TEXT.is_file():
        tokenizer = Tokenizer(directory, config.vocab_size)
        tokens = tokenizer.encode(DEFAULT_TEXT.read_text(encoding="utf-8"), continues=True)
    else:
        tokens = [rng.randrange(3, config.vocab_size) for _ in range(max(lengths) * len(lengths))]
    first = rng.randrange(len(tokens))
    starts = [first + i * len(tokens) // len(lengths) for i in range(len(lengths))]
    return Work([[tokens[(s + i) % len(tokens)] for i in range(n)] for s, n in zip(starts, lengths, strict=True)], new)


def random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A weight that depends on its name alone, so every method has the same."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(sum(ord(c) * 31**i for i, c in enumerate(name[-24:])) % 2**31)
    return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, SPREAD, generator=generator)


def config_of(args: argparse.Namespace) -> ModelConfig:
    """Of a shape or of a checkpoint's directory."""
    shape = args.model.startswith(PREFIX)
    return shape_config(args.model.removeprefix(PREFIX)) if shape else ModelConfig.load(Path(args.model))


def policy_of(method: str, args: argparse.Namespace, layers: int) -> Policy:
    """What a method keeps: `full`, `budget`, a preset or a file, each also in `fixed` batches or `compiled`."""
    name = method.removeprefix("fixed ").removeprefix("compiled ")
    pyramid = pick_pyramid({"full": "off", "budget": "auto"}.get(name, name), Path(args.model), layers)
    return Policy(pyramid, args.kv_budget if name == "budget" else None)


class RandomLLM(LLM):
    """An engine at a known shape, with random weights made where they are used."""

    def __init__(self, shape: str, policy: Policy, args: argparse.Namespace) -> None:
        self.config, self.policy, self.tokenizer = shape_config(shape), policy, None
        self.kv_memory = parse_bytes(args.kv_memory) if args.kv_memory else None
        self.device = pick_device(args.device)
        self.dtype = pick_dtype(args.dtype, self.config.dtype, self.device)
        with torch.device("meta"):
            self.model = Model(self.config)
        state = {
            name: torch.cat([random_tensor(part, shape, self.dtype, self.device) for part, shape in parts])
            for name, parts in parameter_sources(self.config).items()
        }
        self.model.load_state_dict(state, assign=True)
        self.model.inv_freq = self.model.inv_freq.to(self.device)
        self.model.requires_grad_(False).apply(pack)


# --- The methods -------------------------------------------------------------------------------------------------

Run = Callable[[], dict[str, Any]]


def our_engine(policy: Policy, args: argparse.Namespace) -> LLM:
    """Of a shape or of a checkpoint."""
    if args.model.startswith(PREFIX):
        return RandomLLM(args.model.removeprefix(PREFIX), policy, args)
    kept = {"pyramid": policy.pyramid or "off", "kv_budget": policy.kv_budget, "kv_memory": args.kv_memory}
    return LLM(args.model, dtype=args.dtype, device=args.device, **kept)


def our_method(name: str, args: argparse.Namespace) -> Run:
    """`full`, `budget`, a preset or a file: this engine under those settings."""
    llm = our_engine(policy_of(name, args, config_of(args).num_hidden_layers), args)
    if name.startswith("compiled "):
        llm.model.compile_step()
    work = make_work(args, llm.config)
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in work.new_tokens]
    size = args.fixed if name.startswith("fixed ") else len(work.prompts)

    def run() -> dict[str, Any]:
        began, done, prefill = time.perf_counter(), [], 0.0
        for i in range(0, len(params), size):
            completions = llm.generate(work.prompts[i : i + size], params[i : i + size])
            done += completions
            # Those that started together share their time.
            prefill += sum({completion.prefill_s for completion in completions})
        total = time.perf_counter() - began
        plans = [llm.plan([len(prompt)], new) for prompt, new in zip(work.prompts, work.new_tokens, strict=True)]
        return {
            "prefill_s": prefill,
            "decode_s": total - prefill,
            "kv_bytes": sum(completion.kv_bytes for completion in done),
            "kv_bytes_aux": sum(plan.votes_bytes + plan.slack_bytes for plan in plans),
            "kv_share": sum(c.kv_bytes for c in done) / sum(c.kv_bytes_full for c in done),
        }

    return run


def transformers_method(args: argparse.Namespace) -> Run:
    """The library, as it comes: its own attention (sdpa), cache and loop, the same weights, batches padded left."""
    # Not a dependency, so it is looked for where it is asked for, and untyped.
    library: Any = importlib.import_module("transformers")
    config, device = config_of(args), pick_device(args.device)
    dtype = pick_dtype(args.dtype, config.dtype, device)
    if args.model.startswith(PREFIX):
        raw = shape_dict(args.model.removeprefix(PREFIX))
        del raw["torch_dtype"]  # the weights are made in `dtype`
        with torch.device("meta"):
            model = library.LlamaForCausalLM(library.LlamaConfig(**raw, attn_implementation="sdpa", eos_token_id=None))
        parts = [part for sources in parameter_sources(config).values() for part in sources]
        state = {name: random_tensor(name, shape, dtype, device) for name, shape in parts}
        model.load_state_dict(state, assign=True)
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    else:
        model = library.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device)
    model.eval()
    model.generation_config.eos_token_id = None
    work = make_work(args, config)
    size = args.fixed or len(work.prompts)

    class FirstToken(library.LogitsProcessor):  # type: ignore[misc]
        """Notes when the scores of the first new token are there."""

        def __init__(self) -> None:
            self.at = 0.0

        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            if not self.at:
                scores[0, 0].item()  # a device has computed them now
                self.at = time.perf_counter()
            return scores

    @torch.inference_mode()
    def run() -> dict[str, Any]:
        prefill = decode = 0.0
        held = 0
        for i in range(0, len(work.prompts), size):
            prompts, new = work.prompts[i : i + size], max(work.new_tokens[i : i + size])
            longest = max(map(len, prompts))
            ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
            first, began = FirstToken(), time.perf_counter()
            model.generate(
                ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0,
                logits_processor=library.LogitsProcessorList([first]),
            )  # fmt: skip
            prefill += first.at - began
            decode += time.perf_counter() - first.at
            held = max(held, len(prompts) * (longest + new))
        per_token = config.num_hidden_layers * config.kv_bytes_per_token(dtype.itemsize)
        return {
            "prefill_s": prefill,
            "decode_s": decode,
            "kv_bytes": held * per_token,
            "kv_bytes_aux": 0,
            "kv_share": 1.0,
        }

    return run


# --- One process per method, and its memory ----------------------------------------------------------------------


def serve(name: str, args: argparse.Namespace) -> None:
    """Load, then answer each line of stdin with one run's figures as a line of JSON."""
    run = transformers_method(args) if name == "transformers" else our_method(name, args)
    cuda = pick_device(args.device).type == "cuda"
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        reset_peak(cuda)
        figures = run()
        print(json.dumps({**figures, "peak_rss_mb": peak_mb(cuda)}), flush=True)


def reset_peak(cuda: bool) -> None:
    """Forget the highest use of memory so far, where the system allows it."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb(cuda: bool) -> float:
    """Highest use since then: of the device, or resident."""
    if cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    high = [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")]
    return high[0] if high else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Worker:
    """A method in its own process."""

    def __init__(self, name: str, argv: list[str]) -> None:
        self.name = name
        command = [sys.executable, "-m", "minipyramid.bench", *argv, "--serve", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            if self.process.wait() == 2:  # it has said why
                raise SystemExit(2)
            raise RequestError(f"the method {self.name} has ended (exit status {self.process.returncode})")
        figures: dict[str, Any] = json.loads(line)
        return figures

    def run(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


# --- Ceilings and floors -----------------------------------------------------------------------------------------


def ceilings(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Rates of this machine, measured now: products (FLOP/s) and reading (bytes/s); the best of several."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, size, device=device).to(dtype) for n in (size // 2, size))
    held = torch.ones((1 << 30 if device.type == "cuda" else 1 << 28) // 4, device=device)
    rates = {"flops": 2.0 * (size // 2) * size * size / best(lambda: a @ b, device)}
    return {**rates, "bytes_per_s": held.numel() * 4 / best(held.sum, device)}


def best(run: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(7):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def floors(
    config: ModelConfig, policy: Policy, work: Work, itemsize: int, rates: dict[str, float]
) -> tuple[float, float]:
    """Seconds that the two phases take at least; see the module's docstring."""
    layers, hidden, D = config.num_hidden_layers, config.hidden_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    received = hidden * (H + 2 * K) * D  # weights that a layer's received tokens pass, and those that its kept ones do
    kept = hidden * H * D + 3 * hidden * config.intermediate_size
    head = hidden * config.vocab_size
    pairs = list(zip(work.prompts, work.new_tokens, strict=True))
    settings = [policy.settings(len(prompt), new, layers) for prompt, new in pairs]
    flops = 0.0
    for (prompt, _), pyramid in zip(pairs, settings, strict=True):
        lengths = pyramid.prompt_lengths(len(prompt), layers) if pyramid else [len(prompt)] * layers
        for n, after in zip(lengths, [*lengths[1:], 1], strict=True):
            flops += 2 * n * received + 2 * after * kept + (2 * n * n if after > 1 else 4 * n) * H * D
        flops += 2 * head
    weights = itemsize * (layers * (received + kept) + head)
    decode = 0.0
    for step in range(max(work.new_tokens)):
        running = [(len(p), pyramid) for (p, new), pyramid in zip(pairs, settings, strict=True) if new > step]
        held = sum(sum(c.kv_lengths(n, step + 1, layers)) if c else layers * (n + step + 1) for n, c in running)
        read = weights + held * config.kv_bytes_per_token(itemsize)
        products = 2 * len(running) * weights / itemsize + 4 * held * H * D
        decode += max(read / rates["bytes_per_s"], products / rates["flops"])
    return flops / rates["flops"], decode


# --- Growth ------------------------------------------------------------------------------------------------------


def growth(args: argparse.Namespace) -> dict[str, Any]:
    """A decode step's time by what the cache holds, to see whether it grows with the bytes that are read and no faster.

    The slabs hold zeros, for which a step takes as long; the prompts that they stand for are not computed, and may be
    longer than the model's context.
    """
    llm = our_engine(Policy(None), args)
    rates, layers = ceilings(llm.dtype, llm.device), llm.config.num_hidden_layers
    tokens = torch.full((args.batch_size,), 3, device=llm.device)
    weights = sum(math.prod(shape) for parts in parameter_sources(llm.config).values() for _, shape in parts)
    weights -= llm.config.vocab_size * llm.config.hidden_size  # of the embedding only a few rows are read
    rows = []
    for held in GROWTH:
        room = Need((held + GROWTH_STEPS,) * layers)
        try:
            cache = KVCache.allot(llm.config, room, args.batch_size, llm.dtype, llm.device)
        except RuntimeError as error:
            told = f"{args.batch_size} sequences of {held} tokens do not fit into memory"
            raise RequestError(f"{told}; give a smaller --batch-size") from error
        for _ in range(args.batch_size):
            cache.add_row()
            cache.rows[-1].lengths, cache.rows[-1].position = [held] * layers, held
        times = []
        for _ in range(GROWTH_STEPS):
            began = time.perf_counter()
            with torch.inference_mode():
                llm.model.logits(llm.model.step(tokens, [cache])).argmax(-1).tolist()
            times.append(time.perf_counter() - began)
        read = weights * llm.dtype.itemsize + cache.bytes_per_token * layers * args.batch_size * held
        rows.append(
            {
                "held_tokens": held,
                "batch": args.batch_size,
                "step_s": statistics.median(times),
                "read_bytes": read,
                "floor_share": read / rates["bytes_per_s"] / statistics.median(times),
            }
        )
    return {"rows": rows, "machine": machine_of(llm.dtype, llm.device, rates)}


def growth_table(result: dict[str, Any]) -> str:
    lines = [machine_line(result["machine"])]
    lines.append(f"{'tokens held':>11} {'batch':>5} {'step ms':>8} {'read':>10} {'ms per GiB':>10} {'floor':>6}")
    for row in result["rows"]:
        per_gib = 1e3 * row["step_s"] / (row["read_bytes"] / 2**30)
        lines.append(
            f"{row['held_tokens']:11} {row['batch']:5} {1e3 * row['step_s']:8.1f} {readable(row['read_bytes']):>10} "
            f"{per_gib:10.1f} {row['floor_share']:6.2f}"
        )
    return "\n".join(lines)


# --- The command -------------------------------------------------------------------------------------------------


def build_parser() -> Parser:
    parser = Parser(prog="minipyramid.bench", allow_abbrev=False, description="Time prompt and generation phases.")
    parser.add_argument("--model", default=str(DEFAULT_MODEL), metavar="DIR_OR_SHAPE", help="or shape:llama2-7b ...")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N")
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="with --ragged: at most")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="with --ragged: at most")
    parser.add_argument("--ragged", action="store_true", help="prompts and generations of different lengths")
    parser.add_argument(
        "--pyramid", default="auto", metavar="NAME,NAME", help="settings to compare with the full cache"
    )
    parser.add_argument("--kv-budget", type=float, metavar="SHARE", help="compare settings solved for this share, too")
    parser.add_argument("--kv-memory", metavar="SIZE", help="bound of the keys and values in flight")
    parser.add_argument("--fixed", type=int, default=0, metavar="N", help="compare with fixed batches of N, in order")
    parser.add_argument("--compile", action="store_true", help="compare with compiled decode steps")
    parser.add_argument("--growth", action="store_true", help="only a decode step's time by the number of tokens held")
    parser.add_argument("--versus", choices=["transformers"], help="compare with this library, if it is installed")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="medians of so many (default 3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="a last line with everything as JSON")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    return parser


def check(args: argparse.Namespace) -> None:
    least = {"batch_size": 1, "prompt_tokens": 1, "max_new_tokens": 1, "runs": 1, "fixed": 0}
    for name, low in least.items():
        if getattr(args, name) < low:
            raise RequestError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least {low}")
    for name in args.pyramid.split(","):
        if name in ("full", "budget") or name.startswith(("fixed ", "compiled ")):
            told = "expected presets and files; full is always there"
            raise RequestError(f"--pyramid names {name!r}, {told}, for others give --kv-budget, --fixed or --compile")
    default = build_parser().parse_args([])
    for name in NOT_FOR_GROWTH:
        if args.growth and getattr(args, name) != getattr(default, name):
            raise RequestError(f"--growth has no use for --{name.replace('_', '-')}; leave one of them out")


def measure(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """All methods in turn, `--runs` times after one that does not count; rows of medians, and the machine."""
    config = config_of(args)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, config.dtype, device)
    work = make_work(args, config)
    ours = ["full", *(name for name in args.pyramid.split(",") if name and name != "off")]
    ours += ["budget"] if args.kv_budget is not None else []
    ours += [f"{how} {ours[-1]}" for how, asked in (("fixed", args.fixed), ("compiled", args.compile)) if asked]
    policies = {}
    for name in ours:
        policies[name] = policy_of(name, args, config.num_hidden_layers)
        for prompt, new in zip(work.prompts, work.new_tokens, strict=True):
            policies[name].settings(len(prompt), new, config.num_hidden_layers)  # refused here, before anything loads
    names = [*ours, *([args.versus] if args.versus else [])]
    rates = ceilings(dtype, device)
    workers: list[Worker] = []
    figures: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    try:
        workers += [Worker(name, argv) for name in names]
        for worker in workers:
            worker.answer()  # loaded; from here on one works at a time
        for turn in range(args.runs + 1):
            for worker in workers:
                got = worker.run()
                if turn:
                    figures[worker.name].append(got)
    finally:
        for worker in workers:
            worker.close()
    rows = []
    for name in names:
        middle = {key: statistics.median(run[key] for run in figures[name]) for key in figures[name][0]}
        total = middle["prefill_s"] + middle["decode_s"]
        low = floors(config, policies.get(name, Policy(None)), work, dtype.itemsize, rates)
        rows.append(
            {
                "method": f"budget {args.kv_budget}" if name == "budget" else name,
                "batch": len(work.prompts),
                "prompt_tokens": max(map(len, work.prompts)),
                "new_tokens": max(work.new_tokens),
                **middle,
                "total_s": total,
                "tokens_per_s": work.generated / total,
                "prefill_floor_share": low[0] / middle["prefill_s"],
                "decode_floor_share": low[1] / middle["decode_s"],
            }
        )
    machine = machine_of(dtype, device, rates)
    return {"rows": [{column: row[column] for column in COLUMNS} for row in rows], "machine": machine}


def machine_of(dtype: torch.dtype, device: torch.device, rates: dict[str, float]) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "gflops": rates["flops"] / 1e9,
        "read_gb_s": rates["bytes_per_s"] / 1e9,
    }


def machine_line(machine: dict[str, Any]) -> str:
    return (
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, {machine['dtype']}: "
        f"{machine['gflops']:.0f} GFLOP/s, reading {machine['read_gb_s']:.0f} GB/s"
    )


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def table(result: dict[str, Any]) -> str:
    """For people."""
    lines = [
        machine_line(result["machine"]),
        f"{'method':24} {'prompt s':>9} {'decode s':>9} {'tokens/s':>9} {'KV held':>10} {'share':>6} {'peak MB':>8} "
        f"{'floor: prompt':>13} {'decode':>7}",
    ]
    for row in result["rows"]:
        lines.append(
            f"{row['method']:24} {row['prefill_s']:9.2f} {row['decode_s']:9.2f} {row['tokens_per_s']:9.1f} "
            f"{readable(row['kv_bytes']):>10} {row['kv_share']:6.1%} {row['peak_rss_mb']:8.0f} "
            f"{row['prefill_floor_share']:13.2f} {row['decode_floor_share']:7.2f}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    try:
        check(args)
        set_threads(args.threads)
        if args.serve:
            serve(args.serve, args)
        else:
            result = growth(args) if args.growth else measure(args, argv)
            print(growth_table(result) if args.growth else table(result))
            if args.json:
                print(json.dumps(result))
        print(end="", flush=True)  # here, where a failure can still be told
    except MiniPyramidError as error:
        print_error(error)
        return 2
    except BrokenPipeError:  # the reader has seen enough
        discard_output()
    except OSError as error:
        discard_output()
        print_error(f"the output cannot be written ({error})")
        return 2
    except ImportError as error:
        print_error(f"--versus {args.versus} cannot be run: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
