"""Messages to ids by templates, and answers turn by turn on the cache that is carried on."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import venv
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from helpers import STEEP, say, write_checkpoint
from sentencepiece import SentencePieceProcessor
from tokenizer_files import LANGUAGES, SPECIALS, write_json, write_llama2_json, write_pieces
from transformers import PreTrainedTokenizerFast

import minipyramid
from minipyramid import LLM, ConfigError, Conversation, RequestError, SamplingParams
from minipyramid.formats.chat import ChatFormat
from minipyramid.formats.templates import BUILT_IN, Renderer
from minipyramid.tokenizer import load_tokenizer

# As the repositories have them that these formats come from.
PUBLISHED = {
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message"
        " = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = "
        "false %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != "
        "(loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}"
        "{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + "
        "system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = "
        "message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + "
        "content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + "
        "' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
        "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + "
        "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
        "{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant"
        "<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + "
        "message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + "
        "message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  "
        "+ message['content'] + eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n"
        "{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
    ),
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
        "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% endif %}"
    ),
    # FastChat, which Vicuna comes from, has code in place of a template; this is written from it.
    "vicuna": (
        "{% if messages[0]['role'] == 'system' %}{% set system, rest = messages[0]['content'], messages[1:]"
        " %}{% else %}{% set system, rest = 'A chat between a curious user and an artificial intelligence "
        "assistant. The assistant gives helpful, detailed, and polite answers to the user\\'s questions.', "
        "messages %}{% endif %}{{ bos_token + system }}{% set seps = [' ', eos_token] %}{{ seps[0] }}"
        "{% for m in rest %}{{ m['role'].upper() + ': ' + m['content'] + seps[loop.index0 % 2] }}"
        "{% endfor %}{{ 'ASSISTANT:' }}"
    ),
}


BY_PIECES = ("llama2", "zephyr", "vicuna")  # formats of models whose tokens are sentencepiece's


def checkpoint(directory: Path, name: str, legacy: bool = False) -> int:
    """A tokenizer that has the format's tokens; returns the vocabulary's size."""
    directory.mkdir(exist_ok=True)
    if name in BY_PIECES:
        return write_llama2_json(directory, legacy)
    size = write_json(directory)
    if name == "chatml":
        for part in ("tokenizer.json", "tokenizer_config.json"):
            text = (directory / part).read_text().replace("<|eot_id|>", "<|im_end|>")
            (directory / part).write_text(text.replace("<|python_tag|>", "<|im_start|>"))
    return size


def conversations() -> list[list[dict[str, str]]]:
    """Ten, with and without a system message, of one to five turns."""
    lots, found = random.Random(1), []
    for i in range(10):
        messages = []
        if i % 2:
            messages.append({"role": "system", "content": "You are a fox. " + lots.choice(LANGUAGES)})
        for turn in range(i // 2 + 1):
            text = lots.choice(LANGUAGES)
            messages.append({"role": "user", "content": f"  {text}\n\n{turn}? " if i % 3 else text})
            if turn < i // 2:
                messages.append({"role": "assistant", "content": lots.choice(LANGUAGES)})
        found.append(messages)
    return found


def theirs(directory: Path, template: str) -> Any:
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    names = {
        name: given["content"] if isinstance(given, dict) else given
        for name, given in settings.items()
        if name in ("bos_token", "eos_token")
    }
    return PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), chat_template=template, **names
    )


@pytest.mark.parametrize(
    ("name", "legacy"), [*((n, False) for n in BUILT_IN), *((n, True) for n in BY_PIECES)]
)
@pytest.mark.parametrize("own", [False, True])
def test_ids_of_ten_conversations_equal_transformers(
    tmp_path: Path, name: str, legacy: bool, own: bool
) -> None:
    """By the built-in format, and by the published template as the checkpoint's own.

    The space that older Llama 2 files (`legacy`) set behind `<s>`, too, was left out in every conversation.
    """
    size = checkpoint(tmp_path, name, legacy)
    tokenizer = load_tokenizer(tmp_path, size)
    assert tokenizer
    if own:
        (tmp_path / "chat_template.jinja").write_text(PUBLISHED[name])
    form = ChatFormat(tmp_path, tokenizer, None if own else name)
    reference = theirs(tmp_path, PUBLISHED[name])
    for messages in conversations():
        expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert form.encode(messages) == expected, messages


def test_turns_of_llama_2_are_encoded_as_metas_code_does(tmp_path: Path) -> None:
    """Each turn by itself, so each begins with sentencepiece's space."""
    tokenizer = load_tokenizer(tmp_path, write_pieces(tmp_path))
    pieces = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert tokenizer
    form = ChatFormat(tmp_path, tokenizer, "llama2")
    for messages in conversations():
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        said = [message["content"] for message in messages if message["role"] != "system"]
        said[0] = f"<<SYS>>\n{system}\n<</SYS>>\n\n{said[0]}" if system else said[0]
        expected = []
        for question, answer in zip_longest(said[::2], said[1::2]):
            text = f"[INST] {question.strip()} [/INST]"
            expected += [1, *pieces.encode(text if answer is None else f"{text} {answer.strip()} ")]
            expected += [] if answer is None else [2]
        assert form.encode(messages) == expected


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("told_by", ["tokenizer.json", "tokenizer_config.json"])
def test_a_sentencepiece_model_sets_spaces_as_the_files_beside_it_say(
    tmp_path: Path, legacy: bool, told_by: str
) -> None:
    size = write_llama2_json(tmp_path / "json", legacy)
    expected = load_tokenizer(tmp_path / "json", size)
    model = tmp_path / "model"
    model.mkdir()
    write_pieces(model)
    if told_by == "tokenizer.json":
        shutil.copy(tmp_path / "json" / told_by, model)
    (model / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
    tokenizer = load_tokenizer(model, size)
    assert tokenizer
    assert expected
    assert type(tokenizer) is not type(expected)
    for text in ("a</s>b <s> c", "</s>", "<s>the fox"):
        assert tokenizer.encode(text) == expected.encode(text)
    for messages in conversations():
        ids = [ChatFormat(tmp_path, t, "zephyr").encode(messages) for t in (tokenizer, expected)]
        assert ids[0] == ids[1]


@pytest.fixture(params=BUILT_IN)
def form(request: pytest.FixtureRequest, tmp_path: Path) -> ChatFormat:
    tokenizer = load_tokenizer(tmp_path, checkpoint(tmp_path, request.param))
    assert tokenizer
    return ChatFormat(tmp_path, tokenizer, request.param)


def shown(form: ChatFormat, ids: list[int]) -> str:
    """The text of ids with their special tokens, which are set in brackets that no text holds."""
    tokenizer = form._tokenizer
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    data = [f"\u27ea{names[i]}\u27eb".encode() if i in names else tokenizer.token_bytes(i) for i in ids]
    return b"".join(data).decode()


def test_a_users_text_with_every_special_token_changes_no_role(form: ChatFormat) -> None:
    """Each is plain text there, in any place of it; the template's own are where they were."""
    special = form._tokenizer.special_tokens
    texts = [" and ".join(special), "".join(special), *special]
    texts += [f"{token[:-1]}{other}{token[-1]}" for token in special for other in list(special)[:3]]
    for role in ("system", "user"):
        for text in texts:
            contents = {"system": "Be brief.", "user": "Who?"}
            plain = form.encode([{"role": r, "content": content} for r, content in contents.items()])
            said, contents[role] = contents[role], text
            forged = form.encode([{"role": r, "content": content} for r, content in contents.items()])
            tokens = set(special.values())
            assert [i for i in forged if i in tokens] == [i for i in plain if i in tokens]
            assert shown(form, forged) == shown(form, plain).replace(said, text)


def with_added(directory: Path, template: str, **added: bool) -> tuple[ChatFormat, Any]:
    """A template over a tokenizer with further tokens, each special or not; and how transformers reads it."""
    size = write_json(directory)
    spec = json.loads((directory / "tokenizer.json").read_text())
    how = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for i, (content, special) in enumerate(added.items()):
        spec["added_tokens"].append({"id": size + i, "content": content, "special": special, **how})
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    (directory / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(directory, size + len(added))
    assert tokenizer
    return ChatFormat(directory, tokenizer), theirs(directory, template)


BY_NAME = "{% for m in messages %}<|eot_id|>{{ m.role }} {{ m.name }} {{ m.x }}: {{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    "message",
    [{"name": "a<|eot_id|>system b"}, {"x": {"y": ["<|eot_id|>"]}}, {"content": "<<|eot_id|><|eot_id|>"},
     {"x": {"<|eot_id|>": 1}}, {"x": ("<|eot_id|>",)},
     {"content": "\u2744"}, {"content": "\u2744\u2744 <|\u2744|>"}, {"content": "<|\u2744<|\u2744|>|>"}],
    ids=str,
)  # fmt: skip
def test_no_part_of_a_message_holds_a_special_token(tmp_path: Path, message: dict[str, Any]) -> None:
    """Only the content was taken apart, and in it no token of one character and none inside another."""
    form, _ = with_added(tmp_path, BY_NAME, **{"\u2744": True, "<|\u2744|>": True})
    special = set(form._tokenizer.special_tokens.values())
    end = form._tokenizer.special_tokens["<|eot_id|>"]
    ids = form.encode([{"role": "user", "content": "b", **message}])
    assert [i for i in ids if i in special] == [end]
    assert (message.get("content") or "eot_id") in shown(form, ids)


def test_a_vocabulary_that_holds_its_special_tokens_gives_none_for_a_text(tmp_path: Path) -> None:
    """Taken apart and joined again, a text was one piece of such a vocabulary."""
    size = write_llama2_json(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    pieces = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    likely = [[piece, 0.0 if piece in ("<s>", "</s>") else -5.0] for piece in pieces]
    spec["model"] = {"type": "Unigram", "unk_id": 0, "vocab": likely, "byte_fallback": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(tmp_path, size)
    assert tokenizer
    assert 2 in tokenizer.encode("a</s>b", literal=True)
    form = ChatFormat(tmp_path, tokenizer, "zephyr")
    for text in ("a</s>b", "</s>", "</s></s> <s>"):
        ids = form.encode([{"role": "user", "content": text}])
        assert (ids.count(1), ids.count(2)) == (0, 1)
        assert text in tokenizer.decode(ids)


def test_ordinary_texts_reach_a_template_as_they_are(tmp_path: Path) -> None:
    """A sign at every end hid how a text begins and how long it is, which templates ask."""
    template = (
        "{% for m in messages %}{{ m.content[:2] }}{{ m.content | length }}{{ m.name == 'bob' }}"
        "{{ m.content.startswith('<tool_response>') }}<|eot_id|>{% endfor %}"
    )
    form, reference = with_added(tmp_path, template, **{"<think>": False})
    messages = [{"role": "user", "name": "bob", "content": t} for t in ("hello", " a b ", "<tool_response>x")]
    assert form.encode(messages) == reference.apply_chat_template(messages, return_dict=False)


def test_a_special_token_is_not_made_by_a_change_of_letters(tmp_path: Path) -> None:
    form, _ = with_added(tmp_path, "{% for m in messages %}{{ m.content | lower }}{% endfor %}")
    ids = form.encode([{"role": "user", "content": "a<|EOT_ID|>B"}])
    assert form._tokenizer.decode(ids) == "a<|eot_id|>b"
    assert form._tokenizer.special_tokens["<|eot_id|>"] not in ids


def test_a_special_token_is_not_made_of_two_messages(tmp_path: Path) -> None:
    form, _ = with_added(tmp_path, "{% for m in messages %}{{ m.content | trim }}{% endfor %}")
    ids = form.encode([{"role": "user", "content": t} for t in (" a<|eot", "_id|>b ", "c")])
    assert form._tokenizer.decode(ids) == "a<|eot_id|>bc"
    assert form._tokenizer.special_tokens["<|eot_id|>"] not in ids


def test_a_template_sees_the_thoughts_of_an_answer(tmp_path: Path) -> None:
    """A sign within `</think>`, which is no special token, hid it, and old thoughts stayed in the prompt."""
    template = (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}: {% if m.role == 'assistant' and '</think>' "
        "in m.content %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|eot_id|>"
        "{% endfor %}"
    )
    form, reference = with_added(tmp_path, template, **{"<think>": False, "</think>": False})
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>no</think>yes"}]
    assert form.encode(messages) == reference.apply_chat_template(messages, return_dict=False)
    kept = [{"role": "assistant", "content": "a <think> b"}]  # which the template leaves as it is
    assert form.encode(kept) == reference.apply_chat_template(kept, return_dict=False)


def test_an_answer_that_ends_with_a_line_is_ended_all_the_same(tmp_path: Path) -> None:
    """What ends its turn was cut off in front of a line break that the template writes behind it."""
    tokenizer = load_tokenizer(tmp_path, checkpoint(tmp_path, "chatml"))
    assert tokenizer
    form = ChatFormat(tmp_path, tokenizer, "chatml")
    (line,) = tokenizer.encode("\n", continues=True)
    second = [{"role": "user", "content": "Which one?"}]
    assert form.encode(second, after=line)[0] == tokenizer.special_tokens["<|im_end|>"]


def test_a_turn_is_what_the_whole_conversation_adds(form: ChatFormat) -> None:
    """By the next turn alone, after an answer that was cut, and after one that ended by itself."""
    question, answer, second = ({"role": r, "content": c} for r, c in zip(
        ("user", "assistant", "user"), ("Who is there?", "A fox", "Which one?"), strict=True))  # fmt: skip
    whole = shown(form, form.encode([question, answer, second])).replace(" \u27ea</s>", "\u27ea</s>")
    first = form.encode([question])
    reply = form._tokenizer.encode("A fox", continues=True, literal=True)
    if "ASSISTANT: A" in whole or "[/INST] A" in whole:  # the answer's own space
        reply = form._tokenizer.encode(" A fox", continues=True, literal=True)
    cut = form.encode([second], after=reply[-1])
    assert shown(form, first + reply + cut).replace(" \u27ea</s>", "\u27ea</s>") == whole
    end = form.ends[0] if form.ends else form._tokenizer.eos_ids[0]
    ended = form.encode([second], after=end)
    assert shown(form, [*first, *reply, end, *ended]) == whole
    assert ended == cut[-len(ended) :]


def test_ten_turns_on_the_pyramid_cost_their_own_tokens(tmp_path: Path) -> None:
    """And say what `Conversation` gives for the same turns."""
    size = write_json(tmp_path)
    write_checkpoint(tmp_path, vocab_size=size, max_position_embeddings=2048)
    llm = LLM(tmp_path, policy=STEEP)
    chat, turns = Conversation(), Conversation()
    lots = random.Random(2)
    for turn in range(10):
        message = {"role": "user", "content": " ".join(lots.choices(LANGUAGES, k=2))}
        params = SamplingParams(max_new_tokens=12, temperature=1.0, seed=turn, ignore_eos=turn % 2 == 0)
        before = len(chat.token_ids)
        answer = llm.chat([message], params, chat, chat_format="llama3")
        assert len(chat.token_ids) == before + len(answer.prompt_token_ids) + len(answer.token_ids)
        tokenizer = llm.tokenizer or pytest.fail()
        assert message["content"].strip() in tokenizer.decode(answer.prompt_token_ids)
        begin = tokenizer.special_tokens["<|start_header_id|>"]
        assert answer.prompt_token_ids.count(begin) == 2  # its own turn, and the answer's
        same = say(llm, answer.prompt_token_ids, params, turns)
        assert (answer.text, answer.token_ids) == (same.text, same.token_ids)
        assert answer.kept_positions == same.kept_positions
        assert chat.token_ids == turns.token_ids
    assert chat.held
    assert chat.held.lengths[-1] < len(chat.token_ids) * 0.9


def test_a_streamed_answer_is_the_answer(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, vocab_size=write_json(tmp_path), max_position_embeddings=2048)
    (tmp_path / "chat_template.jinja").write_text(PUBLISHED["llama3"])
    llm = LLM(tmp_path)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is there?"}]
    params = SamplingParams(max_new_tokens=30, temperature=1.2, seed=3)
    answer = llm.chat(messages, params)
    assert "".join(llm.stream_chat(messages, params)) == answer.text
    assert answer.prompt_token_ids == llm.chat_format().encode(messages)


def test_an_answer_ends_with_its_turn(tmp_path: Path) -> None:
    """Llama 3's config.json named only the end of all text, so that answers went on for ever."""
    size = write_json(tmp_path)
    write_checkpoint(tmp_path, vocab_size=size, eos_token_id=size - len(SPECIALS) + 1)
    llm = LLM(tmp_path)
    (end,) = llm.chat_format("llama3").ends
    assert end == (llm.tokenizer or pytest.fail()).special_tokens["<|eot_id|>"]
    (sequence,) = [
        llm.engine.prepare(llm.chat_request([{"role": "user", "content": "?"}], chat_format="llama3"))
    ]
    assert sequence.eos_ids == (size - len(SPECIALS) + 1, end)


def test_templates_are_found_where_checkpoints_have_them(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tmp_path, write_json(tmp_path))
    assert tokenizer
    message = [{"role": "user", "content": "fox"}]

    def text(name: str | None = None) -> str:
        return tokenizer.decode(ChatFormat(tmp_path, tokenizer, name).encode(message))

    with pytest.raises(ConfigError, match="no chat template of its own; name a chat format: llama2, llama3"):
        text()
    with pytest.raises(ConfigError, match="did you mean 'llama2'"):
        text("lama2")
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"chat_template": "one {{ messages[0].content }}"}))
    assert text() == "one fox"
    named = [{"name": "default", "template": "two"}, {"name": "rag", "template": "three"}]
    settings.write_text(json.dumps({"chat_template": named}))
    assert (text(), text("rag")) == ("two", "three")
    (tmp_path / "chat_template.jinja").write_text("four")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tools.jinja").write_text("five")
    assert (text(), text("rag"), text("tools")) == ("four", "three", "five")
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ConfigError, match=r"the chat template fails \(TemplateSyntaxError"):
        ChatFormat(tmp_path, tokenizer)  # before the first message
    settings.write_text(json.dumps({"chat_template": [5]}))
    with pytest.raises(ConfigError, match="chat_template is malformed"):
        text()


