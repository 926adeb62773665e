"""What the engine asks of a policy.

A policy answers three questions, and the rest of the engine asks them without knowing which policy it has.

1. How many tokens of a prompt does each layer *compute*, and how many keys and values does it *hold* after?
   Two lists, for they are two questions (docs/method.md). A layer attends over all that it computes before
   it holds less, so only later tokens miss what it drops. What it does not pass on, no deeper layer computes.
2. Which tokens? A choice from what the layer has at hand (`Seen`), and from a look over the whole prompt
   beforehand, if the policy takes one. Of tokens that leave, deeper layers may get guesses.
3. How are generated tokens dropped (`Generation`): how many stay of each group, and who votes? Which of them
   stay follows from the votes under every policy.

Every length is a function of the numbers of tokens and layers and of the policy's settings, never of the
data. So the memory is planned before anything is computed, and a batch holds what its single runs hold.

`Policy` itself is the policy `full`. Others are frozen dataclasses of settings that answer differently:
PyramidInfer (`minipyramid/pyramid.py`) and those of `minipyramid/policies/`.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from minipyramid.config import ModelConfig
from minipyramid.errors import ConfigError, check_number


@dataclass(frozen=True)
class Seen:
    """What a layer has at hand when its policy chooses among the T prompt tokens that the layer computes."""

    q: Tensor  # [T, H, D] their queries, rotated
    keys: Tensor  # [K, n, D] rotated; theirs are the last T, after guesses and those of earlier turns
    values: Tensor  # [K, n, D]
    logsumexp: Tensor | None  # [H, T] log of the sum under each query's softmax, if the kernel returned it
    rotation: tuple[Tensor, Tensor]  # cosines and sines at their positions, two of [T, 1, D / 2]
    x: Tensor  # [T, hidden_size] their hidden states, as the layer received them
    attended: Tensor  # [T, H * D] what attention found for them; of the last layer the newest one's alone
    layer: int  # 0-based
    prompt_tokens: int  # N: layer 0 computed so many
    seed: int = 0  # of this prompt and layer, the same in every batch
    looked_over: Tensor | None = None  # [K, T] what `Policy.look_over` has found of them

    def votes(self, voters: int, weights: Tensor | None = None) -> Tensor:
        """How much the newest `voters` of the T tokens look at each one before them.  [K, G, T - voters]"""
        from minipyramid.voting import votes  # `full` does without

        T, n = len(self.q), self.keys.shape[1]
        logsumexp = None if self.logsumexp is None else self.logsumexp[:, T - voters :]
        return votes(self.q[T - voters :], self.keys, logsumexp, n - voters, weights)[..., n - T :]


@dataclass(frozen=True)
class Generation:
    """How generated tokens are dropped, in groups, by the votes of the newest (docs/method.md, section 3).

    Of T tokens so far the newest 1 + int(T * recent_ratio) are the recent tokens. A generated token is
    *pending* until a compaction reaches it. As soon as `group` pending tokens are older than the recent ones,
    each layer keeps the highest-voted of that group: a *compaction*.
    """

    prompt_tokens: int
    recent_ratio: float
    group: int  # tokens of one compaction
    stay: tuple[int, ...]  # [layer] how many of each group stay
    distance_weight: float  # of the newest voter; the oldest has 1
    fewest_recent: int = 0  # so many are recent at least, beside the newest

    def older(self, generated: int) -> int:
        """Generated tokens that are older than the recent ones, after so many were generated."""
        recent = int((self.prompt_tokens + generated) * self.recent_ratio)
        return max(0, generated - 1 - max(recent, self.fewest_recent))

    def compactions(self, generated: int) -> int:
        """How many compactions have happened by then."""
        return self.older(generated) // self.group

    def compacts_at(self, compaction: int, new_tokens: int) -> int:
        """Number of generated tokens at which a compaction (0-based) happens; `new_tokens` + 1 if never."""
        return bisect_left(range(new_tokens + 1), (compaction + 1) * self.group, key=self.older)

    def dropped(self, new_tokens: int) -> list[int]:
        """Generated tokens that each layer has dropped by then.  [layer]"""
        done = self.compactions(new_tokens)
        return [done * (self.group - stay) for stay in self.stay]

    def weight(self, voter: int, generated: int) -> float:
        """Weight of token `voter` in the compaction after so many were generated; 0 if it has no vote."""
        oldest = self.older(generated)
        voters = generated - oldest
        rank = voter - oldest
        if rank < 0:
            return 0.0
        return (1 + (self.distance_weight - 1) * rank / max(1, voters - 1)) / voters


@dataclass(frozen=True)
class Policy:
    """What each layer computes and holds. This one computes and holds everything: `full`."""

    def check_model(self, config: ModelConfig) -> None:
        """Raise `ConfigError` for a model that the settings are not for."""

    def computed(self, prompt_tokens: int, layers: int) -> list[int]:
        """Tokens of the prompt that each layer receives: all in layer 0, then never more than before."""
        return [prompt_tokens] * layers

    def held(self, prompt_tokens: int, layers: int) -> list[int]:
        """Tokens of the prompt that each layer leaves in its cache: of those that it computes, and those that
        `guess` has written before.
        """
        return self.computed(prompt_tokens, layers)

    def look_over(self, ids: list[int], compute: "Compute") -> list[Tensor] | None:
        """Score a prompt before it is computed, for a policy that needs a pass of its own for it.

        `compute(ids, policy)` runs tokens through the layers; what the policy holds of them is let go.
        Returns [layer] of [K, N], which `hold` then finds in `Seen.looked_over`; it may end with the last
        layer that needs it.
        """
        return None

    def computed_by_look_over(self, prompt_tokens: int, layers: int) -> int:
        """Token-layers that `look_over` computes: its tokens, added up over the layers that they pass."""
        return 0

    def pass_on(self, seen: Seen, count: int) -> Tensor:
        """Which of the T tokens the next layer receives, where it receives fewer.  [count] ascending"""
        raise ConfigError(f"{type(self).__name__} computes less with depth, so it needs pass_on")

    def guess(self, seen: Seen, passed_on: Tensor) -> "Iterable[Guess]":
        """What deeper layers hold of tokens that leave here, which they never compute.

        Asked where fewer than T are passed on; a layer holds what is guessed before it computes anything.
        """
        return ()

    def hold(self, seen: Seen, count: int) -> Tensor:
        """Which of the T tokens the layer holds; asked where it holds fewer than it computes.

        Returns [count] for all key/value heads alike or [K, count], ascending.
        """
        raise ConfigError(f"{type(self).__name__} holds less than it computes, so it needs hold")

    def entries(self, seen: Seen, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values that the cache gets for the chosen tokens: their own.  two of [K, held, D]"""
        k, v = (t[:, -len(seen.q) :] for t in (seen.keys, seen.values))  # two of [K, T, D]
        if chosen.shape[-1] == k.shape[1]:
            return k, v
        slots = chosen.expand(len(k), -1)[..., None].expand(-1, -1, k.shape[2])  # [K, held, D]
        return k.gather(1, slots), v.gather(1, slots)

    def generation(self, prompt_tokens: int, layers: int) -> Generation | None:
        """How generated tokens are dropped; None where all of them stay."""
        return None

    def within(self, share: float, prompt_tokens: int, new_tokens: int, layers: int) -> "Policy":
        """The same policy with settings that hold at most this share of the full cache, as close as possible.

        Raises:
            BudgetError: with the smallest share that can be reached.
            ConfigError: the share is not above 0 and at most 1, or the policy has no `within` of its own.
        """
        raise ConfigError(f"{type(self).__name__} has no `within` to solve a budget of {share}; give it one")

    def kv_lengths(self, prompt_tokens: int, new_tokens: int, layers: int) -> list[int]:
        """Tokens that each layer holds after `new_tokens` were generated."""
        held = [n + new_tokens for n in self.held(prompt_tokens, layers)]
        generation = self.generation(prompt_tokens, layers)
        if generation is None:
            return held
        return [n - dropped for n, dropped in zip(held, generation.dropped(new_tokens), strict=True)]


