"""The README claims only what runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType

import pytest
from helpers import STEEP, WEIGHTS

from minipyramid import LLM, SamplingParams
from minipyramid.generate import stream

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
    assert files - set(links) <= {"minipyramid/__init__.py", "minipyramid/errors.py"}


def test_the_walk_of_a_prompt_is_drawn_as_it_is_called(tiny: LLM) -> None:
    """Both columns: each function is in the file of its line, and first called in this order."""
    drawing = README.split("## How to read it")[1].split("```")[1].splitlines()[1:]
    middle = drawing[0].index("each further")
    once: list[tuple[str, str]] = []
    each: list[tuple[str, str]] = []
    file = ""
    for line in drawing[1:]:
        file = line.split()[0] if line[0] != " " else file
        for called in re.finditer(r"(\w+)\(\)", line):
            (once if called.start() < middle else each).append((file, called[1]))
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
