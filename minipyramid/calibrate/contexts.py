"""Contexts of a text, computed once, and what any profile would lose of them.

A context is followed by two things: by what follows it in the text, and by a stretch of its own, said again.
The first asks for what a text usually needs, the second for what somebody may ask for later; neither needs a
question or a label. A profile's loss is the KL divergence of the full cache's next-token distributions
from its own (nats per token, mean over tokens and windows), over the first, and `AGAIN` times that over the
second.

Every layer's queries, keys and values are recorded in one pass. What a layer would hold is then chosen
from the record by the profile's own code, and only what follows is computed: a profile costs tenths of a
second, and not a prompt. (Another cut, or other guesses, cost all contexts anew.)
"""

import random
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from minipyramid import LLM, RequestError
from minipyramid.cache import KVCache, Row, Span
from minipyramid.need import Need
from minipyramid.policies.levels import Level
from minipyramid.policies.profile import Profile
from minipyramid.policies.repeat import say_again
from minipyramid.policy import Compute, Guess, Policy, Seen

AGAIN = 0.3  # weight of what is said again, beside 1 for the text that follows


@dataclass(frozen=True)
class Window:
    """A context, and what is read after it."""

    context: list[int]
    following: list[int]
    again: list[int]  # a stretch of the context


@dataclass(frozen=True)
class Recorder(Policy):
    """Computes what a profile computes, holds nothing, and keeps what each layer had at hand."""

    profile: Profile
    repeats: bool  # whether the score `repeat` is wanted, which takes a second pass
    seen: list[Seen] = field(default_factory=list, compare=False)

    def look_over(self, ids: list[int], compute: Compute) -> list[Tensor] | None:
        """The score of every layer."""
        layers = len(self.profile.levels[0].held)
        return say_again(ids, compute, layers - 1) if self.repeats else None

    def computed(self, prompt_tokens: int, layers: int) -> list[int]:
        """As the profile."""
        return self.profile.computed(prompt_tokens, layers)

    def held(self, prompt_tokens: int, layers: int) -> list[int]:
        """Nothing of what it computes."""
        return [0] * layers

    def kv_lengths(self, prompt_tokens: int, new_tokens: int, layers: int) -> list[int]:
        """What is guessed: later tokens of the prompt attend to it."""
        return [count + new_tokens for count in self.profile.guessed_counts(prompt_tokens)]

    def guess(self, seen: Seen, passed_on: Tensor) -> list[Guess]:
        """As the profile."""
        return self.profile.guess(seen, passed_on)

    def pass_on(self, seen: Seen, count: int) -> Tensor:
        """As the profile."""
        return self.profile.pass_on(seen, count)

    def hold(self, seen: Seen, count: int) -> Tensor:
        """Nothing.  [0]"""
        self.seen.append(seen)
        return torch.arange(0, device=seen.q.device)


def recorded(llm: LLM, profile: Profile, ids: list[int], repeats: bool = False) -> list[Seen]:
    """What each layer has at hand of some tokens, computed as a profile computes them.  [layer]"""
    recorder = Recorder(profile, repeats)
    llm.under(recorder).prefill(ids)
    return recorder.seen


def cut_windows(
    tokens: list[int], begin: list[int], sizes: tuple[int, int], count: int, rng: random.Random
) -> list[Window]:
    """Windows from places drawn at random; what is said again is drawn from all but a context's end.

    `sizes` are the tokens of a context, `begin` included, and of each of the two things read after it.
    """
    context, following = sizes
    length = context + following - len(begin)
    if len(tokens) < length:
        raise RequestError(f"the text has {len(tokens)} tokens, expected {length} or more")
    windows = []
    for _ in range(count):
        start = rng.randrange(len(tokens) - length + 1)
        ids = begin + tokens[start : start + length]
        said = rng.randrange(len(begin), max(len(begin) + 1, context - 2 * following))
        windows.append(Window(ids[:context], ids[context:], ids[said : said + following]))
    return windows


def profile_of(level: Level, lines: Tensor | None = None, guesses: Tensor | None = None) -> Profile:
    """The profile that computes and holds just what a level says."""
    return Profile((level,), share=level.share, fewest=0, lines=lines, guesses=guesses)


@dataclass(frozen=True)
class Held:
    """What stands of a context in a layer of a row."""

    own: int  # held tokens that the layer computes itself
    guessed: int
    score: str
    newest: float


