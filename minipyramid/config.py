"""The shape of a model.

How it is read from a checkpoint's files, and what is refused there, stands in `minipyramid/formats/`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipyramid.errors import CheckpointError, RequestError

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions: the base, and how its frequencies are stretched for longer contexts."""

    rope_type: str
    rope_theta: float
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """The fields have the names that they have in `config.json`."""

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
    qkv_bias: bool = False  # queries, keys and values have one (Qwen2)
    head_norms: bool = False  # each head of queries and keys is normed (Qwen3)
    quantization: Any = None  # a layout of `formats/` in which weights lie, or what plain ones become: "int8"

    kv_dtype: str = "auto"  # of the keys and values that are held: the model's, or "int8"

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of one token's key and value in one layer, with `itemsize` bytes a number of the model."""
        # In 8 bits each head's part has a scale of two bytes (minipyramid/eight_bits.py).
        of_head = self.head_dim + 2 if self.kv_dtype == "int8" else self.head_dim * itemsize
        return 2 * self.num_key_value_heads * of_head

    def check_length(self, prompt: int, new: int, name: str) -> None:
        """Raise `RequestError` if the prompt has no tokens, or with `new` ones more than the context."""
        context = self.max_position_embeddings
        if prompt < 1:
            raise RequestError(f"{name} has {prompt} tokens, expected at least 1")
        room = context - prompt
        if new > room:
            advice = f"shorten it by {new - room}"
            if room > 0:
                advice += f" or ask for at most {room} new tokens"
            tokens = f"{prompt} tokens, which with {new} new ones"
            raise RequestError(f"{name} has {tokens} is more than the context of {context}; {advice}")


def read_json(path: Path, optional: bool = False, holds: str = "a Hugging Face checkpoint") -> dict[str, Any]:
    """Read an object from a JSON file; an `optional` file that is absent is an empty object.

    Raises `CheckpointError`, which says what the file `holds`, if it is missing, unreadable (a dangling link,
    too) or holds anything else.
    """
    if optional and not path.exists() and not path.is_symlink():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise CheckpointError(f"{path} {reason}; expected {holds}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value