FULL = Policy()
# A deeper layer, keys and values [K, g, D] for it, and which of the T tokens they are of [g].
Guess = tuple[int, Tensor, Tensor, Tensor]
Compute = Callable[[list[int], Policy], None]  # run tokens through the layers; nothing of them stays held
# Weights of the new tokens' votes, and the slots they are for, two of [B, U]; None where nothing is voted on.
VotesToCast = tuple[Tensor, Tensor] | None


def check_share(share: float, name: str = "kv_budget") -> None:
    """Of the full cache, or of what it computes: above 0 and at most 1. Errors tell it by its name."""
    check_number(name, share, (float, 1e-9, 1.0), ConfigError, TypeError)


def top_scored(score: Tensor, count: int, first: int = 0, newest: int = 0) -> Tensor:
    """Indices of the `count` highest scores, ascending; the `newest` and then the `first` so many always win.

    Of equal scores the earlier token wins, so this sorts: topk promises no order.  [..., T] -> [..., count]
    """
    score = score.float().clone()
    score[..., :first] = torch.finfo(score.dtype).max
    if newest:
        score[..., -newest:] = math.inf
    ranked = score.sort(descending=True, stable=True).indices
    return ranked[..., :count].sort().values


class PendingTokens:
    """Counts the pending tokens of one sequence: those that no compaction has reached yet."""

    def __init__(self, generation: Generation, new_tokens: int) -> None:
        self.generation = generation
        self.generated = 0
        self.compacted = 0  # compactions that have happened
        compactions = range(generation.compactions(new_tokens))
        self.compact_at = [generation.compacts_at(i, new_tokens) for i in compactions]

    @property
    def count(self) -> int:
        """How many are pending: all that follow the last compaction's group."""
        return self.generated - self.compacted * self.generation.group

    def add_one(self) -> list[float]:
        """Count one more generated token; returns what its vote weighs on each group that is not compacted
        yet.

        The oldest group first; 0 for a group whose compaction never comes, because generation ends before.
        """
        self.generated += 1
        groups = math.ceil(self.count / self.generation.group)
        coming = self.compact_at[self.compacted : self.compacted + groups]
        weights = [self.generation.weight(self.generated - 1, generated) for generated in coming]
        return weights + [0.0] * (groups - len(weights))

    def take_due_group(self) -> bool:
        """Whether the oldest group is due; it is not pending any more then, and the caller compacts it."""
        due = self.compacted < len(self.compact_at) and self.compact_at[self.compacted] == self.generated
        if due:
            self.compacted += 1
        return due


