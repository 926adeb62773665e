"""The model `minipyramid` of lm-evaluation-harness: importing this registers it (extra `lm-eval`)."""

try:
    from minipyramid.lm_eval.model import MiniPyramidLM
except ImportError as error:
    raise ImportError(
        'minipyramid.lm_eval needs lm-evaluation-harness; pip install "minipyramid[lm-eval]"'
    ) from error

__all__ = ["MiniPyramidLM"]
