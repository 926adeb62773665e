"""Files of prompts over Ray Data, with an engine in each worker (extra `fleet`)."""

from minipyramid.fleet.job import run

__all__ = ["run"]
