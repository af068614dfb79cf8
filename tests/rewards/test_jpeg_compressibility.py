"""JPEG compressibility."""

import numpy as np
import pytest
from PIL import Image

from diffusers_mixgrpo.rewards.jpeg_compressibility import jpeg_compressibility


def test_it_is_minus_the_size_of_the_file(tmp_path):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (64, side, 3), dtype=np.uint8)) for side in (16, 64, 65)]
    images += [Image.new("RGB", (64, 64), "navy"), images[1].convert("L")]
    scores = jpeg_compressibility([""] * 5, images, answer=[1] * 5)
    for image, score in zip(images, scores, strict=True):
        image.convert("RGB").save(tmp_path / "image.jpg", quality=95)
        assert score == -(tmp_path / "image.jpg").stat().st_size / 1000
    noise, plain = scores[1], scores[3]
    assert -12 < noise < -4 and -1 < plain < 0  # 64 x 64 pixels: of 12 kB, noise keeps most and a single color none
    assert jpeg_compressibility.__name__ == "jpeg_compressibility"
    assert jpeg_compressibility([], []) == []


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "CMYK", "I;16"])
def test_other_modes(mode):
    (score,) = jpeg_compressibility(["a"], [Image.new(mode, (33, 20))])
    assert -1 < score < 0


def test_an_unreadable_image_has_no_score(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:5000])
    scores = jpeg_compressibility(
        ["a"] * 3, [None, Image.open(tmp_path / "cut.png"), Image.open(tmp_path / "whole.png")]
    )
    assert scores[:2] == [None, None] and scores[2] < -4
