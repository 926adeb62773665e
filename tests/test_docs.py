"""The documentation claims only what the code has, names only what exists, and shows only what runs."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from helpers import prompts_of

import minipyramid
from minipyramid import LLM, PyramidConfig, SamplingParams
from minipyramid.bench.__main__ import build_parser as bench_parser
from minipyramid.eval.__main__ import build_parser as eval_parser
from minipyramid.generate import build_parser as generate_parser
from minipyramid.generate import main as generate
from minipyramid.policies import POLICIES, load_policy

ROOT = Path(__file__).parent.parent
METHOD = (ROOT / "docs" / "method.md").read_text()
PAGES = [*(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PARSERS = {
    "minipyramid.generate": generate_parser,
    "minipyramid.eval": eval_parser,
    "minipyramid.bench": bench_parser,
}


def section(heading: str) -> str:
    """What stands below a heading, up to the next one."""
    after = METHOD.split(f"{heading}\n", 1)[1]
    return re.split(r"^##+ ", after, maxsplit=1, flags=re.MULTILINE)[0]


def test_the_words_of_the_glossary_are_those_of_the_code() -> None:
    words = re.findall(r"^- \*\*(.+?)\*\*:", section("## Words"), flags=re.MULTILINE)
    assert len(words) >= 12
    sources = [path.read_text() for path in (ROOT / "minipyramid").rglob("*.py")]
    code = " ".join(" ".join(sources).lower().replace("_", " ").split())
    assert [word for word in words if not re.search(rf"\b{word}", code)] == []


def test_every_test_that_is_named_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", METHOD))
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) >= 8
    assert {name for name in named if f"def {name}(" not in tests} == set()


def test_eight_defects_have_a_test_each() -> None:
    rows = re.findall(
        r"^\| (\d) \|.*`test_\w+`", section("## Eight defects of the published code"), re.MULTILINE
    )
    assert rows == list("12345678")


def test_the_table_of_settings_is_that_of_the_code() -> None:
    table = re.findall(r"^\| `(\w+)` \| (\S+) \|", section("### 1. Settings"), flags=re.MULTILINE)
    assert table == [(field.name, str(field.default)) for field in fields(PyramidConfig)]


def test_the_table_of_policies_names_all() -> None:
    table = re.findall(r"^\| `([\w-]+)` \|", section("## The two lists"), flags=re.MULTILINE)
    assert table == [*POLICIES, "NAME-split"]


def test_the_plan_that_is_quoted_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    shown = section("## The plan")
    command, *quoted = re.findall(r"```\n\$ (.*?)```", shown, flags=re.DOTALL)[0].splitlines()
    flags = shlex.split(command)[3:]
    assert generate(flags) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(quoted) >= 4
    assert [line for line in quoted if line not in printed] == []
    (share, solved), *_ = re.findall(r"`--kv-budget (\S+)`.*?`(keys and values .*?)`", shown, flags=re.DOTALL)
    assert generate([*flags, "--kv-budget", share]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(solved)


def test_the_example_policy_runs_as_planned(
    tiny: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", METHOD, flags=re.DOTALL)
    (tmp_path / "my_module.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    llm, lengths, new = tiny.under("my_module:MyPolicy", kv_budget=0.5), [60, 31], 8
    plan = llm.plan(lengths, new)
    prompts, params = prompts_of(lengths), SamplingParams(max_new_tokens=new, ignore_eos=True)
    completions = llm.generate(prompts, params)
    assert [completion.kv_lengths for completion in completions] == plan.kv_lengths
    assert sum(completion.kv_bytes for completion in completions) == plan.kv_bytes
    assert 0.48 < plan.kv_share <= 0.5
    for prompt, completion in zip(prompts, completions, strict=True):
        (alone,) = llm.generate([prompt], params)
        assert (alone.token_ids, alone.kept_positions) == (completion.token_ids, completion.kept_positions)


def test_the_commands_that_are_shown_have_their_flags() -> None:
    commands = re.findall(r"^ {4}python -m (\S+) (.*)$", METHOD, flags=re.MULTILINE)
    assert {module for module, _ in commands} == set(PARSERS)
    for module, flags in commands:
        PARSERS[module]().parse_args(shlex.split(flags))  # exits where a flag does not exist


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    local = [link for link in links if not link.startswith("http")]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_version_is_the_same_everywhere() -> None:
    assert f"\nversion: {minipyramid.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{minipyramid.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    "file",
    [
        *(ROOT / "docs" / "settings").glob("*.json"),
        *(ROOT / "weights" / "storyteller").glob("[!c]*.json"),  # all but the model's config.json
    ],
    ids=lambda file: file.stem,
)
def test_every_file_of_settings_that_comes_along_is_read(file: Path) -> None:
    """One shared the fitted file of another, which had then got stand-ins of more levels than it has."""
    policy = load_policy(file)
    assert len(policy.held(1000, 12)) == 12
