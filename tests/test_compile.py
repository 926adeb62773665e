"""Compiled decode steps do what the others do, in one graph, and are refused where nothing can compile them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_checkpoint
from torch._dynamo.utils import counters

from minipyramid import LLM, ConfigError, PyramidConfig, SamplingParams
from minipyramid.generate import main
from minipyramid.model import Model

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
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
def test_tokens_and_what_is_kept_are_the_same_from_one_graph_for_all(tmp_path: Path) -> None:
    """A graph that breaks, or is compiled anew for every layer, length or token, is slower than none, without a word.

    In float32, for in bf16 a fused sum is rounded less often.
    """
    write_checkpoint(tmp_path)
    plain, compiled = (LLM(tmp_path, pyramid=OFTEN_JUDGED, compile=c) for c in (False, True))
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    before = counters["stats"]["unique_graphs"]  # the trial of the compiler
    for length in (50, 70):  # each of another number of slots in every layer
        prompts = torch.randint(3, 320, (2, length), generator=torch.Generator().manual_seed(length)).tolist()
        for one, other in zip(plain.generate(prompts, params), compiled.generate(prompts, params), strict=True):
            assert one.token_ids == other.token_ids
            assert one.kept_positions == other.kept_positions
        assert max(map(len, one.kept_positions[1:])) < length + 40, "nothing was dropped, so nothing was tried out"
    assert counters["stats"]["unique_graphs"] - before == 1
    assert not counters["graph_break"]


def test_without_a_compiler_it_is_refused_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("No working C++ compiler found\nin many lines")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    told = r"^compile cannot be used here; leave it out, .* \(No working C\+\+ compiler found\)$"
    with pytest.raises(ConfigError, match=told):
        LLM(write_checkpoint(tmp_path), compile=True)


@pytest.mark.parametrize("flags", [[], ["--compile"]])
def test_the_flag_compiles(flags: list[str], tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Model) -> None:
        raise ConfigError("asked to compile")

    monkeypatch.setattr(Model, "compile_step", refuse)
    assert main(["Once", "--model", str(tiny_dir), "--max-new-tokens", "2", *flags]) == (2 if flags else 0)
