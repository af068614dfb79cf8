"""Hybrid inference on stock pipelines with random weights."""

import copy

import pytest
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.hooks import HookRegistry, ModelHook
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from diffusers_mixgrpo.hybrid_inference import ForwardPasses, hybrid_inference, num_trained_steps


STEPS = 5
RATIOS = [0.0, 0.4, 0.8]


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
        sample_size=32,
        latent_channels=1,
        block_out_channels=(4,),
        layers_per_block=1,
        norm_num_groups=1,
        shift_factor=0.1,
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


def add_lora(pipe, target_modules=("to_q", "to_v", "proj_out")) -> None:
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=list(target_modules)))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)


def generate(pipe, callback=None, **kwargs) -> torch.Tensor:
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


def true_cfg() -> dict:
    return {
        "negative_prompt_embeds": torch.ones(1, 4, 32),
        "negative_pooled_prompt_embeds": torch.ones(1, 32),
        "true_cfg_scale": 2.0,
    }


def switching_by_hand(pipe, cutoff: int, **kwargs) -> torch.Tensor:
    """The reference: the same call with the LoRA switched off before step `cutoff` by a plain callback."""

    def callback(pipe, step, timestep, kwargs):
        if step + 1 == cutoff:
            pipe.transformer.disable_lora()
        return kwargs

    if cutoff == 0:
        pipe.transformer.disable_lora()
    latents = generate(pipe, callback, **kwargs)
    pipe.transformer.enable_lora()
    return latents


def lora_is_on(pipe) -> bool:
    layers = [layer for layer in pipe.transformer.modules() if isinstance(layer, BaseTunerLayer)]
    assert layers
    return not any(layer.disable_adapters for layer in layers)


@pytest.fixture
def pipe() -> FluxPipeline:
    pipe = build_pipeline()
    add_lora(pipe)
    return pipe


@pytest.fixture
def images(pipe) -> dict[str, torch.Tensor]:
    trained = generate(pipe)
    base = switching_by_hand(pipe, 0)
    assert not torch.equal(trained, base)
    return {"trained": trained, "base": base}


# ---- The images ----


@pytest.mark.parametrize("ratio", [1, 1.0])
def test_ratio_1_is_the_trained_model(pipe, images, ratio):
    with hybrid_inference(pipe, ratio) as passes:
        assert torch.equal(generate(pipe), images["trained"])
    assert passes == ForwardPasses(trained=STEPS, base=0)
    assert torch.equal(generate(pipe), images["trained"])


@pytest.mark.parametrize("ratio", [0, 0.0])
def test_ratio_0_is_the_base_model(pipe, images, ratio):
    with hybrid_inference(pipe, ratio) as passes:
        assert torch.equal(generate(pipe), images["base"])
    assert passes == ForwardPasses(trained=0, base=STEPS)
    assert torch.equal(generate(pipe), images["trained"])


@pytest.mark.parametrize("cutoff", range(1, STEPS))
def test_between_the_two(pipe, images, cutoff):
    with hybrid_inference(pipe, cutoff / STEPS) as passes:
        hybrid = generate(pipe)
    assert torch.equal(hybrid, switching_by_hand(pipe, cutoff))
    assert not torch.equal(hybrid, images["trained"])
    assert not torch.equal(hybrid, images["base"])
    assert passes == ForwardPasses(trained=cutoff, base=STEPS - cutoff)
    assert torch.equal(generate(pipe), images["trained"])


def test_the_default_ratio(pipe):
    with hybrid_inference(pipe) as passes:
        generate(pipe)
    assert passes == ForwardPasses(trained=4, base=1)


@pytest.mark.parametrize("ratio", [0.0, 0.6])
def test_several_calls_in_one_context(pipe, ratio):
    """Each call counts its own steps, also after one with another number of steps."""
    with hybrid_inference(pipe, ratio) as passes:
        first = generate(pipe)
        generate(pipe, num_inference_steps=2)
        second = generate(pipe)
    assert torch.equal(first, second)
    assert torch.equal(first, switching_by_hand(pipe, int(ratio * STEPS)))
    trained = 0 if ratio == 0 else 3 + 1 + 3
    assert passes == ForwardPasses(trained=trained, base=12 - trained)


