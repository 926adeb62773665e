"""Which number format a model runs in, where nobody has said it."""

import pytest
import torch

from minipyramid import device, quicker
from minipyramid.linear import Linear, reorder


@pytest.mark.parametrize("faster", ["bfloat16", "float32"])
def test_auto_takes_the_format_whose_products_are_quicker(
    faster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor that has the instructions may run them at half of float32's rate, and `auto` took them."""
    cpu = torch.device("cpu")
    seconds = {torch.bfloat16: 2.0, torch.float32: 2.0} | {getattr(torch, faster): 1.0}
    monkeypatch.setattr(device, "has_bf16", lambda: True)
    monkeypatch.setattr(quicker, "product_seconds", seconds.__getitem__)
    for stored in ("bfloat16", "float16"):
        assert device.pick_dtype("auto", stored, cpu) == getattr(torch, faster)
    assert device.pick_dtype("auto", "float32", cpu) == torch.float32  # as it is stored, whatever is quicker
    assert device.pick_dtype("bfloat16", "float32", cpu) == torch.bfloat16  # asked for by name


def test_without_instructions_for_bf16_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One product of it takes seconds there."""
    monkeypatch.setattr(device, "has_bf16", lambda: False)
    monkeypatch.setattr(quicker, "product_seconds", lambda _: pytest.fail("a product was timed"))
    assert device.pick_dtype("auto", "float16", torch.device("cpu")) == torch.float32


def test_a_product_is_timed() -> None:
    assert quicker.product_seconds(torch.float32) > 0


def test_what_is_timed_is_the_product_of_the_models_layers() -> None:
    """torch's own product of float32 ran at less than half their rate, by which bf16 would look too good."""
    weight, x = torch.randn(24, 16), torch.randn(3, 16)
    layer = quicker.layer_of(weight)
    assert layer.product is Linear(24, 16).apply(reorder).product
    torch.testing.assert_close(layer(x), x @ weight.T)
