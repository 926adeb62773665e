"""What a server costs: the same prompts by `LLM.generate`, and by as many clients at once.

One process holds the weights and is the server as well, so its CPU time tells what the server adds, also
where others disturb the wall clock. The clients are another process (`clients.py`). The ways take turns.
"""

import argparse
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from minipyramid import LLM, RequestError, SamplingParams
from minipyramid.bench.models import load_llm
from minipyramid.bench.work import Work, make_work

Ask = Callable[[str], dict[str, Any]]  # from a line for the clients to their answer


def served(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all ways in turns; returns what `--json` prints."""
    llm = load_llm(args, args.policy, args.kv_budget)
    work = make_work(args, llm.config)
    with serving(llm, len(work.prompts)) as port, clients() as ask:
        ways: dict[str, Callable[[], float]] = {"generate": partial(generate, llm, work)}
        for name, stream in (("served", False), ("streamed", True)):
            line = json.dumps({"port": port, "bodies": bodies(work, stream)})
            ways[name] = partial(ask_the_server, ask, line, work)
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for turn in range(args.runs + 1):
            for name, way in ways.items():
                cpu = time.process_time()
                measured = (way(), time.process_time() - cpu)
                if turn > 0:  # the first time warms up
                    runs[name].append(measured)
    return {"rows": [row_of(name, runs[name], runs["generate"], work) for name in ways]}


def row_of(
    name: str, runs: list[tuple[float, float]], generated: list[tuple[float, float]], work: Work
) -> dict[str, Any]:
    """Medians; the shares are of `generate` in the same turn."""
    seconds, cpu_s = (statistics.median(column) for column in zip(*runs, strict=True))
    turns = list(zip(runs, generated, strict=True))
    return {
        "way": name,
        "clients": len(work.prompts),
        "seconds": seconds,
        "cpu_s": cpu_s,
        "tokens_per_s": work.generated / seconds,
        "of_generate": statistics.median(generate[0] / mine[0] for mine, generate in turns),
        "of_generate_by_cpu": statistics.median(generate[1] / mine[1] for mine, generate in turns),
    }


def served_table(result: dict[str, Any]) -> str:
    """The rows for people."""
    head = f"{'seconds':>8} {'CPU s':>7} {'tokens/s':>9} {'of generate':>12} {'by CPU time':>12}"
    lines = [f"{'way':10} {'clients':>7} {head}"]
    for row in result["rows"]:
        lines.append(
            f"{row['way']:10} {row['clients']:7} {row['seconds']:8.2f} {row['cpu_s']:7.2f} "
            f"{row['tokens_per_s']:9.1f} {row['of_generate']:12.2f} {row['of_generate_by_cpu']:12.2f}"
        )
    return "\n".join(lines)


def generate(llm: LLM, work: Work) -> float:
    """All prompts by one call; returns seconds."""
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in work.new_tokens]
    began = time.perf_counter()
    llm.generate(work.prompts, params)
    return time.perf_counter() - began


def bodies(work: Work, stream: bool) -> list[dict[str, Any]]:
    """A client's request for each prompt."""
    common: dict[str, Any] = {"ignore_eos": True, "stream": stream}
    if stream:
        common["stream_options"] = {"include_usage": True}
    both = zip(work.prompts, work.new_tokens, strict=True)
    return [{"prompt": prompt, "max_tokens": new, **common} for prompt, new in both]


def ask_the_server(ask: Ask, line: str, work: Work) -> float:
    """All prompts by the clients; returns seconds, if every token was generated."""
    answer = ask(line)
    if "error" in answer:
        raise RequestError(f"a client was answered: {answer['error']:.300}")
    if answer["tokens"] != work.generated:
        raise RequestError(f"the server generated {answer['tokens']} tokens, expected {work.generated}")
    return float(answer["seconds"])


@contextlib.contextmanager
def serving(llm: LLM, most_waiting: int) -> Iterator[int]:
    """A server in a thread of this process; gives its port."""
    try:
        import uvicorn

        from minipyramid.serve.app import Limits, Service, build_app
    except ImportError as error:
        raise RequestError(
            '--served needs starlette and uvicorn; pip install "minipyramid[serve]"'
        ) from error
    app = build_app(Service(llm, "measured", Limits(max_waiting=most_waiting)))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def clients() -> Iterator[Ask]:
    """The clients' process."""
    command = [sys.executable, "-m", "minipyramid.bench.clients"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def ask(line: str) -> dict[str, Any]:
            assert process.stdin is not None
            assert process.stdout is not None
            print(line, file=process.stdin, flush=True)
            answer: dict[str, Any] = json.loads(process.stdout.readline())
            return answer

        yield ask