@pytest.mark.parametrize("cutoff", [0, 2, STEPS])
def test_both_passes_of_true_cfg_go_to_the_same_model(pipe, cutoff):
    with hybrid_inference(pipe, cutoff / STEPS) as passes:
        hybrid = generate(pipe, **true_cfg())
    assert torch.equal(hybrid, switching_by_hand(pipe, cutoff, **true_cfg()))
    assert passes == ForwardPasses(trained=2 * cutoff, base=2 * (STEPS - cutoff))


def test_image_to_image_counts_the_steps_that_are_run(pipe):
    """Strength 0.6 skips two of five steps, and 70% of the other three are two whole steps."""
    image_pipe = FluxImg2ImgPipeline(**pipe.components)
    image_pipe.set_progress_bar_config(disable=True)
    arguments = {"image": torch.zeros(1, 3, 8, 8), "strength": 0.6}
    with hybrid_inference(image_pipe, 0.7) as passes:
        hybrid = generate(image_pipe, **arguments)
    assert passes == ForwardPasses(trained=2, base=1)
    assert torch.equal(hybrid, switching_by_hand(image_pipe, 2, **arguments))


@pytest.mark.parametrize("ratio", [0.0, 0.6, 1.0])
def test_full_fine_tuning_takes_the_base_transformer(ratio):
    pipe = build_pipeline()
    base_transformer = copy.deepcopy(pipe.transformer)
    for parameter in pipe.transformer.parameters():
        parameter.data = parameter.data * 1.1
    trained_transformer = pipe.transformer
    trained = generate(pipe)
    cutoff = round(ratio * STEPS)

    def swap(pipe, step, timestep, kwargs):
        if step + 1 == cutoff:
            pipe.transformer = base_transformer
        return kwargs

    if cutoff == 0:
        pipe.transformer = base_transformer
    by_hand = generate(pipe, swap)
    pipe.transformer = trained_transformer
    with hybrid_inference(pipe, ratio, base_transformer) as passes:
        hybrid = generate(pipe)
        assert pipe.transformer is trained_transformer
    assert torch.equal(hybrid, by_hand)
    assert torch.equal(hybrid, trained) == (ratio == 1)
    assert passes == ForwardPasses(trained=cutoff, base=STEPS - cutoff)
    assert torch.equal(generate(pipe), trained)


def test_another_family():
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
    )
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"))
    tokenizers = dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"))
    pipe = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None,
        transformer=transformer.eval(),
        **parts,
        **tokenizers,
    )
    pipe.set_progress_bar_config(disable=True)
    add_lora(pipe, ["to_q", "to_v", "proj_out"])
    negative = {key: value for key, value in true_cfg().items() if key != "true_cfg_scale"}
    trained = generate(pipe, **negative)
    with hybrid_inference(pipe, 0.4) as passes:
        hybrid = generate(pipe, **negative)
    assert torch.equal(hybrid, switching_by_hand(pipe, 2, **negative))
    assert passes == ForwardPasses(trained=2, base=3)
    assert not torch.equal(hybrid, trained)
    assert torch.equal(generate(pipe, **negative), trained)


# ---- The pipeline is left as it was ----


class Stop(Exception):
    pass


def stop_at(monkeypatch, pipe, where: str, step: int, error: type[BaseException]):
    """Makes step `step` of the next call raise in the transformer, the scheduler or the returned callback."""

    def stop(*args, **kwargs):
        raise error

    def arm():
        if where == "transformer":
            monkeypatch.setattr(pipe.transformer.single_transformer_blocks[0], "forward", stop)
        if where == "scheduler":
            monkeypatch.setattr(pipe.scheduler, "step", stop)

    def callback(pipe, index, timestep, kwargs):
        if where == "callback" and index == step:
            raise error
        if index == step - 1:
            arm()
        return kwargs

    if step == 0:
        arm()
    return callback


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("where", ["transformer", "scheduler", "callback"])
@pytest.mark.parametrize("step", [0, 2, STEPS - 1])
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_a_call_that_raises(pipe, images, monkeypatch, ratio, where, step, error):
    """It leaves the pipeline as it was, inside the context and after it."""
    by_hand = switching_by_hand(pipe, int(ratio * STEPS))
    with hybrid_inference(pipe, ratio) as passes:
        with pytest.raises(error):
            generate(pipe, stop_at(monkeypatch, pipe, where, step, error))
        monkeypatch.undo()
        assert passes.trained + passes.base == step + 1
        assert lora_is_on(pipe)
        assert torch.equal(generate(pipe), by_hand)

    with pytest.raises(error):
        with hybrid_inference(pipe, ratio):
            generate(pipe, stop_at(monkeypatch, pipe, where, step, error))
    monkeypatch.undo()
    assert lora_is_on(pipe)
    assert torch.equal(generate(pipe), images["trained"])


