"""LAION's aesthetic predictor: how beautiful an image is, regardless of its prompt."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, CLIPModel

from ._clip import BatchedReward, loading, read_weights


LAYER_NUMBERS = (0, 2, 4, 6, 7)  # the numbers in between are dropout layers without weights


class AestheticReward(BatchedReward):
    """
    LAION's improved aesthetic predictor: a prediction of the rating that people would give an image, from 1 to 10.
    Most images score 4 to 7. The prompt is ignored.

    The L2-normalized embedding of a frozen CLIP ViT-L/14 passes through five linear layers without activations. They
    were trained on the ratings of Simulacra Aesthetic Captions, LAION-Logos and AVA
    ([christophschuhmann/improved-aesthetic-predictor](https://github.com/christophschuhmann/improved-aesthetic-predictor)).

    Weights: Apache-2.0 (predictor) and MIT (CLIP), downloads of 4 MB and 1.7 GB. Memory: 1.2 GB in float32, 0.6 GB in
    bfloat16, plus about 0.1 GB for a batch of 32. The predictor always runs in float32.

    Args:
        model (`str`, defaults to `"camenduru/improved-aesthetic-predictor"`):
            A Hub repository or folder with the predictor, or the path of its file. LAION's first predictors, which
            have a single linear layer, are supported as well; the variant with ReLUs is not.
        filename (`str`, defaults to `"sac+logos+ava1-l14-linearMSE.pth"`):
            Name of the predictor's file in that repository or folder, such as `"aesthetic-model.pth"` of
            `"trl-lib/ddpo-aesthetic-predictor"`.
        clip_model (`str`, defaults to `"openai/clip-vit-large-patch14"`):
            A Hub repository or folder with the CLIP model that the predictor was trained on, and its image processor.
        device (`str` or `torch.device`, defaults to `"cpu"`): Device of the model.
        dtype (`torch.dtype`, defaults to `torch.float32`): Data type of CLIP's weights, such as `torch.bfloat16`.
        batch_size (`int`, defaults to 32): Maximum number of images per forward pass.

    Raises:
        `OSError`: If CLIP or the predictor cannot be loaded, or the file contains other layers.
        `ValueError`: If the predictor does not match the size of CLIP's embeddings.

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
    ) -> None:
        with loading("model", model):
            head = linear_layers(read_weights(model, filename))
        with loading("clip_model", clip_model):
            clip = CLIPModel.from_pretrained(clip_model, dtype=dtype)
            self.image_processor = AutoImageProcessor.from_pretrained(clip_model, backend="pil")
        width = clip.config.projection_dim
        sizes = [(layer.in_features, layer.out_features) for layer in head]
        if sizes[0][0] != width or sizes[-1][1] != 1:
            raise ValueError(
                f"`model` must take the {width} numbers of the embeddings of `clip_model`={clip_model!r} and return "
                f"one, got {model!r} with linear layers {sizes}. Pass a predictor and the CLIP it was trained on."
            )
        del clip.text_model  # the prompt is not used
        super().__init__(nn.ModuleDict({"clip": clip, "head": head}), device, batch_size)

    def _score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> torch.Tensor:
        clip = self.model["clip"]
        head = self.model["head"]
        pixels = self.image_processor(list(images), return_tensors="pt").pixel_values
        features = clip.get_image_features(pixels.to(self.device, clip.dtype)).pooler_output.float()
        return head(F.normalize(features)).squeeze(1)


def linear_layers(weights: Mapping[str, torch.Tensor]) -> nn.Sequential:
    """
    The predictor's layers, from weights named `layers.0.weight`, `layers.0.bias`, ..., or only `weight` and `bias`.

    Raises:
        `ValueError`: If the weights have other names. LAION's predictor with ReLUs numbers its layers differently.
    """
    names = [""] if "weight" in weights else [f"layers.{number}." for number in LAYER_NUMBERS]
    if set(weights) != {name + part for name in names for part in ("weight", "bias")}:
        raise ValueError(
            f"the file must contain the linear layers {', '.join(map(str, LAYER_NUMBERS))} of LAION's improved "
            f"aesthetic predictor, got {', '.join(weights)}."
        )
    layers = []
    for name in names:
        layer = nn.Linear(*weights[f"{name}weight"].T.shape)
        layer.load_state_dict({part: weights[name + part] for part in ("weight", "bias")})
        layers.append(layer)
    return nn.Sequential(*layers)