class Contexts:
    """Windows whose contexts are computed as `profile` computes them, and held as any level says."""

    def __init__(self, llm: LLM, windows: list[Window], profile: Profile, repeats: bool = False) -> None:
        self.llm, self.windows, self.profile = llm, windows, profile
        self.seen: list[list[Seen]] = []  # [window][layer]
        self.in_rows: dict[tuple[int, int], Held] = {}  # what is written in the rows now, by row and layer
        self.stand_ins_in_rows: Tensor | None = None
        for window in windows:
            seen = recorded(llm, profile, window.context, repeats)
            # Hidden states are large, and are read behind one layer only.
            nothing = torch.empty(0)
            self.seen.append(
                [s if s.layer + 1 == profile.depth else replace(s, x=nothing, attended=nothing) for s in seen]
            )

    @cached_property
    def rows(self) -> list[tuple[Row, Row]]:
        """Two rows of one cache for each window: for what follows, and for what is said again."""
        longest = max(len(w.context) + len(w.following) for w in self.windows)
        need = Need((longest,) * self.llm.config.num_hidden_layers)
        rows = 2 * len(self.windows)
        cache = KVCache.allot(self.llm.config, [need] * rows, self.llm.dtype, self.llm.device)
        return [(cache.add_row(), cache.add_row()) for _ in self.windows]

    @torch.inference_mode()
    def logprobs(self, level: Level) -> Tensor:
        """Log-probabilities behind what is held by a level.  [2 * windows * following, vocab_size]"""
        profile = self.holding(level)
        if level.stand_ins is not self.stand_ins_in_rows:
            self.in_rows, self.stand_ins_in_rows = {}, level.stand_ins
        ids: list[int] = []
        spans = []
        for window, rows, seen in zip(self.windows, self.rows, self.seen, strict=True):
            self.hold(rows, seen, profile, len(window.context))
            for row, continuation in zip(rows, (window.following, window.again), strict=True):
                row.position = len(window.context)
                spans.append(Span(row, len(continuation)))
                ids += continuation
        x = self.llm.model.extend(torch.tensor(ids, device=self.llm.device), spans, all_positions=True)
        return self.llm.model.logits(x).log_softmax(-1)

    def holding(self, level: Level) -> Profile:
        """The profile of a level that is computed as these contexts are."""
        return profile_of(level, self.profile.lines, self.profile.guesses)

    def hold(self, rows: tuple[Row, Row], seen: list[Seen], profile: Profile, tokens: int) -> None:
        """Leave in both rows what the layers hold of a context; what is there already is not copied again."""
        level = profile.levels[0]
        lists = profile.held(tokens, len(seen)), profile.guessed_counts(tokens), level.scores, level.newest
        now = [
            # Rounding may ask for a token more than these contexts compute.
            Held(min(count - guessed, len(of_layer.q)), guessed, score, newest)
            for of_layer, count, guessed, score, newest in zip(seen, *lists, strict=True)
        ]
        row_index = rows[0].index
        changed = [layer for layer, held in enumerate(now) if self.in_rows.get((row_index, layer)) != held]
        guesses: dict[int, tuple[Tensor, Tensor]] = {}
        if profile.depth is not None and any(now[layer].guessed for layer in changed):
            cut = seen[profile.depth - 1]
            which = profile.sinks_and_newest(len(cut.q), len(seen[-1].q), cut.q.device)
            guesses = {deeper: (keys, values) for deeper, keys, values, _ in profile.guess(cut, which)}
        for layer, held in enumerate(now):
            for row in rows:  # what followed before is overwritten
                row.lengths[layer] = 0 if layer in changed else held.own + held.guessed
                row.kept[layer] = row.kept[layer][:, : row.lengths[layer]]
            if layer in changed:
                self.in_rows[row_index, layer] = held
                keys, values = chosen_of(seen[layer], profile, held.own)
                if held.guessed:
                    pairs = zip(guesses[layer], (keys, values), strict=True)
                    keys, values = (torch.cat(pair, 1) for pair in pairs)
                for row in rows:
                    row.write(layer, keys, values, torch.arange(keys.shape[1], device=keys.device))


def chosen_of(seen: Seen, policy: Policy, count: int) -> tuple[Tensor, Tensor]:
    """Keys and values that a policy holds of what a layer computes.  two of [K, count, D]"""
    T = len(seen.q)
    everything = torch.arange(T, device=seen.q.device)
    return policy.entries(seen, policy.hold(seen, count) if count < T else everything)


@dataclass(frozen=True)
class Loss:
    """KL divergence of the full cache's distribution from the pruned one's, nats per token."""

    following: float
    again: float

    @property
    def total(self) -> float:
        """What a search makes small."""
        return self.following + AGAIN * self.again


def divergence(full: Tensor, pruned: Tensor, windows: list[Window]) -> Loss:
    """Of a profile's log-probabilities against the full cache's; [2 * windows * following, vocab_size]."""
    by_token = (full.exp() * (full - pruned)).sum(-1)  # [2 * windows * following]
    of_kind = by_token.view(len(windows), 2, -1).mean((0, 2)).tolist()
    return Loss(*of_kind)
