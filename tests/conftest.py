"""Fixtures, and the one setting of the property tests."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

# One thread for each worker and for every process that a test starts: two workers with two threads each on
# two cores wait for each other, and take many times as long. Torch reads it once, as it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell lets its background jobs ignore Ctrl-C, and what they start with them; tests send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis
import pytest
from helpers import TINY, WEIGHTS, random_tensors, train_pieces, write_checkpoint

from minipyramid import LLM

__all__ = ["TINY", "WEIGHTS", "random_tensors", "train_pieces", "write_checkpoint"]

# The same examples every time, so that a run says something about the change and not about its luck;
# `--hypothesis-profile=default` draws others.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")


@pytest.fixture(autouse=True)
def loud() -> Iterator[None]:
    """A command that was run with --quiet keeps warnings back in its process: that of later tests."""
    logging.getLogger("minipyramid").setLevel(logging.NOTSET)
    yield


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with a tokenizer."""
    directory = write_checkpoint(tmp_path_factory.mktemp("tiny"))
    train_pieces(directory)
    return directory


@pytest.fixture(scope="session")
def tiny(tiny_dir: Path) -> LLM:
    return LLM(tiny_dir, policy="full")
