"""A fleet of two local workers: the texts of one engine, each id once, also where a worker is killed."""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minipyramid import LLM, MiniPyramidError, RequestError, SamplingParams, batch

ray = pytest.importorskip("ray", reason="needs the extra fleet")
fleet = pytest.importorskip("minipyramid.fleet", reason="needs the extra fleet")

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}
SHORT = SamplingParams(max_new_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=4, include_dashboard=False, runtime_env=ENVIRONMENT, logging_level="ERROR")
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


def of_one_engine(tiny: LLM, source: Path, params: SamplingParams = SHORT) -> list[str]:
    target = source.with_suffix(".out")
    target.unlink(missing_ok=True)
    batch.run(tiny, source, target, params)
    return sorted(target.read_text().splitlines())


def test_what_is_no_input_or_no_model_is_told_before_anything_starts(
    cluster: None, tiny_dir: Path, source: Path, tmp_path: Path
) -> None:
    """They ended in pages of Ray's, and what it had noted was then in the way of the corrected run."""
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    for wrong, problem in (
        ({"source": tmp_path / "nowhere"}, "nowhere does not exist"),
        ({"source": tmp_path / "empty"}, "empty holds no files"),
        ({"model": tmp_path / "empty"}, "config.json is missing"),
    ):
        with pytest.raises(MiniPyramidError, match=problem):
            fleet.run(**{"source": source, "target": out, "model": tiny_dir, **wrong})
    with pytest.raises(TypeError, match="polcy"):
        fleet.run(source, out, tiny_dir, polcy="full")
    assert not out.exists()


def test_notes_in_a_directory_are_no_input(tmp_path: Path) -> None:
    for name in ("a.jsonl", "_finished/x", ".checkpoints/a.jsonl", ".hidden", "deep/b.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found = importlib.import_module("minipyramid.fleet.lines").files_of(tmp_path)
    assert found == [str(tmp_path / "a.jsonl"), str(tmp_path / "deep/b.jsonl")]


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


def wait_until_in_the_middle(target: Path) -> None:
    """Some of 200 records are written, and not most."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if len(records(target)) >= 20:
            break
        time.sleep(0.02)
    assert 20 <= len(records(target)) < 150


def test_two_workers_give_the_records_of_one_engine(
    cluster: None, tiny: LLM, tiny_dir: Path, source: Path, tmp_path: Path
) -> None:
    """Bad lines, too. A byte that is no UTF-8 ended the job, and U+2028 in a text tore its line in two."""
    with source.open("ab") as file:
        file.write(b'{"id": "bad", "prompt": "a", "top_p": 3}\nno json\n\n{"id": "\xff", "prompt": "a"}\n')
        file.write('{"id": "separated", "prompt": "the\u2028fox"}\n{"prompt": "a"}\n'.encode())
        file.write(b'{"id": "n7", "prompt": "once more"}\n' * 2 + b'{"id": 7, "prompt": "last"}')
    fleet.run(source, tmp_path / "out", tiny_dir, workers=2, params=SHORT, policy="full", lines_at_once=25)
    expected = [json.loads(line) for line in of_one_engine(tiny, source)]
    for record in expected:
        if "line" in record:  # of several files the number alone would not tell
            record["line"] = f"{source}:{record['line']}"
    found = [json.loads(line) for line in records(tmp_path / "out")]
    assert sorted(found, key=str) == sorted(expected, key=str)
    assert sum("error" in record for record in found) == 6
    assert len({record["id"] for record in found if "id" in record}) == 200 + 3


def test_a_worker_that_is_killed_loses_and_repeats_nothing(
    cluster: None, tiny: LLM, tiny_dir: Path, source: Path, tmp_path: Path
) -> None:
    """It is killed when it has given some of its records, and has lines at work."""
    killed: list[int] = []

    def kill_one() -> None:
        wait_until_in_the_middle(tmp_path / "out")
        killed.append(workers()[0])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    long = replace(SHORT, max_new_tokens=60)
    fleet.run(source, tmp_path / "out", tiny_dir, workers=2, params=long, policy="full", lines_at_once=10)
    killer.join()
    assert killed
    assert records(tmp_path / "out") == of_one_engine(tiny, source, long)


def test_a_run_that_is_killed_is_resumed_and_a_finished_one_repeats_nothing(
    cluster: None, tiny: LLM, tiny_dir: Path, source: Path, tmp_path: Path
) -> None:
    target, long = tmp_path / "out", replace(SHORT, max_new_tokens=60)
    options: dict[str, Any] = {"workers": 2, "params": long, "policy": "full", "lines_at_once": 10}
    program = (
        "import ray\nfrom minipyramid import SamplingParams, fleet\n"
        f"ray.init(address={ray.get_runtime_context().gcs_address!r}, runtime_env={ENVIRONMENT!r})\n"
        f"fleet.run({str(source)!r}, {str(target)!r}, {str(tiny_dir)!r}, **{options!r})"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_until_in_the_middle(target)
    driver.kill()
    driver.wait()
    with pytest.raises(RequestError, match="resume it"):
        fleet.run(source, target, tiny_dir, **options)
    for _ in range(2):
        fleet.run(source, target, tiny_dir, resume=True, **options)
        assert records(target) == of_one_engine(tiny, source, long)
