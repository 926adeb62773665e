"""The model `minipyramid` of lm-evaluation-harness: importing this registers it (extra `lm-eval`)."""

try:
    from minipyramid.lm_eval.model import MiniPyramidLM
except ModuleNotFoundError as error:
    needed = 'minipyramid.lm_eval needs lm-evaluation-harness; pip install "minipyramid[lm-eval]"'
    raise ModuleNotFoundError(f"{needed} ({error})", name=error.name) from error

__all__ = ["MiniPyramidLM"]
