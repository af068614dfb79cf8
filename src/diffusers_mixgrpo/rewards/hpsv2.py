"""HPSv2: which image people prefer for a prompt, from a CLIP ViT-H/14 fine-tuned on human choices."""

import html
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from ._clip import BatchedReward, embed_prompts, loading, read_weights


FILENAMES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
HEADS = 16  # attention heads of both towers of ViT-H/14; the shapes in the checkpoint do not determine them
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]

# Parts of a weight's name in open_clip's files -> in transformers
PARTS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
    "transformer.resblocks.": "text_model.encoder.layers.",
}
LAYER_PARTS = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
}


class HPSv2Reward(BatchedReward):
    """
    Human Preference Score v2: cosine similarity of image and prompt, in [-1, 1]. Images of current models score about
    0.2 to 0.35.

    The model is a CLIP ViT-H/14 fine-tuned on people's choices between generated images
    ([arXiv:2306.09341](https://huggingface.co/papers/2306.09341)). Scores equal those of the `hpsv2` package with
    torchvision 0.17 or later: the *longer* side is resized to 224 pixels with an antialiased bicubic filter in
    float32, and the rest is padded with black, so nothing is cropped. (Earlier versions of torchvision did not
    antialias tensors.) On a GPU the package runs under float16 autocast; this class uses `dtype` throughout.

    Weights: Apache-2.0, a download of 4 GB. Memory: 3.9 GB in float32, 2 GB in bfloat16, plus about 0.1 GB for a
    batch of 32.

    Args:
        version (`str`, defaults to `"v2.1"`): `"v2.1"`, trained on more and better data, or `"v2.0"`.
        model (`str`, defaults to `"xswu/HPSv2"`):
            A Hub repository or folder with the version's checkpoint, or a checkpoint file in open_clip's layout (.pt
            or .safetensors).
        tokenizer (`str`, defaults to `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`):
            A Hub repository or folder with CLIP's tokenizer. Nothing else is loaded from there.
        device (`str` or `torch.device`, defaults to `"cpu"`): Device of the model.
        dtype (`torch.dtype`, defaults to `torch.float32`): Data type of the weights, such as `torch.bfloat16`.
        batch_size (`int`, defaults to 32): Maximum number of images per forward pass.

    Raises:
        `ValueError`: If `version` is unknown, or the file does not contain a CLIP in open_clip's layout.
        `OSError`: If the weights or the tokenizer cannot be loaded.

    Example:

    ```python
    reward = HPSv2Reward(device="cuda", dtype=torch.bfloat16)
    scores = reward(["a cat"], [image])
    ```
    """

    __name__ = "hpsv2"

    def __init__(
        self,
        version: str = "v2.1",
        model: str = "xswu/HPSv2",
        *,
        tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ) -> None:
        if version not in FILENAMES:
            raise ValueError(f"`version` must be one of {', '.join(map(repr, FILENAMES))}, got {version!r}.")
        with loading("tokenizer", tokenizer):
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        with loading("model", model):
            checkpoint = read_weights(model, FILENAMES[version])
        weights = checkpoint.get("state_dict", checkpoint)
        try:
            clip = load_open_clip(weights, self.tokenizer.eos_token_id, dtype)
        except (KeyError, RuntimeError) as error:
            raise ValueError(
                f"`model` must be a checkpoint of a CLIP ViT in open_clip's layout, got {model!r} ({error}). Pass a "
                f"checkpoint of HPSv2, such as {FILENAMES[version]} of the Hub repository xswu/HPSv2."
            ) from error
        super().__init__(clip, device, batch_size)

    def _score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> torch.Tensor:
        size = self.model.config.vision_config.image_size
        pixels = torch.stack([preprocess(image, size) for image in images])
        pixels = pixels.to(self.device, self.model.dtype)
        image_features = self.model.get_image_features(pixels).pooler_output.float()
        text_features = embed_prompts(self.model, self.tokenizer, [clean(prompt) for prompt in prompts])
        return F.cosine_similarity(image_features, text_features)


