"""Fixtures of the tests of policies."""

import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def quick_collections():
    """
    Take the modules that are imported out of garbage collection.

    They hold a million objects, and each move of the text encoders and each run of a trainer collects garbage.
    """
    gc.collect()
    gc.freeze()
