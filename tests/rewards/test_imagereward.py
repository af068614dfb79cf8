"""
ImageReward, on a checkpoint of small encoders with random weights in the original's layout.

To compare with the original package (`image-reward` 1.5, which needs older versions of its dependencies than this
package), install it in an environment of its own and set IMAGEREWARD_PYTHON to that environment's interpreter.
"""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from transformers import BertTokenizer

from diffusers_mixgrpo.rewards.imagereward import ImageReward, to_pixels


VISION, TEXT, LAYERS, PATCH, GRID = 128, 192, 2, 16, 3
SIZE = PATCH * GRID
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "cube", "##s", "of", "ice", ",", "été"]
PROMPTS = ["a red cube", "", "red cubes of blue ice, " * 20, "a blue cube of red ice", "été 立方体"]


def linear(state, name, outputs, inputs, std=0.1):
    state[f"{name}.weight"] = torch.randn(outputs, inputs) * std
    state[f"{name}.bias"] = torch.randn(outputs) * std


def norm(state, name, width):
    state[f"{name}.weight"] = 1 + 0.3 * torch.randn(width)
    state[f"{name}.bias"] = 0.3 * torch.randn(width)


def make_checkpoint():
    """The original's tensors. Embeddings are so small that the epsilon of the norms after them matters."""
    torch.manual_seed(0)
    state = {
        "blip.visual_encoder.cls_token": torch.randn(1, 1, VISION) * 2e-3,
        "blip.visual_encoder.pos_embed": torch.randn(1, GRID**2 + 1, VISION) * 2e-3,
        "blip.visual_encoder.patch_embed.proj.weight": torch.randn(VISION, 3, PATCH, PATCH) * 1e-4,
        "blip.visual_encoder.patch_embed.proj.bias": torch.randn(VISION) * 2e-3,
        "blip.text_encoder.embeddings.position_ids": torch.arange(40)[None],
        "blip.text_encoder.embeddings.word_embeddings.weight": torch.randn(len(WORDS) + 2, TEXT) * 2e-3,
        "blip.text_encoder.embeddings.position_embeddings.weight": torch.randn(40, TEXT) * 2e-3,
    }
    for i in range(LAYERS):
        block = f"blip.visual_encoder.blocks.{i}"
        norm(state, f"{block}.norm1", VISION)
        linear(state, f"{block}.attn.qkv", 3 * VISION, VISION, 0.2)
        linear(state, f"{block}.attn.proj", VISION, VISION)
        norm(state, f"{block}.norm2", VISION)
        linear(state, f"{block}.mlp.fc1", 4 * VISION, VISION)
        linear(state, f"{block}.mlp.fc2", VISION, 4 * VISION)
        layer = f"blip.text_encoder.encoder.layer.{i}"
        for part, keys in (("attention", TEXT), ("crossattention", VISION)):
            linear(state, f"{layer}.{part}.self.query", TEXT, TEXT, 0.2)
            linear(state, f"{layer}.{part}.self.key", TEXT, keys, 0.2)
            linear(state, f"{layer}.{part}.self.value", TEXT, keys)
            linear(state, f"{layer}.{part}.output.dense", TEXT, TEXT)
            norm(state, f"{layer}.{part}.output.LayerNorm", TEXT)
        linear(state, f"{layer}.intermediate.dense", 4 * TEXT, TEXT)
        linear(state, f"{layer}.output.dense", TEXT, 4 * TEXT)
        norm(state, f"{layer}.output.LayerNorm", TEXT)
    norm(state, "blip.visual_encoder.norm", VISION)
    norm(state, "blip.text_encoder.embeddings.LayerNorm", TEXT)
    linear(state, "blip.vision_proj", 256, VISION)
    linear(state, "blip.text_proj", 256, TEXT)
    widths = [TEXT, 1024, 128, 64, 16, 1]
    for i, (number, inputs, outputs) in enumerate(zip((0, 2, 4, 6, 7), widths[:-1], widths[1:], strict=True)):
        linear(state, f"mlp.layers.{number}", outputs, inputs, 0.1 if i else 0.05)
    return state


def attend(q, k, v):
    """Softmax attention with heads of 64 channels, of `(tokens, width)`."""
    q, k, v = (x.unflatten(-1, (-1, 64)).transpose(0, 1) for x in (q, k, v))
    return ((q @ k.transpose(1, 2) / 8).softmax(-1) @ v).transpose(0, 1).flatten(1)


