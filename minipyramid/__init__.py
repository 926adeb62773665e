"""A Llama inference engine in pure PyTorch, to read and to embed; README.md gives the order to read it in."""

from minipyramid.engine import Engine
from minipyramid.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    MiniPyramidError,
    RequestError,
    TokenizerError,
)
from minipyramid.llm import LLM
from minipyramid.policy import Policy
from minipyramid.pyramid import PyramidConfig
from minipyramid.request import Completion, Conversation, Prefill, Request
from minipyramid.sampling import SamplingParams

__version__ = "0.2.0"
__all__ = [
    "LLM", "BudgetError", "CheckpointError", "Completion", "ConfigError", "Conversation", "Engine",
    "MiniPyramidError", "Policy", "Prefill", "PyramidConfig", "Request", "RequestError",
    "SamplingParams", "TokenizerError",
]  # fmt: skip