def votes_to_cast(pending: list[PendingTokens], lengths: Tensor, room: int) -> list[VotesToCast]:
    """Count one more generated token of every sequence; returns what its vote weighs, and for which slots.

    For each layer: the weights [B, U] with which the token votes on each pending token of its row, the oldest
    first, and the slots [B, U] of these; None for all layers if nothing will ever be voted on. Beyond the
    last pending token weights are 0, and slots are clamped so that they exist.

    Which compaction a token falls into, and who votes in it, follow from its index. So one running sum is
    enough: 4 bytes per token and layer, where its key and value take hundreds. All groups have one size, for
    `KVCache.takes` and `sharing.shared` let no others share a cache.

    lengths [L, B] are what the layers hold before the token; U is the cache's `room` for pending tokens.
    """
    by_group = [tokens.add_one() for tokens in pending]
    if not any(tokens.compact_at for tokens in pending):
        return [None] * len(lengths)
    offsets, group = torch.arange(room, device=lengths.device), pending[0].generation.group
    padded = [weights + [0.0] * (room // group + 1 - len(weights)) for weights in by_group]
    by_token = torch.tensor(padded, device=lengths.device)[:, offsets // group]  # [B, U]
    counts = torch.tensor([tokens.count for tokens in pending], device=lengths.device)  # [B]
    slots = (lengths + 1 - counts)[..., None] + offsets  # [L, B, U]
    return [(by_token, of_layer) for of_layer in slots.minimum(lengths[..., None])]
