"""How much of what is generated a profile holds within a budget, so that its prompt has about its share.

Generated tokens get the budget's share. What they leave for the prompt is to be half of the budget's share of
it at least, and no more than all of it. Neither holds for a prompt far shorter than what follows: the newest
tokens, which are protected, may leave it nothing, and what it cannot use would be wasted. So first fewer of
the newest are protected, and where that does not do, the share of generated tokens goes down or up.
"""

from bisect import bisect_left
from collections.abc import Callable

FEWEST_RECENT = (64, 32, 16, 8, 0)  # the profile's own, then these that are fewer
PARTS = 256  # of 1: the share of generated tokens is the budget's, or a multiple of one of these


def split_between(
    leaves: Callable[[int, float], int], fewest_recent: int, share: float, whole: int, layers: int
) -> tuple[int, int, float]:
    """Tokens that are left for a prompt, and the `fewest_recent` and `generated_share` that leave them.

    `leaves` says what such settings leave of the budget's `share`; `whole` is the prompt in all layers. If
    nothing leaves half of the prompt's share, or a token of each layer, the settings that leave most are
    taken. A larger budget holds no less.
    """
    fair = max(layers, int(share * whole))
    enough = max(layers, fair // 2)
    fewer = [fewest_recent, *(n for n in FEWEST_RECENT if n < fewest_recent)]
    tried = [(leaves(recent, share), recent, share) for recent in fewer]
    for found in tried:
        if enough <= found[0] <= whole:
            return found
    for recent in fewer:
        at = bisect_left(range(PARTS), -fair, key=lambda n: -leaves(recent, n / PARTS))
        parts = [n / PARTS for n in (max(0, at - 1), at)]
        tried += [(leaves(recent, part), recent, part) for part in parts]
    # Of those that leave enough, the one that leaves least beyond the whole prompt holds most in total.
    return max(tried, key=lambda found: (min(found[0], enough), min(0, whole - found[0])))
