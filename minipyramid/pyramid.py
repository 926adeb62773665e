"""PyramidInfer: which tokens the layers keep, and why (Yang et al., Findings of ACL 2024, arXiv 2405.12532).

Two findings carry the method. Inference context redundancy: how many keys and values the next tokens need falls
with depth. Recent attention consistency: the last tokens agree on which context matters, so they can vote for the
tokens to come. What they vote for is the *pivotal context*. A token that is dropped after a layer is dropped from the
hidden states, so no deeper layer computes anything of it: a prompt gets cheaper to compute as well as to store.

For a prompt of N tokens the last 1 + R are protected and vote, R = int(N * recent_ratio). A layer that received n
tokens has c = n - 1 - R of context, and the next layer receives the tail and the k = int(c * s) highest-voted of it:

    vote[j] = mean over voters q of  w[q] * mean over heads h of A[h, q, j]        w from 1 (oldest) to distance_weight
    s(i)    = p + (1 - p) * (1 + cos(pi * i / L)) / 2                              cosine, from 1 towards p

with A the attention probabilities, j a token of the context, i the layer of L, and p the decay ratio. A layer's ratio
is of what the one before it left; a layer that would keep `min_context_length` or less drops nothing, only every so
many-th layer drops, and the first tokens (sinks, counted in k) always win. Ours, and by default off: no layer before
the last of `prefill_full_layers` drops by votes (`keep`).

Generated tokens pass all layers. Once `exceed_length_to_compress` of them are older than the protected tail, those in
the tail vote on them, and each layer drops its own; the prompt is not judged again. Every length is a function of N,
the tokens generated, L and the configuration, so memory is known before the first token is computed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minipyramid.budget import solve
from minipyramid.settings import PublishedSettings

# Voters whose probabilities are held at a time.  [K, G, VOTERS, n] float32
VOTERS = 64

STRATEGIES: dict[str, Callable[[float, int, int], float]] = {
    # (lowest ratio p, layer i, L) -> s(i), the ratio of the context that the next layer receives
    "cosine": lambda p, i, L: p + (1 - p) * (1 + math.cos(math.pi * i / L)) / 2,
    "linear": lambda p, i, L: 1 - (1 - p) * i / L,
    "constant": lambda p, i, L: p,
}


@dataclass(frozen=True)
class PyramidConfig(PublishedSettings):
    """The settings, and what follows from them."""

    def recent(self, tokens: int) -> int:
        """R: the newest token and R before it are protected and vote."""
        return int(tokens * self.recent_ratio)

    def prompt_lengths(self, prompt_tokens: int, layers: int) -> list[int]:
        """Tokens of a prompt that each layer receives, computes and holds.

        n(i + 1) = tail + int((n(i) - tail) * s(i))  where i % interval == 0 and that leaves > min_context_length,
        else n(i); tail = 1 + R. Of several full layers layer 0 has prefill_full_ratio for s, the others drop nothing.
        """
        tail = 1 + self.recent(prompt_tokens)
        schedule = STRATEGIES[self.prefill_decay_strategy]
        lengths, n = [], prompt_tokens
        for i in range(layers):
            lengths.append(n)
            by_age = i == 0 and self.prefill_full_layers > 1  # one cut for all full layers behind layer 0
            ratio = self.prefill_full_ratio if by_age else schedule(self.prefill_decay_ratio, i, layers)
            kept = int((n - tail) * ratio)
            drops = i + 1 >= self.prefill_full_layers and i % self.layerwise_downsample_interval == 0
            if (by_age or drops) and kept > self.min_context_length:
                n = kept + tail
        return lengths

    def survivors(self, layers: int) -> list[int]:
        """Of each E = `exceed_length_to_compress` generated tokens, how many stay, per layer.

        k(i) = max(1, int(E * gen_compress_ratio * s_gen(i)))
        """
        schedule, gathered = STRATEGIES[self.gen_decay_strategy], self.exceed_length_to_compress
        ratios = [schedule(self.gen_decay_ratio, i, layers) for i in range(layers)]
        return [max(1, int(gathered * self.gen_compress_ratio * ratio)) for ratio in ratios]

    def compactions(self, prompt_tokens: int, new_tokens: int) -> "Iterator[Compaction]":
        """One happens when `exceed_length_to_compress` tokens that are not judged yet have left the protected tail."""
        judged = 0
        for generated in range(1, new_tokens + 1):
            older = generated - 1 - self.recent(prompt_tokens + generated)
            if older - judged == self.exceed_length_to_compress:
                yield Compaction(generated, older)
                judged += self.exceed_length_to_compress

    def peaks(self, prompt_tokens: int, new_tokens: int, layers: int) -> tuple[list[int], int]:
        """Tokens that each layer holds at its longest, and how many wait for their judgement at most."""
        gathered, stay = self.exceed_length_to_compress, self.survivors(layers)
        prompt = self.prompt_lengths(prompt_tokens, layers)
        past = list(self.compactions(prompt_tokens, new_tokens))
        # After `generated` tokens and `done` compactions. Most is held before the last compaction, or at the end.
        moments = [*((c.generated, done) for done, c in enumerate(past)), (new_tokens, len(past))][-2:]
        held = [[n + g - done * (gathered - s) for n, s in zip(prompt, stay, strict=True)] for g, done in moments]
        return [max(lengths) for lengths in zip(*held, strict=True)], max(g - done * gathered for g, done in moments)

    def kv_lengths(self, prompt_tokens: int, new_tokens: int, layers: int) -> list[int]:
        """Tokens that each layer holds after `new_tokens` were generated."""
        older = new_tokens - 1 - self.recent(prompt_tokens + new_tokens)
        gathered = self.exceed_length_to_compress
        compactions = max(0, older) // gathered  # as `older` grows by at most 1 per token
        lengths = zip(self.prompt_lengths(prompt_tokens, layers), self.survivors(layers), strict=True)
        return [n + new_tokens - compactions * (gathered - stay) for n, stay in lengths]

    @classmethod
    def for_budget(cls, share: float, *, prompt_tokens: int, new_tokens: int, layers: int) -> "PyramidConfig":
        """Settings that hold at most `share` of the full cache at the end of generation, and hardly less.

        Starting from the preset nearest in depth, the first of these that comes close is taken: the decay ratio is
        lowered (or, where generated tokens are most of it, they are pruned less than published); the schedule becomes
        `constant` with a ratio of its own, which drops from the first layer on, where cosine hardly does; on top of
        that `recent_ratio` falls to 0.05; fewer generated tokens stay; the first layers that drop drop more, down to
        `min_context_length`; that falls; `prefill_full_ratio` falls (there are only as many full layers as the settings
        have), with a decay ratio of 0.05 behind them; `recent_ratio` falls to 0, last because the recent tokens are the
        voters.

        Args:
            share: keys and values held, as a share of layers * (prompt_tokens + new_tokens).

        Raises:
            BudgetError: with the smallest share that can be reached.
            ConfigError: the share is not above 0 and at most 1.
        """
        return solve(cls.for_layers(layers), share, prompt_tokens, new_tokens, layers)


@dataclass(frozen=True)
class Compaction:
    """One judgement of generated tokens: when it happens, and who votes.

    They gather until `exceed_length_to_compress` of them have left the protected tail unjudged; then the tail votes on
    these, each layer keeps its survivors, and what it drops is closed up: a compaction.
    """

    generated: int  # tokens generated when it happens, the newest voter among them
    oldest_voter: int  # index of the oldest voter among the generated tokens

    def weight(self, voter: int, config: PyramidConfig) -> float:
        """What a generated token's probabilities count in it: 0 for one that is no voter."""
        voters, youth = self.generated - self.oldest_voter, voter - self.oldest_voter
        weight = 1 + (config.distance_weight - 1) * youth / max(1, voters - 1)
        return weight / voters if youth >= 0 else 0.0


