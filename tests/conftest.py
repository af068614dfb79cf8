"""Fixtures that many tests share. The miniature pipeline and small trainers are in helpers.py."""

import copy
import gc
import os
import sys
from collections.abc import Callable

import pytest


os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before torch starts: test processes share the cores, and threads that wait must not take them from each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from diffusers import FluxPipeline  # noqa: E402
from helpers import build_pipeline, make_trainer  # noqa: E402

from diffusers_mixgrpo import MixGRPOTrainer  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def quick_collections():
    """
    Take the imported modules out of garbage collection.

    They hold a million objects, and each run of a trainer and each search for a batch size collects garbage.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_pipe() -> FluxPipeline:
    """The miniature pipeline, for tests that do not change it."""
    return build_pipeline()


@pytest.fixture
def tiny_pipe(shared_pipe) -> FluxPipeline:
    """A copy of the miniature pipeline, to train and change."""
    pipe = FluxPipeline(**{name: copy.deepcopy(part) for name, part in shared_pipe.components.items()})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def pipeline_folder(shared_pipe, tmp_path_factory) -> str:
    """The miniature pipeline, saved."""
    folder = tmp_path_factory.mktemp("pipeline")
    shared_pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make(tmp_path, tiny_pipe) -> Callable[..., MixGRPOTrainer]:
    """`helpers.make_trainer` with an output folder and, unless another is given, one pipeline for the whole test."""

    def make(pipe=tiny_pipe, **kwargs) -> MixGRPOTrainer:
        return make_trainer(tmp_path / "output", pipe=pipe, **kwargs)

    return make


@pytest.fixture(autouse=True)
def own_modules(tmp_path_factory):
    """Forget modules that a test imported from a folder of its own, since another's may have the same name."""
    yield
    folder = str(tmp_path_factory.getbasetemp())
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(folder):
            del sys.modules[name]
