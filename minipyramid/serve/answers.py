"""What a client gets: answers, pieces of a stream, and errors, in the form that it knows."""

import json
import secrets
import time
from typing import Any

from minipyramid import Completion
from minipyramid.serve.fields import Asked
from minipyramid.serve.worker import Event
from minipyramid.tokenizer import Tokenizer


def error_body(message: str, status: int, code: str | None = None) -> dict[str, Any]:
    """An error."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Answer:
    """One request's answer, as a whole or in pieces."""

    def __init__(self, asked: Asked, model: str, tokenizer: Tokenizer | None) -> None:
        self.asked, self.tokenizer = asked, tokenizer
        name = "chat.completion" if asked.chat else "text_completion"
        prefix = "chatcmpl" if asked.chat else "cmpl"
        chunk = ".chunk" if asked.chat and asked.stream else ""
        self.head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": name + chunk,
            "created": int(time.time()),
            "model": model,
        }
        self._told: dict[int, int] = {}  # tokens whose log-probabilities a stream has told
        self._offsets: dict[int, int] = {}

    def whole(self, completions: list[Completion]) -> dict[str, Any]:
        """All choices."""
        choices = []
        for i, done in enumerate(completions):
            message = {"message": {"role": "assistant", "content": done.text}}
            choices.append(
                {
                    "index": i,
                    **(message if self.asked.chat else {"text": done.text}),
                    "logprobs": self._logprobs(i, done, len(done.token_ids)),
                    "finish_reason": done.finish_reason,
                }
            )
        return {**self.head, "choices": choices, "usage": self.usage(completions)}

    def usage(self, completions: list[Completion]) -> dict[str, Any]:
        """Tokens; a prompt counts once, however many choices it has."""
        prompts, new = self.asked.prompt_tokens, sum(len(done.token_ids) for done in completions)
        choices = [completions[i : i + self.asked.n] for i in range(0, len(completions), self.asked.n)]
        # The choice that computed most of a prompt tells what another request had computed of it.
        shared = {"cached_tokens": sum(min(done.shared_tokens for done in each) for each in choices)}
        counts = {"prompt_tokens": prompts, "completion_tokens": new, "total_tokens": prompts + new}
        return {**counts, "prompt_tokens_details": shared}

    def begin(self) -> list[bytes]:
        """What a stream of a chat begins with: who speaks."""
        if not self.asked.chat:
            return []
        roles = [{"role": "assistant", "content": ""} for _ in self.asked.requests]
        return [self._piece(i, {"delta": role}, None, None) for i, role in enumerate(roles)]

    def piece(self, event: Event) -> bytes:
        """A part of a stream."""
        done, index = event.ticket.sequence.completion, event.ticket.index
        if self.asked.chat:
            said: dict[str, Any] = {"delta": {"content": event.text} if event.text else {}}
        else:
            said = {"text": event.text}
        if event.kept is not None:
            said["kept_positions"] = event.kept
        if event.ended:
            said["kv_bytes"], said["kv_bytes_full"] = done.kv_bytes, done.kv_bytes_full
        reason = done.finish_reason if event.ended else None
        return self._piece(index, said, self._logprobs(index, done, event.tokens), reason)

    def end(self, completions: list[Completion]) -> bytes:
        """The end of a stream."""
        usage = {**self.head, "choices": [], "usage": self.usage(completions)}
        return (sse(usage) if self.asked.usage else b"") + b"data: [DONE]\n\n"

    def _piece(self, index: int, said: dict[str, Any], logprobs: Any, reason: str | None) -> bytes:
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}
        return sse({**self.head, "choices": [choice]})

    def _logprobs(self, index: int, done: Completion, tokens: int) -> dict[str, Any] | None:
        """Of the tokens that are new since it was last asked."""
        if not self.asked.logprobs or done.logprobs is None:
            return None
        start = self._told.get(index, 0)
        self._told[index] = tokens
        ids, logprobs = done.token_ids[start:tokens], done.logprobs[start:tokens]
        data = [self.tokenizer.token_bytes(token) if self.tokenizer else b"" for token in ids]
        texts = [part.decode(errors="replace") for part in data]
        if self.asked.chat:
            content = [
                {"token": text, "logprob": logprob, "bytes": list(part), "top_logprobs": []}
                for text, logprob, part in zip(texts, logprobs, data, strict=True)
            ]
            return {"content": content, "refusal": None}
        offsets, at = [], self._offsets.get(index, 0)
        for text in texts:
            offsets.append(at)
            at += len(text)
        self._offsets[index] = at
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": offsets}


def sse(data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(data)}\n\n".encode()
