"""The model `minipyramid` of lm-evaluation-harness: importing this registers it (extra `lm-eval`)."""

from minipyramid.lm_eval.model import MiniPyramidLM

__all__ = ["MiniPyramidLM"]
