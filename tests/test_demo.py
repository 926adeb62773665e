"""The demo: both sides are the engine's own, nothing is counted that was not generated, and the picture is exact."""

from __future__ import annotations

import io
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import WEIGHTS

from minipyramid import LLM, PyramidConfig, SamplingParams
from minipyramid.demo import (
    Case,
    build_parser,
    check,
    compare,
    depth_of,
    main,
    run_side,
    style_of_stdout,
    tell_one,
    tokens_of,
)
from minipyramid.picture import (
    INVERSE,
    MOST_LINES,
    PLAIN,
    Picture,
    Side,
    Style,
    Token,
    bar,
    breaks,
    difference,
    excerpt,
    first_difference,
    kept_by_layer,
    marked,
    page,
    screen,
)
from minipyramid.tokenizer import Tokenizer

INJECTION = (
    "The fox </script><script>alert(1)</script><img src=x onerror=alert(2)> & \"who\" 'there'\r\n\u00e9\U0001f98a" * 2
)
SHORT = ["--max-new-tokens", "12", "--kv-budget", "0.7"]


def compared(tiny_dir: Path, *argv: str) -> Picture:
    args = build_parser().parse_args(["--model", str(tiny_dir), *argv])
    return compare(args, check(args))


@pytest.fixture(scope="module")
def picture(tiny_dir: Path) -> Picture:
    return compared(tiny_dir, *SHORT, "--prompt", INJECTION)


