"""Quantised weights give the scores of the weights that they mean, and are multiplied as they are."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from helpers import WEIGHTS, train_pieces, write_checkpoint
from quantised_files import AWQ, CASES, FP8_CASES, GPTQ, GROUPS, SHAPE, W8A8, compressed, write_both
from safetensors.torch import load_file, save_file

from minipyramid import LLM, CheckpointError, ConfigError, SamplingParams, quantised
from minipyramid.generate import main
from minipyramid.model import Layer
from minipyramid.quantised import (
    MOST_ROWS,
    Int4,
    Int8,
    Quantised,
    by_pieces,
    packed,
    packed_product,
    quantise,
)

IDS = list(range(3, 60))
CPU = torch.device("cpu")
HAS_VECTORS = torch.backends.cpu.get_cpu_capability() in quantised.INT4_ROWS
needs_int4 = pytest.mark.skipif(not HAS_VECTORS, reason="torch has no product for 4 bits on this processor")


def scores(directory: Path, ids: list[int] = IDS, **how: Any) -> torch.Tensor:
    return LLM(directory, policy="full", **{"dtype": "float32", **how}).prefill([ids])[0].logits


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def first_layer(llm: LLM) -> Layer:
    return cast("Layer", llm.model.layers[0])


def forms(llm: LLM) -> set[str]:
    return {type(linear.weight).__name__ for linear in (first_layer(llm).qkv_proj, llm.model.lm_head)}


# --- what lies in files ---


@pytest.mark.parametrize("name", [*CASES, *FP8_CASES])
def test_each_layout_gives_the_scores_of_its_plain_weights(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And says so in a line where torch has no product for it."""
    stored, plain = write_both(tmp_path, name)
    assert error(scores(stored), scores(plain)) < 1e-2
    caplog.clear()
    form = CASES[name].form if name in CASES else "Tensor"
    form = "Tensor" if form == "Int4" and not HAS_VECTORS else form
    layer = first_layer(LLM(stored, dtype="float32"))
    linears = (layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj)
    assert {type(linear.weight).__name__ for linear in linears} == {form}
    assert len(caplog.messages) == (form == "Tensor")
    if form == "Tensor":
        assert "8 weights (" in caplog.text
        assert "become float32 and take its bytes" in caplog.text
        assert torch.equal(scores(stored), scores(plain))  # it is the same product then


def test_a_model_in_bfloat16_rounds_no_more_than_its_plain_weights(tmp_path: Path) -> None:
    stored, plain = write_both(tmp_path, "int4")
    exact = scores(plain)
    assert error(scores(stored, dtype="bfloat16"), exact) < 2 * error(scores(plain, dtype="bfloat16"), exact)


def test_layers_of_one_projection_that_are_not_alike_are_joined(tmp_path: Path) -> None:
    """A checkpoint may leave some layers plain; queries, keys and values are one matrix here."""
    stored, plain = write_both(tmp_path, "gptq")
    tensors, meant = load_file(stored / "model.safetensors"), load_file(plain / "model.safetensors")
    layer = "model.layers.1.self_attn.k_proj"
    kept = {name: t for name, t in tensors.items() if not name.startswith(layer)}
    save_file({**kept, f"{layer}.weight": meant[f"{layer}.weight"]}, stored / "model.safetensors")
    assert error(scores(stored), scores(plain)) < 1e-2


@pytest.mark.parametrize("layout", ["awq", "gptq"])
def test_biases_norms_and_a_tied_head_stay_as_they_are(layout: str, tmp_path: Path) -> None:
    """GPTQ's files may have biases of their own, and those of Qwen2 were taken for such."""
    for kind, parts in (
        ("qwen2", ("q_proj.bias", "k_proj.bias", "v_proj.bias")),
        ("qwen3", ("q_norm", "k_norm")),
    ):
        both = write_both(tmp_path / kind, layout, tie_word_embeddings=True, model_type=kind)
        for directory in both:
            tensors = load_file(directory / "model.safetensors")
            for i, part in enumerate(parts):
                rows = (
                    32
                    if "norm" in part
                    else len(
                        load_file(both[1] / "model.safetensors")[
                            f"model.layers.0.self_attn.{part[0]}_proj.weight"
                        ]
                    )
                )
                for layer in range(2):
                    name = f"model.layers.{layer}.self_attn.{part}" + ".weight" * ("norm" in part)
                    tensors[name] = torch.linspace(0.5, 1.5 + i, rows)
            save_file(tensors, directory / "model.safetensors")
        stored, plain = both
        assert error(scores(stored), scores(plain)) < 1e-2
        llm = LLM(stored)
        assert isinstance(llm.model.lm_head.weight, torch.Tensor)