class Gathering:
    """The generated tokens of one sequence that wait for their judgement."""

    def __init__(self, config: PyramidConfig, prompt_tokens: int, new_tokens: int) -> None:
        self.config, self.generated, self.done = config, 0, 0
        self.compactions = list(config.compactions(prompt_tokens, new_tokens))

    @property
    def unjudged(self) -> int:
        return self.generated - self.done * self.config.exceed_length_to_compress

    def count_one(self) -> list[float]:
        """Count one more generated token; returns what its vote weighs in each judgement that has tokens waiting.

        The oldest first. A judgement is of `exceed_length_to_compress` tokens; 0 where generation ends before it.
        """
        self.generated += 1
        begun = math.ceil(self.generated / self.config.exceed_length_to_compress)
        coming = self.compactions[self.done : begun]
        weights = [compaction.weight(self.generated - 1, self.config) for compaction in coming]
        return weights + [0.0] * (begun - self.done - len(weights))

    def judge_if_due(self) -> bool:
        """Whether the oldest are judged now; from here on they count as judged."""
        now = any(c.generated == self.generated for c in self.compactions[self.done : self.done + 1])
        self.done += now
        return now


def voting(gatherings: Sequence[Gathering], lengths: Tensor, room: int) -> Sequence[tuple[Tensor, Tensor] | None]:
    """Count one more generated token of every sequence; returns what its vote weighs, and for which slots.

    Which judgement a token falls into, and who votes in it, follow from its index, so one running sum is remembered: 4
    bytes per token and layer, where its key and value take hundreds. All gather equally many tokens at a time.

    lengths [L, B] are what the layers hold before it, and U is the `room` of the cache for unjudged tokens  ->  by
    layer the weights [B, U], the oldest token's first, and the slots [B, U]; None for all layers where nothing will be
    judged. Behind the last unjudged token weights are 0, and slots clamped so that they exist.
    """
    by_judgement = [gathering.count_one() for gathering in gatherings]
    if not any(gathering.compactions for gathering in gatherings):
        return [None] * len(lengths)
    places, gathered = torch.arange(room, device=lengths.device), gatherings[0].config.exceed_length_to_compress
    padded = [weights + [0.0] * (room // gathered + 1 - len(weights)) for weights in by_judgement]
    by_token = torch.tensor(padded, device=lengths.device)[:, places // gathered]  # [B, U]
    unjudged = torch.tensor([gathering.unjudged for gathering in gatherings], device=lengths.device)  # [B]
    slots = (lengths + 1 - unjudged)[..., None] + places  # [L, B, U]
    return [(by_token, of_layer) for of_layer in slots.minimum(lengths[..., None])]


def votes(config: PyramidConfig, q: Tensor, keys: Tensor, logsumexp: Tensor | None) -> Tensor:
    """How much the newest tokens look at each token of the context before them.

    q [V, H, D] are the voters' queries, keys [K, n, D] all that the layer holds, the voters' last, and
    logsumexp [H, n] the log of what a softmax divides by, where attention has told it  ->  [n - V]
    The voters' probabilities are computed a block at a time, so no n x n matrix is ever held. With the published
    settings 3 % of the time of a prompt of 512 tokens, 6 % of 2,048 (12 layers, hidden size 768, float32, two cores).
    """
    (V, H, D), (K, n, _) = q.shape, keys.shape
    weights = torch.linspace(1.0, config.distance_weight, V, device=q.device)
    total = torch.zeros(K, H // K, n - V, device=q.device)
    for start in range(0, V, VOTERS):
        block = q[start : start + VOTERS]
        # Divided here, where they are few, and not behind the product.
        grouped = (block / math.sqrt(D)).view(-1, K, H // K, D).permute(1, 2, 0, 3).flatten(1, 2)  # [K, G * VOTERS, D]
        if logsumexp is None:
            scores = (grouped @ keys.transpose(1, 2)).float().view(K, H // K, -1, n)
            unseen = torch.ones(len(block), n, dtype=torch.bool, device=q.device).triu(n - V + start + 1)
            probs = scores.masked_fill_(unseen, -math.inf).softmax(-1)[..., : n - V]
        else:  # all voters see all of the context, so nothing is masked and their own keys are not needed
            scores = (grouped @ keys[:, : n - V].transpose(1, 2)).float().view(K, H // K, -1, n - V)
            probs = scores.sub_(logsumexp[:, -V:][:, start : start + VOTERS].view(K, H // K, -1, 1)).exp_()
        total += weights[start : start + VOTERS] @ probs
    return (total.amax((0, 1)) if config.prefill_max_over_heads else total.mean((0, 1))) / V


def pivotal(vote: Tensor, count: int, sinks: int) -> Tensor:
    """Indices of the `count` highest-voted tokens, in their original order; the first `sinks` always win.  [count]

    Of equal votes the earlier token's wins (topk promises no order), so sinks stay from the front if not all can.
    """
    vote = vote.clone()
    vote[:sinks] = math.inf
    return vote.sort(descending=True, stable=True).indices[:count].sort().values


def keep(
    config: PyramidConfig, q: Tensor, keys: Tensor, logsumexp: Tensor | None, *, lengths: list[int], layer: int
) -> Tensor:
    """What the next layer receives of a prompt, as indices into what this one received.  [lengths[layer + 1]]

    q [n, H, D] of these tokens, keys [K, m, D] of all that the layer holds, with theirs last (those of former turns
    before them are voted on too, and the votes cut off); `lengths` are what was planned, by layer
    """
    n, tail = len(q), 1 + config.recent(lengths[0])
    if layer + 1 < config.prefill_full_layers:  # by age, for layers that do not look back yet cannot judge
        vote = torch.arange(n - tail, device=q.device).float()
    else:
        vote, near = votes(config, q[n - tail :], keys, logsumexp)[-(n - tail) :], config.prefill_vote_neighbours
        vote = F.avg_pool1d(vote[None], 2 * near + 1, 1, near, count_include_pad=False)[0]
    context = pivotal(vote, lengths[layer + 1] - tail, config.streamingllm_sink_len)
    return torch.cat((context, torch.arange(n - tail, n, device=q.device)))
