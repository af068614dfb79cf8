"""Fixtures of the tests of training."""

import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def quick_collections():
    """
    Take the modules that are imported out of garbage collection.

    They hold a million objects, and each run of a trainer and each search for a batch size collects garbage.
    """
    gc.collect()
    gc.freeze()