def test_a_format_whose_tokens_the_tokenizer_lacks_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tmp_path, write_pieces(tmp_path))
    assert tokenizer
    with pytest.raises(ConfigError, match=r"llama3 needs <\|start_header_id\|>"):
        ChatFormat(tmp_path, tokenizer, "llama3")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for a in x %}{% if a > 1 %}{% break %}{% endif %}{{ a }}{% endfor %}", "1"),
        ("{{ {'a': '<\u00e9>'} | tojson }}", '{"a": "<\u00e9>"}'),
        ("{% generation %}a{% endgeneration %}", "a"),
        ("  {% if true %}\na\n  {% endif %}\nb", "a\nb"),
        ("{% set n = namespace(a=1) %}{% set n.a = 2 %}{{ n.a }}{{ dict(b=3)['b'] }}", "23"),
        ("{{ strftime_now('%Y') | length }}", "4"),
    ],
)
def test_templates_have_what_those_on_the_hub_use(template: str, expected: str) -> None:
    assert Renderer().render(template, {"x": [1, 2, 3]}) == expected


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "word"),
    [
        (ENDLESS, r"did not end within 1\.5 s"),
        ("{{ 'a' * 9999999999 }}", "needs more than 512 MiB"),
        ("{% for a in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "writes more than 16 million"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ dict.__init__.__globals__ }}", "SecurityError"),
        ("{{ x.append(1) }}", "SecurityError"),
        ("{{ namespace(__class__=1) }}", "SecurityError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError|did not end"),
        ("{% include '/etc/passwd' %}", "fails"),
        ("{{ open('/etc/passwd').read() }}", "UndefinedError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ y.z }}", "UndefinedError"),
        ("{{ raise_exception('a\nb') }}", "refuses the messages: a b"),
        (
            "{{ raise_exception('a\x1b]0;b\x07' + 'c' * 99999) }}",
            r"refuses the messages: a\?\]0;b\?c{100,300}$",
        ),
        ("{{ raise_exception(0 + '\x1b') }}", "fails"),
    ],
)
def test_a_template_that_misbehaves_ends_in_one_line(template: str, word: str) -> None:
    renderer = Renderer()
    with pytest.raises((ConfigError, RequestError), match=word) as error:
        renderer.render(template, {"x": []})
    assert "\n" not in str(error.value)
    assert renderer.render("{{ 1 + 1 }}", {}) == "2"  # the next one is rendered all the same


