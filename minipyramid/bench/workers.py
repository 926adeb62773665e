"""A process for each method: it holds its weights, waits for its turn, and its peak of memory is its own.

The processes take turns, run by run, so that what disturbs the machine disturbs all methods alike.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from minipyramid import MiniPyramidError, RequestError
from minipyramid.bench.methods import our_method
from minipyramid.bench.versus import transformers_method
from minipyramid.device import pick_device


class Worker:
    """A method in its own process, as the process that measures sees it."""

    def __init__(self, name: str, argv: list[str]) -> None:
        self.name = name
        command = [sys.executable, "-m", "minipyramid.bench", *argv, "--serve", name]
        # In a session of its own, Ctrl-C does not reach it; it is for this process to speak, and to end it.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def answer(self) -> dict[str, Any]:
        """Wait for its next line: first that it has loaded, then one run's figures at a time."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            if self.process.wait() == 2:  # it has said why
                raise SystemExit(2)
            raise RequestError(f"{self.name!r} has ended (exit status {self.process.returncode})")
        figures: dict[str, Any] = json.loads(line)
        return figures

    def run(self) -> dict[str, Any]:
        """Let it do its work once; returns the figures."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # if it has ended, `answer` says so
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """End it, whatever it is doing."""
        self.process.kill()
        self.process.wait()


def take_turns(
    names: list[str], runs: int, argv: list[str], before_turn: Callable[[], None]
) -> dict[str, list[dict[str, Any]]]:
    """Run each method so often, after a first time that does not count; returns the figures of every run.

    `before_turn` is called once before each turn of all methods, while none works.
    """
    figures: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    workers: list[Worker] = []
    try:
        for name in names:
            workers.append(Worker(name, argv))
            if len(workers) == 1:
                # Weights that the first cannot load no other can, and one line about them is enough.
                workers[0].answer()
        for worker in workers[1:]:
            worker.answer()  # it has loaded; from here on one works at a time
        for turn in range(runs + 1):
            before_turn()
            for worker in workers:
                measured = worker.run()
                if turn > 0:
                    figures[worker.name].append(measured)
    finally:
        for worker in workers:
            worker.close()
    return figures


def serve(name: str, args: argparse.Namespace) -> None:
    """What a worker's process does: load, then answer each line of stdin with one run's figures in JSON.

    Raises `RequestError` where the method fails, whatever it raises: a policy may be the user's own.
    """
    try:
        run = transformers_method(args) if name == args.versus else our_method(name, args)
        cuda = pick_device(args.device).type == "cuda"
        print(json.dumps({"ready": True}), flush=True)
        for _ in sys.stdin:
            reset_peak(cuda)
            figures = run()
            print(json.dumps({**figures, "peak_rss_mb": peak_mb(cuda)}), flush=True)
    except (MiniPyramidError, OSError):
        raise
    except Exception as error:
        raise RequestError(f"{name!r} has failed ({type(error).__name__}: {error})") from error


def reset_peak(cuda: bool) -> None:
    """Forget the highest use of memory so far, where the system allows it."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb(cuda: bool) -> float:
    """The highest use of memory since then, in MiB: the device's, or what is resident."""
    if cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
