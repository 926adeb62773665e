"""Files of prompts over Ray Data, with an engine in each worker (extra `fleet`)."""

try:
    from minipyramid.fleet.job import run
except ImportError as error:
    raise ImportError('minipyramid.fleet needs Ray Data; pip install "minipyramid[fleet]"') from error

__all__ = ["run"]
