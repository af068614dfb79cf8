"""HPSv2 against an independent implementation of the model on weights in the original layout, and the package."""

import gzip
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from toy_clip import CONTEXT, MEAN, PROMPTS, SIZE, STD, VOCABULARY, make_images, save_tokenizer, token_ids
from transformers import AutoTokenizer, CLIPTokenizer

from diffusers_mixgrpo.rewards.hpsv2 import HPSv2Reward, clean


WIDTH, TEXT_WIDTH, DIM, LAYERS, PATCH, HEADS = 48, 32, 24, 2, 8, 16
WORDS = ["a red cat", "", "far more words than the context has room for " * 5, "A  Tree ", "a red cat", "sea"]


def original_weights(seed=0) -> dict[str, torch.Tensor]:
    """Random weights under open_clip's names, as in HPSv2's files."""
    rng = torch.Generator().manual_seed(seed)

    def random(*shape, mean=0.0, std=0.3):
        return mean + std * torch.randn(shape, generator=rng)

    weights = {
        "positional_embedding": random(CONTEXT, TEXT_WIDTH),
        "text_projection": random(TEXT_WIDTH, DIM),
        "logit_scale": torch.tensor(4.6),
        "visual.class_embedding": random(WIDTH),
        "visual.positional_embedding": random((SIZE // PATCH) ** 2 + 1, WIDTH),
        "visual.proj": random(WIDTH, DIM),
        "visual.conv1.weight": random(WIDTH, 3, PATCH, PATCH, std=0.05),
        "token_embedding.weight": random(len(VOCABULARY), TEXT_WIDTH),
    }
    for norm, width in (("visual.ln_pre", WIDTH), ("visual.ln_post", WIDTH), ("ln_final", TEXT_WIDTH)):
        weights |= {f"{norm}.weight": random(width, mean=1.0), f"{norm}.bias": random(width)}
    for prefix, width in (("visual.", WIDTH), ("", TEXT_WIDTH)):
        for i in range(LAYERS):
            block = f"{prefix}transformer.resblocks.{i}"
            shapes = {"attn.in_proj_": (3 * width, width), "attn.out_proj.": (width, width)}
            shapes |= {"mlp.c_fc.": (4 * width, width), "mlp.c_proj.": (width, 4 * width)}
            for name, shape in shapes.items():
                weights |= {f"{block}.{name}weight": random(*shape), f"{block}.{name}bias": random(shape[0])}
            for norm in ("ln_1", "ln_2"):
                weights |= {f"{block}.{norm}.weight": random(width, mean=1.0), f"{block}.{norm}.bias": random(width)}
    return weights


@torch.no_grad()
def original_score(weights, text: str, image: Image.Image) -> float:
    """One score, computed directly from the original's weights."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    def linear(x, name):
        return F.linear(x, weights[f"{name}weight"], weights[f"{name}bias"])

    def transformer(x, prefix, mask=None):  # x: (tokens, width)
        for i in range(LAYERS):
            block = f"{prefix}transformer.resblocks.{i}"
            y = norm(x, f"{block}.ln_1")
            query, key, value = (
                part.view(len(x), HEADS, -1).transpose(0, 1)
                for part in linear(y, f"{block}.attn.in_proj_").chunk(3, -1)
            )
            logits = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
            attended = (logits if mask is None else logits + mask).softmax(-1) @ value
            x = x + linear(attended.transpose(0, 1).reshape(x.shape), f"{block}.attn.out_proj.")
            hidden = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc.")
            x = x + linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), f"{block}.mlp.c_proj.")
        return x

    patches = padded(image).unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # (3, rows, columns, PATCH, PATCH)
    x = torch.einsum("crkij,wcij->rkw", patches, weights["visual.conv1.weight"]).flatten(0, 1)
    x = torch.cat([weights["visual.class_embedding"][None], x]) + weights["visual.positional_embedding"]
    x = transformer(norm(x, "visual.ln_pre"), "visual.")
    image_features = norm(x[0], "visual.ln_post") @ weights["visual.proj"]

    ids = torch.tensor(token_ids(text) + [0] * CONTEXT)[:CONTEXT]
    x = weights["token_embedding.weight"][ids] + weights["positional_embedding"]
    x = transformer(x, "", torch.full((CONTEXT, CONTEXT), -math.inf).triu(1))
    text_features = norm(x[ids.argmax()], "ln_final") @ weights["text_projection"]
    return float(image_features @ text_features / image_features.norm() / text_features.norm())


def padded(image: Image.Image) -> torch.Tensor:
    """The preprocessing with PIL's float32 resampling, channel by channel, into a black square."""
    scale = SIZE / max(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    square = np.zeros((SIZE, SIZE, 3), dtype=np.float32)
    top, left = (SIZE - height) // 2, (SIZE - width) // 2
    for channel in range(3):
        values = np.asarray(image.convert("RGB"), dtype=np.float32)[..., channel] / 255
        resized = Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)
        square[top : top + height, left : left + width, channel] = np.asarray(resized)
    return torch.from_numpy((square - MEAN) / STD).permute(2, 0, 1)


@pytest.fixture(scope="module")
def weights():
    return original_weights()


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory):
    """A folder with the checkpoint of v2.1 as released, and a tokenizer."""
    folder = tmp_path_factory.mktemp("hpsv2")
    torch.save({"epoch": 1, "name": "toy", "state_dict": weights}, folder / "HPS_v2.1_compressed.pt")
    save_tokenizer(folder / "tokenizer")
    return folder


def build(folder, **arguments) -> HPSv2Reward:
    return HPSv2Reward(**{"model": str(folder), "tokenizer": str(folder / "tokenizer")} | arguments)


@pytest.fixture(scope="module")
def reward(folder):
    return build(folder)


def test_scores_are_the_originals(reward, weights):
    scores = reward(WORDS, make_images())
    expected = [original_score(weights, text, image) for text, image in zip(WORDS, make_images(), strict=True)]
    assert np.std(expected) > 0.05
    assert scores == pytest.approx(expected, abs=1e-5)


def test_nothing_of_a_wide_image_is_cropped(reward):
    image = Image.new("RGB", (96, 32), "white")
    edited = image.copy()
    edited.paste("red", (0, 0, 8, 32))
    first, second = reward(["a"] * 2, [image, edited])
    assert abs(first - second) > 1e-4


@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_batches_do_not_matter(folder, reward, batch_size):
    scores = build(folder, batch_size=batch_size)(PROMPTS, make_images())
    assert scores == pytest.approx(reward(PROMPTS, make_images()), abs=1e-5)
    assert all(-1 <= score <= 1 for score in scores)
    assert reward([], []) == []


def test_bfloat16_is_near(folder, reward):
    half = build(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    assert half(PROMPTS, make_images()) == pytest.approx(reward(PROMPTS, make_images()), abs=0.05)


def test_other_files_hold_the_same(folder, reward, weights, tmp_path):
    expected = reward(WORDS, make_images())
    prefixed = {f"module.{name}": weight for name, weight in weights.items()}
    torch.save({"state_dict": prefixed}, tmp_path / "HPS_v2_compressed.pt")
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, tmp_path / "hps.safetensors")
    for arguments in (
        {"model": str(tmp_path), "version": "v2.0"},
        {"model": str(tmp_path / "old.pt")},
        {"model": str(tmp_path / "hps.safetensors")},
    ):
        assert build(folder, **arguments)(WORDS, make_images()) == pytest.approx(expected, abs=1e-5)


def test_an_unreadable_image_has_no_score(reward, tmp_path):
    whole = make_images()[0]
    whole.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    images = [None, whole, Image.open(tmp_path / "cut.png"), whole]
    scores = reward(["sea", "a", "b", "a red cat"], images, answer=[1, 2, 3, 4])
    assert scores[0] is None and scores[2] is None
    assert scores[1::2] == pytest.approx(reward(["a", "a red cat"], [whole, whole]), abs=1e-5)
    assert reward(["sea"], [None]) == [None]


def test_interface_of_the_trainer(reward):
    assert reward.__name__ == "hpsv2"
    assert reward.to("cpu") is reward and reward.device == torch.device("cpu")
    assert not reward.model.training and not any(p.requires_grad for p in reward.model.parameters())


def test_wrong_arguments(folder, reward, weights, tmp_path):
    with pytest.raises(ValueError, match=r"`version` must be one of 'v2.0', 'v2.1', got 'v3'"):
        build(folder, version="v3")
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        build(folder, batch_size=0)
    with pytest.raises(OSError, match="(?s)`model`='/no/such/HPS.pt' could not be loaded.*existing local file"):
        build(folder, model="/no/such/HPS.pt")
    with pytest.raises(OSError, match="(?s)`model`='.*' could not be loaded.*HPS_v2_compressed.pt"):
        build(folder, version="v2.0")
    with pytest.raises(OSError, match="(?s)`tokenizer`='/no/such' could not be loaded.*existing local"):
        build(folder, tokenizer="/no/such")
    with pytest.raises(ValueError, match="must have the same length, got 1 prompts and 2 images"):
        reward(["a"], make_images()[:2])


def test_files_that_hold_something_else(folder, weights, tmp_path):
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(
        ValueError,
        match="`model` must be a checkpoint of a CLIP ViT .*got .*HPS_v2.1_compressed.pt",
    ):
        build(folder, model=str(tmp_path / "other.pt"))
    for changed in ({"visual.ln_pre.weight": None}, {"score_predictor.weight": torch.zeros(1)}):
        kept = {name: weight for name, weight in (weights | changed).items() if weight is not None}
        torch.save({"state_dict": kept}, tmp_path / "other.pt")
        with pytest.raises(ValueError, match="missing or unexpected: .*(pre_layrnorm|score_predictor).weight"):
            build(folder, model=str(tmp_path / "other.pt"))
    torch.save({"state_dict": weights, "code": Harmful()}, tmp_path / "other.pt")
    with pytest.raises(OSError, match="could not be loaded: Weights only load failed"):
        build(folder, model=str(tmp_path / "other.pt"))


class Harmful:
    """Would run code when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("the checkpoint ran code",)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("  A Red\n\tcat ", "a red cat"),
        ("“Cats” don’t &amp;amp; won‘t", "\"cats\" don't & won't"),
        ("一只猫，在树上！　ＡＢＣ", "一只猫,在树上! abc"),
        ("ﬂuﬃest \ufeffcafe\u0301\x07 &lt;3", "fluffiest café <3"),
        ("🐱🌲", "🐱🌲"),
        ("", ""),
    ],
)
def test_prompts_are_cleaned_as_by_open_clip(text, expected):
    assert clean(text) == expected


HARD_PROMPTS = [
    *PROMPTS,
    "“Cats” don’t &amp; won‘t fly, it's 1920s film-noir; f/2.8 50mm!!",
    "ﬂuﬃest \ufeffcafe\u0301 &lt;3 &quot;quoted&quot; <b>bold</b>",
    "Привет, МИР — ÉCOLE straße ΣΑΣ İstanbul",
    "日本の城、春（ハル）　ﾊﾝｶｸ ＦＵＬＬ",
    "tab\tnew\nline\r\n end\u2028of\xa0line",
    "masterpiece, best quality, (detailed:1.2), [[blurry]], <lora:style:0.8> #art @artist " * 6,
    "👨‍👩‍👧‍👦 family 🇩🇪 flag ☃️ 1️⃣",
    "l'été d’une fille, 'tis we'll they're I'd I'M",
]


@pytest.fixture(scope="module")
def real_tokenizer(tmp_path_factory):
    """CLIP's own vocabulary, as transformers' tokenizer."""
    open_clip = pytest.importorskip("open_clip")
    with gzip.open(open_clip.tokenizer.default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(open_clip.tokenizer.bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(line.split()) for line in lines)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("tokenizer")
    merges = [tuple(line.split()) for line in lines]
    CLIPTokenizer({token: i for i, token in enumerate(tokens)}, merges, model_max_length=77).save_pretrained(folder)
    return folder


def test_tokens_are_open_clips(real_tokenizer):
    open_clip = pytest.importorskip("open_clip")
    tokenizer = AutoTokenizer.from_pretrained(real_tokenizer)
    expected = open_clip.SimpleTokenizer(context_length=77)(HARD_PROMPTS)
    for text, row in zip(HARD_PROMPTS, expected.tolist(), strict=True):
        ids = tokenizer(clean(text), truncation=True, max_length=77).input_ids
        assert ids == row[: row.index(49407) + 1], text


def test_scores_are_those_of_the_package(real_tokenizer, tmp_path):
    img_score = pytest.importorskip("hpsv2.img_score")
    hps_clip = pytest.importorskip("hpsv2.src.open_clip")
    torch.manual_seed(0)
    tower = {"layers": 2, "width": 64}
    model = hps_clip.CLIP(
        48,
        {"image_size": 224, "patch_size": 28, "head_width": 4} | tower,
        {"heads": 16, "context_length": 77, "vocab_size": 49408} | tower,
        output_dict=True,
    ).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    transform = hps_clip.image_transform(224, is_train=False, resize_longest_max=True)
    img_score.model_dict.update(model=model, preprocess_val=transform)

    rng = np.random.default_rng(0)
    shapes = [(224, 224), (512, 512), (1024, 768), (333, 500), (61, 90), (224, 100), (1000, 30)]
    images = [Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]
    images[5] = images[5].resize((100, 225))  # the package does not pad an image of 224 pixels, and then fails
    images = [*images, images[1].convert("L")] * 2
    prompts = HARD_PROMPTS + ["a cat", "a dog"]
    expected = [
        img_score.score(image, prompt, cp=str(tmp_path / "HPS_v2.1_compressed.pt"), hps_version="v2.1")[0]
        for prompt, image in zip(prompts, images, strict=True)
    ]
    scores = HPSv2Reward(model=str(tmp_path), tokenizer=str(real_tokenizer))(prompts, images)
    difference = max(abs(score - other) for score, other in zip(scores, expected, strict=True))
    print(f"largest difference from the hpsv2 package: {difference:.2e}, over scores of std {np.std(expected):.3f}")
    assert np.std(expected) > 0.02
    assert difference < 1e-5
