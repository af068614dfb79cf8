"""Shared parts of the CLIP rewards' tests: a tiny CLIP with a vocabulary like CLIP's own, images and prompts."""

import numpy as np
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


CONTEXT = 20
SIZE = 32  # image size of the tiny models
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)

# Each byte alone and at the end of a word, as in CLIP: any text can be encoded, and end-of-text has the highest id.
LETTERS = sorted(ByteLevel.alphabet())
VOCABULARY = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]

PROMPTS = [
    "a red cat",
    "",
    "far more words than the context has room for " * 5,
    "一只猫，在树上",
    "🐱🌲 Café!",
    "a red cat",
]


def save_tokenizer(folder) -> CLIPTokenizer:
    tokenizer = CLIPTokenizer({token: i for i, token in enumerate(VOCABULARY)}, [], model_max_length=77)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_clip(folder, seed: int = 0, eos_token_id: int = len(VOCABULARY) - 1) -> CLIPModel:
    """Save a CLIP with random weights, its tokenizer and its image processor to `folder`."""
    torch.manual_seed(seed)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config=tower
        | {"vocab_size": len(VOCABULARY), "max_position_embeddings": CONTEXT, "eos_token_id": eos_token_id},
        vision_config=tower | {"image_size": SIZE, "patch_size": 8},
        projection_dim=24,
        logit_scale_init_value=3.0,
    )
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for weight in model.parameters():  # much larger than at initialization, so that all parts matter
            weight.add_(torch.randn_like(weight) * 0.2)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(
        folder
    )
    return model


def make_images() -> list[Image.Image]:
    """One image per prompt of `PROMPTS`: wide and tall, larger and smaller than the model's, in many modes."""
    rng = np.random.default_rng(0)
    shapes = [(45, 77), (90, 33), (19, 11), (32, 32), (64, 64), (7, 100)]
    images = [Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]
    alpha = Image.fromarray(rng.integers(0, 256, (90, 33), dtype=np.uint8))
    images[1].putalpha(alpha)
    return [images[0], images[1], images[2].convert("L"), images[3].convert("P"), images[4].convert("1"), images[5]]


def token_ids(text: str) -> list[int]:
    """The token ids of a text that consists of letters and spaces, worked out by hand."""
    ids = []
    for word in text.lower().split():
        ids += [VOCABULARY.index(letter) for letter in word[:-1]] + [VOCABULARY.index(word[-1] + "</w>")]
    start, end = len(VOCABULARY) - 2, len(VOCABULARY) - 1
    return [start, *ids[: CONTEXT - 2], end]


def cropped(image: Image.Image) -> torch.Tensor:
    """CLIP's preprocessing by hand: the shorter side resized in 8 bits, the center cropped, normalized."""
    scale = SIZE / min(image.size)
    image = image.convert("RGB").resize(
        (int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    pixels = np.asarray(image.crop((left, top, left + SIZE, top + SIZE)), dtype=np.float32) / 255
    return torch.from_numpy((pixels - MEAN) / STD).permute(2, 0, 1)
