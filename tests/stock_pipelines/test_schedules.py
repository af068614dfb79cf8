"""The scheduler in stock pipelines of diffusers, in miniature with random weights, which call it in their own ways."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    BriaPipeline,
    BriaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    LTXConditionPipeline,
    LTXVideoTransformer3DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from parts import deep_compression_vae
from PIL import Image

from diffusers_mixgrpo import MixedODESDEScheduler


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def embeds(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw(pipe, scheduler, **arguments) -> torch.Tensor:
    """The latents that a pipeline ends with."""
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(**arguments, generator=generator, output_type="latent", return_dict=False)[0]


def small_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        latent_channels=4,
        norm_num_groups=4,
        shift_factor=0.0,
        scaling_factor=1.0,
    ).eval()


@pytest.fixture(scope="module")
def bria():
    torch.manual_seed(0)
    transformer = BriaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[0, 4, 4],
    ).eval()
    parts = {"text_encoder": None, "tokenizer": None, "vae": small_vae(), "transformer": transformer}
    return BriaPipeline(**parts, scheduler=FlowMatchEulerDiscreteScheduler())


@pytest.fixture(scope="module")
def cogview4():
    torch.manual_seed(0)
    transformer = CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
    ).eval()
    parts = {"text_encoder": None, "tokenizer": None, "vae": small_vae(), "transformer": transformer}
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    return CogView4Pipeline(**parts, scheduler=scheduler)


@pytest.fixture(scope="module")
def ltx():
    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    ).eval()
    vae = AutoencoderKLLTXVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    ).eval()
    parts = {"text_encoder": None, "tokenizer": None, "vae": vae, "transformer": transformer}
    return LTXConditionPipeline(**parts, scheduler=FlowMatchEulerDiscreteScheduler())


@pytest.fixture(scope="module")
def wan():
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    ).eval()
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    parts = {"text_encoder": None, "tokenizer": None, "vae": vae, "transformer": transformer}
    return WanPipeline(**parts, scheduler=UniPCMultistepScheduler(**FLOW, flow_shift=5.0))


@pytest.fixture(scope="module")
def sana():
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    ).eval()
    parts = {"text_encoder": None, "tokenizer": None, "vae": deep_compression_vae(), "transformer": transformer}
    return SanaPipeline(**parts, scheduler=DPMSolverMultistepScheduler(**FLOW, flow_shift=3.0))


def arguments_of(pipe) -> dict:
    """Small arguments for its `__call__`, with embeddings in the place of prompts."""
    steps = {"num_inference_steps": 8}
    mask = torch.ones(1, 4, dtype=torch.long)
    if isinstance(pipe, BriaPipeline):
        # Bria reads the shape of the negative embeddings from its own.
        both = {"prompt_embeds": embeds(1, 4, 32), "negative_prompt_embeds": embeds(1, 4, 32, seed=2)}
        return steps | both | {"height": 16, "width": 16, "guidance_scale": 2.0}
    if isinstance(pipe, CogView4Pipeline):
        return steps | {"prompt_embeds": embeds(1, 16, 32), "height": 16, "width": 16, "guidance_scale": 1.0}
    if isinstance(pipe, LTXConditionPipeline):
        size = {"height": 32, "width": 32, "num_frames": 9, "guidance_scale": 1.0}
        return steps | size | {"prompt_embeds": embeds(1, 4, 32), "prompt_attention_mask": mask}
    if isinstance(pipe, WanPipeline):
        size = {"height": 16, "width": 16, "num_frames": 1, "guidance_scale": 1.0}
        return steps | size | {"prompt_embeds": embeds(1, 4, 32)}
    size = {"height": 32, "width": 32, "guidance_scale": 1.0, "use_resolution_binning": False}
    return steps | size | {"prompt_embeds": embeds(1, 4, 8), "prompt_attention_mask": mask}


# ---- The same latents without a window ----


@pytest.mark.parametrize("name", ["bria", "cogview4", "ltx"])
@pytest.mark.parametrize("config", [{}, {"shift": 3.0, "use_dynamic_shifting": False}])
def test_without_a_window_the_latents_are_the_stock_ones(request, name, config):
    pipe = request.getfixturevalue(name)
    stock = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, **config)
    ours = MixedODESDEScheduler.from_config(stock.config, window_size=0)
    arguments = arguments_of(pipe)
    expected = draw(pipe, stock, **arguments)
    assert expected.isfinite().all() and torch.equal(draw(pipe, ours, **arguments), expected)


@pytest.mark.parametrize(("name", "solver"), [("wan", "unipc"), ("sana", "dpmsolver++")])
def test_the_multistep_schedulers_of_flow_matching(request, name, solver):
    """Converted, with their solver: their timesteps, and their latents up to float32."""
    pipe = request.getfixturevalue(name)
    cls = UniPCMultistepScheduler if name == "wan" else DPMSolverMultistepScheduler
    stock = cls(**FLOW, flow_shift=5.0)
    ours = MixedODESDEScheduler.from_config(stock.config, window_size=0, ode_solver=solver)
    arguments = arguments_of(pipe)
    expected = draw(pipe, stock, **arguments)
    latents = draw(pipe, ours, **arguments)
    assert torch.equal(ours.timesteps, stock.timesteps.float()) and ours.config.shift == 5.0
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    other = draw(pipe, MixedODESDEScheduler(window_size=0, ode_solver=solver), **arguments)
    assert (other - expected).abs().max() > 1e-2  # as it was with a `flow_shift` that was lost


@pytest.mark.parametrize("name", ["bria", "cogview4", "wan", "sana"])
def test_a_window_has_log_probs(request, name):
    pipe = request.getfixturevalue(name)
    scheduler = MixedODESDEScheduler.from_config(pipe.scheduler.config, window_start=2, window_size=3)
    assert draw(pipe, scheduler, **arguments_of(pipe)).isfinite().all()
    assert scheduler.window_log_probs.shape == (1, 3) and scheduler.window_log_probs.isfinite().all()


# ---- Timesteps per token: LTXCondition ----


def condition() -> list[LTXVideoCondition]:
    return [LTXVideoCondition(image=Image.new("RGB", (32, 32), "red"), frame_index=0, strength=0.5)]


def test_timesteps_per_token(ltx):
    """A conditioned frame has a lower timestep than the others."""
    arguments = arguments_of(ltx) | {"conditions": condition()}
    stock = FlowMatchEulerDiscreteScheduler.from_config(ltx.scheduler.config)
    expected = draw(ltx, stock, **arguments)
    assert torch.equal(draw(ltx, MixedODESDEScheduler.from_config(stock.config, window_size=0), **arguments), expected)
    assert not torch.equal(draw(ltx, stock, **arguments_of(ltx)), expected)


@pytest.mark.parametrize("config", [{"window_size": 2}, {"window_size": 0, "ode_solver": "unipc"}])
def test_timesteps_per_token_have_no_transition(ltx, config):
    with pytest.raises(ValueError, match="`per_token_timesteps` must be None with a window or a multistep solver"):
        draw(ltx, MixedODESDEScheduler(**config), **arguments_of(ltx))


# ---- Timesteps of the pipeline's own: CogView4 ----


def test_compression_of_a_pipelines_own_timesteps(cogview4):
    """CogView4 gives the model unshifted integers, and the scheduler shifted noise levels."""
    whole = MixedODESDEScheduler.from_config(cogview4.scheduler.config, window_start=2, window_size=2)
    arguments = arguments_of(cogview4)
    draw(cogview4, whole, **arguments)
    fewer = MixedODESDEScheduler.from_config(whole.config, prefix_ratio=0.5, suffix_ratio=0.5)
    assert draw(cogview4, fewer, **arguments).isfinite().all()
    assert len(fewer.timesteps) == 1 + 2 + 2 and fewer.window == range(1, 3)
    for ours, stock in ((fewer.timesteps, whole.timesteps), (fewer.sigmas, whole.sigmas)):
        assert torch.equal(ours[:4], stock[[0, 2, 3, 4]])  # steps that are kept, to the last bit
    given = np.linspace(1000, 1, 8).astype(np.int64)
    assert fewer.timesteps[4] == (given[6] + 0.0)  # the new point is step 6 of 8
    halves = MixedODESDEScheduler(window_start=0, window_size=1, suffix_ratio=0.5)
    halves.set_timesteps(timesteps=[900.0, 400.0, 100.0, 50.0], sigmas=[0.9, 0.4, 0.1, 0.05])
    # 2 of 3 steps after the first: at 1 and 2.5
    assert halves.timesteps.tolist() == [900.0, 400.0, 75.0]
    torch.testing.assert_close(halves.sigmas[:3], torch.tensor([0.9, 0.4, 0.075]))


def test_compression_of_timesteps_alone():
    scheduler = MixedODESDEScheduler(window_start=0, window_size=1, suffix_ratio=0.5)
    scheduler.set_timesteps(timesteps=[900.0, 400.0, 100.0, 50.0])
    assert scheduler.timesteps.tolist() == [900.0, 400.0, 75.0]
    torch.testing.assert_close(scheduler.sigmas[:3], torch.tensor([0.9, 0.4, 0.075]))


# ---- Runs that begin after the window does: image-to-image ----


@pytest.mark.parametrize(
    ("strength", "left_out"), [(1.0, 0), (0.8, 0), (0.6, 1), (0.2, 3)], ids=["whole", "before", "inside", "after"]
)
def test_a_strength_that_cuts_the_window_short(shared_pipe, caplog, strength, left_out):
    """Of 10 steps, those from 3 to 5 are stochastic, and `strength` leaves out the first ones."""
    parts = {name: part for name, part in shared_pipe.components.items() if name != "scheduler"}
    scheduler = MixedODESDEScheduler.from_config(shared_pipe.scheduler.config, window_start=3, window_size=3)
    pipe = FluxImg2ImgPipeline(**parts, scheduler=scheduler)
    arguments = {"prompt": "a cat", "image": Image.new("RGB", (32, 32), "red"), "height": 32, "width": 32}
    arguments |= {"num_inference_steps": 10, "strength": strength, "max_sequence_length": 12}
    assert draw(pipe, scheduler, **arguments).isfinite().all()
    run = 0 if scheduler.window_log_probs is None else scheduler.window_log_probs.shape[1]
    assert run == 3 - left_out
    messages = [record.message for record in caplog.records if "stochastic steps" in record.message]
    if left_out == 0:
        assert not messages
    else:
        assert f"{left_out} of the window's 3 stochastic steps (3 to 5) are not run" in messages[0]
        assert "Raise the pipeline's `strength`" in messages[0]