def test_an_error_outside_of_a_call(pipe, images):
    with pytest.raises(Stop):
        with hybrid_inference(pipe, 0.0):
            raise Stop
    assert torch.equal(generate(pipe), images["trained"])


def test_a_pipeline_that_is_interrupted(pipe, images):
    def interrupt(pipe, step, timestep, kwargs):
        pipe._interrupt = step == 3
        return kwargs

    by_hand = switching_by_hand(pipe, 2)
    with hybrid_inference(pipe, 0.4) as passes:
        generate(pipe, interrupt)
        assert passes == ForwardPasses(trained=2, base=2)
        assert torch.equal(generate(pipe), by_hand)
    assert lora_is_on(pipe)
    assert torch.equal(generate(pipe), images["trained"])


@pytest.mark.parametrize("error", [None, Stop])
def test_requires_grad_is_left_alone(pipe, monkeypatch, error):
    for index, parameter in enumerate(pipe.transformer.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    before = {name: parameter.requires_grad for name, parameter in pipe.transformer.named_parameters()}
    with hybrid_inference(pipe, 0.4):
        if error is None:
            generate(pipe)
        else:
            with pytest.raises(error):
                generate(pipe, stop_at(monkeypatch, pipe, "transformer", 3, error))
        inside = {name: parameter.requires_grad for name, parameter in pipe.transformer.named_parameters()}
    assert inside == before
    assert {name: parameter.requires_grad for name, parameter in pipe.transformer.named_parameters()} == before


@pytest.mark.parametrize("own_forward", ["none", "accelerate", "diffusers"])
@pytest.mark.parametrize("full", [False, True])
def test_hooks_on_forward_run_and_stay(pipe, own_forward, full):
    """Libraries replace `forward` by an attribute of the instance."""
    base_transformer = None
    if full:
        base_transformer = build_pipeline().transformer
    by_hand = switching_by_hand(pipe, 2)
    seen = []

    class Spy(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    if own_forward == "accelerate":
        cpu_offload_with_hook(pipe.transformer, execution_device="cpu")
    if own_forward == "diffusers":
        HookRegistry.check_if_exists_or_initialize(pipe.transformer).register_hook(Spy(), "spy")
    before = dict(vars(pipe.transformer))
    with hybrid_inference(pipe, 0.4, base_transformer) as passes:
        assert torch.equal(generate(pipe), by_hand)
    after = vars(pipe.transformer)
    assert after.get("forward") is before.get("forward")
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() <= {"_compiled_call_impl"}
    assert pipe.transformer._compiled_call_impl is None
    if own_forward == "diffusers":
        assert len(seen) == (passes.trained if full else passes.trained + passes.base)


def test_hooks_that_are_renewed_after_each_call(pipe, images):
    """As `enable_model_cpu_offload` does it on an accelerator."""
    by_hand = switching_by_hand(pipe, 2)
    cpu_offload_with_hook(pipe.transformer, execution_device="cpu")
    with hybrid_inference(pipe, 0.4) as passes:
        for _ in range(2):
            assert torch.equal(generate(pipe), by_hand)
            remove_hook_from_module(pipe.transformer, recurse=True)
            cpu_offload_with_hook(pipe.transformer, execution_device="cpu")
    assert passes == ForwardPasses(trained=4, base=6)
    hooked = vars(pipe.transformer)["forward"]
    assert hooked.func.__module__.startswith("accelerate")
    assert torch.equal(generate(pipe), images["trained"])


def test_a_compiled_transformer_stays_compiled(pipe, images):
    by_hand = switching_by_hand(pipe, 2)
    calls = []

    def compiled(*args, **kwargs):
        calls.append(lora_is_on(pipe))
        return pipe.transformer._call_impl(*args, **kwargs)

    pipe.transformer._compiled_call_impl = compiled  # what `transformer.compile()` sets
    with hybrid_inference(pipe, 0.4):
        assert torch.equal(generate(pipe), by_hand)
    assert calls == [True, True, False, False, False]
    assert pipe.transformer._compiled_call_impl is compiled


def test_a_lora_that_was_off_stays_off(pipe, images):
    base_transformer = build_pipeline().transformer
    pipe.transformer.disable_lora()
    with pytest.raises(ValueError, match="no active LoRA"):
        with hybrid_inference(pipe, 0.4):
            pass
    with hybrid_inference(pipe, 0.4, base_transformer) as passes:
        assert torch.equal(generate(pipe), images["base"])
    assert passes == ForwardPasses(trained=2, base=3)
    assert not lora_is_on(pipe)
    with hybrid_inference(pipe, 1.0):
        assert torch.equal(generate(pipe), images["base"])
    assert not lora_is_on(pipe)


def test_a_lora_that_is_switched_off_inside_stays_off(pipe, images):
    with hybrid_inference(pipe, 0.4):
        pipe.transformer.disable_lora()
        assert torch.equal(generate(pipe), images["base"])
    assert not lora_is_on(pipe)


# ---- Bad input ----


@pytest.mark.parametrize("ratio", RATIOS)
def test_no_base_model_is_an_error_before_any_call(ratio):
    pipe = build_pipeline()
    with pytest.raises(ValueError, match="`base_transformer` must be .*, got None.*load_lora_weights"):
        with hybrid_inference(pipe, ratio):
            pytest.fail("entered")


def test_ratio_1_needs_no_base_model():
    pipe = build_pipeline()
    expected = generate(pipe)
    with hybrid_inference(pipe, 1.0) as passes:
        assert torch.equal(generate(pipe), expected)
    assert passes == ForwardPasses(trained=STEPS, base=0)


def test_a_fused_lora_cannot_be_switched_off(pipe):
    """To unfuse it changes the weights by rounding."""
    pipe.fuse_lora()
    weights = copy.deepcopy(pipe.transformer.state_dict())
    with pytest.raises(ValueError, match="do not fuse it"):
        with hybrid_inference(pipe, 0.8):
            pytest.fail("entered")
    with hybrid_inference(pipe, 0.8, build_pipeline().transformer):
        generate(pipe)
    assert all(torch.equal(weights[name], tensor) for name, tensor in pipe.transformer.state_dict().items())


@pytest.mark.parametrize("ratio", [1.2, -0.1, float("nan"), float("inf"), "0.8", None])
def test_bad_ratios(pipe, ratio):
    with pytest.raises(ValueError) as error:
        with hybrid_inference(pipe, ratio):
            pytest.fail("entered")
    assert str(error.value) == f"`trained_ratio` must be in [0, 1], got {ratio!r}."


def test_the_trained_transformer_as_base_transformer(pipe):
    with pytest.raises(ValueError, match="`base_transformer` must be .*, got the pipeline's own"):
        with hybrid_inference(pipe, 0.8, pipe.transformer):
            pytest.fail("entered")


def test_contexts_do_not_nest(pipe, images):
    by_hand = switching_by_hand(pipe, 2)
    with hybrid_inference(pipe, 0.4) as passes:
        with pytest.raises(ValueError, match="`pipe` must be outside of `hybrid_inference`"):
            with hybrid_inference(pipe, 0.8):
                pytest.fail("entered")
        assert torch.equal(generate(pipe), by_hand)
    assert passes == ForwardPasses(trained=2, base=3)
    with hybrid_inference(pipe, 0.0):
        assert torch.equal(generate(pipe), images["base"])
    assert torch.equal(generate(pipe), images["trained"])


@pytest.mark.parametrize(
    ("ratio", "steps", "trained"),
    [(0.6, 50, 30), (0.29, 100, 29), (0.8, 25, 20), (0.8, 4, 3), (0.0, 9, 0), (1.0, 9, 9), (0.01, 9, 1)],
)
def test_num_trained_steps(ratio, steps, trained):
    assert num_trained_steps(ratio, steps) == trained
