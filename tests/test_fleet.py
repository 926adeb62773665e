"""A fleet of two local workers: the texts of one engine, each id once, also where a worker is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minipyramid import LLM, SamplingParams, batch

ray = pytest.importorskip("ray", reason="needs the extra fleet")
fleet = pytest.importorskip("minipyramid.fleet", reason="needs the extra fleet")

ROOT = Path(__file__).parent.parent
SHORT = SamplingParams(max_new_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    environment = {"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=4, include_dashboard=False, runtime_env=environment, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rng = random.Random(1)
    entries = [
        {"id": f"n{i}", "prompt": "the fox " * rng.randint(1, 9), "temperature": 1.3 * (i % 2), "seed": i}
        for i in range(200)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return tmp_path / "in.jsonl"


def records(target: Path) -> list[str]:
    return sorted(line for file in target.glob("*.jsonl") for line in file.read_text().splitlines())


def of_one_engine(tiny: LLM, source: Path) -> list[str]:
    batch.run(tiny, source, source.with_suffix(".out"), SHORT)
    return sorted(source.with_suffix(".out").read_text().splitlines())


def workers() -> list[int]:
    """Processes of the actors that have an engine."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if b"MapWorker" in command and f"{os.getuid()}" in (process / "status").read_text():
            found.append(int(process.name))
    return found


def test_two_workers_give_the_texts_of_one_engine(
    cluster: None, tiny: LLM, tiny_dir: Path, source: Path, tmp_path: Path
) -> None:
    with source.open("a") as file:
        file.write('{"id": "bad", "prompt": "a", "top_p": 3}\nno json\n')
    fleet.run(source, tmp_path / "out", tiny_dir, workers=2, params=SHORT, policy="full", lines_at_once=25)
    expected = of_one_engine(tiny, source)
    found = records(tmp_path / "out")
    told = [json.loads(line) for line in found]
    wrong = {record.get("id", record.get("line")): record["error"] for record in told if "error" in record}
    assert set(wrong) == {"bad", "no json"}
    assert "top_p is 3" in wrong["bad"]
    finished = [[line for line in lines if '"error"' not in line] for lines in (found, expected)]
    assert finished[0] == finished[1]
    assert len(finished[0]) == 200


def test_a_worker_that_is_killed_loses_and_repeats_nothing(
    cluster: None, tiny: LLM, tiny_dir: Path, source: Path, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill_one() -> None:
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            for pid in workers()[:1]:
                time.sleep(2)  # into its work
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            time.sleep(0.05)

    killer = threading.Thread(target=kill_one)
    killer.start()
    fleet.run(source, tmp_path / "out", tiny_dir, workers=2, params=SHORT, policy="full", lines_at_once=5)
    killer.join()
    assert killed
    assert records(tmp_path / "out") == of_one_engine(tiny, source)


def test_a_resumed_run_leaves_out_what_is_finished(
    cluster: None, tiny: LLM, tiny_dir: Path, source: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"workers": 2, "params": SHORT, "policy": "full", "lines_at_once": 25}
    fleet.run(source, tmp_path / "out", tiny_dir, resume=True, **options)
    assert records(tmp_path / "out") == of_one_engine(tiny, source)
