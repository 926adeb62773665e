"""The README claims only what runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import WEIGHTS

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


def test_the_first_two_commands_are_the_main_job_and_the_tests() -> None:
    """`.ci/run` takes them from here, so it cannot run anything else."""
    block = README.split("```sh\n")[1].split("```")[0].splitlines()
    assert [line.split("&& ")[1].split(" ")[:3] for line in block] == [
        ["python", "-m", "minipyramid.generate"],
        ["python", "-m", "pytest"],
    ]
