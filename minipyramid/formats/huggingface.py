"""`config.json` in the Hugging Face layout, refused if the engine would not run the model faithfully.

Two spellings are in use: transformers 4 writes `rope_theta`, `rope_scaling` and `torch_dtype`, transformers 5
writes `rope_parameters` and `dtype`. What the engine does not implement (a bias, a sliding window, another
rope type) is an error here and never an approximation later.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from minipyramid.config import DTYPES, ModelConfig, RopeConfig, read_json
from minipyramid.errors import ConfigError, check_number

SIZES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
# For each field, the values that the engine implements; a field that is absent has one of them. Mistral
# is a Llama as long as no text is longer than its sliding window.
IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama", "mistral", "qwen2", "qwen3"),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, 1.0),
}
# For each rope type, the fields that it needs.
ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
ROPE_DEFAULTS = {"rope_theta": 10000.0, "factor": 1.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
Fields = dict[str, Any]


def read_config(directory: Path, quantize: str | None = None) -> ModelConfig:
    """Read `config.json` and the ids that end a text in `generation_config.json`, or Meta's `params.json`.

    `quantize` is what plain weights are to become.

    Raises:
        CheckpointError: a file is missing or not JSON.
        ConfigError: a field is absent, out of range, or asks for what the engine does not implement.
    """
    file = directory / "config.json"
    if not file.exists() and (directory / "params.json").exists():
        from minipyramid.formats.meta import config_fields

        return config_of(config_fields(directory), str(directory / "params.json"), quantize=quantize)
    if not file.exists() and any(directory.glob("*.gguf")):
        problem = "holds a GGUF file, which is not read"
        raise ConfigError(f"{directory} {problem}; take the same model in the Hugging Face layout")
    raw = read_json(file)
    more = read_json(directory / "generation_config.json", optional=True)
    return config_of(raw, str(file), more.get("eos_token_id"), quantize)


def config_of(
    raw: Fields, source: str = "config.json", more_eos: Any = None, quantize: str | None = None
) -> ModelConfig:
    """The same from the fields themselves; messages begin with `source`."""
    settings = raw.get("quantization_config")
    if quantize is not None:
        from minipyramid.formats.quantisation import check_quantize

        check_quantize(quantize, settings)
    try:
        config = _model(raw, more_eos)
        return replace(config, quantization=quantize if settings is None else _layout(settings))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _layout(settings: Any) -> Any:
    from minipyramid.formats.quantisation import layout_of

    return layout_of(settings)


def _model(raw: Fields, more_eos: Any) -> ModelConfig:
    if raw.get("model_type") == "mistral":
        # If it is absent; null means that there is no window.
        raw = {"sliding_window": 4096, **raw}
    raw = _without_nulls(raw)
    if str(raw.get("model_type")).startswith("qwen") and not raw.get("use_sliding_window"):
        raw.pop("sliding_window", None)  # its files give one, whether it is used or not
    _refuse_unsupported(raw)
    sizes = {name: _positive(raw, name) for name in SIZES}
    context = _positive(raw, "max_position_embeddings")
    heads = sizes["num_attention_heads"]
    kv_heads = _positive(raw, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(f"num_key_value_heads is {kv_heads}, no divisor of num_attention_heads {heads}")
    head_dim = _positive(raw, "head_dim", sizes["hidden_size"] // heads)
    if head_dim % 2:
        raise ConfigError(f"head_dim is {head_dim}, expected an even number for rotary positions")
    rope = _rope(raw, context)
    window = _positive(raw, "sliding_window", context)
    if window < context:
        problem = f"sliding_window {window} is not implemented below max_position_embeddings {context}"
        raise ConfigError(f"{problem}; lower that to {window} to run within the window")
    if rope.rope_type == "linear" and "sliding_window" not in raw:
        # What was stretched, unless the file names the whole: so FastChat reads it, of Vicuna's makers.
        context = max(context, int(min(rope.original_max_position_embeddings * rope.factor, 2**31)))
    dtype: Any = raw.get("dtype", raw.get("torch_dtype", "float32"))
    _expect_one_of("dtype", dtype, DTYPES)
    tie = raw.get("tie_word_embeddings", False)
    _expect_one_of("tie_word_embeddings", tie, (False, True))
    return ModelConfig(
        **sizes,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=_positive(raw, "rms_norm_eps", 1e-6),
        tie_word_embeddings=tie,
        rope=rope,
        dtype=dtype,
        eos_token_ids=_eos(sizes["vocab_size"], raw.get("eos_token_id"), more_eos),
        qkv_bias=raw["model_type"] == "qwen2",
        head_norms=raw["model_type"] == "qwen3",
    )


def _rope(raw: Fields, context: int) -> RopeConfig:
    given = raw.get("rope_parameters", raw.get("rope_scaling", {}))
    if not isinstance(given, dict):
        raise ConfigError(f"the rope settings are {given!r}, expected an object")
    given = _without_nulls(given)
    kind: Any = given.get("rope_type", given.get("type", "default"))
    _expect_one_of("rope_type", kind, tuple(ROPE_NEEDS))
    # transformers 4 writes two of the fields next to rope_scaling and not into it; transformers 5 may write
    # partial_rotary_factor into rope_parameters.
    raw = {**raw, **given}
    _refuse_unsupported(raw)
    for name in ROPE_NEEDS[kind]:
        if name not in given:
            raise ConfigError(f"rope_type {kind!r} needs {name}, which is absent")
    original = _positive(raw, "original_max_position_embeddings", context)
    numbers = {name: _positive(raw, name, default) for name, default in ROPE_DEFAULTS.items()}
    low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
    if kind == "llama3" and high <= low:
        raise ConfigError(f"high_freq_factor is {high}, expected more than low_freq_factor")
    return RopeConfig(kind, original_max_position_embeddings=original, **numbers)


def _without_nulls(raw: Fields) -> Fields:
    """In these files null means absent; 0 and an empty text are given."""
    return {name: value for name, value in raw.items() if value is not None}


def _refuse_unsupported(raw: Fields) -> None:
    for name, allowed in IMPLEMENTED.items():
        value = raw.get(name)
        # Only model_type has no default.
        given = name in raw or name == "model_type"
        if given and value not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise ConfigError(f"{name} is {value!r}, which is not implemented; expected {expected}")


def _positive(raw: Fields, name: str, default: float | None = None) -> Any:
    """A field that must be a positive number: a float if the default is one, else an int."""
    # A damaged file shall not build a model for hours, nor make arithmetic overflow.
    highest = 4096 if name == "num_hidden_layers" else 2**40
    limits = (float, 1e-20, highest) if isinstance(default, float) else (int, 1, highest)
    return check_number(name, raw.get(name, default), limits, ConfigError, ConfigError)


def _expect_one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    # The type counts, too, since 0 equals False.
    if value not in allowed or type(value) is not type(allowed[0]):
        raise ConfigError(f"{name} is {value!r}, expected one of {', '.join(map(str, allowed))}")


def _eos(vocab_size: int, *given: Any) -> tuple[int, ...]:
    """The ids that end a text, each once; given are single ids, lists of ids and None."""
    lists = [ids if isinstance(ids, list) else [ids] for ids in given]
    ids = [i for some in lists for i in some if i is not None]
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        where = "eos_token_id (or that of generation_config.json)"
        raise ConfigError(f"{where} is {ids!r:.60}, expected ids below {vocab_size}")
    return tuple(dict.fromkeys(ids))
