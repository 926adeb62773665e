"""Well-known shapes by name, for what needs no weights: planning, and measuring with random ones."""

from typing import Any

from minipyramid.config import ModelConfig
from minipyramid.errors import ConfigError, nearest
from minipyramid.formats.huggingface import config_of
from minipyramid.hub import SHAPE

# name: layers, hidden_size, heads, key/value heads, intermediate_size, vocabulary, context
SHAPES = {
    "llama-125m": (12, 768, 12, 12, 2048, 32000, 16384),
    "llama-125m-gqa": (12, 768, 12, 3, 2048, 32000, 16384),
    "tinyllama-1.1b": (22, 2048, 32, 4, 5632, 32000, 2048),
    "llama2-7b": (32, 4096, 32, 32, 11008, 32000, 4096),
    "llama2-13b": (40, 5120, 40, 40, 13824, 32000, 4096),
    "llama2-70b": (80, 8192, 64, 8, 28672, 32000, 4096),
    "llama3-8b": (32, 4096, 32, 8, 14336, 128256, 8192),
}
FIELDS = (
    "num_hidden_layers hidden_size num_attention_heads num_key_value_heads intermediate_size vocab_size "
    "max_position_embeddings"
).split()


def shape_dict(name: str) -> dict[str, Any]:
    """The `config.json` of a shape; `ConfigError` for an unknown name."""
    if name not in SHAPES:
        raise ConfigError(f"there is no shape {name!r}; {nearest(name, SHAPES)}")
    return {
        "model_type": "llama",
        **dict(zip(FIELDS, SHAPES[name], strict=True)),
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def shape_config(name: str, quantize: str | None = None) -> ModelConfig:
    """The same, checked."""
    return config_of(shape_dict(name), f"{SHAPE}{name}", quantize=quantize)
