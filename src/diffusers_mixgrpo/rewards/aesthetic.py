"""LAION's aesthetic predictor: how beautiful a picture is, whatever its prompt."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, CLIPModel

from ._clip import BatchedReward, loading, read_weights


NUMBERS = (0, 2, 4, 6, 7)  # of the layers in its files: the original has dropout between most of them


class AestheticReward(BatchedReward):
    """
    LAION's improved aesthetic predictor: the rating of a picture that people would give, from 1 to 10; most pictures
    score 4 to 7. The prompt does not matter.

    The embedding of a frozen CLIP ViT-L/14, scaled to length 1, goes through five linear layers with nothing between
    them, trained on the ratings of Simulacra Aesthetic Captions, LAION-Logos and AVA
    ([christophschuhmann/improved-aesthetic-predictor](https://github.com/christophschuhmann/improved-aesthetic-predictor)).

    Weights: Apache-2.0 (predictor) and MIT (CLIP), downloads of 4 MB and 1.7 GB. Memory: 1.2 GB in float32, 0.6 GB in
    bfloat16, and about 0.1 GB for a batch of 32. The predictor itself is always in float32.

    Args:
        model (`str`, defaults to `"camenduru/improved-aesthetic-predictor"`):
            A Hub repository or folder with the predictor, or its file. LAION's first predictors, of a single linear
            layer, are read as well; the one with ReLUs is not.
        filename (`str`, defaults to `"sac+logos+ava1-l14-linearMSE.pth"`):
            The predictor's file in that repository or folder, such as `"aesthetic-model.pth"` of
            `"trl-lib/ddpo-aesthetic-predictor"`.
        clip_model (`str`, defaults to `"openai/clip-vit-large-patch14"`):
            A Hub repository or folder with the CLIP that the predictor was trained on, and its image processor.
        device (`str` or `torch.device`, defaults to `"cpu"`): Where to compute.
        dtype (`torch.dtype`, defaults to `torch.float32`): Type of CLIP's weights, such as `torch.bfloat16`.
        batch_size (`int`, defaults to 32): Most images at once.

    Raises:
        `OSError`: If CLIP or the predictor cannot be loaded, or the file holds other layers.
        `ValueError`: If the predictor does not fit CLIP's embeddings.

    Example:

    ```python
    reward = AestheticReward(device="cuda", dtype=torch.bfloat16)
    scores = reward(["a cat"], [image])
    ```
    """

    __name__ = "aesthetic"

    def __init__(
        self,
        model: str = "camenduru/improved-aesthetic-predictor",
        *,
        filename: str = "sac+logos+ava1-l14-linearMSE.pth",
        clip_model: str = "openai/clip-vit-large-patch14",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ):
        with loading("model", model):
            head = linear_layers(read_weights(model, filename))
        with loading("clip_model", clip_model):
            clip = CLIPModel.from_pretrained(clip_model, dtype=dtype)
            self.image_processor = AutoImageProcessor.from_pretrained(clip_model, backend="pil")
        width = clip.config.projection_dim
        sizes = [(layer.in_features, layer.out_features) for layer in head]
        if sizes[0][0] != width or sizes[-1][1] != 1:
            raise ValueError(
                f"`model={model!r}` holds no predictor for `clip_model={clip_model!r}`: its embeddings have {width} "
                f"numbers, the predictor's linear layers are {sizes}. Pass the two that belong together."
            )
        del clip.text_model  # no text is read
        super().__init__(nn.ModuleDict({"clip": clip, "head": head}), device, batch_size)

    def _score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> torch.Tensor:
        clip, head = self.model["clip"], self.model["head"]
        pixels = self.image_processor(list(images), return_tensors="pt").pixel_values
        features = clip.get_image_features(pixels.to(self.device, clip.dtype)).pooler_output.float()
        return head(F.normalize(features)).squeeze(1)


def linear_layers(weights: Mapping[str, torch.Tensor]) -> nn.Sequential:
    """
    The predictor's layers, of a file with `layers.0.weight`, `layers.0.bias`, ..., or with `weight` and `bias` alone.

    Raises:
        `ValueError`: If it has others; LAION's predictor with ReLUs has other numbers.
    """
    names = [""] if "weight" in weights else [f"layers.{number}." for number in NUMBERS]
    if set(weights) != {name + part for name in names for part in ("weight", "bias")}:
        raise ValueError(
            f"it holds {', '.join(weights)}, not the linear layers {', '.join(map(str, NUMBERS))} of LAION's improved "
            "aesthetic predictor."
        )
    layers = []
    for name in names:
        layer = nn.Linear(*weights[f"{name}weight"].T.shape)
        layer.load_state_dict({part: weights[name + part] for part in ("weight", "bias")})
        layers.append(layer)
    return nn.Sequential(*layers)
