"""The shape of a model, read from `config.json`, refused where the engine would not run it faithfully.

Two spellings are in use: transformers 4 writes `rope_theta`, `rope_scaling` and `torch_dtype`, transformers 5
writes `rope_parameters` and `dtype`. What the engine does not implement (a bias, a sliding window, another rope
type) is an error here and never an approximation later.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipyramid.errors import CheckpointError, ConfigError

# Mistral is a Llama wherever its sliding window does not come into play.
MODEL_TYPES = ("llama", "mistral")
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions: the base and how its frequencies are stretched for contexts longer than the original."""

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 2048


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
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def load(cls, directory: Path) -> ModelConfig:
        """Read `config.json`, and the further ids that end a text from `generation_config.json`.

        Raises:
            CheckpointError: a file is missing or not JSON.
            ConfigError: a field is absent, out of range, or asks for what the engine does not implement.
        """
        raw = read_json(directory / "config.json")
        generation = directory / "generation_config.json"
        more = read_json(generation) if generation.exists() else {}
        return cls.from_dict(raw, str(directory / "config.json"), more.get("eos_token_id"))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "config.json", more_eos: Any = None) -> ModelConfig:
        """The same from a dictionary; `source` names it in messages."""
        _refuse_unsupported(raw, source)

        def integer(name: str, default: int | None = None) -> int:
            value = default if raw.get(name) is None else raw[name]
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{source}: {name} is {raw.get(name)!r}, expected a positive integer")
            return value

        hidden_size, heads = integer("hidden_size"), integer("num_attention_heads")
        kv_heads = integer("num_key_value_heads", heads)
        if heads % kv_heads:
            raise ConfigError(
                f"{source}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        head_dim = integer("head_dim", hidden_size // heads)
        if head_dim % 2:
            raise ConfigError(f"{source}: head_dim is {head_dim}, expected an even number for rotary positions")
        context = integer("max_position_embeddings")
        window = raw.get("sliding_window", 4096 if raw["model_type"] == "mistral" else None)
        if window is not None and window < context:
            raise ConfigError(
                f"{source}: sliding_window {window} is shorter than max_position_embeddings {context} and is not "
                f"implemented; lower max_position_embeddings to {window} to run within the window"
            )
        ids = [i for eos in (raw.get("eos_token_id"), more_eos) for i in (eos if isinstance(eos, list) else [eos])]
        if not all(i is None or (isinstance(i, int) and not isinstance(i, bool)) for i in ids):
            raise ConfigError(f"{source}: eos_token_id is {raw.get('eos_token_id')!r}, expected an id or a list of ids")
        tie = raw.get("tie_word_embeddings") or False
        if not isinstance(tie, bool):
            raise ConfigError(f"{source}: tie_word_embeddings is {tie!r}, expected true or false")
        return cls(
            vocab_size=integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=integer("intermediate_size"),
            num_hidden_layers=integer("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=context,
            rms_norm_eps=_number(raw, "rms_norm_eps", source, default=1e-6),
            tie_word_embeddings=tie,
            rope=_rope(raw, source, context),
            dtype=raw.get("dtype") or raw.get("torch_dtype") or "float32",
            bos_token_id=raw.get("bos_token_id"),
            eos_token_ids=tuple(dict.fromkeys(i for i in ids if i is not None)),
        )


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file; `CheckpointError` where it is missing, unreadable or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise CheckpointError(f"{path} {reason}; expected a checkpoint in the Hugging Face layout") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def _number(values: dict[str, Any], name: str, source: str, default: float) -> float:
    value = default if values.get(name) is None else values[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ConfigError(f"{source}: {name} is {value!r}, expected a positive number")
    return float(value)


def _refuse_unsupported(raw: dict[str, Any], source: str) -> None:
    if raw.get("model_type") not in MODEL_TYPES:
        raise ConfigError(
            f"{source}: model_type is {raw.get('model_type')!r}, but only the Llama decoder is implemented "
            f"({', '.join(MODEL_TYPES)})"
        )
    # What each field must be for the model to be the one implemented; absent means the same.
    plain: dict[str, tuple[Any, ...]] = {
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "hidden_act": ("silu", "swish"),
        "quantization_config": (),
        "partial_rotary_factor": (1, 1.0),
    }
    for name, allowed in plain.items():
        value = raw.get(name)
        if value is not None and value not in allowed:
            expected = f"expected {allowed[0]!r}" if allowed else "expected plain weights"
            raise ConfigError(f"{source}: {name} is {value!r}, which is not implemented; {expected}")


def _rope(raw: dict[str, Any], source: str, context: int) -> RopeConfig:
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ConfigError(f"{source}: the rope settings are {scaling!r}, expected an object")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ConfigError(f"{source}: rope_type is {kind!r}, expected one of {', '.join(ROPE_TYPES)}")
    if scaling.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ConfigError(f"{source}: partial_rotary_factor is not implemented; expected whole heads to be rotated")
    needed = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    for name in needed.get(kind, ()):
        if scaling.get(name) is None:
            raise ConfigError(f"{source}: rope_type {kind!r} needs {name}, which is absent")
    theta_of = scaling if scaling.get("rope_theta") is not None else raw
    original = scaling.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings")
    rope = RopeConfig(
        rope_type=kind,
        rope_theta=_number(theta_of, "rope_theta", source, default=10000.0),
        factor=_number(scaling, "factor", source, default=1.0),
        low_freq_factor=_number(scaling, "low_freq_factor", source, default=1.0),
        high_freq_factor=_number(scaling, "high_freq_factor", source, default=4.0),
        original_max_position_embeddings=original or context,
    )
    if kind == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        raise ConfigError(f"{source}: high_freq_factor must be above low_freq_factor {rope.low_freq_factor}")
    return rope
