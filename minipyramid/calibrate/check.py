"""Levels on windows that they were not fitted to, beside an even split that holds and computes no less."""

import math
from typing import Any

import torch
from torch import Tensor

from minipyramid.calibrate.contexts import Window, divergence
from minipyramid.calibrate.find import Search
from minipyramid.policies.levels import Level

EVEN_CHOICE = ("keydiff", 0.25)  # of the even split, whatever the calibration has found


def check_levels(search: Search, levels: list[Level]) -> list[dict[str, Any]]:
    """What each level costs: KL divergence, perplexity over the full cache's, and that of an even split.

    `search` is over the windows to check on. A level is `better` where its loss (`Loss.total`) is below
    that of the even split, which computes everything.
    """
    layers, windows, expected = search.layers, search.windows, search.expected
    rows = []
    for level in levels:
        score, newest = EVEN_CHOICE
        even = Level((1.0,) * layers, (level.share,) * layers, (score,) * layers, (newest,) * layers)
        logprobs, of_even = search.contexts_of(level).logprobs(level), search.full.logprobs(even)
        measured, beside = divergence(expected, logprobs, windows), divergence(expected, of_even, windows)
        rows.append(
            {
                "held": round(level.share, 4),
                "computed": round(level.computed_share, 4),
                "kl": measured.following,
                "kl_again": measured.again,
                "even_kl": beside.following,
                "even_kl_again": beside.again,
                "perplexity_ratio": perplexity_ratio(expected, logprobs, windows),
                "even_perplexity_ratio": perplexity_ratio(expected, of_even, windows),
                "better": measured.total < beside.total,
            }
        )
    return rows


def perplexity_ratio(full: Tensor, pruned: Tensor, windows: list[Window]) -> float:
    """Of what follows the contexts, its first token left out, which is read and not scored."""
    following = len(windows[0].following)
    targets = torch.tensor([window.following[1:] for window in windows], device=full.device)[..., None]
    nats = []
    for logprobs in (pruned, full):
        of_windows = logprobs.view(len(windows), 2, following, -1)
        after = of_windows[:, 0, :-1]  # [windows, following - 1, vocab_size]
        nats.append(-float(after.gather(-1, targets).mean()))
    return math.exp(nats[0] - nats[1])