@pytest.fixture
def command(tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Call the command on the tiny checkpoint; returns (exit status, stdout, stderr)."""

    def call(*argv: str) -> tuple[Any, str, str]:
        try:
            status: Any = main(["--model", str(tiny_dir), *argv])
        except SystemExit as exit_:  # argparse's own
            status = exit_.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def made_up(depth: list[int], layers: int, texts: list[str] | None = None) -> Picture:
    """A picture without a run."""
    tokens = [Token(text, text) for text in texts or [f" w{i}" for i in range(len(depth))]]
    side = Side("full cache", 1.0, 3.0, 8, 4096, 4096, 1, [5, 6], [Token(" a", " a"), Token(" b", " b")], depth)
    other = replace(
        side, name="pyramid", kv_bytes=2048, token_ids=[5, 7], tokens=[Token(" a", " a"), Token("<c>", "<c>")]
    )
    return Picture("a title", tokens, layers, 2, 1, None, 1, side, other)


# --- Tokens and depths -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        "The fox said: who is there?",
        "caf\u00e9 \u6f22\u5b57 \U0001f98a fox",
        "  two spaces\n\nand lines\r\n\tand a tab ",
        "\nthe fox",
        "</s> the fox</s> <s>went home",
        "<s>the fox",
        "\u00e9",
        INJECTION,
    ],
)
def test_the_tokens_of_a_prompt_join_to_it(tiny: LLM, prompt: str) -> None:
    """Also where a character spans byte tokens, and where special tokens are written out."""
    assert tiny.tokenizer is not None
    ids = tiny.tokenizer.encode(prompt)
    tokens = tokens_of(tiny.tokenizer, prompt, ids, [])
    assert len(tokens) == len(ids)
    assert "".join(token.text for token in tokens) == prompt
    assert all(token.name for token in tokens)
    for style in (Style(30, True, False), Style(30, True, True)):
        kept = [random.Random(i).random() < 0.5 for i in ids]
        lines = marked([token.text for token in tokens], kept, style)
        unmarked = re.sub(r"\x1b\[7m|\x1b\[0m|[\[\]]", "", "".join(lines))
        assert unmarked == prompt


def test_tokens_without_a_text_have_a_name(tiny: LLM) -> None:
    assert tiny.tokenizer is not None
    ids = tiny.tokenizer.encode("\u6f22 fox")
    names = [token.name for token in tokens_of(tiny.tokenizer, "\u6f22 fox", ids, [2])]
    assert names[0] == "<s>"
    assert names[-1] == "</s>"
    assert names[names.index("<0xE6>") :][:3] == ["<0xE6>", "<0xBC>", "\u6f22"]


def test_the_depth_is_what_the_layers_kept(tiny_dir: Path) -> None:
    """What is dropped stays away, so one number per token tells each layer's positions."""
    steep = PyramidConfig(
        recent_ratio=0.1, prefill_decay_ratio=0.5, prefill_decay_strategy="constant", min_context_length=4
    )
    llm, prompt = LLM(tiny_dir, pyramid=steep), "the fox went home again. " * 5
    (completion,) = llm.generate(prompt, SamplingParams(max_new_tokens=9, ignore_eos=True))
    n = len(completion.prompt_token_ids)
    depth = depth_of(completion.kept_positions, n)
    assert set(depth) == {1, 2, 3}
    for layer, kept in enumerate(completion.kept_positions):
        assert [p for p, d in enumerate(depth) if d > layer] == [p for p in kept if p < n]
        assert kept_by_layer(depth, 3)[layer] == sum(p < n for p in kept)


# --- The comparison ----------------------------------------------------------------------------------------------


def test_both_sides_are_what_the_engine_does_alone(tiny_dir: Path, tiny: LLM, picture: Picture) -> None:
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    for side, llm in ((picture.full, tiny), (picture.pruned, LLM(tiny_dir, kv_budget=0.7))):
        (alone,) = llm.generate(INJECTION, params)
        assert alone.token_ids[: len(side.token_ids)] == side.token_ids
        assert (alone.kv_bytes, alone.kv_bytes_full) == (side.kv_bytes, side.kv_bytes_full)
        assert depth_of(alone.kept_positions, len(picture.tokens)) == side.depth
    assert picture.pruned.kv_bytes <= 0.7 * picture.full.kv_bytes == 0.7 * picture.full.kv_bytes_full


def test_only_generated_tokens_count_as_throughput(tiny_dir: Path) -> None:
    """Defect 8 of the published code: its demo counts the prompt's tokens as well."""
    batch = compared(tiny_dir, *SHORT, "--batch-size", "3", "--prompt-tokens", "150")
    for side in (batch.full, batch.pruned):
        assert side.generated == 3 * 12
        assert min(side.prompt_s, side.decode_s) > 0
        assert side.tokens_per_s == pytest.approx(3 * 12 / (side.prompt_s + side.decode_s))


def test_the_stories_of_a_batch_differ(tiny: LLM) -> None:
    """Defect 8, the other half: one prompt copied over the batch."""
    assert tiny.tokenizer is not None
    rng = random.Random(0)
    cases = [tell_one(rng, 200, tiny.tokenizer) for _ in range(5)]
    assert len({case.prompt for case in cases}) == 5
    assert cases[0] == tell_one(random.Random(0), 200, tiny.tokenizer)
    assert cases[0] != tell_one(random.Random(1), 200, tiny.tokenizer)


@pytest.mark.skipif(not WEIGHTS.exists(), reason="no embedded checkpoint in this tree")
@pytest.mark.parametrize("tokens", [128, 512, 2000])
def test_a_story_has_the_length_that_was_asked_for_and_the_answer_stands_in_it(tokens: int) -> None:
    tokenizer = Tokenizer(WEIGHTS, 4096)
    for seed in range(5):
        case = tell_one(random.Random(seed), tokens, tokenizer)
        assert 0.9 * tokens < len(tokenizer.encode(case.prompt)) <= tokens
        assert case.answer is not None
        text, _, asked = case.prompt.rpartition("\nQuestion: ")
        assert asked.partition("Answer: ")[2] + case.answer.removesuffix(".") in text


def test_a_right_answer_is_counted(tiny: LLM) -> None:
    assert tiny.tokenizer is not None
    said = tiny.generate("the fox", SamplingParams(max_new_tokens=6, ignore_eos=True))[0].text
    cases = [Case("the fox", said[:3]), Case("the fox", said[:3] + "?"), Case("the fox")]
    assert run_side("full cache", tiny, tiny.tokenizer, cases, 6).right == 1


def test_what_follows_the_end_of_text_is_computed_and_not_shown(tiny_dir: Path) -> None:
    """Both sides do equal work, and a text is still shown as it would have ended."""
    llm = LLM(tiny_dir, pyramid="off")
    assert llm.tokenizer is not None
    ids = llm.generate("the fox", SamplingParams(max_new_tokens=10, ignore_eos=True))[0].token_ids
    llm.config = replace(llm.config, eos_token_ids=(ids[3],))
    side = run_side("full cache", llm, llm.tokenizer, [Case("the fox")], 10)
    assert side.token_ids == ids[: ids.index(ids[3]) + 1]
    assert len(side.tokens) == len(side.token_ids)
    assert side.generated == 10


# --- On a terminal -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "right", "at"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([4, 2], [1, 2], 0), ([1, 2], [1], 1), ([], [1], 0), ([], [], None)],
)
def test_the_first_difference(left: list[int], right: list[int], at: int | None) -> None:
    assert first_difference(left, right) == at