def preprocess(image: Image.Image, size: int) -> torch.Tensor:
    """An RGB image as `(3, size, size)`: the longer side resized to `size`, padded with black, normalized."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255
    scale = size / max(image.size)
    if scale != 1:
        shape = [max(1, round(side * scale)) for side in (image.height, image.width)]
        pixels = F.interpolate(pixels[None], shape, mode="bicubic", align_corners=False, antialias=True)[0]
    rows = size - pixels.shape[1]
    columns = size - pixels.shape[2]
    pixels = F.pad(pixels, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
    return (pixels - MEAN) / STD


def clean(text: str) -> str:
    """
    Clean a prompt as open_clip does before tokenization; transformers' tokenizer omits this step. HTML entities are
    decoded, curly quotes straightened, full-width letters and ligatures replaced by plain ones, and control characters
    removed. Unlike in open_clip, wrongly encoded text is not repaired.
    """
    text = html.unescape(html.unescape(text))
    # Ligatures and full-width forms; NFKC maps both to plain letters.
    text = re.sub("[ĲĳŉǄ-ǌǱ-ǳﬀ-ﬄﬆ\u3000\uff01-\uffef]", lambda match: unicodedata.normalize("NFKC", match[0]), text)
    text = re.sub("[\u02bc\u2018-\u201b]", "'", text)
    text = re.sub("[\u201c-\u201f]", '"', text)
    text = re.sub("[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]", "", text)
    return " ".join(unicodedata.normalize("NFC", text).split()).lower()


def load_open_clip(weights: dict[str, torch.Tensor], eos_token_id: int, dtype: torch.dtype) -> CLIPModel:
    """
    Load a ViT CLIP in open_clip's layout as a [`~transformers.CLIPModel`]. Its sizes follow from the weights' shapes.

    Raises:
        `KeyError`: If a weight that determines a size is missing.
        `RuntimeError`: If weights are missing, unexpected, or have other shapes.
    """
    weights = {name.removeprefix("module."): weight for name, weight in weights.items()}
    text_config = {
        **_tower(weights, "", weights["token_embedding.weight"]),
        "vocab_size": len(weights["token_embedding.weight"]),
        "max_position_embeddings": len(weights["positional_embedding"]),
        "eos_token_id": eos_token_id,
    }
    patch_size = weights["visual.conv1.weight"].shape[-1]
    patches = len(weights["visual.positional_embedding"]) - 1
    vision_config = {
        **_tower(weights, "visual.", weights["visual.positional_embedding"]),
        "patch_size": patch_size,
        "image_size": patch_size * round(patches**0.5),
    }
    config = CLIPConfig(
        text_config=text_config,
        vision_config=vision_config,
        projection_dim=weights["text_projection"].shape[1],
    )
    renamed = dict(pair for name, weight in weights.items() for pair in _rename(name, weight))
    loaded: Any = CLIPModel.from_pretrained(
        None, config=config, state_dict=renamed, dtype=dtype, output_loading_info=True
    )
    model, report = loaded
    wrong = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    if wrong:
        raise RuntimeError(f"weights missing or unexpected: {', '.join(wrong[:3])}")
    return model


def _tower(weights: dict[str, torch.Tensor], prefix: str, embedding: torch.Tensor) -> dict[str, Any]:
    """The configuration fields that both towers share."""
    blocks = f"{prefix}transformer.resblocks."
    return {
        "hidden_size": embedding.shape[1],
        "intermediate_size": weights[f"{blocks}0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": len({name[len(blocks) :].split(".")[0] for name in weights if name.startswith(blocks)}),
        "num_attention_heads": HEADS,
        "hidden_act": "gelu",
    }


def _rename(name: str, weight: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """One weight under its name in transformers, or three weights where queries, keys and values are fused."""
    for part, other in PARTS.items():
        if name.startswith(part):
            name = other + name[len(part) :]
            break
    for part, other in LAYER_PARTS.items():
        name = name.replace(part, other)
    if name in ("visual_projection.weight", "text_projection.weight"):
        return [(name, weight.T.contiguous())]
    if ".attn.in_proj_" not in name:
        return [(name, weight)]
    return [
        (name.replace(".attn.in_proj_", f".self_attn.{part}_proj."), piece.contiguous())
        for part, piece in zip("qkv", weight.chunk(3), strict=True)
    ]
