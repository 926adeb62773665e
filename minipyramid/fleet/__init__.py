"""Files of prompts over Ray Data, with an engine in each worker (extra `fleet`)."""

try:
    from minipyramid.fleet.job import run
except ModuleNotFoundError as error:
    needed = 'minipyramid.fleet needs Ray Data; pip install "minipyramid[fleet]"'
    raise ModuleNotFoundError(f"{needed} ({error})", name=error.name) from error

__all__ = ["run"]
