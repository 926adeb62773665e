"""From a share of memory to settings of PyramidInfer that hold at most so much of the full cache, and hardly
less.

The paper's headline is a share (45.4 % of the memory), its settings are ratios, and the published ones keep
about three quarters of a 32-layer model's, more of a shallower one's. Every length follows from the settings,
so they can be solved for without computing anything.

The first of these that comes close is taken: the decay ratio is lowered (or, where dropping generated tokens
as published holds less than asked, fewer are dropped); the schedule becomes `constant` with a ratio of its
own, which drops from the first layer on, where cosine hardly does; on top of that `recent_ratio` falls to
0.05; fewer generated tokens stay; the layers that drop first cut deeper, down to `min_context_length`; that
falls; full layers become fewer, down to one; `recent_ratio` falls to 0, last because the recent tokens are
the voters.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from functools import lru_cache
from operator import itemgetter
from typing import Any, TypeVar

from minipyramid.errors import BudgetError
from minipyramid.policy import Policy, check_share

# Settings of PyramidInfer. They are known here by their names only, for their own file imports this one.
Settings = TypeVar("Settings", bound=Policy)

POINTS = 16  # steps of a stage that are tried, then as many between the neighbours of the best one
ROUNDS = 5  # each is 8 times finer: a step of the last is a 65,536th of the stage
CLOSE = 0.99  # of the budget; a stage that comes no closer leaves it to the next


@lru_cache(maxsize=4096, typed=True)  # requests of one length are many; True is not 1.0
def solve(base: Settings, share: float, prompt_tokens: int, new_tokens: int, layers: int) -> Settings:
    """Go along the `stages` until one comes close to the share without exceeding it."""
    most = most_tokens(share, prompt_tokens, new_tokens, layers)
    tried: list[tuple[int, Settings]] = []  # tokens held, and by which settings

    def search(start: Settings, end: Settings) -> tuple[int, Settings]:
        """The settings that hold most within the share, on this line from `start` to `end` and all before.

        What is held falls along a line, except where a layer's context would reach `min_context_length`: it
        then drops nothing. So it is searched in rounds, and not by halving.
        """
        middle, width = 0.5, 0.5
        for _ in range(ROUNDS):
            best = -1
            for t in [min(1.0, max(0.0, middle + width * (2 * i / POINTS - 1))) for i in range(POINTS + 1)]:
                config = part_of_the_way(start, end, t)
                held = sum(config.kv_lengths(prompt_tokens, new_tokens, layers))
                tried.append((held, config))
                if best < held <= most:
                    best, middle = held, t
            width *= 2 / POINTS
        return max((pair for pair in tried if pair[0] <= most), key=itemgetter(0), default=(-1, base))

    for line in stages(base, prompt_tokens, layers):
        best = search(*line)
        if best[0] >= CLOSE * most:
            return best[1]
    if best[0] < 0:
        least = min(tried, key=itemgetter(0))[0]
        raise refusal(share, least, prompt_tokens, new_tokens, layers)
    # A compaction drops a group's tokens in every layer at once. What it left unused goes to the prompt, and
    # what is left then to generated tokens.
    best = search(changed(best[1], prefill_decay_ratio=1.0), best[1])
    return search(changed(best[1], gen_decay_ratio=1.0, gen_compress_ratio=1.0), best[1])[1]


def refusal(share: float, least: int, prompt_tokens: int, new_tokens: int, layers: int) -> BudgetError:
    """The error for a share that cannot be held; `least` tokens over all layers are the fewest that can."""
    share_of_least = least / (layers * (prompt_tokens + new_tokens))
    smallest = math.ceil(1e4 * share_of_least) / 1e4  # rounded up, for it must be taken
    tokens = f"{prompt_tokens} + {new_tokens} tokens in {layers} layers"
    problem = f"a budget of {share} cannot be held with {tokens}"
    return BudgetError(f"{problem}; the smallest that can is {smallest:.4f}", smallest)


def most_tokens(share: float, prompt_tokens: int, new_tokens: int, layers: int) -> float:
    """Tokens over all layers that a share of the full cache is.

    A hair more than that, for 0.175 * 720 comes to a little less than 126.
    """
    check_share(share)
    return share * layers * (prompt_tokens + new_tokens) * (1 + 1e-9)


def stages(base: Settings, prompt_tokens: int, layers: int) -> Iterator[tuple[Settings, Settings]]:
    """What is given up, in this order; a stage is a line between two configurations."""
    # The stages begin with whole prompts, whatever a file's ratios are.
    base = changed(base, prefill_decay_ratio=1.0)
    given = asdict(base)
    few = min(given["recent_ratio"], 0.05)  # it falls to this first, and to 0 only last
    context = max(1, prompt_tokens - 1 - int(prompt_tokens * few))
    least = min(given["min_context_length"], context - 1)
    # The ratios of `constant` that leave just more than `least` after one layer, and after all that drop one
    # by one.
    after_full = range(given["prefill_full_layers"] - 1, layers - 1)
    drops = sum(i % given["layerwise_downsample_interval"] == 0 for i in after_full)
    steepest, even = ((1 + 1e-6) * ((least + 1) / context) ** (1 / n) for n in (1, max(1, drops)))

    # Nothing is dropped; then generated tokens are, by the settings.
    yield changed(base, gen_decay_ratio=1.0, gen_compress_ratio=1.0), base
    # The decay ratio, which is the method's own knob.
    yield base, changed(base, prefill_decay_ratio=0.0)
    # The same from the first layer on, for cosine hardly falls in the first layers of a model that has few.
    sloping = changed(base, prefill_decay_strategy="constant", prefill_decay_ratio=min(1.0, even))
    yield changed(sloping, prefill_decay_ratio=1.0), sloping
    # Fewer of the recent.
    yield sloping, changed(sloping, recent_ratio=few)
    # Fewer generated tokens.
    forgetful = changed(sloping, recent_ratio=few, gen_decay_ratio=0.0, gen_compress_ratio=0.0)
    yield changed(sloping, recent_ratio=few), forgetful
    # A cliff instead of a slope.
    cliff = changed(forgetful, prefill_decay_ratio=min(1.0, steepest), min_context_length=least)
    yield changed(forgetful, min_context_length=least), cliff
    # No least context.
    small = changed(cliff, min_context_length=0, prefill_decay_ratio=min(1.0, (1 + 1e-6) / context))
    yield cliff, small
    # Fewer full layers.
    shallow = changed(small, prefill_full_layers=1)
    yield small, shallow
    # No voter but the newest token.
    yield shallow, changed(shallow, recent_ratio=0.0)


def changed(settings: Settings, **changes: Any) -> Settings:
    """Other settings, with these changes."""
    return replace(settings, **changes)


def part_of_the_way(start: Settings, end: Settings, t: float) -> Settings:
    """The configuration at `t` of the way, 0 to 1."""
    changes: dict[str, Any] = {}
    for field in fields(end):
        a, b = getattr(start, field.name), getattr(end, field.name)
        if a != b and t < 1:
            changes[field.name] = type(b)(a + (b - a) * t)
    return changed(end, **changes)
