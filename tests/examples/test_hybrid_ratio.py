"""The study of hybrid inference: at ratio 0 the base model alone makes the images, whatever was trained."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


STUDIES = Path(__file__).parents[2] / "examples" / "studies"


@pytest.mark.slow
def test_a_short_run(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(STUDIES))
    script = importlib.import_module("hybrid_ratio")
    flags = "--seeds 0 --iterations 1 --ratios 0 1 --num_eval_prompts 4 --output_dir"
    script.main([*flags.split(), str(tmp_path)])
    scores = json.loads((tmp_path / "results.json").read_text())["scores"]
    assert scores.keys() == script.REWARDS.keys()
    for judged in script.REWARDS:
        base, trained = zip(*(scores[name][judged][0] for name in script.REWARDS), strict=True)
        assert base[0] == base[1] and trained[0] != trained[1]
    assert np.asarray(Image.open(tmp_path / "results.png")).std() > 10
    assert "true reward, 100%" in (tmp_path / "results.md").read_text()