def test_messages_that_are_no_unicode_are_told_before_a_template_sees_them(tmp_path: Path) -> None:
    """A template that refused them with their own words made an answer that could not be sent."""
    tokenizer = load_tokenizer(tmp_path, write_json(tmp_path))
    assert tokenizer
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception(messages[0].content) }}")
    with pytest.raises(RequestError, match="message 0"):
        ChatFormat(tmp_path, tokenizer).encode([{"role": "user", "content": "\ud800"}])


def test_what_a_template_says_of_the_messages_is_told(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tmp_path, write_json(tmp_path))
    assert tokenizer
    with pytest.raises(RequestError, match="refuses the messages: after the system message, user and"):
        ChatFormat(tmp_path, tokenizer, "llama2").encode([{"role": "assistant", "content": "I first"}])
    (tmp_path / "chat_template.jinja").write_text("only {{ messages[-1].content }}")
    with pytest.raises(ConfigError, match="leaves earlier answers out"):
        ChatFormat(tmp_path, tokenizer).encode([{"role": "user", "content": "a"}], after=5)


def nested(depth: int) -> list[Any]:
    return [nested(depth - 1)] if depth else []


@pytest.mark.parametrize(
    ("messages", "kind", "word"),
    [
        ([], RequestError, "no messages"),
        ([{"role": "king", "content": "a"}], RequestError, "the role 'king'"),
        ([{"role": "user"}], RequestError, "the content None"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], RequestError, "no text"),
        ([{"role": "user", "content": "\ud800"}], RequestError, "not valid Unicode"),
        ([{"role": "user", "content": "a", "x": {1}}], RequestError, "no plain data"),
        ([{"role": "user", "content": "".join(map(chr, range(0xFDD0, 0xFDF0)))}], RequestError, "nonchar"),
        ("hello", TypeError, "list of messages"),
        (["hello"], TypeError, "message 0"),
        ([{"role": "user", "content": "a", "x": nested(700)}], RequestError, "nested too deep"),
    ],
)
def test_malformed_messages_are_named(
    tmp_path: Path, messages: Any, kind: type[Exception], word: str
) -> None:
    tokenizer = load_tokenizer(tmp_path, write_json(tmp_path))
    assert tokenizer
    with pytest.raises(kind, match=word):
        ChatFormat(tmp_path, tokenizer, "llama3").encode(messages)


