"""Every example runs as its first line says, is short, and the policy of one's own has its rows."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import WEIGHTS

from minipyramid.bench.__main__ import build_parser as bench_parser
from minipyramid.calibrate.__main__ import build_parser as calibrate_parser
from minipyramid.eval.__main__ import build_parser as eval_parser
from minipyramid.generate import build_parser as generate_parser

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PARSERS = {
    "minipyramid.bench": bench_parser,
    "minipyramid.calibrate": calibrate_parser,
    "minipyramid.eval": eval_parser,
    "minipyramid.generate": generate_parser,
}
needs_weights = pytest.mark.skipif(not WEIGHTS.exists(), reason="no embedded checkpoint in this tree")


def run(*argv: str, cwd: Path = ROOT) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *argv],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_weights
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_is_short(example: Path) -> None:
    assert len(example.read_text().splitlines()) <= 40
    assert f"`python examples/{example.name}`" in example.read_text()
    assert run(str(example)).strip()


def test_the_commands_for_a_real_model_have_their_flags() -> None:
    """There is no such model here; what would stop the commands at once is a flag that does not exist."""
    script = ROOT / "examples" / "llama-3.1-8b.sh"
    text = script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert len(text.splitlines()) <= 40
    commands = re.findall(r"^python -m (\S+) (.*)$", text.replace("\\\n", " "), flags=re.MULTILINE)
    assert {module for module, _ in commands} == set(PARSERS)
    for module, flags in commands:
        PARSERS[module]().parse_args(shlex.split(flags))


@needs_weights
def test_a_conversation_answers_from_what_was_kept() -> None:
    assert "lives in Fenwick" in run("examples/conversation.py").split("Question: Where")[1]


def test_a_policy_of_ones_own_is_at_most_thirty_lines_with_its_imports() -> None:
    text = (ROOT / "examples" / "own_policy.py").read_text()
    policy = text[text.index("from dataclasses") : text.index("if __name__")]
    assert len(policy.strip().splitlines()) <= 30


@needs_weights
def test_a_policy_of_ones_own_has_a_row_in_the_evaluation_and_in_the_benchmark() -> None:
    name, examples = "own_policy:LargeValues", ROOT / "examples"
    short = ["--samples", "2", "--context", "64", "--continuation", "4", "--budgets", "0.5", "--json"]
    rows = json.loads(run("-m", "minipyramid.eval", *short, "--policies", f"full,{name}", cwd=examples))[
        "rows"
    ]
    assert [row["policy"] for row in rows] == ["full", name]
    assert rows[1]["kv_share"] == pytest.approx(0.5, abs=0.02)
    size = ["--batch-size", "2", "--prompt-tokens", "40", "--max-new-tokens", "4", "--runs", "1", "--json"]
    out = run("-m", "minipyramid.bench", *size, "--policy", name, "--kv-budget", "0.6", cwd=examples)
    rows = json.loads(out.splitlines()[-1])["rows"]
    (row,) = [row for row in rows if row["method"] == f"{name} 0.6"]
    assert row["kv_share"] <= 0.6
