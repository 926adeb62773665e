"""A Llama inference engine in pure PyTorch, to read and to embed; README.md gives the order to read it in."""

from minipyramid.engine import LLM
from minipyramid.errors import BudgetError, CheckpointError, ConfigError, MiniPyramidError, RequestError, TokenizerError
from minipyramid.plan import Plan
from minipyramid.pyramid import PyramidConfig
from minipyramid.request import Completion, Conversation, Prefill
from minipyramid.sampling import SamplingParams

__all__ = [
    "LLM", "BudgetError", "CheckpointError", "Completion", "ConfigError", "Conversation", "MiniPyramidError", "Plan",
    "Prefill", "PyramidConfig", "RequestError", "SamplingParams", "TokenizerError",
]  # fmt: skip