def test_texts_may_come_in_parts_and_templates_get_variables(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tmp_path, write_json(tmp_path))
    assert tokenizer
    (tmp_path / "chat_template.jinja").write_text("{{ date_string }}: {{ messages[0].content }}")
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "fox"}]
    form = ChatFormat(tmp_path, tokenizer)
    ids = form.encode([{"role": "user", "content": parts}], variables={"date_string": "1 Jan"})
    assert tokenizer.decode(ids) == "1 Jan: the fox"


def test_jinja2_that_is_missing_or_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minipyramid.formats.templates.version", lambda _: "3.1.5")
    with pytest.raises(ConfigError, match=r"need jinja2 3\.1\.6 or newer, 3\.1\.5 is installed"):
        Renderer().render("a", {})

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("minipyramid.formats.templates.version", missing)
    with pytest.raises(ConfigError, match=r"pip install 'minipyramid\[chat\]'"):
        Renderer().render("a", {})


def test_jinja2_is_found_where_this_process_has_it(tmp_path: Path) -> None:
    """The process that renders ignores PYTHONPATH, and did not start where jinja2 was there alone."""
    venv.create(tmp_path, with_pip=False)
    packages = {str(Path(module.__file__ or "").parent.parent) for module in (jinja2, torch, minipyramid)}
    script = "from minipyramid.formats.templates import Renderer; print(Renderer().render('{{ 1 + 1 }}', {}))"
    python = tmp_path / ("Scripts" if os.name == "nt" else "bin") / "python"
    env = {"PYTHONPATH": os.pathsep.join(packages), "PATH": os.environ["PATH"]}
    ran = subprocess.run([python, "-c", script], capture_output=True, text=True, check=False, env=env)
    assert ran.stdout == "2\n", ran.stderr


def test_a_process_that_was_ended_is_begun_anew() -> None:
    """It was told as a template that takes too long."""
    renderer = Renderer()
    assert renderer.render("a", {}) == "a"
    assert renderer._process
    renderer._process.kill()
    renderer._process.wait()
    assert renderer.render("b", {}) == "b"


def test_a_thread_waits_for_another_ones_template() -> None:
    renderer = Renderer()
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda i: renderer.render("{{ i }}", {"i": i}), range(50)))
    assert texts == list(map(str, range(50)))
