"""Messages to token ids, by the template of a checkpoint or one that is built in.

What a person has written must not be taken for the template's own words. A special token's text that stands
in a message is taken apart by a sign that no message holds, so that what is split at special tokens
afterwards are those of the template alone. The sign is then left out, and what lies between them is plain
text. (Marks that are plain text in the template itself, as `[INST]` or `USER:`, cannot be told from a
message's.)
"""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from minipyramid.errors import ConfigError, RequestError, expect_type, nearest
from minipyramid.formats.templates import BUILT_IN, DEFAULT, NEEDS, Renderer, own_templates, special_texts
from minipyramid.request import Conversation, Request
from minipyramid.sampling import SamplingParams
from minipyramid.tokenizer import Tokenizer, check_unicode

ROLES = ("system", "user", "assistant", "tool", "developer")
# With these a model ends its turn, also where its configuration names only the end of all text.
ENDS_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|end_of_turn|>")
NONCHARACTERS = range(0xFDD0, 0xFDF0)  # of Unicode, whose promise is that no text needs them
Messages = list[dict[str, Any]]


def request_of(
    make_format: Callable[[str | None], "ChatFormat"],
    messages: Messages,
    params: SamplingParams | None,
    conversation: Conversation | None,
    *,
    chat_format: str | None = None,
    variables: dict[str, Any] | None = None,
    name: str = "the messages",
) -> Request:
    """What is asked of the engine; arguments and errors as those of `LLM.chat_request`."""
    expect_type("conversation", conversation, (Conversation, type(None)), "a Conversation")
    earlier = conversation.token_ids if conversation else []
    form = make_format(chat_format)
    ids = form.encode(messages, after=earlier[-1] if earlier else None, variables=variables)
    asked = SamplingParams() if params is None else params
    return Request(ids, asked, conversation, name=name, ends=form.ends)


