"""Files of prompts: a JSON object on each line, in and out. `run` does one; `Counts` is what became of it."""

from minipyramid.batch.job import Counts, run

__all__ = ["Counts", "run"]
