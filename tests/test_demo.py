"""The demo: both sides are the engine's own, only generated tokens are counted, and the picture is exact."""

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
import torch
from helpers import STEEP, WEIGHTS, write_checkpoint
from safetensors.torch import save_file

from minipyramid import LLM, SamplingParams
from minipyramid.cli.terminal import DEFAULT_TEXT
from minipyramid.demo.__main__ import build_parser, check, main
from minipyramid.demo.cases import Book, Case, first_of_each
from minipyramid.demo.kept import Kept, layers_in_words
from minipyramid.demo.page import page
from minipyramid.demo.picture import (
    Picture,
    Prompt,
    Side,
    Text,
    Token,
    computed_in_words,
    ending,
    figures,
    first_difference,
    legend,
    outcome,
)
from minipyramid.demo.screen import (
    INVERSE,
    MOST_LINES,
    PLAIN,
    UNDERLINED,
    Style,
    bar,
    breaks,
    excerpt,
    marked,
    screen,
    style_of_stdout,
)
from minipyramid.demo.sides import compare, run_side
from minipyramid.demo.tokens import tokens_of
from minipyramid.eval.books import sentences
from minipyramid.tokenizer import Tokenizer, load_tokenizer

INJECTION = (
    "The fox </script><script>alert(1)</script><img src=x onerror=alert(2)> "
    "& \"who\" 'there'\r\n\u00e9\U0001f98a"
) * 2
SHORT = ["--max-new-tokens", "12", "--kv-budget", "0.7"]
FOXES = "the fox went home again. " * 6


def compared(tiny_dir: Path, *argv: str) -> Picture:
    args = build_parser().parse_args(["--model", str(tiny_dir), *argv])
    return compare(args, check(args))


@pytest.fixture(scope="module")
def picture(tiny_dir: Path) -> Picture:
    return compared(tiny_dir, *SHORT, "--prompt", INJECTION)


@pytest.fixture(scope="module")
def snapkv(tiny_dir: Path) -> Picture:
    """A policy whose layers and heads choose for themselves."""
    return compared(tiny_dir, *SHORT, "--prompt", INJECTION, "--policy", "snapkv")


@pytest.fixture(scope="module")
def split(tiny_dir: Path) -> Picture:
    """As many tokens as the pyramid in each layer, and others."""
    return compared(tiny_dir, *SHORT, "--prompt", INJECTION, "--policy", "random-split")


