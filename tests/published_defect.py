"""What the published code's generation costs: recall with its defect, and without it.

    python tests/published_defect.py --samples 20

In generation that code compares a layer's pruned length with the count of all tokens ever seen. So a layer that pruned
its prompt always seems to have 16 tokens waiting, and drops its 16 oldest at every step, until only the protected tail
is left: prompt and sinks are gone. Here a story is pruned, sentences of filler are generated behind it (they are given,
so that both sides read the same), and then a fact of the story is asked for. Nothing but this file has the switch.
"""

from __future__ import annotations

import argparse
import random

import torch

from minipyramid import LLM, PyramidConfig
from minipyramid.baselines import Held, hold_pyramid
from minipyramid.eval import answers, interval
from minipyramid.generate import DEFAULT_MODEL
from minipyramid.stories import filler, story


def drop_oldest(held: Held, settings: PyramidConfig) -> None:
    """Every layer that is shorter than all that was seen drops its oldest tokens, as if they were waiting."""
    row, cache, gathered = held.cache.rows[0], held.cache, settings.exceed_length_to_compress
    tail = 1 + settings.recent(row.position)
    for layer, n in enumerate(row.lengths):
        drop = min(gathered, n - tail)
        if row.position - n >= gathered and drop > 0:
            for slab in (cache.keys[layer], cache.values[layer]):
                slab[0, :, : n - drop] = slab[0, :, drop:n].clone()
            row.lengths[layer] = n - drop
            row.kept[layer] = row.kept[layer][drop:]


@torch.inference_mode()
def read(llm: LLM, ids: list[int], between: list[int], room: int, settings: PyramidConfig, *, defect: bool) -> Held:
    """A pruned prompt, and tokens behind it that are taken in as if they were generated."""
    new = len(between)
    held = hold_pyramid(llm, ids, settings, room + new if defect else room, 0 if defect else new)
    for token in between:
        llm.model.step(torch.tensor([token]), [held.cache])
        if defect:
            drop_oldest(held, settings)
    return held


def recall(
    llm: LLM, settings: PyramidConfig, context: int, generated: int, samples: int, *, defect: bool
) -> list[float]:
    """1 for every answer that is the first choice, `generated` tokens behind the story."""
    tokenizer, rng, hits = llm.tokenizer, random.Random(0), []
    assert tokenizer is not None
    for _ in range(samples):
        tale = story(rng, context, lambda text: len(tokenizer.encode(text, continues=True)))
        ids = tokenizer.encode(tale.text)
        between = tokenizer.encode("".join(" " + filler(rng) for _ in range(generated)), continues=True)[:generated]
        for question, answer in tale.asked[:4]:
            both = tokenizer.encode(question + answer, continues=True)
            asked = len(tokenizer.encode(question, continues=True))
            held = read(llm, ids, between, len(both), settings, defect=defect)
            hits.append(answers(llm, held, both[:asked], both[asked:]))
    return hits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(DEFAULT_MODEL))
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--generated", type=int, default=64)
    parser.add_argument("--samples", type=int, default=20)
    args = parser.parse_args()
    llm = LLM(args.model, pyramid="llama2-7b")
    settings = llm.policy.pyramid
    assert settings is not None
    for name, defect in (("without the defect", False), ("with the defect", True)):
        hits = recall(llm, settings, args.context, args.generated, args.samples, defect=defect)
        mean, low, high = interval(hits, 0)
        print(f"recall {name:18} {mean:.3f} [{low:.3f}, {high:.3f}] of {len(hits)} questions")


if __name__ == "__main__":
    main()
