"""PyramidInfer: which tokens the layers keep, and why (Yang et al., Findings of ACL 2024, arXiv 2405.12532).

Two findings carry the method. Inference context redundancy: how many keys and values the next tokens need falls
with depth. Recent attention consistency: the last tokens agree on which context matters, so they can vote for the
tokens to come. What they vote for is the *pivotal context*. A token that is dropped after a layer is dropped from the
hidden states, so no deeper layer computes anything of it: a prompt gets cheaper to compute as well as to store.

For a prompt of N tokens the last 1 + R are protected and vote, R = int(N * recent_ratio). A layer that received n
tokens has c = n - 1 - R of context, and the next layer receives the tail and the k = int(c * s) highest-voted of it:

    vote[k] = mean over voters q of  w[q] * mean over heads h of A[h, q, k]        w from 1 (oldest) to distance_weight
    s(i)    = p + (1 - p) * (1 + cos(pi * i / L)) / 2                              cosine, from 1 towards p

Generated tokens are gathered and judged `exceed_length_to_compress` at a time, by the same kind of vote. Every
length is a function of N, L and the configuration, so memory is known before the first token is computed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minipyramid.settings import PublishedSettings

# Voters whose probabilities are held at a time.  [K, G, VOTERS, n] float32
VOTERS = 64

STRATEGIES: dict[str, Callable[[float, float], float]] = {
    # (lowest ratio p, depth i / L) -> ratio of the context that the next layer receives
    "cosine": lambda p, depth: p + (1 - p) * (1 + math.cos(math.pi * depth)) / 2,
    "linear": lambda p, depth: 1 - (1 - p) * depth,
    "constant": lambda p, depth: p,
}


@dataclass(frozen=True)
class PyramidConfig(PublishedSettings):
    """The settings, and what follows from them."""

    def recent(self, tokens: int) -> int:
        """R: the newest token and R before it are protected and vote."""
        return int(tokens * self.recent_ratio)

    def prompt_lengths(self, prompt_tokens: int, layers: int) -> list[int]:
        """Tokens of a prompt that each layer receives, computes and holds."""
        tail = 1 + self.recent(prompt_tokens)
        least = min(self.min_context_length, prompt_tokens - tail)  # m
        schedule = STRATEGIES[self.prefill_decay_strategy]
        lengths, n = [], prompt_tokens
        for i in range(layers):
            lengths.append(n)
            context, ratio = n - tail, schedule(self.prefill_decay_ratio, i / layers)
            kept = int(context * ratio)
            if i % self.layerwise_downsample_interval == 0 and context > least and ratio < 1 and kept > least:
                n = kept + tail
        return lengths

    def survivors(self, layers: int) -> list[int]:
        """Of each `exceed_length_to_compress` generated tokens, how many stay, per layer."""
        schedule, gathered = STRATEGIES[self.gen_decay_strategy], self.exceed_length_to_compress
        ratios = [schedule(self.gen_decay_ratio, i / layers) for i in range(layers)]
        return [max(1, int(gathered * self.gen_compress_ratio * ratio)) for ratio in ratios]

    def compactions(self, prompt_tokens: int, new_tokens: int) -> Iterator[Compaction]:
        """It happens when so many generated tokens have left the protected tail and wait to be judged."""
        judged = 0
        for generated in range(1, new_tokens + 1):
            older = generated - 1 - self.recent(prompt_tokens + generated)
            if older - judged == self.exceed_length_to_compress:
                yield Compaction(generated, older)
                judged += self.exceed_length_to_compress

    def future(self, prompt_tokens: int, new_tokens: int, layers: int) -> Future:
        """Every length of a sequence, before any of it is computed."""
        gathered, stay = self.exceed_length_to_compress, self.survivors(layers)
        prompt = self.prompt_lengths(prompt_tokens, layers)
        past = list(self.compactions(prompt_tokens, new_tokens))
        # Held after `generated` tokens and `done` compactions; a layer is at its longest before one, or at the end.
        moments = [(c.generated, done) for done, c in enumerate(past)] + [(new_tokens, len(past))]
        held = [[n + g - done * (gathered - s) for n, s in zip(prompt, stay, strict=True)] for g, done in moments]
        peaks = [max(lengths) for lengths in zip(*held, strict=True)]
        return Future(held[-1], peaks, max(g - done * gathered for g, done in moments))

    def kv_lengths(self, prompt_tokens: int, new_tokens: int, layers: int) -> list[int]:
        """Tokens that each layer holds at the end of generation."""
        return self.future(prompt_tokens, new_tokens, layers).lengths


@dataclass(frozen=True)
class Compaction:
    """When generated tokens are judged, and by whom."""

    generated: int  # tokens generated when it happens, the newest voter among them
    oldest_voter: int  # index of the oldest voter among the generated tokens

    def weight(self, voter: int, config: PyramidConfig) -> float:
        """What a generated token's probabilities count in it: 0 for one that is no voter."""
        voters = self.generated - self.oldest_voter
        if voter < self.oldest_voter:
            return 0.0
        age = (voter - self.oldest_voter) / max(1, voters - 1)
        return (1 + (config.distance_weight - 1) * age) / voters