@pytest.fixture(scope="module")
def profile(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Picture:
    """Layers that hold less than they compute, and more behind those that hold less."""
    file = tmp_path_factory.mktemp("profile") / "p.json"
    save_file({"stand_ins": torch.ones(1, 3, 2, 2, 8)}, file.with_name("p.safetensors"))
    level = {"computed": [1, 1, 0.5], "held": [0.2, 0.9, 0.3]}
    settings = {"policy": "profile", "levels": [level], "share": 0.4, "fewest": 8, "fitted": "p.safetensors"}
    file.write_text(json.dumps(settings))
    return compared(tiny_dir, "--max-new-tokens", "12", "--prompt", INJECTION, "--policy", str(file))


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


def nested(depth: list[int], layers: int) -> Kept:
    """Each token is kept by the first so many layers, as PyramidInfer does it."""
    holders = [[int(d > layer) for d in depth] for layer in range(layers)]
    return Kept(1, holders, [sum(row) for row in holders])


# Two heads that choose for themselves in layer 1, and a layer 2 that keeps what layer 1 dropped.
LOOSE = Kept(2, [[2, 2, 2, 2], [2, 1, 1, 0], [0, 0, 2, 2]], [4, 4, 3])


def made_up(kept: Kept, texts: list[str] | None = None) -> Picture:
    """A picture without a run."""
    tokens = [Token(text, text) for text in texts or [f" w{i}" for i in range(kept.computed[0])]]
    side = Side("full cache", 1.0, 3.0, 8, 4096, 4096, 1, [wrote({5: " a", 6: " b"})], kept)
    other = replace(side, name="pyramid", kv_bytes=2048, texts=[wrote({5: " a", 7: "<c>"})])
    return Picture("a title", [Prompt("the prompt", tokens, None)], 2, 1, 0, side, other)


def wrote(told: dict[int, str]) -> Text:
    """What was generated, by token id."""
    return Text([*told], [Token(text, text) for text in told.values()])


def book(tokenizer: Tokenizer | None, seed: int = 0) -> Book:
    """The demo's own."""
    assert tokenizer is not None
    return Book(sentences(DEFAULT_TEXT.read_text(encoding="utf-8")), tokenizer, random.Random(seed))


# --- Tokens, and who keeps them -----------------------------------------------------------------------------


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


def test_the_picture_holds_what_the_layers_kept(tiny_dir: Path) -> None:
    """PyramidInfer: what is dropped stays away, so each token is kept by the first so many layers."""
    steep = replace(STEEP, prefill_decay_strategy="constant")
    llm = LLM(tiny_dir, policy=steep)
    (completion,) = llm.generate(
        "the fox went home again. " * 5, SamplingParams(max_new_tokens=9, ignore_eos=True)
    )
    n = len(completion.prompt_token_ids)
    kept = Kept.of(completion.kept_positions, 2, steep.computed(n, 3))
    depth = [sum(column) // 2 for column in kept.columns]
    assert set(depth) == {1, 2, 3}
    for layer, positions in enumerate(completion.kept_positions):
        of_prompt = [p for p in positions if isinstance(p, int) and p < n]
        assert [p for p, d in enumerate(depth) if d > layer] == of_prompt
        assert [p for p, held in enumerate(kept.holders[layer]) if held] == of_prompt
        assert kept.counts[layer] == len(of_prompt)
    assert kept.counts == kept.computed == steep.held(n, 3)
    assert not kept.heads_differ


@pytest.mark.parametrize("policy", ["snapkv", "streaming", "random-split", "h2o"])
def test_the_picture_holds_what_each_head_kept(tiny: LLM, policy: str) -> None:
    """A count of heads for every layer and token, whether positions are told once or for each head."""
    llm = tiny.under(policy, kv_budget=0.5)
    (completion,) = llm.generate(FOXES, SamplingParams(max_new_tokens=4, ignore_eos=True))
    n = len(completion.prompt_token_ids)
    plan = llm.plan([n], 4)
    kept = Kept.of(completion.kept_positions, 2, plan.computed[0])
    for positions, row in zip(completion.kept_positions, kept.holders, strict=True):
        heads = positions if isinstance(positions[0], list) else [positions, positions]
        assert row == [sum(p in head for head in heads) for p in range(n)]
    assert kept.counts == plan.at(0)[0]
    assert kept.computed == [n] * 3
    assert kept.heads_differ == (policy != "streaming")


def test_who_keeps_a_token_is_told_in_words() -> None:
    assert layers_in_words([3]) == "layer 3"
    assert layers_in_words([0, 1, 2]) == "layers 0 to 2"
    assert layers_in_words([0, 2]) == "layers 0 and 2"
    assert layers_in_words([0, 1, 4, 6, 7]) == "layers 0 to 1, 4 and 6 to 7"
    assert [LOOSE.where(column) for column in LOOSE.columns] == [
        "kept by 2 of 3 layers, in layers 0 to 1",
        "kept by 1 of 3 layers, in layer 0; kept by some heads of layer 1",
        "kept by 2 of 3 layers, in layers 0 and 2; kept by some heads of layer 1",
        "kept by 2 of 3 layers, in layers 0 and 2",
    ]
    assert LOOSE.where((0, 0, 0)) == "kept by no layer"
    assert LOOSE.where((1, 0, 1)) == "kept by some heads of layers 0 and 2"


def test_only_what_all_heads_keep_is_drawn_darkest() -> None:
    eight = Kept(8, [[8]], [1])
    assert [eight.shade(count) for count in range(9)] == [0, 1, 1, 2, 2, 2, 3, 3, 4]
    assert [LOOSE.shade(count) for count in range(3)] == [0, 2, 4]
    assert [nested([1], 1).shade(count) for count in range(2)] == [0, 4]


def test_the_legend_tells_of_the_layer_that_keeps_least() -> None:
    pyramid = made_up(nested([3, 1, 2, 3, 3, 3], 3))
    assert legend(pyramid) == (
        "The last layer kept 4 of the prompt's 6 tokens: the newest 2, which vote, the first 1, "
        "1 that were voted for. No other layer holds less."
    )
    other = replace(pyramid, newest=0, sinks=0)  # of policies that are not PyramidInfer no more is known
    assert legend(other) == "The last layer kept 4 of the prompt's 6 tokens. No other layer holds less."
    assert legend(made_up(nested([2, 2], 2))) == "The last layer kept all of the prompt's 2 tokens."
    heads = replace(made_up(LOOSE), newest=0, sinks=0)
    assert legend(heads) == "The last layer kept 2 of the prompt's 4 tokens. No other layer holds less."
    turned = replace(heads, pruned=replace(heads.pruned, kept=Kept(2, [LOOSE.holders[1], [2] * 4], [4, 4])))
    assert legend(turned) == (
        "Layer 0 kept 2 of the prompt's 4 tokens in each of its 2 heads: 1 in all of them, 2 in some. "
        "No other layer holds less."
    )


def test_a_token_that_gave_its_slot_to_a_stand_in_is_not_told_as_kept() -> None:
    """The demo marked it as held, though its key and value are lost."""
    kept = Kept.of([[0, 2, 3, 4], [[0, 3], [2, 3]]], 2, [4, 4], [2, None])
    assert kept == Kept(2, [[2, 0, 0, 2], [1, 0, 1, 2]], [4, 4], frozenset([0]))
    picture = made_up(replace(kept, holders=kept.holders[::-1], stand_ins=frozenset([1])))
    assert legend(replace(picture, newest=0)) == (
        "The last layer kept 2 of the prompt's 4 tokens; one more slot stands for the others. "
        "No other layer holds less."
    )


def test_what_was_computed_is_told_in_words() -> None:
    assert computed_in_words(nested([2, 1], 2)) == "Each layer computed just the tokens that it kept."
    assert computed_in_words(Kept(1, [[1, 0]], [2])) == "Each layer computed all tokens of the prompt."
    assert computed_in_words(LOOSE) == "Only layers 0 to 1 computed all tokens of the prompt."


# --- The comparison -----------------------------------------------------------------------------------------


def test_both_sides_are_what_the_engine_does_alone(tiny_dir: Path, tiny: LLM, picture: Picture) -> None:
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    for side, llm in ((picture.full, tiny), (picture.pruned, LLM(tiny_dir, kv_budget=0.7))):
        (alone,) = llm.generate(INJECTION, params)
        (text,) = side.texts
        assert alone.token_ids[: len(text.token_ids)] == text.token_ids
        assert (alone.kv_bytes, alone.kv_bytes_full) == (side.kv_bytes, side.kv_bytes_full)
        computed = llm.plan([len(picture.tokens)], 12).computed[0]
        assert Kept.of(alone.kept_positions, 2, computed) == side.kept
    assert picture.pruned.kv_bytes <= 0.7 * picture.full.kv_bytes == 0.7 * picture.full.kv_bytes_full
    assert (picture.full.name, picture.pruned.name) == ("full cache", "pyramid")
    assert picture.newest > 1
    assert picture.sinks == 4


def test_another_policy_is_shown_as_it_is(snapkv: Picture, split: Picture, picture: Picture) -> None:
    """Its layers are not nested, its heads differ, and nothing is said of votes that it may not have."""
    for shown, name in ((snapkv, "snapkv"), (split, "random-split")):
        assert shown.pruned.name == name
        assert (shown.newest, shown.sinks) == (0, 0)
        assert shown.pruned.kept.heads_differ
        assert shown.pruned.kept.computed == [len(shown.tokens)] * 3
        assert shown.pruned.kv_bytes <= 0.7 * shown.full.kv_bytes
        shallow, deep = shown.pruned.kept.holders[1:]
        assert any(below > above for above, below in zip(shallow, deep, strict=True))
        assert shown.full == replace(picture.full, prompt_s=shown.full.prompt_s, decode_s=shown.full.decode_s)
    assert split.pruned.kept.counts == picture.pruned.kept.counts


def test_only_generated_tokens_count_as_throughput(tiny_dir: Path) -> None:
    """Defect 8 of the published code: its demo counts the prompt's tokens as well."""
    batch = compared(tiny_dir, *SHORT, "--batch-size", "3", "--prompt-tokens", "150")
    new = 4 * 12  # of three questions and a stretch that is continued
    for side in (batch.full, batch.pruned):
        assert side.generated == new
        assert min(side.prompt_s, side.decode_s) > 0
        assert side.tokens_per_s == pytest.approx(new / (side.prompt_s + side.decode_s))


def test_a_stretch_of_the_book_is_continued_beside_the_questions(tiny_dir: Path) -> None:
    """It is one more prompt, of which figures tell, and the last; answers are those of questions alone."""
    batch = compared(tiny_dir, *SHORT, "--batch-size", "3", "--prompt-tokens", "150")
    asked, stretch = batch.prompts
    assert "prompts: 4 (3 with a question)" in batch.title
    assert batch.questions == 3
    assert [right.split(" of ")[1] for _, right, _ in figures(batch) if " of " in right] == ["3"]
    assert (asked.name, stretch.name) == ("prompt 0", "prompt 3")
    assert asked.answer is not None
    assert stretch.answer is None
    text = "".join(token.text for token in stretch.tokens)
    assert text in " ".join(DEFAULT_TEXT.read_text(encoding="utf-8").split())
    assert len(asked.tokens) - 10 < len(stretch.tokens) <= len(asked.tokens)
    for side in (batch.full, batch.pruned):
        assert len(side.texts) == 2
    alone = compared(tiny_dir, "--max-new-tokens", "12", "--prompt", text, "--kv-budget", "0.7")
    assert alone.pruned.texts == batch.pruned.texts[1:]


def test_the_questions_of_a_batch_differ(tiny: LLM) -> None:
    """Defect 8, the other half: one prompt copied over the batch."""
    drawn = book(tiny.tokenizer)
    cases = [drawn.ask(200) for _ in range(5)]
    assert len({case.prompt for case in cases}) == 5
    assert cases[0] == book(tiny.tokenizer).ask(200)
    assert cases[0] != book(tiny.tokenizer, seed=1).ask(200)


@pytest.mark.skipif(not WEIGHTS.exists(), reason="no embedded checkpoint in this tree")
@pytest.mark.parametrize(("tokens", "least"), [(128, 32), (512, 410), (2000, 1800)])
def test_a_question_stands_behind_its_fact_in_a_stretch_as_long_as_was_asked_for(
    tokens: int, least: int
) -> None:
    """Up to a sentence, which may be of a hundred tokens; the stretch that is continued up to a word."""
    tokenizer = load_tokenizer(WEIGHTS, 4096)
    assert tokenizer is not None
    for seed in range(5):
        drawn = book(tokenizer, seed)
        case = drawn.ask(tokens)
        assert least < len(tokenizer.encode(case.prompt)) <= tokens
        assert case.answer is not None
        text, _, asked = case.prompt.rpartition("\nQuestion: ")
        assert asked.partition("Answer: ")[2] + case.answer.removesuffix(".") in text
        if tokens >= 512:
            assert sum(sentence in text for sentence in drawn.sentences) >= 3
        stretch = drawn.as_it_stands(tokens)
        assert stretch.answer is None
        assert tokens - 8 < len(tokenizer.encode(stretch.prompt)) <= tokens
        assert stretch.prompt in " ".join(drawn.sentences)


@pytest.mark.skipif(not WEIGHTS.exists(), reason="no embedded checkpoint in this tree")
def test_the_embedded_checkpoint_answers_from_half_of_the_cache() -> None:
    """What the demo shows without flags: both answer from the book, by the checkpoint's own profile."""
    args = build_parser().parse_args(["--dtype", "float32", "--max-new-tokens", "8"])
    picture = compare(args, check(args))
    assert picture.pruned.name == "profile"
    assert picture.full.right == picture.pruned.right == picture.questions == 1
    assert picture.pruned.kv_bytes <= 0.5 * picture.full.kv_bytes


def test_of_prompts_that_ask_and_of_others_the_first_is_shown() -> None:
    asks, goes_on = Case("who?", "Nora"), Case("the fox")
    assert first_of_each([asks, asks, goes_on]) == [0, 2]
    assert first_of_each([goes_on, goes_on]) == [0]


def test_a_right_answer_is_counted(tiny: LLM) -> None:
    assert tiny.tokenizer is not None
    said = tiny.generate("the fox", SamplingParams(max_new_tokens=6, ignore_eos=True))[0].text
    cases = [Case("the fox", said[:3]), Case("the fox", said[:3] + "?"), Case("the fox")]
    assert run_side("full cache", tiny, tiny.tokenizer, cases, 6).right == 1


def test_what_follows_the_end_of_text_is_computed_and_not_shown(
    tiny: LLM, tiny_dir: Path, tmp_path: Path
) -> None:
    """Both sides do equal work, and a text is still shown as it would have ended."""
    ids = tiny.generate("the fox", SamplingParams(max_new_tokens=10, ignore_eos=True))[0].token_ids
    config = json.loads((tiny_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": ids[3]}))
    for name in ("tokenizer.model", "model.safetensors"):
        (tmp_path / name).symlink_to(tiny_dir / name)
    llm = LLM(tmp_path, policy="full")
    assert llm.tokenizer is not None
    side = run_side("full cache", llm, llm.tokenizer, [Case("the fox")], 10)
    (text,) = side.texts
    assert text.token_ids == ids[: ids.index(ids[3]) + 1]
    assert len(text.tokens) == len(text.token_ids)
    assert side.generated == 10


# --- On a terminal ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "right", "at"),
    [
        ([1, 2], [1, 2], None),
        ([1, 2], [1, 3], 1),
        ([4, 2], [1, 2], 0),
        ([1, 2], [1], 1),
        ([], [1], 0),
        ([], [], None),
    ],
)
def test_the_first_difference(left: list[int], right: list[int], at: int | None) -> None:
    assert first_difference(left, right) == at


def test_the_difference_names_both_tokens() -> None:
    picture = made_up(nested([2, 1], 2))
    assert outcome(picture, 0) == "The texts first differ at token 1: ' b' (full cache), '<c>' (pyramid)."
    ended = replace(picture.pruned, texts=[wrote({5: " a"})])
    assert "token 1: ' b' (full cache), its end (pyramid)" in outcome(replace(picture, pruned=ended), 0)
    asked = [replace(picture.prompts[0], answer=" b")]
    same = replace(picture, pruned=picture.full, prompts=asked)
    assert outcome(same, 0) == "The texts differ nowhere. The right answer is ' b'."


def test_what_a_prompt_ends_with_is_told_in_one_line() -> None:
    tokens = [Token(f"w{i}\n", "") for i in range(40)]
    assert ending(Prompt("prompt 3", tokens, None)).startswith("Prompt 3 ends: ... w10 w11 ")
    assert ending(Prompt("the prompt", tokens[:2], None)) == "The prompt ends: w0 w1"


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


def test_what_some_heads_keep_has_marks_of_its_own() -> None:
    texts, shares = ["The", " fox", " went", " home", ".\n", "Then"], [0.5, 1, 1, 0.25, 0.75, 0]
    assert marked(texts, shares, Style(80, True, False)) == ["{The}[ fox went]{ home.}\n", "Then"]
    assert marked(texts, shares, Style(80, True, True)) == [
        f"{UNDERLINED}The{PLAIN}{INVERSE} fox went{PLAIN}{UNDERLINED} home.{PLAIN}\n",
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
    n, kept = len(picture.tokens), picture.pruned.kept.counts
    for word in (
        "prompt, seconds",
        "generation, seconds",
        "tokens/s",
        "keys and values held",
        "100.0%",
        "full cache",
    ):
        assert word in text
    for layer, count in enumerate(kept):
        assert f"{layer:5} {count:7} {count / n:6.1%} {'#' * round(40 * count / n)}" in lines
    assert f"kept {kept[-1]} of the prompt's {n} tokens" in text.replace("\n", " ")
    assert "\x1b" not in text
    assert INVERSE in "\n".join(screen(picture, Style(100, True, True)))
    assert "Kept of the prompt, layer by layer:" in lines


def test_texts_stand_one_under_the_other_below_what_their_prompt_ends_with() -> None:
    """Of every prompt that is shown, with their first difference; on the page likewise."""
    one = made_up(nested([2, 1], 2))
    asked, stretch = (
        Prompt(f"prompt {i}", [Token(text, text) for text in texts], answer)
        for i, texts, answer in ((0, ["Who", "?"], " b"), (5, ["Far away"], None))
    )
    same = wrote({9: " hills"})
    two = replace(
        one,
        prompts=[asked, stretch],
        full=replace(one.full, texts=[*one.full.texts, same]),
        pruned=replace(one.pruned, texts=[*one.pruned.texts, same]),
    )
    lines = screen(two, Style(110, False, False))
    first = lines.index("Prompt 0 ends: Who?")
    assert lines[first : lines.index("Kept of prompt 0, layer by layer:")] == [
        "Prompt 0 ends: Who?",
        "full cache:",
        "    a b",
        "pyramid:",
        "    a<c>",
        "The texts first differ at token 1: ' b' (full cache), '<c>' (pyramid). The right answer is ' b'.",
        "",
        "Prompt 5 ends: Far away",
        "full cache:",
        "    hills",
        "pyramid:",
        "    hills",
        "The texts differ nowhere.",
        "",
    ]
    generated = page(two).partition("<h2>What was generated</h2>")[2]
    told = [
        "Prompt 0 ends: Who?",
        "> a<mark> b</mark><",
        "> a<mark>&lt;c&gt;</mark><",
        "differ at token 1",
        "Prompt 5 ends: Far away",
        "> hills<",
        "differ nowhere",
    ]
    places = [generated.find(text) for text in told]
    assert -1 not in places
    assert places == sorted(places)


def test_a_profile_is_told_of_as_what_it_is(profile: Picture) -> None:
    """Some layers compute all, and the one that holds least is not the last; of votes nothing is known."""
    kept, n = profile.pruned.kept, len(profile.tokens)
    assert profile.pruned.name == "profile"
    assert (profile.newest, profile.sinks) == (0, 0)
    assert kept.computed[:2] == [n, n] > kept.computed[2:]
    assert kept.counts[0] < kept.counts[2] < kept.counts[1] < n
    assert kept.stand_ins == {0, 1, 2}
    assert kept.counts[0] == round(0.2 * 0.4 * 3 / 1.4 * n) - 1  # the level holds 1.4 / 3
    assert legend(profile).startswith(f"Layer 0 kept {kept.counts[0]} of the prompt's {n} tokens")
    for text in (" ".join(screen(profile, Style(100, False, False))), page(profile)):
        assert "Only layers 0 to 1 computed all tokens of the prompt." in text
        assert "vote" not in text.replace("devote", "")


def test_the_screen_shows_what_was_computed_and_not_kept(snapkv: Picture, split: Picture) -> None:
    """Lighter, behind the bar; and what only some heads of the smallest layer kept has other marks."""
    for shown in (snapkv, split):
        n = len(shown.tokens)
        lines = screen(shown, Style(100, False, False))
        for layer, count in enumerate(shown.pruned.kept.counts):
            filled = round(40 * count / n)
            line = f"{layer:5} {count:7} {count / n:6.1%} {'#' * filled}{'.' * (40 - filled)} {n} computed"
            assert line in lines
        text = " ".join(lines)
        assert "(. computed and not kept)" in text
        assert "Each layer computed all tokens of the prompt." in text
        assert "in brackets" in text
        assert "in braces" in text
        coloured = "\n".join(screen(shown, Style(100, True, True)))
        assert "(\u2591 computed and not kept)" in coloured
        assert INVERSE in coloured
        assert UNDERLINED in coloured


def test_the_columns_are_as_wide_as_the_policy_s_name(split: Picture) -> None:
    long = replace(split, pruned=replace(split.pruned, name="a-policy-of-a-long-name"))
    lines = screen(long, Style(100, False, False))
    (head,) = [line for line in lines if line.startswith("    ") and line.endswith("a-policy-of-a-long-name")]
    (share,) = [line for line in lines if line.startswith("share of the full cache")]
    assert len(head) == len(share)


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


# --- The command --------------------------------------------------------------------------------------------


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
    picture = compared(
        tiny_dir, *SHORT, "--prompt", "the fox " * 12, "--prompt-file", str(tmp_path / "prompt.txt")
    )
    assert "prompts: 2, of " in picture.title
    (first,) = picture.prompts
    assert "".join(token.text for token in picture.tokens) == "the fox " * 12
    assert (first.name, first.answer, picture.questions) == ("prompt 0", None, 0)


def test_the_budget_and_the_policy_are_heeded(tiny_dir: Path, tmp_path: Path) -> None:
    """Half by default; settings that are named run as they are, unless a budget is given with them."""
    (tmp_path / "p.json").write_text(json.dumps({"recent_ratio": 0.1, "min_context_length": 8}))
    flags = ["--prompt", FOXES, "--max-new-tokens", "12"]
    runs: tuple[list[str], ...] = (
        [],
        ["--kv-budget", "0.8"],
        ["--policy", str(tmp_path / "p.json")],
        ["--policy", "llama2-7b"],
    )
    half, most, own, published = (compared(tiny_dir, *flags, *more).pruned for more in runs)
    assert 0.4 < half.kv_bytes / half.kv_bytes_full <= 0.5
    assert 0.7 < most.kv_bytes / most.kv_bytes_full <= 0.8
    assert half.kv_bytes < own.kv_bytes < published.kv_bytes <= published.kv_bytes_full
    both = compared(tiny_dir, *flags, "--policy", str(tmp_path / "p.json"), "--kv-budget", "0.6").pruned
    assert both.kv_bytes <= 0.6 * both.kv_bytes_full
    assert {side.name for side in (half, most, own, published, both)} == {"pyramid"}
    (tmp_path / "s.json").write_text(json.dumps({"policy": "streaming", "share": 0.25}))
    files = compared(tiny_dir, *flags, "--policy", str(tmp_path / "s.json"))
    assert files.pruned.name == "streaming"
    assert sum(files.pruned.kept.counts) == len(files.tokens) * 3 // 4


def test_dtype_and_threads_are_heeded(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    flags = [*SHORT, "--prompt", "the fox went home again. " * 4, "--threads", "1"]
    full, half = (
        compared(tiny_dir, *flags, "--dtype", dtype).full.kv_bytes for dtype in ("float32", "bfloat16")
    )
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
        (["--prompt-tokens", "64"], "too few for a fact"),
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
        (["--policy", "full"], "--policy is full"),
        (["--policy", "full", "--kv-budget", "0.5"], "--policy is full"),
        (["--policy", "snapkw"], "snapkv"),
        (["--pyramid", "auto"], "--pyramid"),
        (["--policy", "llama9"], "llama3-8b"),
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


def test_prompts_longer_than_the_book_are_refused(
    capsys: pytest.CaptureFixture[str], tiny_dir: Path, tmp_path: Path
) -> None:
    """What draws a stretch asks for a longer text, for which the demo has no flag."""
    write_checkpoint(tmp_path, max_position_embeddings=10**6)
    (tmp_path / "tokenizer.model").symlink_to(tiny_dir / "tokenizer.model")
    assert main(["--model", str(tmp_path), "--prompt-tokens", "900000"]) == 2
    err = capsys.readouterr().err
    assert "expected 900000 or more" in err
    assert "--prompt-file, or fewer --prompt-tokens" in err
    assert err.count("\n") == 1


def test_a_checkpoint_without_a_tokenizer_is_one_line(command: Any, tiny_dir: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(tiny_dir / name)
    status, out, err = command("--model", str(tmp_path))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "tokenizer.model" in err


# --- The page -----------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page holds: its tags, the prompt's tokens with how many layers keep them, and what is told."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[tuple[float, str]] = []
        self.entries: list[int] = []  # of each token, in the list of what is told
        self.told: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        given = dict(attrs)
        style = given.get("style") or ""
        self.inside = tag if tag == "li" or (tag == "span" and style.startswith("--held:")) else ""
        if self.inside == "span":
            self.tokens.append((float(style.removeprefix("--held:")), ""))
            self.entries.append(int(given["data-told"] or ""))
        elif self.inside:
            self.told.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "span":
            held, text = self.tokens[-1]
            self.tokens[-1] = (held, text + data)
        elif self.inside:
            self.told[-1] += data


@pytest.mark.parametrize("policy", ["picture", "snapkv", "split", "profile"])
def test_the_page_holds_each_token_and_who_kept_it(request: pytest.FixtureRequest, policy: str) -> None:
    """The shade is the number of layers that keep a token, of which a head is its part."""
    picture: Picture = request.getfixturevalue(policy)
    parsed, kept = Page(page(picture)), picture.pruned.kept
    assert [text for _, text in parsed.tokens] == [token.text for token in picture.tokens]
    assert "".join(text for _, text in parsed.tokens) == INJECTION
    assert [held for held, _ in parsed.tokens] == [sum(column) / 2 for column in kept.columns]
    assert [parsed.told[entry] for entry in parsed.entries] == [kept.where(column) for column in kept.columns]
    assert len(set(parsed.told)) == len(parsed.told) or kept.heads_differ  # words do not count heads


def paths(picture: Picture) -> list[tuple[str | None, str | None]]:
    """Style and outline of what fills the map."""
    tags = Page(page(picture)).tags
    return [(attrs["style"], attrs["d"]) for tag, attrs in tags if tag == "path" and attrs["class"] == "kept"]


def test_the_map_is_filled_where_a_layer_kept_a_token() -> None:
    """Neighbours that are kept alike are one rectangle."""
    outline = "M0 0h1v3h-1zM1 0h2v1h-2zM3 0h1v2h-1z"
    assert paths(made_up(nested([3, 1, 1, 2], 3))) == [("fill-opacity:1", outline)]


def test_the_map_is_lighter_where_some_heads_kept_a_token() -> None:
    """And a layer may keep what the layer before it dropped."""
    assert paths(made_up(LOOSE)) == [
        ("fill-opacity:0.5", "M1 1h1v1h-1zM2 1h1v1h-1z"),
        ("fill-opacity:1", "M0 0h1v2h-1zM1 0h1v1h-1zM2 0h1v1h-1zM2 2h1v1h-1zM3 0h1v1h-1zM3 2h1v1h-1z"),
    ]


def test_the_bars_tell_what_was_kept_and_computed() -> None:
    """The outline stands where a layer computed more than it kept."""
    bars = [attrs for tag, attrs in Page(page(made_up(LOOSE))).tags if tag == "rect" and "class" in attrs]
    drawn = [(attrs["class"], attrs["width"], attrs["y"]) for attrs in bars]
    assert drawn == [
        ("kept", "4", "0.1"),
        ("kept", "2", "1.1"),
        ("computed", "4", "1.1"),
        ("kept", "2", "2.1"),
        ("computed", "3", "2.1"),
    ]
    text = page(made_up(LOOSE))
    assert "computed: 4, 4, 3; kept: 4, 2, 2" in text
    assert "<title>layer 2: 2 kept, 3 computed</title>" in text


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
    shown = made_up(nested([2, 2], 2), ["</script>", "<script>alert(1)</script>"])
    named = replace(shown, pruned=replace(shown.pruned, name="<b>"))
    asked = [replace(shown.prompts[0], name="<b>", answer="<b>")]
    for text in (page(picture), page(shown), page(replace(shown, prompts=asked, title="<i>")), page(named)):
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
    svg, bars = [attrs for tag, attrs in tags if tag == "svg"]
    assert svg["aria-label"]
    assert svg["tabindex"] == "0"
    assert bars["aria-label"]


def test_the_first_difference_is_marked_in_both_texts() -> None:
    text = page(made_up(nested([2, 1], 2)))
    assert "> a<mark> b</mark></div>" in text
    assert "> a<mark>&lt;c&gt;</mark></div>" in text


def test_a_page_of_2000_tokens_and_80_layers_is_small() -> None:
    rng = random.Random(0)
    text = page(made_up(nested([rng.randint(1, 80) for _ in range(2000)], 80)))
    assert len(text.encode()) < 200_000
    assert len(Page(text).tokens) == 2000


# --- The plot -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["auto", "snapkv", "random-split"])
def test_a_plot_is_written(command: Any, tmp_path: Path, policy: str) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, an optional extra, is not installed")
    file = tmp_path / "kept.png"
    status, _, err = command(
        *SHORT, "--prompt", "the fox went home again. " * 4, "--plot", str(file), "--policy", policy
    )
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


def test_files_that_cannot_be_written_are_refused_before_anything_is_computed(
    command: Any, tmp_path: Path
) -> None:
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
    argv = [
        sys.executable,
        "train_free_demo.py",
        "--model",
        str(tiny_dir),
        "--prompt",
        "the fox " * 12,
        *SHORT,
    ]
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
    drawn = replace(picture, prompts=[replace(picture.prompts[0], tokens=tokens)])
    on_screen = "\n".join(screen(drawn, Style(80, blocks=True, colour=False)))
    assert "\r" not in on_screen
    for shown in (on_screen, page(drawn)):
        assert not {"\x1b", "\u202e"} & {*shown}
        assert "a[2Jb" in shown
