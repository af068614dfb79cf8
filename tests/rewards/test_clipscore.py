"""The CLIP score of CLIP and SigLIP models, with preprocessing and tokens made by hand."""

import io

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from toy_clip import PROMPTS, cropped, make_images, save_clip, token_ids
from transformers import SiglipConfig, SiglipModel, SiglipTokenizer, T5Config, T5EncoderModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from diffusers_mixgrpo.rewards.clipscore import CLIPScoreReward


WORDS = ["a red cat", "", "far more words than the context has room for " * 5, "A  Tree ", "a red cat", "sea"]
SIGLIP_CONTEXT, SIGLIP_SIZE = 12, 24


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder, seed=1)
    return folder


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red cat in a tree by the sea", "more words than there is room for"] * 20),
        model_writer=file,
        vocab_size=40,
        hard_vocab_limit=False,
        bos_id=-1,
        eos_id=1,
        pad_id=-1,
        unk_id=2,
        control_symbols=["<control>"],
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(file.getvalue())
    tokenizer = SiglipTokenizer(str(folder / "spiece.model"), model_max_length=SIGLIP_CONTEXT)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(2)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = SiglipModel(
        SiglipConfig(
            text_config=tower | {"vocab_size": len(tokenizer), "max_position_embeddings": SIGLIP_CONTEXT},
            vision_config=tower | {"image_size": SIGLIP_SIZE, "patch_size": 8},
        )
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    model.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": SIGLIP_SIZE, "width": SIGLIP_SIZE}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(clip_folder):
    return CLIPScoreReward(str(clip_folder))


@pytest.fixture(scope="module")
def siglip(siglip_folder):
    return CLIPScoreReward(str(siglip_folder))


def cosines(first, second):
    return (first * second).sum(-1) / first.norm(dim=-1) / second.norm(dim=-1)


@torch.no_grad()
def test_clip_scores_are_the_models(clip):
    text = torch.cat([clip.model.get_text_features(torch.tensor([token_ids(word)])).pooler_output for word in WORDS])
    pixels = torch.stack([cropped(image) for image in make_images()])
    expected = cosines(text, clip.model.get_image_features(pixels).pooler_output).tolist()
    assert np.std(expected) > 0.05
    assert clip(WORDS, make_images()) == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_siglip_scores_are_the_models(siglip, siglip_folder):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(siglip_folder / "spiece.model"))
    rows = []
    for word in WORDS:
        ids = pieces.encode(" ".join(word.lower().split()))[: SIGLIP_CONTEXT - 1]
        rows.append(ids + [pieces.eos_id()] * (SIGLIP_CONTEXT - len(ids)))  # padding is attended to
    text = siglip.model.get_text_features(torch.tensor(rows)).pooler_output
    squares = [
        image.convert("RGB").resize((SIGLIP_SIZE, SIGLIP_SIZE), Image.Resampling.BICUBIC) for image in make_images()
    ]
    pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2) / 127.5 - 1
    expected = cosines(text, siglip.model.get_image_features(pixels).pooler_output).tolist()
    assert np.std(expected) > 0.02
    assert siglip(WORDS, make_images()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_batches_and_bfloat16(kind, request):
    folder, reward = request.getfixturevalue(f"{kind}_folder"), request.getfixturevalue(kind)
    scores = reward(PROMPTS, make_images())
    assert all(-1 <= score <= 1 for score in scores)
    assert CLIPScoreReward(str(folder), batch_size=1)(PROMPTS, make_images()) == pytest.approx(scores, abs=1e-5)
    half = CLIPScoreReward(str(folder), dtype=torch.bfloat16)
    assert half(PROMPTS, make_images()) == pytest.approx(scores, abs=0.05)


def test_an_unreadable_image_has_no_score(clip, tmp_path):
    whole = make_images()[0]
    whole.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    scores = clip(["a", "a", "a"], [None, Image.open(tmp_path / "cut.png"), whole], size=[1, 2, 3])
    assert scores[:2] == [None, None]
    assert scores[2:] == pytest.approx(clip(["a"], [whole]), abs=1e-5)


def test_wrong_arguments(clip, tmp_path):
    assert clip.__name__ == "clipscore" and clip.to("cpu") is clip
    with pytest.raises(OSError, match="(?s)`model`='/no/such' could not be loaded.*existing local file or folder"):
        CLIPScoreReward("/no/such")
    save_clip(tmp_path)
    T5EncoderModel(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="`model` must be a CLIP or SigLIP model, got .*which is a T5"):
        CLIPScoreReward(str(tmp_path))