def test_the_difference_names_both_tokens() -> None:
    picture = made_up([2, 1], 2)
    assert "token 1: ' b' (full cache), '<c>' (pyramid)" in difference(picture)
    ended = replace(picture.pruned, token_ids=[5], tokens=picture.pruned.tokens[:1])
    assert "token 1: ' b' (full cache), its end (pyramid)" in difference(replace(picture, pruned=ended))
    assert "nowhere" in difference(replace(picture, pruned=picture.full))


def test_bars() -> None:
    assert (bar(1, 8, True), bar(0, 8, True), bar(0.5, 8, True)) == ("\u2588" * 8, "", "\u2588" * 4)
    assert bar(0.5 + 1 / 64, 8, True) == "\u2588" * 4 + "\u258f"
    assert (bar(1, 8, False), bar(0.45, 8, False)) == ("########", "####")


def test_lines_break_at_spaces_and_lose_nothing() -> None:
    text = "one two\n\nthree " + "x" * 25 + " four five   six\n"
    lines = [text[start:end] for start, end in breaks(text, 10)]
    assert "".join(lines) == text
    assert lines[:4] == ["one two\n", "\n", "three ", "x" * 10]
    assert all(len(line.rstrip()) <= 10 for line in lines)


def test_marks_stand_around_runs_of_kept_tokens() -> None:
    texts, kept = ["The", " fox", " went", " home", ".\n", "Then"], [False, True, True, False, True, False]
    assert marked(texts, kept, Style(80, True, False)) == ["The[ fox went] home[.]\n", "Then"]
    assert marked(texts, kept, Style(80, True, True)) == [
        f"The{INVERSE} fox went{PLAIN} home{INVERSE}.{PLAIN}\n",
        "Then",
    ]


def test_a_long_prompt_is_shown_in_part_and_says_so() -> None:
    lines = [f"line {i}\n" for i in range(100)]
    shown = excerpt(lines)
    assert shown[0] == "line 0"
    assert shown[-1] == "line 99"
    assert [line for line in shown if "left out" in line] == [
        "... (40 lines are left out here; --html FILE shows all) ..."
    ]
    assert len(excerpt(lines[:MOST_LINES])) == MOST_LINES


def test_the_screen_shows_everything(picture: Picture) -> None:
    lines = screen(picture, Style(100, False, False))
    text = "\n".join(lines)
    n, kept = len(picture.tokens), kept_by_layer(picture.pruned.depth, 3)
    for word in ("prompt, seconds", "generation, seconds", "tokens/s", "keys and values held", "100.0%", "full cache"):
        assert word in text
    for layer, count in enumerate(kept):
        assert f"{layer:5} {count:7} {count / n:6.1%} {'#' * round(40 * count / n)}" in lines
    assert f"kept {kept[-1]} of the prompt's {n} tokens" in text.replace("\n", " ")
    assert "\x1b" not in text
    assert INVERSE in "\n".join(screen(picture, Style(100, True, True)))


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def test_marks_and_blocks_depend_on_what_stdout_can_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = []
    for kind, encoding in ((Terminal, "utf-8"), (Terminal, "ascii"), (io.TextIOWrapper, "utf-8")):
        monkeypatch.setattr("sys.stdout", kind(io.BytesIO(), encoding=encoding))
        style = style_of_stdout()
        shown.append((style.blocks, style.colour))
    assert shown == [(True, True), (False, True), (True, False)]
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("sys.stdout", Terminal(io.BytesIO(), encoding="utf-8"))
    assert not style_of_stdout().colour


