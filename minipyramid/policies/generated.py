"""How much of what is generated a profile holds within a budget, and what that leaves for its prompt.

Generated tokens get the budget's share b, and the prompt the room that is left. Of N prompt tokens in L
layers that should be half of b N L at least, and no more than all N L. Both can fail where much is generated.
Newest tokens are protected, so generated ones may take more than b of their number; and where the prompt is
short, more may be left than it has tokens. So first fewer of the newest are protected. Where that is not
enough, the share of generated tokens is another one than b: the largest that leaves the prompt half of its
share, or the smallest that leaves it no more than it has.
"""

from bisect import bisect_left
from collections.abc import Callable

FEWEST_RECENT = (64, 32, 16, 8, 0)  # tried after the profile's own number, where they are smaller
PARTS = 256  # a share that is not the budget's is a whole number of 256ths


def split_between(
    room: Callable[[int, float], int], fewest_recent: int, share: float, whole: int, layers: int
) -> tuple[int, int, float]:
    """Room for a prompt, and the `fewest_recent` and `generated_share` that leave so much.

    `room` says what such settings leave of a budget of `share`; `whole` is the prompt in all layers. If no
    settings leave half of the prompt's share, and a token of each layer, those that leave most are taken. A
    larger budget holds no less.
    """
    enough = max(layers, int(share * whole) // 2)
    tried = []
    for recent in [fewest_recent, *(n for n in FEWEST_RECENT if n < fewest_recent)]:
        left = room(recent, share)
        if enough <= left <= whole:
            return left, recent, share
        tried.append((left, recent, share))
    for left, recent, _ in tried[:]:
        # The larger the part, the less is left. These two are on both sides of what is aimed at.
        aim = whole if left > whole else enough
        at = bisect_left(range(PARTS), -aim, key=lambda n: -room(recent, n / PARTS))
        parts = [n / PARTS for n in (max(0, at - 1), at)]
        tried += [(room(recent, part), recent, part) for part in parts]

    def worth(found: tuple[int, int, float]) -> tuple[int, int, float]:
        """What leaves enough, or most; of that what wastes least; of that the largest part."""
        left, _, part = found
        return min(left, enough), min(0, whole - left), part

    return max(tried, key=worth)
