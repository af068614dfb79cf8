"""The aesthetic predictor against its original architecture, on files in its original layout."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from toy_clip import PROMPTS, cropped, make_images, save_clip

from diffusers_mixgrpo.rewards.aesthetic import AestheticReward


FILENAME = "sac+logos+ava1-l14-linearMSE.pth"


def predictor(width: int = 24) -> nn.Module:
    """The original architecture with narrow layers: linear layers with dropout, under `layers`."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(width, 32),
        nn.Dropout(0.2),
        nn.Linear(32, 16),
        nn.Dropout(0.2),
        nn.Linear(16, 8),
        nn.Dropout(0.1),
        nn.Linear(8, 4),
        nn.Linear(4, 1),
    )
    for weight in layers.parameters():
        nn.init.normal_(weight, std=0.5)
    return nn.ModuleDict({"layers": layers}).eval()


def near(expected: list[float]):
    """Equal up to float32 rounding, relative to the largest score: five layers amplify the rounding of each one."""
    return pytest.approx(expected, abs=1e-5 * max(1, *map(abs, expected)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aesthetic")
    torch.save(predictor().state_dict(), folder / FILENAME)
    return folder


@pytest.fixture(scope="module")
def clip(folder):
    return save_clip(folder)


@pytest.fixture(scope="module")
def reward(folder, clip):
    return AestheticReward(str(folder), clip_model=str(folder))


@torch.no_grad()
def embeddings(clip) -> torch.Tensor:
    features = clip.get_image_features(torch.stack([cropped(image) for image in make_images()])).pooler_output
    return features / features.norm(dim=-1, keepdim=True)


@torch.no_grad()
def test_scores_are_the_originals(reward, clip):
    expected = predictor()["layers"](embeddings(clip)).squeeze(1).tolist()
    assert np.std(expected) > 0.1
    assert reward(PROMPTS, make_images()) == near(expected)
    assert reward([""] * 6, make_images()) == near(expected)


@torch.no_grad()
def test_first_predictors_of_one_layer(folder, clip, tmp_path):
    torch.manual_seed(1)
    layer = nn.Linear(24, 1)
    save_file(layer.state_dict(), tmp_path / "linear.safetensors")
    reward = AestheticReward(str(tmp_path / "linear.safetensors"), clip_model=str(folder))
    assert reward(PROMPTS, make_images()) == near(layer(embeddings(clip)).squeeze(1).tolist())


def test_batches_and_bfloat16(reward, folder):
    scores = reward(PROMPTS, make_images())
    single = AestheticReward(str(folder / FILENAME), clip_model=str(folder), batch_size=1)
    assert single(PROMPTS, make_images()) == near(scores)
    half = AestheticReward(str(folder), clip_model=str(folder), dtype=torch.bfloat16)
    assert half.model["head"][0].weight.dtype == torch.float32
    assert half(PROMPTS, make_images()) == pytest.approx(scores, abs=0.1)


def test_an_unreadable_image_has_no_score(reward, tmp_path):
    whole = make_images()[0]
    whole.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    scores = reward(["a", "a", "a"], [None, Image.open(tmp_path / "cut.png"), whole], size=[1, 2, 3])
    assert scores[:2] == [None, None]
    assert scores[2:] == near(reward(["a"], [whole]))


def test_wrong_arguments(reward, folder, tmp_path):
    assert reward.__name__ == "aesthetic" and reward.to("cpu") is reward
    with pytest.raises(OSError, match="(?s)`model`='/no/such.pth' could not be loaded.*existing local file"):
        AestheticReward("/no/such.pth", clip_model=str(folder))
    with pytest.raises(OSError, match="(?s)`model`='.*' could not be loaded.*aesthetic-model.pth"):
        AestheticReward(str(folder), filename="aesthetic-model.pth", clip_model=str(folder))
    with pytest.raises(OSError, match="(?s)`clip_model`='/no/such' could not be loaded"):
        AestheticReward(str(folder), clip_model="/no/such")
    torch.save(predictor(width=25).state_dict(), tmp_path / FILENAME)
    with pytest.raises(ValueError, match=r"must take the 24 numbers .*got .* layers \[\(25, 32\), .*trained on"):
        AestheticReward(str(tmp_path), clip_model=str(folder))


def test_the_predictor_with_relus_is_refused(folder, tmp_path):
    # Its layers have other numbers, because the ReLUs are in the same list.
    weights = predictor().state_dict()
    numbers = {"0": "0", "2": "3", "4": "6", "6": "9", "7": "11"}
    renamed = {f"layers.{numbers[name.split('.')[1]]}.{name.split('.')[2]}": w for name, w in weights.items()}
    torch.save(renamed, tmp_path / FILENAME)
    with pytest.raises(OSError, match="must contain the linear layers 0, 2, 4, 6, 7 .*got layers.0.weight, "):
        AestheticReward(str(tmp_path), clip_model=str(folder))
