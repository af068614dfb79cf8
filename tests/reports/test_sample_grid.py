"""Grids of images with captions."""

import numpy as np
import pytest
from helpers import make_trainer
from PIL import Image

from diffusers_mixgrpo.reports.sample_grid import save_sample_grid


def grid_of(path):
    with Image.open(path) as grid:
        return np.asarray(grid.convert("RGB"), dtype=int)


@pytest.mark.parametrize("count, columns, tiles", [(3, 8, (3, 1)), (8, 8, (8, 1)), (9, 8, (8, 2)), (4, 2, (2, 2))])
def test_rows_and_columns(tmp_path, count, columns, tiles):
    path = tmp_path / "images" / "grid.png"  # its folder is created
    save_sample_grid([Image.new("RGB", (32, 32), "red")] * count, ["a cat"] * count, path, columns=columns)
    grid = grid_of(path)
    assert grid.shape[1] == tiles[0] * 168 and grid.shape[0] == tiles[1] * (160 + 14 + 10)


def test_images_are_scaled_and_in_order(tmp_path):
    colors = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255)}
    images = [Image.new("RGBA", (20 * (i + 1), 30), color) for i, color in enumerate(colors)]
    save_sample_grid(images, list(colors), tmp_path / "grid.png", columns=2, tile_size=40)
    grid = grid_of(tmp_path / "grid.png")
    height = len(grid) // 2
    for i, color in enumerate(colors.values()):
        y, x = i // 2 * height + 4, i % 2 * 48 + 4
        assert (grid[y : y + 40, x : x + 40] == color).all()
        assert (grid[y - 1, x : x + 40] == 255).all()  # a white border


def test_long_captions_are_wrapped_and_cut(tmp_path):
    images = [Image.new("RGB", (32, 32))] * 2
    save_sample_grid(images, ["word " * 20, "short"], tmp_path / "four.png")
    save_sample_grid(images, ["word " * 200, "short"], tmp_path / "many.png")
    four, many = grid_of(tmp_path / "four.png"), grid_of(tmp_path / "many.png")
    assert four.shape == many.shape and len(four) == 160 + 4 * 14 + 10
    text = four[4 + 160 + 2 :] < 255
    assert text[:, :168].any() and text[:14, 168:].any() and not text[14:, 168:].any()


def test_a_run_saves_grids_of_its_first_images(tmp_path):
    """In the first iteration at or after each multiple of `logging_images_steps`."""
    trainer = make_trainer(tmp_path, logging_images_steps=3, num_logged_images=6, max_steps=6)
    trainer.train()
    files = sorted((tmp_path / "images").iterdir())
    assert [file.name for file in files] == ["step_000000.png", "step_000004.png"]
    grid = grid_of(files[0])
    assert grid.shape[1] == 4 * 168 and len(grid) > 2 * 160  # six images, four of each prompt in a row