NEVER = Compaction(sys.maxsize, sys.maxsize)  # after the last token


@dataclass(frozen=True)
class Future:
    """What a sequence will need."""

    lengths: list[int]  # [layer] tokens held at the end
    peaks: list[int]  # [layer] tokens held at most
    unjudged: int  # generated tokens that wait for their judgement, at most


@dataclass(frozen=True)
class Voting:
    """What the newest token of every sequence counts in the judgement of those before it.

    A token's judgement and its voters are known when it is generated, so one running sum per token is all that is
    remembered: 4 bytes, where its key and value take hundreds.
    """

    weights: Tensor  # [B, U] by unjudged token, the oldest first
    unjudged: Tensor  # [B]


class Gathering:
    """The generated tokens of one sequence that wait for their judgement."""

    def __init__(self, config: PyramidConfig, prompt_tokens: int, new_tokens: int) -> None:
        self.config = config
        self.generated = self.judged = 0
        self._future = config.compactions(prompt_tokens, new_tokens)
        self._next: list[Compaction] = []  # the first of them judges the oldest unjudged tokens

    @property
    def unjudged(self) -> int:
        return self.generated - self.judged

    def weights(self) -> list[float]:
        """Count one more generated token; returns its weight in the judgement of each unjudged token."""
        self.generated += 1
        batch = self.config.exceed_length_to_compress
        while len(self._next) * batch < self.unjudged:
            self._next.append(next(self._future, NEVER))
        weights = [compaction.weight(self.generated - 1, self.config) for compaction in self._next]
        return [weights[i // batch] for i in range(self.unjudged)]

    def due(self) -> bool:
        """Whether the oldest are judged now; if so they count as judged."""
        if not self._next or self._next[0].generated != self.generated:
            return False
        self._next.pop(0)
        self.judged += self.config.exceed_length_to_compress
        return True


def voting(gatherings: list[Gathering], device: torch.device) -> Voting:
    """The votes of one more generated token of every sequence."""
    rows = [gathering.weights() for gathering in gatherings]
    longest = max(map(len, rows))
    padded = [row + [0.0] * (longest - len(row)) for row in rows]
    return Voting(torch.tensor(padded, device=device), torch.tensor([len(row) for row in rows], device=device))


def voter_weights(count: int, config: PyramidConfig) -> Tensor:
    """From 1 for the oldest voter to `distance_weight` for the newest.  [count]"""
    return torch.linspace(1.0, config.distance_weight, count)


def votes(q: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """How much the newest tokens look at each token of the context before them.

    q [V, H, D] are the voters' queries, keys [K, n, D] all that the layer received, the voters' last  ->  [n - V]
    The voters' probabilities are computed a block at a time, so no n x n matrix is ever held.
    """
    (V, H, D), (K, n, _) = q.shape, keys.shape
    total = torch.zeros(n - V, device=q.device)
    for start in range(0, V, VOTERS):
        block = q[start : start + VOTERS]
        b = len(block)
        grouped = block.view(b, K, H // K, D).permute(1, 2, 0, 3).flatten(1, 2)  # [K, G * b, D]
        scores = (grouped @ keys.transpose(1, 2)).float().view(K, H // K, b, n) / math.sqrt(D)
        unseen = torch.ones(b, n, dtype=torch.bool, device=q.device).triu(n - V + start + 1)
        probs = scores.masked_fill(unseen, -math.inf).softmax(-1).mean((0, 1))  # [b, n]
        total += weights[start : start + b].to(q.device) @ probs[:, : n - V]
    return total / V


def pivotal(vote: Tensor, count: int, sinks: int) -> Tensor:
    """Indices of the `count` highest-voted tokens, in their original order; the first `sinks` always win.  [count]

    Of equal votes the earlier token's wins (topk promises no order), so sinks stay from the front if not all can.
    """
    vote = vote.clone()
    vote[:sinks] = math.inf
    return vote.sort(descending=True, stable=True).indices[:count].sort().values


def keep(
    config: PyramidConfig, queries: Sequence[Tensor], keys: list[Tensor], prompts: list[int], lengths: list[int]
) -> list[Tensor]:
    """What the next layer receives of each sequence, as indices into the packed tokens.

    queries [n, H, D] and keys [K, n, D] of every sequence, its prompt's length and the length that is planned
    """
    kept, offset = [], 0
    for q, all_keys, prompt, length in zip(queries, keys, prompts, lengths, strict=True):
        n, tail = len(q), 1 + config.recent(prompt)
        indices = torch.arange(n, device=q.device)
        if length < n:
            vote = votes(q[n - tail :], all_keys, voter_weights(tail, config))[-(n - tail) :]
            context = pivotal(vote, length - tail, config.streamingllm_sink_len)
            indices = torch.cat((context, indices[n - tail :]))
        kept.append(indices + offset)
        offset += n
    return kept