def test_a_bias_of_zeros_is_no_bias(tmp_path: Path) -> None:
    """Old GPTQ files have one for every layer."""
    stored, plain = write_both(tmp_path, "gptq")
    tensors, name = load_file(stored / "model.safetensors"), "model.layers.0.mlp.down_proj.bias"
    tensors[name] = torch.zeros(SHAPE["hidden_size"], dtype=torch.float16)
    save_file(tensors, stored / "model.safetensors")
    assert error(scores(stored), scores(plain)) < 1e-2
    tensors[name][3] = 1
    save_file(tensors, stored / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.down_proj has a bias"):
        LLM(stored)


def test_what_activations_were_to_be_quantised_by_is_not_read(tmp_path: Path) -> None:
    stored, plain = write_both(tmp_path, "float8 one scale")
    tensors = load_file(stored / "model.safetensors")
    for name in list(tensors):
        if name.endswith("weight_scale"):
            tensors[name.replace("weight_scale", "input_scale")] = torch.tensor([0.5])
    save_file(tensors, stored / "model.safetensors")
    assert torch.equal(scores(stored), scores(plain))


def test_compressed_tensors_own_reader_agrees(tmp_path: Path) -> None:
    """Where that package is installed."""
    library = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    for name, case in CASES.items():
        if case.settings["quant_method"] != "compressed-tensors":
            continue
        kind = "Packed" if case.settings["format"] == "pack-quantized" else "Naive"
        reader = getattr(compressors, f"{kind}QuantizationCompressor")
        weight = case.weight((64, 128), 3)
        scheme = library.QuantizationScheme(**case.settings["config_groups"]["group_0"])
        read = reader.decompress(dict(case.write(weight)), scheme)["weight"].float()
        assert error(read, weight.plain) < 4e-3, name  # it is rounded to bfloat16


# --- what is refused ---


def of_group(**changes: Any) -> dict[str, Any]:
    return compressed("pack-quantized", 4, **{**GROUPS, **changes})


REFUSED: dict[str, tuple[Any, str]] = {
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "by bitsandbytes, which is not impl",
    ),
    "no object": ("int4", "by an unnamed method"),
    "act-order": ({**GPTQ, "desc_act": True}, r"desc_act \(act-order\) is not implemented"),
    "gptq of 3 bits": ({**GPTQ, "bits": 3}, "bits is 3, which is not implemented; expected 4 or 8"),
    "gptq marlin": ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
    "groups of 0": ({**GPTQ, "group_size": 0}, "group_size is 0, expected at least 1"),
    "groups of a text": ({**GPTQ, "group_size": "64"}, "group_size is '64', expected int"),
    "awq gemv": ({**AWQ, "version": "gemv"}, "version is 'gemv', which is not implemented; expected 'gemm'"),
    "awq without zeros": ({**AWQ, "zero_point": False}, "zero_point is False"),
    "fp8 e5m2": ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt is 'e5m2'"),
    "odd blocks": ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size is \[128\]"),
    "nvfp4": ({**of_group(), "format": "nvfp4-pack-quantized"}, "format is 'nvfp4-pack-quantized'"),
    "2 bits": (of_group(num_bits=2), "num_bits is 2"),
    "float4": (of_group(type="float"), "format is 'pack-quantized'"),
    "groups in act-order": (of_group(actorder="group"), "actorder is 'group'"),
    "another strategy": (of_group(strategy="tensor_group"), "strategy is 'tensor_group'"),
    "quantised keys": ({**W8A8, "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is not implemented"),
    "sparse": ({**W8A8, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is not impl"),
    "rotated": ({**W8A8, "transform_config": {"config_groups": {"R1": {}}}}, "transform_config is not impl"),
    "two groups": ({**W8A8, "config_groups": {"a": {}, "b": {}}}, "config_groups has 2, expected one"),
    "no groups": ({**W8A8, "config_groups": None}, "config_groups has none, expected one"),
    "no weights": ({**W8A8, "config_groups": {"a": {"weights": None}}}, "says nothing of weights"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_configuration_that_is_not_implemented_is_refused_by_name(name: str, tmp_path: Path) -> None:
    settings, words = REFUSED[name]
    write_checkpoint(tmp_path, quantization_config=settings)
    with pytest.raises(ConfigError, match=words) as raised:
        LLM(tmp_path)
    assert "config.json: quantization_config: " in str(raised.value)


Q = "model.layers.1.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]
DAMAGES: dict[str, tuple[str, Callable[[Tensors], Any], str]] = {
    "no scales": ("gptq", lambda t: t.pop(f"{Q}.scales"), f"{Q}.scales is missing"),
    "no zeros": ("awq", lambda t: t.pop(f"{Q}.qzeros"), f"{Q}.qzeros is missing"),
    "no packed weight": ("gptq", lambda t: t.pop(f"{Q}.qweight"), "lacks the tensor"),
    "no scale of int8": ("int8", lambda t: t.pop(f"{Q}.weight_scale"), "holds torch.int8, expected float32"),
    "no scale of float8": (
        "float8",
        lambda t: t.pop(f"{Q}.weight_scale"),
        "holds torch.float8_e4m3fn, expected",
    ),
    "misshapen": (
        "gptq",
        lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"][:-1].clone()}),
        r"q_proj\.qweight has shape \[15, 128\], but quantization_config \(gptq\) asks for \[16, 128\]",
    ),
    "scales of other groups": (
        "int4",
        lambda t: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"][:, :1].clone()}),
        r"weight_scale has shape \[128, 1\], .* asks for \[128, 2\]",
    ),
    "weight of floats": (
        "int8",
        lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].float()}),
        "holds torch.float32, expected torch.int8",
    ),
    "packed in 64 bits": (
        "awq",
        lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].long()}),
        "holds torch.int64, expected torch.int32",
    ),
    "scales not finite": ("awq", lambda t: t[f"{Q}.scales"].fill_(torch.inf), "scales that are not finite"),
    "float8 that is no number": (
        "float8",
        lambda t: t[f"{Q}.weight"].view(torch.uint8).fill_(0x7F),
        "holds values that are not finite in torch.float32",
    ),
    "another shape said": ("int4", lambda t: t[f"{Q}.weight_shape"].fill_(1), r"has weight_shape \[1, 1\]"),
    "act-order": ("gptq", lambda t: t.update({f"{Q}.g_idx": t[f"{Q}.g_idx"].flip(0)}), "groups in act-order"),
    "left over": ("awq", lambda t: t.update({f"{Q}.odd": torch.zeros(1)}), f"holds {Q}.odd"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_tensors_are_one_sentence(name: str, tmp_path: Path) -> None:
    layout, spoil, words = DAMAGES[name]
    stored, _ = write_both(tmp_path, layout)
    tensors = load_file(stored / "model.safetensors")
    spoil(tensors)
    save_file({key: t.contiguous() for key, t in tensors.items()}, stored / "model.safetensors")
    with pytest.raises(CheckpointError, match=words) as raised:
        LLM(stored)
    assert "\n" not in str(raised.value)


# --- plain weights in 8 bits ---


def in_8_bits(weight: torch.Tensor) -> torch.Tensor:
    """What a weight becomes, number by number."""
    out = torch.empty(weight.shape)
    for i, row in enumerate(weight.float()):
        step = (row.abs().max() / 127).bfloat16().float()
        out[i] = torch.clamp(torch.round(row / step), -127, 127) * step
    return out


@pytest.mark.parametrize("tied", [False, True])
def test_int8_gives_the_scores_of_rounded_weights(tied: bool, tmp_path: Path) -> None:
    plain, rounded = tmp_path / "plain", tmp_path / "rounded"
    write_checkpoint(plain, **{**SHAPE, "tie_word_embeddings": tied})
    # Halved, as large as those of the layouts above: the others make 2 % of any rounding to bfloat16.
    tensors = {
        name: t / 2 if name.endswith("proj.weight") else t
        for name, t in load_file(plain / "model.safetensors").items()
    }
    if tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # as older files have it
    save_file(tensors, plain / "model.safetensors")
    is_linear = ("proj.weight", "lm_head.weight")
    meant = {name: in_8_bits(t) if name.endswith(is_linear) else t for name, t in tensors.items()}
    write_checkpoint(rounded, **{**SHAPE, "tie_word_embeddings": tied})
    save_file(meant, rounded / "model.safetensors")
    llm = LLM(plain, dtype="float32", policy="full", quantize="int8")
    assert forms(llm) == {"Int8"}
    assert error(llm.prefill([IDS])[0].logits, scores(rounded)) < 1e-2
    del tensors["lm_head.weight"]
    if tied:  # the same where the file leaves it out
        save_file(tensors, plain / "model.safetensors")
        assert torch.equal(scores(plain, quantize="int8"), llm.prefill([IDS])[0].logits)


def test_without_torchs_operators_the_products_are_plain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(quantised, "HAS_INT8", False)
    monkeypatch.setattr(quantised, "HAS_INT4", False)
    stored, plain = write_both(tmp_path, "int8")
    llm = LLM(stored, dtype="float32", policy="full")
    assert isinstance(first_layer(llm).qkv_proj.weight, Int8)  # a quarter of the bytes all the same
    assert error(llm.prefill([IDS])[0].logits, scores(plain)) < 1e-5
    assert not caplog.messages
    stored, plain = write_both(tmp_path, "awq")
    assert torch.equal(scores(stored), scores(plain))
    assert "become float32" in caplog.text


@pytest.mark.parametrize("columns", [20, 48, 96])
def test_columns_that_do_not_fit_the_operator_are_left_to_the_plain_product(columns: int) -> None:
    """The operator reads past the end of such rows, and may end the process."""
    weight = packed(quantise(torch.randn(8, columns)), CPU)
    assert weight is not None
    assert (quantised.product_of(weight) is packed_product) == (columns % 32 == 0)


def test_other_values_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored, plain = write_both(tmp_path, "awq")
    with pytest.raises(ConfigError, match=r"^quantize is 'int4', expected 'int8'$"):
        LLM(plain, quantize="int4")
    with pytest.raises(TypeError, match="quantize is 8, expected a name"):
        LLM(plain, quantize=8)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the weights are quantised already; leave it out"):
        LLM(stored, quantize="int8")
    for flags in ([], ["--plan", "--prompt-tokens", "5"]):
        assert main(["x", "--model", str(plain), "--quantize", "int4", *flags][bool(flags) :]) == 2
        assert capsys.readouterr().err == "minipyramid: error: quantize is 'int4', expected 'int8'\n"


# --- products ---


@pytest.mark.parametrize("form", ["Int8", pytest.param("Int4", marks=needs_int4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gets_the_same_whatever_the_others_are(form: str, dtype: torch.dtype) -> None:
    """Few rows go through torch's operator and many through plain pieces of the weight."""
    rows, columns, many = 2560, 128, MOST_ROWS + 1
    generator = torch.Generator().manual_seed(1)
    if form == "Int8":
        weight = quantise(torch.randn(rows, columns, generator=generator))
    else:
        values = torch.randint(-8, 8, (rows, columns), generator=generator).to(torch.int8)
        scales = torch.rand(rows, 2, generator=generator).bfloat16().float()
        weight = Quantised(values, scales, torch.randint(-4, 5, (rows, 2)).to(torch.int16), 64, 4)
    form_of = packed(weight, CPU)
    assert type(form_of).__name__ == form
    assert isinstance(form_of, (Int4, Int8))
    x = torch.randn(many, columns, generator=generator).to(dtype)
    together, exact = packed_product(x, form_of), x.bfloat16().float() @ weight.plain().T
    assert together.dtype == dtype
    alone = torch.cat([packed_product(row[None], form_of) for row in x])
    step = 2.0**-8 if form == "Int8" else 2.0**-6  # of 4 bits the zeros times the scales are rounded, too
    for found in (together, alone, by_pieces(x, form_of)):
        assert error(found.float(), exact) < step
    assert (together == alone).float().mean() > 0.99
    assert error(together.float(), alone.float()) < 2.0**-10


def test_batches_give_what_prompts_give_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, **SHAPE)
    llm = LLM(tmp_path, dtype="float32", quantize="int8", policy="full")
    prompts, params = [IDS[:n] for n in (5, 20, 40)], SamplingParams(max_new_tokens=8, ignore_eos=True)
    together = llm.generate(prompts, params)
    alone = [llm.generate([prompt], params)[0] for prompt in prompts]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert [c.kv_bytes for c in together] == [
        c.kv_bytes for c in LLM(tmp_path, dtype="float32", policy="full").generate(prompts, params)
    ]


# --- commands ---


def test_eval_and_bench_take_the_flag(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from minipyramid.bench.__main__ import main as bench
    from minipyramid.eval.__main__ import main as evaluate

    _, plain = write_both(tmp_path, "fp8")
    asked: list[Any] = []
    begin = LLM.__init__

    def noting(self: LLM, *args: Any, **how: Any) -> None:
        asked.append(how.get("quantize"))
        begin(self, *args, **how)

    monkeypatch.setattr(LLM, "__init__", noting)
    flags = ["--model", str(plain), "--quantize", "int8"]
    text = tmp_path / "text.txt"
    text.write_text("The fox went home. " * 50)
    train_pieces(plain)
    few = ["--context", "64", "--continuation", "8", "--samples", "2", "--policies", "streaming"]
    assert evaluate([*flags, "--text", str(text), *few]) == 0
    assert asked == ["int8"]
    monkeypatch.setattr("minipyramid.bench.growth.HELD", (16,))
    capfd.readouterr()
    assert bench([*flags, "--batch-size", "1", "--growth", "--json", "--dtype", "float32"]) == 0
    (row,) = json.loads(capfd.readouterr().out.splitlines()[-1])["rows"]
    weights = sum(t.numel() for t in load_file(plain / "model.safetensors").values())
    weights -= SHAPE["vocab_size"] * SHAPE["hidden_size"]
    keys_and_values = 2 * 2 * 64 * 4 * 16  # of 2 layers, 64 numbers of 4 bytes for each of 16 tokens
    assert row["read_bytes"] == weights + keys_and_values


@pytest.mark.parametrize("command", ["generate", "serve", "eval", "bench", "calibrate", "demo"])
def test_every_command_passes_the_flag_on(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "serve":
        pytest.importorskip("uvicorn")
    name = "generate" if command == "generate" else f"{command}.__main__"
    text = tmp_path / "text.txt"
    text.write_text("The fox went home.")
    more = {"generate": ["x"], "serve": ["--port", "0"], "calibrate": ["--text", str(text)]}
    flags = [*more.get(command, []), "--model", str(write_checkpoint(tmp_path)), "--quantize", "int4"]
    assert importlib.import_module(f"minipyramid.{name}").main(flags) == 2
    assert capsys.readouterr().err == "minipyramid: error: quantize is 'int4', expected 'int8'\n"


def test_one_line_tells_what_becomes_plain_unless_quiet(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored, _ = write_both(tmp_path, "fp8")
    flags = ["--prompt", "x", "--model", str(stored), "--dtype", "float32"]
    assert main([*flags, "--quiet"]) == 2  # it has no tokenizer, which is told when the prompt is encoded
    assert not caplog.messages
    command = [sys.executable, "-m", "minipyramid.generate", *flags]
    told, missing = subprocess.run(command, capture_output=True, text=True, check=False).stderr.splitlines()
    assert told == (
        "minipyramid: 8 weights (fp8) become float32 and take its bytes: none of torch's products is for them"
    )
    assert "has no tokenizer" in missing


def test_the_embedded_checkpoint_in_8_bits_foretells_as_before() -> None:
    if not WEIGHTS.exists():
        pytest.skip("no embedded checkpoint in this tree")
    plain, small = (LLM(WEIGHTS, dtype="float32", policy="full", quantize=q) for q in (None, "int8"))
    text = "Once upon a time there was a little fox who lived in a house at the edge of the wood, and it said"
    one, other = (llm.score(text[:40], text[40:]) for llm in (plain, small))
    assert abs(sum(one) - sum(other)) / len(one) < 0.02