class ChatFormat:
    """How one checkpoint is talked to."""

    def __init__(self, directory: Path, tokenizer: Tokenizer, name: str | None = None) -> None:
        """`name`: a built-in format, or one of the checkpoint's named templates; None for its own.

        Raises `ConfigError` if there is no such template, it is no template of jinja2's, or the tokenizer
        lacks its tokens.
        """
        own = own_templates(directory)
        known = BUILT_IN | own
        if name is None and DEFAULT not in own:
            names = ", ".join([*own, *BUILT_IN])
            raise ConfigError(f"{directory} has no chat template of its own; name a chat format: {names}")
        chosen = DEFAULT if name is None else name
        if chosen not in known:
            raise ConfigError(f"there is no chat format {chosen!r}; {nearest(chosen, known)}")
        special = tokenizer.special_tokens
        lacking = [token for token in NEEDS.get(chosen, ()) if chosen not in own and token not in special]
        if lacking:
            raise ConfigError(f"the chat format {chosen} needs {lacking[0]}, which the tokenizer lacks")
        self._template, self._tokenizer, self._renderer = known[chosen], tokenizer, Renderer()
        texts = {token: text for text, token in special.items()}
        end = tokenizer.eos_ids[0] if tokenizer.eos_ids else -1
        ids = {"bos_token": tokenizer.bos_id, "eos_token": end}
        self._variables = {name: texts[i] for name, i in ids.items() if i in texts} | special_texts(directory)
        self._renderer.check(self._template)
        self.ends = tuple(special[t] for t in ENDS_OF_TURN if t in special and t in self._template)
        # An added token that is not left out of output, as `</think>`, marks no turn: an answer may hold it.
        marks = {text: i for text, i in special.items() if not tokenizer.token_bytes(i)}
        self._special, self._in_answers = _one_of(special), _one_of(marks)
        self._special_ids = set(marks.values())
        self._heads = tuple(text[:i] for text in marks for i in range(1, len(text)))
        self._tails = tuple(text[i:] for text in marks for i in range(1, len(text)))

    def encode(
        self, messages: Messages, *, after: int | None = None, variables: dict[str, Any] | None = None
    ) -> list[int]:
        """Token ids of messages, up to where the answer begins.

        `after`: the messages are the next turn of a conversation whose last token it is. What ends the answer
        before is put in front, unless that token is it.

        Raises:
            RequestError: a message is malformed, or the template refuses them.
            ConfigError: the template fails.
        """
        checked = [_checked(message, i) for i, message in enumerate(_as_messages(messages))]
        try:
            signs = _signs(checked)
            turn = [self._apart(m, m["role"], signs) | {"role": m["role"]} for m in checked]
        except RecursionError as error:
            raise RequestError("the messages are nested too deep; give texts") from error
        if after is not None:
            # What stands before the new messages was rendered in its own turn; only its end matters here.
            place = {"role": "assistant", "content": signs.place}
            turn = [{"role": "user", "content": "-"}, place, *turn]
        expect_type("variables", variables, (dict, type(None)), "a dictionary")
        settings = {"messages": turn, "add_generation_prompt": True, "tools": None, "documents": None}
        text = self._renderer.render(self._template, {**settings, **self._variables, **(variables or {})})
        check_unicode(text, "the messages")
        if after is None:
            return self._ids(text, signs, continues=False)
        if signs.place not in text:
            problem = "leaves earlier answers out, so no conversation can be carried on"
            raise ConfigError(f"the chat template {problem}; give all messages and no conversation")
        ids = self._ids(text.rpartition(signs.place)[2], signs, continues=True)
        if after in ids and after in self._tokenizer.special_tokens.values():
            # The answer ended by itself, with the token that the template writes at its end.
            at = ids.index(after)
            if not self._tokenizer.decode(ids[:at], continues=True).strip():
                return ids[at + 1 :]
        return ids

    def _apart(self, value: Any, role: str, signs: "Signs") -> Any:
        """A message, or a part of it, with a sign behind the first character of every special token.

        Another stands at an end of a text that a token might be made of together with what the template
        writes there; inside the white space, which templates take away.
        """
        if isinstance(value, dict):
            named = ((self._apart(name, role, signs), part) for name, part in value.items())
            return {name: self._apart(part, role, signs) for name, part in named}
        if isinstance(value, (list, tuple)):
            return [self._apart(part, role, signs) for part in value]
        if not isinstance(value, str):
            return value
        special = self._in_answers if role == "assistant" else self._special
        # In any case of letters, for a template may change that.
        marked = re.sub(f"(?={special})(.)", rf"\1{signs.inside}", value, flags=re.DOTALL | re.IGNORECASE)
        inner = marked.strip()
        if not inner:
            return marked
        before, behind = signs.end * inner.startswith(self._tails), signs.end * inner.endswith(self._heads)
        return marked.replace(inner, before + inner + behind, 1)

    def _ids(self, text: str, signs: "Signs", *, continues: bool) -> list[int]:
        """Ids of a rendered text: special tokens are the template's, everything between them is plain."""
        ids: list[int] = []
        start = 0
        # Behind a token of one character the sign stands, for there is no place within it.
        for found in re.finditer(f"{self._special}(?!{signs.inside})", text):
            ids += self._plain(text[start : found.start()], signs, continues)
            ids.append(self._tokenizer.special_tokens[found[0]])
            start, continues = found.end(), not self._tokenizer.adds_space_again
        return ids + self._plain(text[start:], signs, continues)

    def _plain(self, text: str, signs: "Signs", continues: bool) -> list[int]:
        plain = text.replace(signs.inside, "").replace(signs.end, "")
        ids = self._literal(plain, continues)
        if any(i in self._special_ids for i in ids):
            # The vocabulary itself has the token's text; cut where it was taken apart, it is not found.
            parts = [part for part in text.replace(signs.end, "").split(signs.inside) if part]
            ids = [i for k, part in enumerate(parts) for i in self._literal(part, continues or k > 0)]
        return ids

    def _literal(self, text: str, continues: bool) -> list[int]:
        if not text:
            return []
        ids = self._tokenizer.encode(text, "the messages", continues=continues, literal=True)
        # Templates write the beginning of text themselves.
        return ids[1:] if self._tokenizer.add_bos and not continues else ids


def _as_messages(messages: Any) -> Messages:
    expect_type("messages", messages, list, "a list of messages")
    if not messages:
        raise RequestError("there are no messages; give at least one")
    return list(messages)


def _checked(message: Any, i: int) -> dict[str, Any]:
    """The message with its content as one text."""
    expect_type(f"message {i}", message, dict, "a dictionary with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RequestError(f"message {i} has the role {role!r:.60}, expected one of {', '.join(ROLES)}")
    if isinstance(content, list):
        texts: list[Any] = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise RequestError(f"message {i} holds a part that is no text, and only texts are read")
        content = "".join(texts)
    if not isinstance(content, str):
        raise RequestError(f"message {i} has the content {content!r:.60}, expected a text")
    check_unicode(content, f"message {i}")
    return {**message, "content": content}


def _one_of(texts: Iterable[str]) -> str:
    """A pattern of any of these that is no white space, the longest first."""
    longest_first = sorted((text for text in texts if text.strip()), key=len, reverse=True)
    return f"(?:{'|'.join(map(re.escape, longest_first))})" if longest_first else "(?!)"


class Signs(NamedTuple):
    """Characters that stand in no message."""

    inside: str  # a message's special token, behind its first character
    end: str  # of a message's text, where it might be a part of one
    place: str  # in which an earlier answer would stand


def _signs(messages: Messages) -> Signs:
    """The first that no message holds."""
    everything = "".join(_texts(messages))
    unused = [sign for sign in map(chr, NONCHARACTERS) if sign not in everything]
    if len(unused) < 3:
        raise RequestError("the messages hold every one of Unicode's noncharacters; leave one out")
    return Signs(*unused[:3])


def _texts(value: Any) -> Iterator[str]:
    """Every text in a message, or in a list of them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _texts(part)
