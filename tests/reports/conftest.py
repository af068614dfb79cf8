"""Runs that the tests of the report read."""

from pathlib import Path

import pytest
from example_run import train_example
from helpers import once


@pytest.fixture(scope="session")
def first_run(tmp_path_factory) -> Path:
    """The folder of a finished run. Tests copy it before they change it."""
    return once(tmp_path_factory, "first-run", train_example)


@pytest.fixture(scope="session")
def second_run(tmp_path_factory) -> Path:
    """A run with another learning rate and window."""
    return once(
        tmp_path_factory, "second-run", lambda folder: train_example(folder, learning_rate=2e-3, window_size=1)
    )
