"""A request's body: what it asks for in the clients' words, as requests of the engine.

What the engine does not do is refused by its name unless it is asked for in its neutral value, and so is a
field that nobody knows: a client must not believe that something was heeded.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from minipyramid import LLM, Request, RequestError, SamplingParams
from minipyramid.errors import expect_type, nearest

OWN = tuple(
    field.name for field in fields(SamplingParams) if field.name not in ("logprobs", "max_new_tokens")
)
MAX_TOKENS = ("max_tokens", "max_completion_tokens")
OTHERS = ("model", "stream", "stream_options", "n", "logprobs", "kept_positions")
COMPLETION = ("prompt",)
CHAT = ("messages", "top_logprobs")
# Told by some clients, and without a meaning here.
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# Not done here: what may be given all the same, for it changes nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
MOST_STOPS = 64  # texts
STREAM_OPTIONS = ("include_usage", "include_obfuscation")
MOST_CHOICES = 64  # of one request, prompts times n
CHARACTERS_PER_TOKEN = 32  # that no text has; prose has some four


@dataclass(frozen=True)
class Asked:
    """What one body asks for."""

    requests: list[Request]  # every prompt n times
    n: int
    prompt_tokens: int
    chat: bool
    stream: bool
    usage: bool  # at the end of a stream
    logprobs: bool
    picture: bool  # of what the layers hold, while it streams


def asked_of(llm: LLM, body: dict[str, Any], chat: bool, model: str, most_new: int) -> Asked:
    """Read a body; raises `RequestError`, `TypeError`, or what preparing a prompt does."""
    values = {name: value for name, value in body.items() if value is not None}  # null is the default
    heeded = (*OWN, *MAX_TOKENS, *OTHERS, *(CHAT if chat else COMPLETION))
    for name, value in values.items():
        if name not in (*heeded, *IGNORED, *NEUTRAL):
            raise RequestError(f"{name!r:.60} is no field of this endpoint; {nearest(name, heeded)}")
        if name in NEUTRAL and value not in NEUTRAL[name]:
            raise RequestError(f"{name} is {value!r:.60}, which this server does not do; leave it out")
    if values.get("model", model) != model:
        raise ModelNotFoundError(f"there is no model {values['model']!r:.60}; expected {model!r}")
    n = values.get("n", 1)
    expect_type("n", n, int, "a whole number")
    options = values.get("stream_options", {})
    expect_type("stream_options", options, dict, "an object")
    for name in options:
        if name not in STREAM_OPTIONS:
            raise RequestError(f"stream_options has {name!r:.60}; {nearest(name, STREAM_OPTIONS)}")
        expect_type(f"stream_options.{name}", options[name], (bool, type(None)), "true or false")
    if isinstance(values.get("stop"), list) and len(values["stop"]) > MOST_STOPS:
        raise RequestError(f"stop has {len(values['stop'])} texts, expected at most {MOST_STOPS}")
    limit = limit_of(values)
    for name in ("stream", "kept_positions"):
        expect_type(name, values.get(name, False), bool, "true or false")
    if values.get("kept_positions") and not values.get("stream"):
        raise RequestError("kept_positions is told by a stream; ask for one, or leave it out")
    logprobs = wants_logprobs(values, chat)
    given = {name: values[name] for name in OWN if name in values}
    params = SamplingParams(logprobs=logprobs, **given)
    check_characters(values, llm.config.max_position_embeddings)
    prompts = prompts_of(llm, values, chat, params)
    if not 1 <= n * len(prompts) <= MOST_CHOICES:
        raise RequestError(f"n = {n} for each prompt ({len(prompts)}), expected 1 to {MOST_CHOICES} choices")
    requests = []
    for request in prompts:
        left = llm.config.max_position_embeddings - len(request.prompt)
        new = max(1, min(most_new, left)) if limit is None else limit
        for i in range(n):
            seed = None if params.seed is None else (params.seed + i) % 2**63  # a choice of its own for each
            asked = replace(params, max_new_tokens=new, seed=seed)
            requests.append(replace(request, params=asked))
    return Asked(
        requests=requests,
        n=n,
        prompt_tokens=sum(len(request.prompt) for request in prompts),
        chat=chat,
        stream=values.get("stream", False),
        usage=bool(options.get("include_usage", False)),
        logprobs=logprobs,
        picture=values.get("kept_positions", False),
    )


def limit_of(values: dict[str, Any]) -> int | None:
    """The most new tokens, by either of its names; None where it is not given."""
    given = [name for name in MAX_TOKENS if name in values]
    if len(given) > 1:
        raise RequestError(f"{' and '.join(given)} are both given; give one of them")
    for name in given:
        expect_type(name, values[name], int, "a whole number")
        if values[name] < 1:
            raise RequestError(f"{name} is {values[name]}, expected at least 1")
    return values[given[0]] if given else None


def check_characters(values: dict[str, Any], context: int) -> None:
    """Refuse a text that cannot fit before it is made tokens of, which takes long and holds others up."""
    most = CHARACTERS_PER_TOKEN * context
    given = values.get("prompt")
    prompts = given if isinstance(given, list) else [given]
    longest = max((len(text) for text in prompts if isinstance(text, str)), default=0)
    longest = max(longest, characters_of(values.get("messages")))  # which are one prompt
    if longest > most:
        problem = f"a text of {longest} characters is more than the context of {context} tokens can hold"
        raise RequestError(f"{problem}; give at most {most}")


def characters_of(given: Any) -> int:
    """Characters of messages, in all that a template may read of them."""
    # A loop, for they may lie deeper in each other than a function may call itself.
    waiting, count = [given], 0
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting += one
        elif isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, str):
            count += len(one)
    return count


def wants_logprobs(values: dict[str, Any], chat: bool) -> bool:
    """Whether the chosen tokens' are asked for; the likeliest others are not told."""
    wanted = values.get("logprobs", False)
    if chat:
        expect_type("logprobs", wanted, bool, "true or false")
        if values.get("top_logprobs", 0) != 0:
            raise RequestError("top_logprobs is above 0, but only the chosen tokens are told; leave it out")
        return bool(wanted)
    expect_type("logprobs", wanted, (int, bool), "0 or 1")
    if wanted not in (0, 1):
        raise RequestError(f"logprobs is {wanted}, but only the chosen tokens are told; give 0 or 1")
    return "logprobs" in values and wanted is not False


def prompts_of(llm: LLM, values: dict[str, Any], chat: bool, params: SamplingParams) -> list[Request]:
    """The prompts as token ids."""
    if chat:
        if "messages" not in values:
            raise RequestError("there are no messages; give a list of them")
        return [llm.chat_request(values["messages"], params, name="the request")]
    given = values.get("prompt")
    expect_type("prompt", given, (str, list), "a text, a list of texts, token ids, or lists of them")
    several = isinstance(given, list) and bool(given) and all(isinstance(p, (str, list)) for p in given)
    prompts = given if isinstance(given, list) and several else [given]
    if len(prompts) > MOST_CHOICES:
        raise RequestError(f"there are {len(prompts)} prompts, expected at most {MOST_CHOICES}")
    names = ["the prompt"] if len(prompts) == 1 else [f"prompt {i}" for i in range(len(prompts))]
    requests = []
    for prompt, name in zip(prompts, names, strict=True):
        ids = llm.engine.encode(prompt, name)
        llm.config.check_length(len(ids), 1, name)  # before the next one is tokenised
        requests.append(Request(ids, params, name=name))
    return requests


class ModelNotFoundError(RequestError):
    """Another model is asked for than the one that is served."""
