"""The README claims only what runs."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from helpers import STEEP, WEIGHTS, random_tensors, train_pieces, write_checkpoint
from quantised_files import AWQ, GPTQ, SHAPE, W8A8

from minipyramid import LLM, MiniPyramidError, SamplingParams
from minipyramid.generate import build_parser, stream

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_for_embedding_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not WEIGHTS.exists():
        pytest.skip("no embedded checkpoint in this tree")
    monkeypatch.chdir(ROOT)
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_links_lead_somewhere_and_every_file_is_listed() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert all((ROOT / link).exists() for link in links)
    files = {f"minipyramid/{path.name}" for path in (ROOT / "minipyramid").glob("*.py")}
    assert files - set(links) <= {"minipyramid/__init__.py"}


def test_the_walk_of_a_prompt_is_drawn_as_it_is_called(tiny: LLM) -> None:
    """Both columns: each function is in the file of its line, and first called in this order."""
    drawing = README.split("## How to read it")[1].split("```")[1].splitlines()[1:]
    middle = drawing[0].index("each further")
    once: list[tuple[str, str]] = []
    each: list[tuple[str, str]] = []
    file = ""
    for line in drawing[1:]:
        file = line.split()[0] if line[0] != " " else file
        for name in re.finditer(r"(\w+)\(\)", line):
            (once if name.start() < middle else each).append((file, name[1]))
    assert (len(once), len(each)) == (12, 7)
    calls: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.parent.name == "minipyramid":
            calls.append((path.name, frame.f_code.co_name))

    llm = tiny.under(STEEP)
    sys.setprofile(note)
    try:
        stream(llm, "the fox and the fox and the little fox " * 4, SamplingParams(max_new_tokens=3))
    finally:
        sys.setprofile(None)
    further = calls.index(("model.py", "step"))
    for column, called in zip((once, each), (calls[:further], calls[further:]), strict=True):
        assert [step for step in dict.fromkeys(called) if step in column] == column


def test_the_first_two_commands_are_the_main_job_and_the_tests() -> None:
    """`.ci/run` takes them from here, so it cannot run anything else."""
    block = README.split("```sh\n")[1].split("```")[0].splitlines()
    assert [line.split("&& ")[1].split(" ")[:3] for line in block] == [
        ["python", "-m", "minipyramid.generate"],
        ["python", "-m", "pytest"],
    ]


class Runs:
    """What a pickle can do to those who read it carelessly."""

    def __reduce__(self) -> Any:
        return (print, ("it ran",))


def with_fields(**changes: Any) -> Callable[[Path], object]:
    return lambda directory: LLM(write_checkpoint(directory, **changes))


def with_quantization(settings: dict[str, Any]) -> Callable[[Path], object]:
    return with_fields(quantization_config=settings)


def write_gguf(directory: Path) -> object:
    (directory / "model.gguf").write_bytes(b"GGUF")
    return LLM(directory / "model.gguf")


def write_metas(directory: Path) -> object:
    (directory / "params.json").write_text('{"dim": 4096, "use_scaled_rope": true}')
    return LLM(directory)


def write_code(directory: Path) -> object:
    (directory / "config.json").write_text(json.dumps(SHAPE))
    torch.save({**random_tensors(SHAPE), "x": Runs()}, directory / "pytorch_model.bin")
    return LLM(directory)


def chat_without_template(directory: Path) -> object:
    train_pieces(directory)
    return LLM(write_checkpoint(directory)).chat([{"role": "user", "content": "hello"}])


# What a row of the table says of, and how it comes about.
REFUSED: dict[str, Callable[[Path], object]] = {
    "bitsandbytes and other methods": with_quantization({"quant_method": "bitsandbytes"}),
    "GPTQ with act-order": with_quantization({**GPTQ, "desc_act": True}),
    "AWQ of another version": with_quantization({**AWQ, "version": "gemv"}),
    "compressed-tensors in another format": with_quantization({**W8A8, "format": "nvfp4-pack-quantized"}),
    "keys and values quantised by the checkpoint": with_quantization(
        {**W8A8, "kv_cache_scheme": {"bits": 8}}
    ),
    "GGUF": write_gguf,
    "Gemma, Phi, mixtures of experts": with_fields(model_type="gemma"),
    "a sliding window that is in use": with_fields(
        model_type="mistral", sliding_window=4096, max_position_embeddings=32768
    ),
    "Meta's files of Llama 3.1 and 3.2": write_metas,
    "a `.bin` file that holds code": write_code,
    "a chat without a template": chat_without_template,
}


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a line."""
    _, _, table = README.split(heading)[1].partition("\n|---")
    lines = table.split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_what_is_refused_is_said_in_these_words(tmp_path: Path) -> None:
    told = {what: said.strip("`") for what, said in rows("And what is refused")}
    assert set(told) == set(REFUSED)
    for i, (what, sentence) in enumerate(told.items()):
        directory = tmp_path / str(i)
        directory.mkdir()
        with pytest.raises(MiniPyramidError) as raised:
            REFUSED[what](directory)
        assert sentence in str(raised.value)


def test_each_row_of_what_loads_has_a_command() -> None:
    loads = rows("## What loads")
    assert len(loads) >= 14
    for _, _, flags, _ in loads:
        args = build_parser().parse_args(shlex.split(flags.strip("`")))  # exits where a flag does not exist
        assert args.model == "DIRECTORY"