def reference(state, ids, pixels):
    """The score of one image and one prompt without padding, computed directly from the checkpoint's tensors."""

    def dense(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def layer_norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    root = "blip.visual_encoder"
    x = F.conv2d(
        pixels[None], *(state[f"{root}.patch_embed.proj.{part}"] for part in ("weight", "bias")), stride=PATCH
    )
    x = torch.cat([state[f"{root}.cls_token"][0], x[0].flatten(1).T]) + state[f"{root}.pos_embed"][0]
    for i in range(LAYERS):
        block = f"{root}.blocks.{i}"
        qkv = dense(f"{block}.attn.qkv", layer_norm(f"{block}.norm1", x, 1e-6))
        x = x + dense(f"{block}.attn.proj", attend(*qkv.chunk(3, dim=-1)))
        hidden = F.gelu(dense(f"{block}.mlp.fc1", layer_norm(f"{block}.norm2", x, 1e-6)))
        x = x + dense(f"{block}.mlp.fc2", hidden)
    patches = layer_norm(f"{root}.norm", x, 1e-6)

    root = "blip.text_encoder"
    embedded = state[f"{root}.embeddings.word_embeddings.weight"][ids]
    embedded = embedded + state[f"{root}.embeddings.position_embeddings.weight"][: len(ids)]
    x = layer_norm(f"{root}.embeddings.LayerNorm", embedded, 1e-12)
    for i in range(LAYERS):
        layer = f"{root}.encoder.layer.{i}"
        for part, source in (("attention", None), ("crossattention", patches)):
            keys = x if source is None else source
            name = f"{layer}.{part}.self"
            mixed = attend(dense(f"{name}.query", x), dense(f"{name}.key", keys), dense(f"{name}.value", keys))
            x = layer_norm(f"{layer}.{part}.output.LayerNorm", x + dense(f"{layer}.{part}.output.dense", mixed), 1e-12)
        hidden = F.gelu(dense(f"{layer}.intermediate.dense", x))
        x = layer_norm(f"{layer}.output.LayerNorm", x + dense(f"{layer}.output.dense", hidden), 1e-12)
    x = x[0]
    for number in (0, 2, 4, 6, 7):
        x = dense(f"mlp.layers.{number}", x)
    return (x.item() - 0.16717362830052426) / 1.0333394966054072


def make_image(seed, width=70, height=50):
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def state():
    return make_checkpoint()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("imagereward")
    torch.save(state, path / "ImageReward.pt")
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(path / "tokenizer")
    return path


@pytest.fixture(scope="module")
def reward(folder):
    return ImageReward(str(folder), tokenizer=str(folder / "tokenizer"))


@pytest.fixture(scope="module")
def images():
    sizes = [(70, 50), (SIZE, SIZE), (31, 90), (200, 64), (64, 64)]
    return [make_image(i, *size) for i, size in enumerate(sizes)]


# Token ids of the prompts, worked out by hand: lower case without accents, [UNK], and at most 35 tokens.
IDS = [
    [2, 5, 6, 8, 3],
    [2, 3],
    [2, *([6, 8, 9, 10, 7, 11, 12] * 5)[:33], 3],
    [2, 5, 7, 8, 10, 6, 11, 3],
    [2, 1, 1, 1, 1, 3],
]


def test_agrees_with_the_checkpoint_read_by_hand(state, reward, images):
    """All prompts in one batch, and therefore padded, against each prompt alone without padding."""
    expected = [reference(state, ids, to_pixels(image, SIZE)) for ids, image in zip(IDS, images, strict=True)]
    scores = reward(PROMPTS, images, difficulty=[1] * 5)
    assert np.std(expected) > 0.05  # else agreement would mean little
    np.testing.assert_allclose(scores, expected, atol=2e-5)
    assert all(isinstance(score, float) for score in scores)
    assert reward.__name__ == "imagereward"


def test_the_prompt_and_the_image_both_matter(reward, images):
    first, other_image, other_prompt = reward(["a red cube", "a red cube", "ice"], images[:2] + images[:1])
    assert abs(first - other_image) > 1e-3 and abs(first - other_prompt) > 1e-3


def test_tokens_beyond_the_last_do_not_count(reward, images):
    long = "red cubes of blue ice, " * 20
    assert reward([long], images[:1]) == pytest.approx(reward([long + "a a a"], images[:1]), abs=1e-5)


def test_batches(reward, images):
    whole = reward(PROMPTS, images)
    reward.batch_size = 2
    try:
        np.testing.assert_allclose(reward(PROMPTS, images), whole, atol=1e-5)
        assert reward([], []) == []
    finally:
        reward.batch_size = 32


def test_bfloat16(folder, reward, images):
    half = ImageReward(str(folder), tokenizer=str(folder / "tokenizer"), dtype=torch.bfloat16)
    assert {p.dtype for p in half.model.text.parameters()} == {torch.bfloat16}
    whole = reward(PROMPTS, images)
    np.testing.assert_allclose(half(PROMPTS, images), whole, atol=0.05 * np.std(whole) + 0.05)


def test_other_modes_and_broken_files(reward, images):
    file = io.BytesIO()
    images[0].save(file, "PNG")
    broken = Image.open(io.BytesIO(file.getvalue()[: file.tell() // 2]))
    gray = images[1].convert("L")
    scores = reward(["a"] * 4, [gray, broken, gray.convert("RGB"), images[0].convert("RGBA")])
    assert scores[1] is None
    assert scores[0] == pytest.approx(scores[2], abs=1e-5)
    assert scores[3] == pytest.approx(reward(["a"], images[:1])[0], abs=1e-5)


@pytest.mark.parametrize(("size", "scaled"), [((100, 75), (64, 48)), ((75, 130), (48, 83)), ((31, 30), (49, 48))])
def test_pixels(size, scaled):
    """Against torch's bicubic filter, which differs from Pillow's in rounding, then the center square, normalized."""
    image = make_image(0, *size)
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    values = F.interpolate(values, size=scaled[::-1], mode="bicubic", antialias=True, align_corners=False)
    left, top = round((scaled[0] - 48) / 2), round((scaled[1] - 48) / 2)
    expected = values[0, :, top : top + 48, left : left + 48].round().clamp(0, 255) / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = to_pixels(image, 48)
    assert pixels.shape == (3, 48, 48)
    for channel in range(3):
        difference = pixels[channel] * std[channel] + mean[channel] - expected[channel]
        assert difference.abs().max() < 2.1 / 255
        assert difference.abs().mean() < 0.5 / 255


def test_a_file_of_safetensors(tmp_path, folder, state, reward, images):
    file = tmp_path / "weights.safetensors"
    save_file(state, file)
    loaded = ImageReward(str(file), tokenizer=str(folder / "tokenizer"), batch_size=3)
    assert loaded.to("cpu") is loaded
    assert loaded(["a cube"], images[:1]) == pytest.approx(reward(["a cube"], images[:1]), abs=1e-5)


def test_errors(tmp_path, folder, state, reward, images):
    tokenizer = str(folder / "tokenizer")
    with pytest.raises(OSError, match="`model`='/nowhere/at/all' could not be loaded"):
        ImageReward("/nowhere/at/all", tokenizer=tokenizer)
    with pytest.raises(OSError, match="`tokenizer`='/nowhere' could not be loaded"):
        ImageReward(str(folder), tokenizer="/nowhere")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="`model` must be a checkpoint of ImageReward .*got .*other.pt'"):
        ImageReward(str(tmp_path / "other.pt"), tokenizer=tokenizer)
    torch.save({name: x for name, x in state.items() if "layer.1.crossattention" not in name}, tmp_path / "less.pt")
    with pytest.raises(RuntimeError, match="Missing key.*layer.1.crossattention.self.query.weight"):
        ImageReward(str(tmp_path / "less.pt"), tokenizer=tokenizer)
    words = {word: i for i, word in enumerate([*WORDS, "more"])}
    BertTokenizer(vocab=words).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="at most the 16 tokens of .*with 17. Pass the tokenizer"):
        ImageReward(str(folder), tokenizer=str(tmp_path / "tokenizer"))
    with pytest.raises(ValueError, match="2 prompts and 1 images"):
        reward(["a", "a"], images[:1])


# Runs in the environment of the original package: its own classes with a smaller image encoder and head.
ORIGINAL = """
import json, sys
import torch
import ImageReward.ImageReward
from PIL import Image
from ImageReward.models.BLIP import blip_pretrain
from ImageReward.models.BLIP.vit import VisionTransformer

folder, vision, text, layers, size, prompts = json.loads(sys.argv[1])
blip_pretrain.create_vit = lambda *args, **kwargs: (
    VisionTransformer(img_size=size, patch_size=16, embed_dim=vision, depth=layers, num_heads=vision // 64), vision
)
module = sys.modules["ImageReward.ImageReward"]  # the package has a class of that name too
model = module.ImageReward("med_config.json")
model.preprocess = module._transform(size)
model.mlp = module.MLP(text)
missing = model.load_state_dict(torch.load(folder + "/ImageReward.pt"), strict=False)
assert not missing.missing_keys and not missing.unexpected_keys, missing
model.eval()
with torch.no_grad():
    print(json.dumps([model.score(p, Image.open(f"{folder}/{i}.png")) for i, p in enumerate(prompts)]))
"""


@pytest.mark.skipif("IMAGEREWARD_PYTHON" not in os.environ, reason="IMAGEREWARD_PYTHON names no interpreter")
def test_agrees_with_the_original(tmp_path, folder, state, reward, images):
    torch.save(state, tmp_path / "ImageReward.pt")
    (tmp_path / "bert-base-uncased").mkdir()
    (tmp_path / "bert-base-uncased" / "vocab.txt").write_text("\n".join(WORDS))
    config = {
        "hidden_size": TEXT,
        "intermediate_size": 4 * TEXT,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": TEXT // 64,
        "max_position_embeddings": 40,
        "vocab_size": len(WORDS) + 2,
        "layer_norm_eps": 1e-12,
        "add_cross_attention": True,
    }
    (tmp_path / "med_config.json").write_text(json.dumps(config))
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    arguments = json.dumps([str(tmp_path), VISION, TEXT, LAYERS, SIZE, PROMPTS])
    command = [os.environ["IMAGEREWARD_PYTHON"], "-W", "ignore", "-c", ORIGINAL, arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    expected = json.loads(done.stdout.splitlines()[-1])
    scores = reward(PROMPTS, images)
    print("largest difference", np.abs(np.subtract(scores, expected)).max(), file=sys.stderr)
    np.testing.assert_allclose(scores, expected, atol=2e-5)
