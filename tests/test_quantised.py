"""Quantised weights give the scores of the weights that they mean, and are multiplied as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quantised_files import CASES, FP8_CASES, write_both

from minipyramid import LLM

IDS = list(range(3, 60))


def scores(directory: Path, ids: list[int] = IDS, **how: object) -> torch.Tensor:
    """Of what follows a prompt, and of what follows each of two single tokens after it."""
    llm = LLM(directory, policy="full", **{"dtype": "float32", **how})
    return llm.prefill([ids])[0].logits


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", [*CASES, *FP8_CASES])
def test_each_layout_gives_the_scores_of_its_plain_weights(name: str, tmp_path: Path) -> None:
    quantised, plain = write_both(tmp_path, name)
    for ids in (IDS, IDS[:7]):  # more rows than torch's operator is quick at, and few
        e = error(scores(quantised, ids), scores(plain, ids))
        print(name, len(ids), e)
        assert e < 3e-1
    form = CASES[name].form if name in CASES else "Tensor"
    layer = LLM(quantised).model.layers[0]
    assert {type(linear.weight).__name__ for linear in (layer.qkv_proj, layer.down_proj)} == {form}
