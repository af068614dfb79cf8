"""A miniature FLUX with random weights, in the layout of FLUX.1-dev: real classes, made without network."""

import copy
import os
import string
import sys


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from diffusers import (  # noqa: E402
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import (  # noqa: E402
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


torch.set_num_threads(1)


def build_pipeline(seed: int = 0, guidance_embeds: bool = True, dynamic_shift: bool = True) -> FluxPipeline:
    """Pictures of 32x32 (4 latent channels, 2x down): 64 packed tokens of 16. T5 and CLIP read single characters."""
    torch.manual_seed(seed)
    letters = list(string.ascii_lowercase)
    clip_vocab = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    tokenizer = CLIPTokenizer({token: i for i, token in enumerate(clip_vocab)}, [], model_max_length=16)
    t5_vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    tokenizer_2 = T5Tokenizer(t5_vocab + [(letter, -3.0) for letter in letters], extra_ids=0, model_max_length=512)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_vocab),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    text_encoder_2 = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer_2), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    )
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance_embeds,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.7,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic_shift),
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2.eval(),
        tokenizer_2=tokenizer_2,
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def redness(prompts, images, **columns):
    """A reward for the pictures of the tiny pipeline: how much more red than green they are."""
    pixels = np.stack([np.asarray(image, dtype=float) for image in images]) / 255
    return (pixels[..., 0] - pixels[..., 1]).mean((1, 2)).tolist()


@pytest.fixture(scope="session")
def shared_pipe() -> FluxPipeline:
    """For tests that only look."""
    return build_pipeline()


@pytest.fixture
def tiny_pipe(shared_pipe) -> FluxPipeline:
    """One's own, to train and change."""
    pipe = FluxPipeline(**{name: copy.deepcopy(part) for name, part in shared_pipe.components.items()})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def pipeline_folder(shared_pipe, tmp_path_factory) -> str:
    """The same, saved."""
    folder = tmp_path_factory.mktemp("pipeline")
    shared_pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def own_modules(tmp_path_factory):
    """What a test imports from a folder of its own is forgotten, since another's may have the same name."""
    yield
    folder = str(tmp_path_factory.getbasetemp())
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(folder):
            del sys.modules[name]
