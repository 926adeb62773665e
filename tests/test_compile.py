"""Compiled decode steps do what the others do, in one graph, and are refused where nothing compiles."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import write_checkpoint
from torch._dynamo.utils import counters

from minipyramid import LLM, ConfigError, PyramidConfig, SamplingParams
from minipyramid.generate import main
from minipyramid.model import Model

needs_compiler = pytest.mark.skipif(
    not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU"
)
# Judged twice within 40 tokens, by a tail that is shorter than the text.
OFTEN_JUDGED = PyramidConfig(recent_ratio=0.05, exceed_length_to_compress=8, min_context_length=8)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@needs_compiler
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_tokens_and_what_is_kept_are_the_same_from_one_graph_for_all(kv_dtype: str, tmp_path: Path) -> None:
    """A graph that breaks, or is compiled anew for every layer, length or token, is slower than none, without
    a word.

    Nor for every number of rows, as it once was: sequences end at different steps here. A single row has its
    own, for torch takes a size of 1 as fixed. In float32, for in bf16 a fused sum is rounded less often.
    """
    write_checkpoint(tmp_path, eos_token_id=list(range(3, 12)))  # so some of them end early
    plain, compiled = (
        LLM(tmp_path, policy=OFTEN_JUDGED, compile=c, kv_dtype=kv_dtype) for c in (False, True)
    )
    before = counters["stats"]["unique_graphs"]  # the trial of the compiler
    written = set()
    for length, count in ((50, 5), (70, 3)):  # each of another number of slots in every layer
        drawn = torch.Generator().manual_seed(length)
        prompts = torch.randint(12, 320, (count, length), generator=drawn).tolist()
        dropped = 0
        both = (llm.generate(prompts, SamplingParams(max_new_tokens=40)) for llm in (plain, compiled))
        for one, other in zip(*both, strict=True):
            assert one.token_ids == other.token_ids
            assert one.kept_positions == other.kept_positions
            written.add(len(one.token_ids))
            dropped += length + len(one.token_ids) - max(map(len, one.kept_positions[1:]))
        assert dropped, "nothing was dropped"
    assert len(written) > 2, "all rows ended together"
    assert 40 in written, "none was judged to the end"
    assert counters["stats"]["unique_graphs"] - before <= 2
    assert not counters["graph_break"]


@pytest.mark.parametrize("kind", [RuntimeError, NotADirectoryError])
def test_where_it_cannot_be_done_it_is_refused_in_one_sentence(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise kind("No working C++ compiler found\nin many lines")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    told = r"^compile cannot be used here; leave it out, .* \(No working C\+\+ compiler found\)$"
    with pytest.raises(ConfigError, match=told):
        LLM(write_checkpoint(tmp_path), compile=True)


@pytest.mark.parametrize("flags", [[], ["--compile"]])
def test_the_flag_compiles(flags: list[str], tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Model) -> None:
        raise ConfigError("asked to compile")

    monkeypatch.setattr("minipyramid.compiled.compile_step", refuse)
    assert main(["Once", "--model", str(tiny_dir), "--max-new-tokens", "2", *flags]) == (2 if flags else 0)


def test_models_may_be_loaded_in_several_threads_and_by_a_module_imported_again(tiny_dir: Path) -> None:
    """An operator can be registered once; two threads, or a notebook's reload, once tried it twice."""
    script = (
        "import importlib, sys, threading\n"
        "from minipyramid import LLM\n"
        "done, gate = [], threading.Barrier(4)\n"
        "def load():\n"
        "    gate.wait()\n"
        "    import minipyramid.compiled\n"
        "    done.append(LLM(sys.argv[1]).generate([[5, 6, 7]]))\n"
        "threads = [threading.Thread(target=load) for _ in range(4)]\n"
        "[thread.start() for thread in threads], [thread.join() for thread in threads]\n"
        "importlib.reload(sys.modules['minipyramid.compiled'])\n"
        "print(len(done))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tiny_dir)], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, "4\n"), ran.stderr


def test_compile_is_yes_or_no(tiny_dir: Path) -> None:
    with pytest.raises(TypeError, match="compile is 'no', expected bool"):
        LLM(tiny_dir, compile="no")  # type: ignore[arg-type]
