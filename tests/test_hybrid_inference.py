"""Hybrid inference on a stock FluxPipeline, with random weights."""

import copy
import gc

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.callbacks import MultiPipelineCallbacks
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.modules.module import _global_forward_hooks

from diffusers_mixgrpo.hybrid_inference import HybridInferenceCallback


STEPS = 5


def build_pipeline() -> FluxPipeline:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    vae = AutoencoderKL(
        sample_size=32, latent_channels=1, block_out_channels=(4,), layers_per_block=1, norm_num_groups=1
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def add_lora(pipe: FluxPipeline) -> None:
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v", "proj_out"]))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)


def generate(pipe: FluxPipeline, callback=None, **kwargs) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    arguments = {
        "prompt_embeds": torch.randn(1, 4, 32, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 32, generator=generator),
        "generator": generator,
        "num_inference_steps": STEPS,
        "height": 8,
        "width": 8,
        "output_type": "latent",
    }
    return pipe(**(arguments | kwargs), callback_on_step_end=callback).images


@pytest.fixture
def pipe() -> FluxPipeline:
    pipe = build_pipeline()
    add_lora(pipe)
    return pipe


@pytest.fixture
def images(pipe) -> dict[str, torch.Tensor]:
    trained = generate(pipe)
    pipe.transformer.disable_lora()
    base = generate(pipe)
    pipe.transformer.enable_lora()
    assert not torch.equal(trained, base)
    return {"trained": trained, "base": base}


def lora_is_on(pipe) -> bool:
    layers = [layer for layer in pipe.transformer.modules() if isinstance(layer, BaseTunerLayer)]
    assert layers
    return not any(layer.disable_adapters for layer in layers)


def switching_by_hand(pipe, cutoff: int) -> torch.Tensor:
    """The reference: the same run with the LoRA switched off after step `cutoff - 1` by a plain callback."""

    def callback(pipe, step, timestep, kwargs):
        if step + 1 == cutoff:
            pipe.transformer.disable_lora()
        return kwargs

    latents = generate(pipe, callback)
    pipe.transformer.enable_lora()
    return latents


def test_ratio_1_is_the_trained_model(pipe, images):
    assert torch.equal(generate(pipe, HybridInferenceCallback(cutoff_step_ratio=1.0)), images["trained"])
    assert torch.equal(generate(pipe), images["trained"])


@pytest.mark.parametrize("cutoff", [{"cutoff_step_ratio": 0.0}, {"cutoff_step_ratio": None, "cutoff_step_index": 0}])
def test_ratio_0_is_the_base_model(pipe, images, cutoff):
    assert torch.equal(generate(pipe, HybridInferenceCallback(**cutoff)), images["base"])
    assert torch.equal(generate(pipe), images["trained"])


@pytest.mark.parametrize("cutoff", range(1, STEPS))
def test_between_the_two(pipe, images, cutoff):
    hybrid = generate(pipe, HybridInferenceCallback(cutoff_step_ratio=cutoff / STEPS))
    assert torch.equal(hybrid, switching_by_hand(pipe, cutoff))
    assert not torch.equal(hybrid, images["trained"]) and not torch.equal(hybrid, images["base"])
    assert torch.equal(generate(pipe), images["trained"])


def test_a_callback_serves_many_runs(pipe, images):
    callback = HybridInferenceCallback(0.6)
    first = generate(pipe, callback)
    assert torch.equal(generate(pipe), images["trained"])
    assert torch.equal(generate(pipe, callback), first)
    callback = HybridInferenceCallback(0.0)
    for _ in range(2):
        assert torch.equal(generate(pipe, callback), images["base"])
        assert torch.equal(generate(pipe), images["trained"])


def test_the_first_step_hook_goes_with_its_callback(pipe):
    before = len(_global_forward_hooks)
    HybridInferenceCallback(0.8)
    callback = HybridInferenceCallback(0.0)
    assert len(_global_forward_hooks) == before + 1
    generate(pipe, callback)
    del callback
    gc.collect()
    assert len(_global_forward_hooks) == before


def test_true_cfg_takes_both_passes_from_the_base_model(pipe):
    negative = {
        "negative_prompt_embeds": torch.ones(1, 4, 32),
        "negative_pooled_prompt_embeds": torch.ones(1, 32),
        "true_cfg_scale": 2.0,
    }
    pipe.transformer.disable_lora()
    base = generate(pipe, **negative)
    pipe.transformer.enable_lora()
    assert torch.equal(generate(pipe, HybridInferenceCallback(0.0), **negative), base)


def test_among_several_callbacks(pipe, images):
    both = MultiPipelineCallbacks([HybridInferenceCallback(1.0), HybridInferenceCallback(0.0)])
    assert torch.equal(generate(pipe, both), images["base"])


def test_full_fine_tuning_takes_the_base_transformer():
    pipe = build_pipeline()
    base_transformer = copy.deepcopy(pipe.transformer)
    base = generate(pipe)
    for parameter in pipe.transformer.parameters():
        parameter.data = parameter.data * 1.1
    trained = generate(pipe)
    trained_transformer = pipe.transformer

    def swap_by_hand(pipe, step, timestep, kwargs):
        if step == 2:
            pipe.transformer = base_transformer
        return kwargs

    by_hand = generate(pipe, swap_by_hand)
    pipe.transformer = trained_transformer
    callbacks = {ratio: HybridInferenceCallback(ratio, base_transformer=base_transformer) for ratio in (0.0, 0.6, 1.0)}
    assert torch.equal(generate(pipe, callbacks[0.0]), base)
    assert torch.equal(generate(pipe, callbacks[0.6]), by_hand)
    assert torch.equal(generate(pipe, callbacks[1.0]), trained)
    assert pipe.transformer is trained_transformer
    assert torch.equal(generate(pipe), trained)


class Stop(Exception):
    pass


@pytest.mark.parametrize("ratio", [0.0, 0.4, 0.8])
@pytest.mark.parametrize("where", ["transformer", "scheduler", "callback"])
@pytest.mark.parametrize("last_step", [False, True])
def test_lora_is_on_again_after_a_run_that_raises(pipe, images, monkeypatch, ratio, where, last_step):
    hybrid = HybridInferenceCallback(ratio)
    step = STEPS - 1 if last_step else 2

    def stop(*args, **kwargs):
        raise Stop

    class Bomb(HybridInferenceCallback):
        def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
            if where == "callback" and step_index == step:
                raise Stop
            if where == "transformer" and step_index == step - 1:
                monkeypatch.setattr(pipe.transformer.single_transformer_blocks[0], "forward", stop)
            if where == "scheduler" and step_index == step - 1:
                monkeypatch.setattr(pipe.scheduler, "step", stop)
            return callback_kwargs

    with pytest.raises(Stop) as error:  # the traceback, and with it the run's frames, live on in `error`
        generate(pipe, MultiPipelineCallbacks([hybrid, Bomb(1.0)]))
    monkeypatch.undo()

    assert lora_is_on(pipe)
    arguments = {
        "hidden_states": torch.ones(1, 16, 4),
        "encoder_hidden_states": torch.ones(1, 4, 32),
        "pooled_projections": torch.ones(1, 32),
        "timestep": torch.ones(1),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(4, 3),
    }
    expected = build_pipeline()
    add_lora(expected)
    with torch.no_grad():
        assert torch.equal(pipe.transformer(**arguments)[0], expected.transformer(**arguments)[0])
    assert torch.equal(generate(pipe), images["trained"])
    assert torch.equal(generate(pipe, HybridInferenceCallback(0.0)), images["base"])
    assert error.type is Stop


def test_a_run_that_raised_does_not_disturb_the_next_of_the_same_callback(pipe, images, monkeypatch):
    callback = HybridInferenceCallback(0.4)
    expected = generate(pipe, callback)

    def stop(pipeline, step, timestep, kwargs):
        if step == 3:
            raise Stop
        return kwargs

    stopper = HybridInferenceCallback(1.0)
    stopper.callback_fn = stop
    with pytest.raises(Stop):
        generate(pipe, MultiPipelineCallbacks([callback, stopper]))
    assert torch.equal(generate(pipe, callback), expected)


def test_interrupting_a_run(pipe, images):
    class Interrupt(HybridInferenceCallback):
        def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
            pipeline._interrupt = step_index == 3
            return callback_kwargs

    generate(pipe, MultiPipelineCallbacks([HybridInferenceCallback(0.4), Interrupt(1.0)]))
    assert lora_is_on(pipe)
    assert torch.equal(generate(pipe), images["trained"])


def test_requires_grad_is_left_alone(pipe):
    before = {}
    for i, (name, parameter) in enumerate(pipe.transformer.named_parameters()):
        parameter.requires_grad_(i % 2 == 0)
        before[name] = parameter.requires_grad
    generate(pipe, HybridInferenceCallback(0.4))
    assert {name: p.requires_grad for name, p in pipe.transformer.named_parameters()} == before


def test_a_lora_that_was_off_stays_off(pipe):
    pipe.transformer.disable_lora()
    with pytest.raises(ValueError, match="no active LoRA"):
        generate(pipe, HybridInferenceCallback(0.4))
    assert not lora_is_on(pipe)


def test_no_base_model_is_an_error_at_the_first_step():
    pipe = build_pipeline()
    for ratio in (0.0, 0.8):
        with pytest.raises(ValueError, match="`base_transformer` is None.*load_lora_weights"):
            generate(pipe, HybridInferenceCallback(ratio))
    generate(pipe, HybridInferenceCallback(1.0))  # nobody asks for one


@pytest.mark.parametrize(
    ("ratio", "steps", "cutoff"),
    [(0.6, 50, 30), (0.29, 100, 29), (0.8, 25, 20), (0.8, 4, 3), (0.0, 9, 0), (1.0, 9, 9), (0.01, 9, 1)],
)
def test_cutoff_step(ratio, steps, cutoff):
    assert HybridInferenceCallback(ratio).cutoff_step(steps) == cutoff


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cutoff_step_ratio": 1.2}, r"`cutoff_step_ratio` must be in \[0, 1\], but is 1.2"),
        ({"cutoff_step_ratio": -0.1}, "`cutoff_step_ratio` must be in"),
        ({"cutoff_step_ratio": None, "cutoff_step_index": -1}, "`cutoff_step_index` must be >= 0, but is -1"),
        ({"cutoff_step_index": 3}, "Either cutoff_step_ratio or cutoff_step_index"),
        ({"cutoff_step_ratio": None}, "Either cutoff_step_ratio or cutoff_step_index"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        HybridInferenceCallback(**arguments)


def test_integer_ratios_are_fine(pipe, images):
    assert torch.equal(generate(pipe, HybridInferenceCallback(1)), images["trained"])
    assert torch.equal(generate(pipe, HybridInferenceCallback(0)), images["base"])
