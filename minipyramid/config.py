"""The shape of a model, read from `config.json`, refused where the engine would not run it faithfully.

Two spellings are in use: transformers 4 writes `rope_theta`, `rope_scaling` and `torch_dtype`, transformers 5
writes `rope_parameters` and `dtype`. What the engine does not implement (a bias, a sliding window, another rope
type) is an error here and never an approximation later.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipyramid.errors import CheckpointError, ConfigError, RequestError, check_number

DTYPES = ("float32", "bfloat16", "float16")
# What each field must be for the model to be the one implemented; absent or null means the same. Mistral is a
# Llama wherever its sliding window does not come into play.
IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama", "mistral"),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (),
}
# By rope type, the fields that it cannot do without.
ROPE_NEEDS = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
ROPE_DEFAULTS = {"rope_theta": 10000.0, "factor": 1.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SIZES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings".split()


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions: the base, and how its frequencies are stretched for contexts longer than the original."""

    rope_type: str
    rope_theta: float
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """Field names are those of `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: RopeConfig
    dtype: str
    eos_token_ids: tuple[int, ...]

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of one token's key and value in one layer, with `itemsize` bytes a number."""
        return 2 * self.num_key_value_heads * self.head_dim * itemsize

    def check_length(self, prompt: int, new: int, name: str) -> None:
        """Refuse what is empty or would run past the positions that the model was trained for."""
        context = self.max_position_embeddings
        if prompt < 1:
            raise RequestError(f"{name} has {prompt} tokens, expected at least 1")
        if prompt + new > context:
            over = f"{name} has {prompt} tokens, which with {new} new ones is more than the context of {context}"
            fewer = f" or ask for at most {context - prompt} new tokens" if prompt < context else ""
            raise RequestError(f"{over}; shorten it by {prompt + new - context}{fewer}")

    @classmethod
    def load(cls, directory: Path) -> "ModelConfig":
        """Read `config.json`, and the further ids that end a text from `generation_config.json`.

        Raises:
            CheckpointError: a file is missing or not JSON.
            ConfigError: a field is absent, out of range, or asks for what the engine does not implement.
        """
        raw = read_json(directory / "config.json")
        more = read_json(directory / "generation_config.json", optional=True)
        return cls.from_dict(raw, str(directory / "config.json"), more.get("eos_token_id"))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "config.json", more_eos: Any = None) -> "ModelConfig":
        """The same from a dictionary; `source` names it in messages."""
        _refuse_unsupported(raw, source)
        sizes = {name: _positive(raw, name, source, int) for name in SIZES}
        context, heads = sizes["max_position_embeddings"], sizes["num_attention_heads"]
        kv_heads = _positive(raw, "num_key_value_heads", source, int, heads)
        if heads % kv_heads:
            raise ConfigError(f"{source}: num_key_value_heads is {kv_heads}, no divisor of num_attention_heads {heads}")
        head_dim = _positive(raw, "head_dim", source, int, sizes["hidden_size"] // heads)
        if head_dim % 2:
            raise ConfigError(f"{source}: head_dim is {head_dim}, expected an even number for rotary positions")
        # Mistral's own default; null means no window.
        window = ({"sliding_window": 4096} if raw["model_type"] == "mistral" else {}) | raw
        if window.get("sliding_window") is not None:
            size = _positive(window, "sliding_window", source, int)
            if size < context:
                told = f"{source}: sliding_window {size} is not implemented below max_position_embeddings {context}"
                raise ConfigError(f"{told}; lower that to {size} to run within the window")
        given = [raw.get("eos_token_id"), more_eos]
        eos = [i for ids in given for i in (ids if isinstance(ids, list) else [ids]) if i is not None]
        if not all(type(i) is int and 0 <= i < sizes["vocab_size"] for i in eos):
            where = f"{source}: eos_token_id (or that of generation_config.json)"
            raise ConfigError(f"{where} is {eos!r:.60}, expected ids below {sizes['vocab_size']}")
        tie = _one_of((False, True), source, "tie_word_embeddings", raw.get("tie_word_embeddings"), False)
        return cls(
            **sizes,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=_positive(raw, "rms_norm_eps", source, float, 1e-6),
            tie_word_embeddings=tie,
            rope=_rope(raw, source, context),
            dtype=_one_of(DTYPES, source, "dtype", raw.get("dtype"), raw.get("torch_dtype"), "float32"),
            eos_token_ids=tuple(dict.fromkeys(eos)),
        )


def read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    """An object from a JSON file, an empty one for an absent `optional` file.

    Raises `CheckpointError` where it is missing, unreadable (a dangling link as well) or something else.
    """
    if optional and not path.exists() and not path.is_symlink():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise CheckpointError(f"{path} {reason}; expected a checkpoint in the Hugging Face layout") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def _positive(raw: Mapping[str, Any], name: str, source: str, kind: type, default: float | None = None) -> Any:
    """A field that must be a positive number, and one that arithmetic survives; null means absent."""
    value = default if raw.get(name) is None else raw[name]
    # A damaged file shall not build a model for hours.
    limits = (kind, 1e-20 if kind is float else 1, 4096 if name == "num_hidden_layers" else 2**40)
    return check_number(f"{source}: {name}", value, limits, ConfigError, ConfigError)


def _one_of(allowed: tuple[Any, ...], source: str, name: str, *given: Any) -> Any:
    """The first that is given, if it is allowed; null means absent, but 0 or an empty text is given."""
    value = next(value for value in given if value is not None)
    if value not in allowed or type(value) is not type(allowed[0]):
        raise ConfigError(f"{source}: {name} is {value!r}, expected one of {', '.join(map(str, allowed))}")
    return value


def _refuse_unsupported(raw: Mapping[str, Any], source: str) -> None:
    for name, allowed in IMPLEMENTED.items():
        value = raw.get(name)
        if value not in allowed and (value is not None or name == "model_type"):
            expected = f"expected {' or '.join(map(repr, allowed))}" if allowed else "expected plain weights"
            raise ConfigError(f"{source}: {name} is {value!r}, which is not implemented; {expected}")


def _rope(raw: Mapping[str, Any], source: str, context: int) -> RopeConfig:
    scaling: Any = next((s for s in (raw.get("rope_parameters"), raw.get("rope_scaling")) if s is not None), {})
    if not isinstance(scaling, dict):
        raise ConfigError(f"{source}: the rope settings are {scaling!r}, expected an object")
    kind = _one_of(tuple(ROPE_NEEDS), source, "rope_type", scaling.get("rope_type"), scaling.get("type"), "default")
    _refuse_unsupported({"model_type": "llama", **scaling}, source)  # transformers 5 may put partial rotation here
    for name in ROPE_NEEDS[kind]:
        if scaling.get(name) is None:
            raise ConfigError(f"{source}: rope_type {kind!r} needs {name}, which is absent")
    # transformers 4 writes two of the fields beside rope_scaling instead of into it.
    fields = {**raw, **{name: value for name, value in scaling.items() if value is not None}}
    numbers = {name: _positive(fields, name, source, float, default) for name, default in ROPE_DEFAULTS.items()}
    original = _positive(fields, "original_max_position_embeddings", source, int, context)
    rope = RopeConfig(kind, original_max_position_embeddings=original, **numbers)
    if kind == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        raise ConfigError(f"{source}: high_freq_factor is {rope.high_freq_factor}, expected more than low_freq_factor")
    return rope
