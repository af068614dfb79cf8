"""ImageReward: how much people would like an image for its prompt, from BLIP trained on human comparisons."""

import re
from collections.abc import Sequence

import torch
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from ._clip import BatchedReward, loading, read_weights


MAX_TOKENS = 35
MEAN = 0.16717362830052426  # of the head's output, published with the checkpoint
STD = 1.0333394966054072
HEAD_SIZE = 64  # channels of an attention head in ViT-L and in BERT-base
PIXEL_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
PIXEL_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)

# Names of the image encoder's weights: checkpoint -> transformers. The text encoder's names are the same in both.
_VISION_NAMES = {
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^norm\.": "post_layernorm.",
    r"^blocks\.": "encoder.layers.",
    r"\.norm([12])\.": r".layer_norm\1.",
    r"\.attn\.proj\.": ".self_attn.projection.",
    r"\.attn\.": ".self_attn.",
}


class ImageReward(BatchedReward):
    """
    ImageReward: an unbounded score, higher is better. Most images score between -2 and 2, with a mean around 0.

    The model is a BLIP (ViT-L/16 for the image, BERT-base with cross-attention to it for the prompt) with a linear
    head, trained on 137k human comparisons of images ([arXiv:2304.05977](https://huggingface.co/papers/2304.05977)).
    Prompts are truncated to 35 tokens. Images are resized to 224 pixels on the shorter side and center-cropped, so
    anything outside the center square does not influence the score.

    Weights: Apache-2.0, a download of 1.8 GB. Memory: 1.8 GB in float32, 0.9 GB in bfloat16.

    Args:
        model (`str`, defaults to `"THUDM/ImageReward"`):
            A Hub repository or folder with `ImageReward.pt`, or the path of such a file (`.pt` or `.safetensors`).
            Encoders of other sizes are supported if their attention heads have 64 channels.
        tokenizer (`str`, defaults to `"bert-base-uncased"`):
            A Hub repository or folder with the tokenizer of BERT-base.
        device (`str` or `torch.device`, defaults to `"cpu"`): Device of the model.
        dtype (`torch.dtype`, defaults to `torch.float32`): Data type of the encoders' weights. The head is always
            in float32.
        batch_size (`int`, defaults to 32): Maximum number of images per forward pass.

    Raises:
        `OSError`: If the model or the tokenizer cannot be loaded.
        `ValueError`: If `model` is another kind of checkpoint, or `tokenizer` has more tokens than the model.

    Example:

    ```python
    reward = ImageReward(device="cuda", dtype=torch.bfloat16)
    scores = reward(["a cat"], [image])
    ```
    """

    __name__ = "imagereward"

    def __init__(
        self,
        model: str = "THUDM/ImageReward",
        *,
        tokenizer: str = "bert-base-uncased",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ) -> None:
        with loading("tokenizer", tokenizer):
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        self.tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
        with loading("model", model):
            state = read_weights(model, "ImageReward.pt")
        if not {"blip.visual_encoder.pos_embed", "mlp.layers.0.weight"} <= state.keys():
            raise ValueError(
                f"`model` must be a checkpoint of ImageReward with tensors 'blip.*' and 'mlp.*', got {model!r}. Pass "
                "the ImageReward.pt of https://huggingface.co/THUDM/ImageReward."
            )
        network = _Network(state, dtype)
        if len(self.tokenizer) > network.text.config.vocab_size:
            raise ValueError(
                f"`tokenizer` must have at most the {network.text.config.vocab_size} tokens of `model`={model!r}, got "
                f"{tokenizer!r} with {len(self.tokenizer)}. Pass the tokenizer that the model was trained with, "
                "'bert-base-uncased'."
            )
        super().__init__(network, device, batch_size)

    def _score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> torch.Tensor:
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        pixels = torch.stack([to_pixels(image, self.model.vision.config.image_size) for image in images])
        output = self.model(
            tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device), pixels.to(self.device)
        )
        return (output - MEAN) / STD


def to_pixels(image: Image.Image, size: int) -> torch.Tensor:
    """
    The model's preprocessing of an RGB image: bicubic resizing in 8 bits, center crop, and normalization.

    Returns:
        `torch.Tensor` of shape `(3, size, size)`.
    """
    shorter = min(image.size)
    width, height = (int(size * side / shorter) for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left = round((width - size) / 2)
    top = round((height - size) / 2)
    square = image.crop((left, top, left + size, top + size))
    values = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)
    return (values / 255 - PIXEL_MEAN) / PIXEL_STD


class _Network(nn.Module):
    """The encoders and the head of a checkpoint. Their sizes follow from the shapes of its tensors."""

    def __init__(self, state: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.vision = _build_vision(_below("blip.visual_encoder.", state))
        self.text = _build_text(_below("blip.text_encoder.", state), self.vision.config.hidden_size)
        self.to(dtype)
        self.head = _build_head(_below("mlp.layers.", state)).float()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """From `(n, tokens)`, `(n, tokens)` and `(n, 3, size, size)` to the head's output of shape `(n,)`, float32."""
        patches = self.vision(pixels).last_hidden_state  # (n, 1 + patches, vision width)
        text = self.text(input_ids, attention_mask=attention_mask, encoder_hidden_states=patches)
        return self.head(text.last_hidden_state[:, 0].float()).squeeze(-1)


def _build_vision(state: dict[str, torch.Tensor]) -> BlipVisionModel:
    _, positions, width = state["pos_embed"].shape
    patch_size = state["patch_embed.proj.weight"].shape[-1]
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state["blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_count_layers("blocks.", state),
        num_attention_heads=width // HEAD_SIZE,
        image_size=round((positions - 1) ** 0.5) * patch_size,
        patch_size=patch_size,
        layer_norm_eps=1e-6,
    )
    model = BlipVisionModel(config)
    model.load_state_dict({_vision_name(name): tensor for name, tensor in state.items()})
    return model


def _build_text(state: dict[str, torch.Tensor], vision_width: int) -> BlipTextModel:
    state.pop("embeddings.position_ids", None)  # a constant that older versions of BERT save
    vocab_size, width = state["embeddings.word_embeddings.weight"].shape
    config = BlipTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        encoder_hidden_size=vision_width,
        intermediate_size=state["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_count_layers("encoder.layer.", state),
        num_attention_heads=width // HEAD_SIZE,
        max_position_embeddings=state["embeddings.position_embeddings.weight"].shape[0],
        layer_norm_eps=1e-12,
        is_decoder=True,  # adds cross-attention; the attention mask remains that of an encoder
    )
    model = BlipTextModel(config, add_pooling_layer=False)
    model.load_state_dict(state)
    return model


def _build_head(state: dict[str, torch.Tensor]) -> nn.Sequential:
    """Linear layers without activations. The numbers missing in their names are dropout layers."""
    head = nn.Sequential()
    for number in sorted({name.split(".")[0] for name in state}, key=int):
        outputs, inputs = state[f"{number}.weight"].shape
        head.append(nn.Linear(inputs, outputs))
        head[-1].load_state_dict(_below(f"{number}.", state))
    return head


def _vision_name(name: str) -> str:
    for pattern, replacement in _VISION_NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def _below(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _count_layers(prefix: str, state: dict[str, torch.Tensor]) -> int:
    return len({name.split(".")[0] for name in _below(prefix, state)})