# --- The command -------------------------------------------------------------------------------------------------


def test_the_script_runs_in_any_locale(tiny_dir: Path, tmp_path: Path) -> None:
    """As it is called in a clone, in a process of its own."""
    argv = [sys.executable, "train_free_demo.py", "--model", str(tiny_dir), "--prompt-tokens", "180", *SHORT]
    env, root = {**os.environ, "PYTHONIOENCODING": "ascii"}, Path(__file__).parent.parent
    argv += ["--html", str(tmp_path / "out.html"), "--threads", "1", "--dtype", "float32"]
    done = subprocess.run(argv, capture_output=True, env=env, cwd=root, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"answers right" in done.stdout
    assert b"#" * 40 in done.stdout
    assert (tmp_path / "out.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_prompts_come_from_flags_and_from_a_file(tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("the fox went home again. " * 4)
    picture = compared(tiny_dir, *SHORT, "--prompt", "the fox " * 12, "--prompt-file", str(tmp_path / "prompt.txt"))
    assert picture.prompts == 2
    assert "".join(token.text for token in picture.tokens) == "the fox " * 12
    assert picture.answer is None


def test_the_budget_and_the_pyramid_are_heeded(tiny_dir: Path, tmp_path: Path) -> None:
    """Half by default; settings that are named run as they are, unless a budget is given with them."""
    (tmp_path / "p.json").write_text(json.dumps({"recent_ratio": 0.1, "min_context_length": 8}))
    flags = ["--prompt", "the fox went home again. " * 6, "--max-new-tokens", "12"]
    runs = ([], ["--kv-budget", "0.8"], ["--pyramid", str(tmp_path / "p.json")], ["--pyramid", "llama2-7b"])
    half, most, own, published = (compared(tiny_dir, *flags, *more).pruned for more in runs)
    assert 0.4 < half.kv_bytes / half.kv_bytes_full <= 0.5
    assert 0.7 < most.kv_bytes / most.kv_bytes_full <= 0.8
    assert half.kv_bytes < own.kv_bytes < published.kv_bytes <= published.kv_bytes_full
    both = compared(tiny_dir, *flags, "--pyramid", str(tmp_path / "p.json"), "--kv-budget", "0.6").pruned
    assert both.kv_bytes <= 0.6 * both.kv_bytes_full


def test_dtype_and_threads_are_heeded(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    flags = [*SHORT, "--prompt", "the fox went home again. " * 4, "--threads", "1"]
    full, half = (compared(tiny_dir, *flags, "--dtype", dtype).full.kv_bytes for dtype in ("float32", "bfloat16"))
    assert full == 2 * half
    assert threads == [1, 1]


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--batch-size", "0"], "--batch-size"),
        (["--batch-size", "many"], "--batch-size"),
        (["--batch-size", "99999999"], "--batch-size"),
        (["--batch-size", "2", "--prompt", "the fox"], "--batch-size"),
        (["--prompt-tokens", "3"], "--prompt-tokens"),
        (["--prompt-tokens", "200", "--prompt", "the fox"], "--prompt-tokens"),
        (["--prompt-tokens", "5000000"], "context of 256"),
        (["--seed", "-1"], "--seed"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--prompt", "fox " * 500], "context of 256"),
        (["--prompt", ""], "empty"),
        (["--prompt", "the fox", "--prompt", ""], "prompt 1 is empty"),
        (["--prompt-file", "EMPTY"], "empty"),
        (["--prompt-file", "BINARY"], "UTF-8"),
        (["--prompt-file", "ZEROS"], "NUL"),
        (["--prompt-file", "/no/such/file"], "/no/such/file"),
        (["--pyramid", "off"], "--pyramid is off"),
        (["--pyramid", "off", "--kv-budget", "0.5"], "--pyramid is off"),
        (["--pyramid", "llama9"], "llama3-8b"),
        (["--kv-budget", "0"], "kv_budget"),
        (["--kv-budget", "nan"], "nan"),
        (["--prompt", "fox", "--kv-budget", "0.01"], "0.01"),
        (["--dtype", "float8"], "float8"),
        (["--threads", "0"], "--threads"),
        (["--html", "/no/such/folder/out.html"], "--html"),
        (["--html", "/"], "--html"),
        (["--plot", "out.pdf"], ".png"),
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--batch", "2"], "--batch"),
    ],
)
def test_nonsense_is_one_line_and_status_2(command: Any, tmp_path: Path, argv: list[str], word: str) -> None:
    files = {"EMPTY": b"", "BINARY": b"\x7fELF\x02\xff\xfe\x00", "ZEROS": bytes(40)}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    status, out, err = command(*(str(tmp_path / a) if a in files else a for a in argv))
    assert (status, out) == (2, "")
    assert err.startswith("minipyramid: error: ")
    assert word in err
    assert err.count("\n") == 1


def test_a_checkpoint_without_a_tokenizer_is_one_line(command: Any, tiny_dir: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(tiny_dir / name)
    status, out, err = command("--model", str(tmp_path))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "tokenizer.model" in err


# --- The page ----------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page holds: its tags, and the tokens of its prompt with their depths."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[tuple[int, str]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        style = dict(attrs).get("style") or ""
        self.inside = tag == "span" and style.startswith("--depth:")
        if self.inside:
            self.tokens.append((int(style.removeprefix("--depth:")), ""))

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            depth, text = self.tokens[-1]
            self.tokens[-1] = (depth, text + data)


def test_the_page_holds_each_token_and_its_depth(picture: Picture) -> None:
    parsed = Page(page(picture))
    assert [text for _, text in parsed.tokens] == [token.text for token in picture.tokens]
    assert "".join(text for _, text in parsed.tokens) == INJECTION
    assert [depth for depth, _ in parsed.tokens] == picture.pruned.depth


def test_the_map_is_filled_where_a_layer_kept_a_token() -> None:
    """Each run of equal depth is a step of the outline."""
    paths = [attrs["d"] for tag, attrs in Page(page(made_up([3, 1, 1, 2], 3))).tags if tag == "path"]
    assert paths[0] == "M0 0V3h1V1h2V2h1V0Z"


def test_the_page_needs_nothing_else(picture: Picture) -> None:
    text = page(picture)
    parsed = Page(text)
    assert "//" not in text.replace("// ", "")  # comments of the script
    assert "url(" not in text
    assert "@import" not in text
    for _, attrs in parsed.tags:
        assert not {"src", "href", "data", "srcset", "action"} & set(attrs)
    assert not {"link", "img", "iframe", "object", "embed"} & {tag for tag, _ in parsed.tags}


def test_texts_are_escaped(picture: Picture) -> None:
    """Those of the prompt and those that were generated."""
    shown = made_up([2, 2], 2, ["</script>", "<script>alert(1)</script>"])
    for text in (page(picture), page(shown), page(replace(shown, answer="<b>", title="<i>"))):
        assert [tag for tag, _ in Page(text).tags].count("script") == 1
        assert text.count("</script") == 1
        assert "<img" not in text
        assert "<c>" not in text
        assert "<b>" not in text
        assert "<i>" not in text


def test_the_page_can_be_read_by_everyone(picture: Picture) -> None:
    text, tags = page(picture), Page(page(picture)).tags
    assert ("html", {"lang": "en"}) in tags
    assert ("meta", {"charset": "utf-8"}) in tags
    assert "<title>" in text
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    (svg,) = [attrs for tag, attrs in tags if tag == "svg"]
    assert svg["aria-label"]
    assert svg["tabindex"] == "0"


def test_the_first_difference_is_marked_in_both_texts() -> None:
    text = page(made_up([2, 1], 2))
    assert "> a<mark> b</mark></div>" in text
    assert "> a<mark>&lt;c&gt;</mark></div>" in text


def test_a_page_of_2000_tokens_and_80_layers_is_small() -> None:
    rng = random.Random(0)
    text = page(made_up([rng.randint(1, 80) for _ in range(2000)], 80))
    assert len(text.encode()) < 200_000
    assert len(Page(text).tokens) == 2000


# --- The plot ----------------------------------------------------------------------------------------------------


def test_a_plot_is_written(command: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, an optional extra, is not installed")
    file = tmp_path / "kept.png"
    status, _, err = command(*SHORT, "--prompt", "the fox went home again. " * 4, "--plot", str(file))
    assert (status, err) == (0, "")
    assert file.read_bytes().startswith(b"\x89PNG")
    assert file.stat().st_size > 5000


def test_a_plot_without_matplotlib_is_refused_before_anything_is_computed(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, out, err = command("--plot", str(tmp_path / "kept.png"), "--model", "/no/such/model")
    assert (status, out) == (2, "")
    assert 'pip install "minipyramid[plot]"' in err
    assert err.count("\n") == 1


def test_files_that_cannot_be_written_are_refused_before_anything_is_computed(command: Any, tmp_path: Path) -> None:
    status, _, err = command("--html", str(tmp_path / "no" / "out.html"), "--model", "/no/such/model")
    assert status == 2
    assert "out.html cannot be written" in err


def test_the_check_leaves_files_as_they_are(command: Any, tmp_path: Path) -> None:
    """A refused run neither empties a page that was there nor leaves an empty one."""
    old, new = tmp_path / "old.html", tmp_path / "new.html"
    old.write_text("before")
    for file in (old, new):
        assert command("--html", str(file), "--model", "/no/such/model")[0] == 2
    assert old.read_text() == "before"
    assert not new.exists()


def test_a_file_is_not_written_over_another_that_was_named(command: Any, tmp_path: Path) -> None:
    """The page replaced the prompt that had just been read; names were compared as they were written."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("the fox went home again. ")
    roundabout = f"{tmp_path}/../{tmp_path.name}/prompt.txt"
    status, _, err = command("--prompt-file", str(prompt), "--html", roundabout)
    assert (status, prompt.read_text()) == (2, "the fox went home again. ")
    assert "--prompt-file and --html are both" in err


def test_the_check_leaves_links_as_they_are(command: Any, tmp_path: Path) -> None:
    """One that led nowhere yet was deleted, and the file behind it left empty."""
    link, target = tmp_path / "link.html", tmp_path / "target.html"
    link.symlink_to(target)
    assert command("--html", str(link), "--model", "/no/such/model")[0] == 2
    assert link.is_symlink()
    assert not target.exists()


def test_a_budget_that_nobody_gave_is_told_as_the_demo_s(command: Any) -> None:
    status, _, err = command("--prompt", "the fox", "--max-new-tokens", "8")
    assert (status, err.count("\n")) == (2, 1)
    assert "the demo's default" in err
    assert "--kv-budget" in err


def test_the_page_is_written_for_a_reader_who_leaves_early(tiny_dir: Path, tmp_path: Path) -> None:
    argv = [sys.executable, "train_free_demo.py", "--model", str(tiny_dir), "--prompt", "the fox " * 12, *SHORT]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*argv, "--html", str(tmp_path / "out.html")],
        stdout=write,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
        check=False,
        timeout=120,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "out.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_what_moves_the_cursor_or_turns_the_text_is_not_shown(picture: Picture) -> None:
    tokens = [Token("a\x1b[2Jb\r\u202ec\n", ""), *picture.tokens[1:]]
    drawn = replace(picture, tokens=tokens)
    on_screen = "\n".join(screen(drawn, Style(80, blocks=True, colour=False)))
    assert "\r" not in on_screen
    for shown in (on_screen, page(drawn)):
        assert not {"\x1b", "\u202e"} & {*shown}
        assert "a[2Jb" in shown
