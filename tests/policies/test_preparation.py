"""What is trained and what is frozen, and diffusers' options for speed and memory."""

import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers.models import attention_dispatch
from helpers import PROMPTS, logged, small_config, trained
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

from diffusers_mixgrpo import MixGRPOConfig, MixGRPOTrainer, Trajectory
from diffusers_mixgrpo.policies.flux import FluxPolicy
from diffusers_mixgrpo.policies.preparation import (
    compile_repeated_blocks,
    make_reference,
    place_components,
    prepare_pipeline,
    rename_gradient_checkpointing,
)


# One step before the window, which a group shares
FROZEN = {"window_strategy": "frozen", "window_start": 1}


@pytest.fixture(autouse=True)
def own_attention_backend(monkeypatch):
    """diffusers keeps the last attention backend for the whole process."""
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)


def rollout(trainer: MixGRPOTrainer) -> Trajectory:
    engine = trainer.engine
    return engine.roll_out(engine.plan(0, PROMPTS[:2])).trajectory


def assert_close(actual: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    """Equal up to a share of the largest magnitude."""
    assert (actual - expected).abs().max() <= relative * expected.abs().max()


# ---- Weights ----


def prepare(pipe, tmp_path, peft_config=None, **changes):
    return prepare_pipeline(FluxPolicy(pipe, 32, 32), peft_config, small_config(tmp_path, **changes))


def trainable(pipe) -> dict[str, torch.Tensor]:
    models = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    named = ((f"{name}.{key}", p) for name, model in models.items() for key, p in model.named_parameters())
    return {key: p for key, p in named if p.requires_grad}


def test_a_new_lora(tiny_pipe, tmp_path):
    tiny_pipe.to(torch.bfloat16)
    config = LoraConfig(r=4, lora_alpha=8)
    assert prepare(tiny_pipe, tmp_path, config) == (True, "default")
    assert config.target_modules is None  # the caller's configuration is not changed
    found = trainable(tiny_pipe)
    assert found and all(name.startswith("transformer.") and "lora" in name for name in found)
    assert {p.dtype for p in found.values()} == {torch.float32}
    adapted = {name.split(".lora_")[0] for name in found}
    for target in FluxPolicy.lora_target_modules:
        assert any(name.endswith(target) for name in adapted), target
    assert tiny_pipe.transformer.proj_out.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("half", [False, True])
def test_full_fine_tuning(tiny_pipe, tmp_path, half):
    tiny_pipe.to(torch.bfloat16)
    assert not prepare(tiny_pipe, tmp_path, bf16=half).is_lora
    found = trainable(tiny_pipe)
    assert set(found) == {f"transformer.{name}" for name, _ in tiny_pipe.transformer.named_parameters()}
    assert {p.dtype for p in found.values()} == {torch.float32 if half else torch.bfloat16}


def test_a_loaded_lora_is_trained_further(tiny_pipe, tmp_path):
    for name in ("first", "second"):
        tiny_pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), name)
    tiny_pipe.set_adapters(["first", "second"])
    with pytest.raises(ValueError, match="must have one active LoRA to train, got 2: .*`pipe.set_adapters"):
        prepare(tiny_pipe, tmp_path)
    with pytest.raises(ValueError, match=r"`peft_config` must be None .*got one for .*\['first', 'second'\]"):
        prepare(tiny_pipe, tmp_path, LoraConfig(r=4))
    tiny_pipe.set_adapters("second")
    assert prepare(tiny_pipe, tmp_path) == (True, "second")
    assert all(".second." in name for name in trainable(tiny_pipe))


def test_dropout_is_off(tiny_pipe, tmp_path):
    tiny_pipe.text_encoder.train()
    prepare(tiny_pipe, tmp_path, LoraConfig(r=2, lora_dropout=0.5))
    assert all(module.p == 0 for module in tiny_pipe.transformer.modules() if isinstance(module, nn.Dropout))
    assert not tiny_pipe.text_encoder.training


def test_a_reference_is_frozen_and_stays(tiny_pipe, tmp_path):
    prepare(tiny_pipe, tmp_path)
    reference = make_reference(tiny_pipe.transformer, small_config(tmp_path))
    before = copy.deepcopy(tiny_pipe.transformer.state_dict())
    with torch.no_grad():
        tiny_pipe.transformer.proj_out.weight += 1
    assert not any(p.requires_grad for p in reference.parameters())
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())


# ---- Attention ----


def test_the_attention_backend_is_used_in_sampling_and_in_training(make, tiny_pipe, monkeypatch):
    plain = rollout(make(attention_backend="native", **FROZEN))
    tiny_pipe.transformer.delete_adapters("default")
    backends = attention_dispatch._AttentionBackendRegistry._backends
    name = attention_dispatch.AttentionBackendName._NATIVE_MATH
    math_attention = backends[name]
    calls = []

    def counting(*args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return math_attention(*args, **kwargs)

    monkeypatch.setitem(backends, name, counting)
    trainer = make(attention_backend="_native_math", max_steps=2, **FROZEN)
    ours = rollout(trainer)
    # 2 prompts at once before the window and 8 images at once from there: 5 passes of 2 blocks
    assert calls == [False] * 10
    assert_close(ours.log_probs, plain.log_probs, relative=1e-4)
    assert_close(ours.latents, plain.latents, relative=1e-4)
    calls.clear()
    trainer.train()
    assert calls == [False] * 10 + [True] * 2 * 2  # two optimizer steps, each one replay in one pass
    assert max(logged(trainer, "ratio/on_policy_max_deviation")) <= 1e-5


# ---- Compiled blocks ----


def compiled(transformer):
    return {name: m._compiled_call_impl for name, m in transformer.named_modules() if m._compiled_call_impl}


def test_blocks_are_compiled_once(make, tiny_pipe):
    first = make(compile_repeated_blocks=True)
    before = compiled(tiny_pipe.transformer)
    assert set(before) == {"transformer_blocks.0", "single_transformer_blocks.0"}
    second = make(lora=False, compile_repeated_blocks=True)  # goes on with the first one's LoRA
    assert compiled(second.pipe.transformer) == before and second.pipe is first.pipe
    compile_repeated_blocks(tiny_pipe.transformer)
    assert compiled(tiny_pipe.transformer) == before


def test_the_reference_is_compiled_as_the_policy_is(make, tiny_pipe):
    reference = make(lora=False, beta=0.1, compile_repeated_blocks=True).engine.reference
    assert compiled(reference).keys() == compiled(tiny_pipe.transformer).keys() != set()
    assert set(compiled(reference).values()).isdisjoint(compiled(tiny_pipe.transformer).values())


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("lora", [False, True])
def test_compiled_blocks_compute_and_save_the_same(make, tiny_pipe, tmp_path, monkeypatch, lora):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    second_pipe = type(tiny_pipe)(**{name: copy.deepcopy(part) for name, part in tiny_pipe.components.items()})
    second_pipe.set_progress_bar_config(disable=True)

    def train(pipe, **kwargs):
        # With the LoRA, blocks are compiled for batches of any size: 2 before the window, and 8. Else for 8 alone.
        options = {"gradient_checkpointing": True, "max_steps": 2, "shared_noise": lora} | FROZEN | kwargs
        trainer = make(pipe=pipe, lora=lora, **options)
        trajectory = rollout(trainer)
        trainer.train()
        trainer.save_model(str(tmp_path / str(len(kwargs))))
        return trainer, trajectory

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, expected = train(tiny_pipe)
    assert not torch._dynamo.utils.counters["frames"]
    trainer, trajectory = train(second_pipe, compile_repeated_blocks=True)
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] == frames["total"] >= 4  # two kinds of blocks, with and without gradient; none given up
    assert_close(trajectory.log_probs, expected.log_probs, relative=1e-4)
    assert max(logged(trainer, "ratio/on_policy_max_deviation")) <= 1e-5
    for name in ("loss", "grad_norm"):  # of the first step: Adam moves weights whose gradient is rounding alone
        assert logged(trainer, name)[0] == pytest.approx(logged(plain, name)[0], rel=1e-2, abs=1e-5)
    assert trained(trainer).keys() == trained(plain).keys()
    file = "pytorch_lora_weights.safetensors" if lora else "transformer/diffusion_pytorch_model.safetensors"
    saved = load_file(tmp_path / "1" / file)
    assert saved.keys() == load_file(tmp_path / "0" / file).keys()
    assert not any("_orig_mod" in name for name in saved)


# ---- Gradient checkpointing ----


def test_gradient_checkpointing_of_diffusers_under_the_trainers_name(tiny_pipe):
    transformer = tiny_pipe.transformer
    rename_gradient_checkpointing(transformer)
    with pytest.raises(ValueError, match="`activation_checkpointing_kwargs` .* got every_n_layers=2, offload=False"):
        transformer.activation_checkpointing_enable(every_n_layers=2)
    with pytest.raises(ValueError, match="got every_n_layers=1, offload=True"):
        transformer.activation_checkpointing_enable(offload=True)
    assert not transformer.is_gradient_checkpointing
    transformer.activation_checkpointing_enable({"use_reentrant": False})
    assert transformer.is_gradient_checkpointing


# ---- Devices ----


def test_components_go_where_they_are_needed(tiny_pipe):
    settings = SimpleNamespace(device=torch.device("meta"), offload_vae=True)
    place_components(tiny_pipe, settings, stay=("text_encoder",))
    devices = {name: getattr(part, "device", torch.device("cpu")).type for name, part in tiny_pipe.components.items()}
    assert [name for name, device in devices.items() if device == "meta"] == ["text_encoder_2"]
    settings.offload_vae = False
    place_components(tiny_pipe, settings)
    assert tiny_pipe.vae.device.type == "meta" and tiny_pipe.transformer.device.type == "cpu"


def test_components_with_hooks_are_left_to_them(tiny_pipe):
    tiny_pipe.vae._hf_hook = object()  # accelerate's, which moves it
    place_components(tiny_pipe, SimpleNamespace(device=torch.device("meta"), offload_vae=False))
    assert tiny_pipe.vae.device.type == "cpu" and tiny_pipe.text_encoder.device.type == "meta"


def test_the_vae_comes_for_each_decoding_and_leaves(make, tiny_pipe, monkeypatch):
    trainer = make(offload_vae=True, sample_batch_size=4, decode_batch_size=2)
    vae = tiny_pipe.vae
    to = vae.to
    decode = vae.decode
    events = []
    # "cpu:0" is the CPU to torch, but not the same word: so both devices differ where there is no other.
    monkeypatch.setattr(MixGRPOConfig, "device", torch.device("cpu", 0))
    monkeypatch.setattr(vae, "to", lambda device: events.append(str(device)) or to(device))
    monkeypatch.setattr(vae, "decode", lambda *args, **kwargs: events.append("decode") or decode(*args, **kwargs))
    one = ["cpu:0", "decode", "decode", "cpu"]
    rollout(trainer)
    assert events == one * 2  # two prompts, each with four images that are decoded in pairs
    events.clear()
    trainer.sample_images(["a cat", "sea"])
    assert events == ["cpu:0", "decode", "cpu"]
    events.clear()
    trainer.preflight()
    assert events.count("cpu:0") == events.count("cpu") >= 2
    assert events[0] == "cpu:0" and events[-1] == "cpu"
    monkeypatch.setattr(trainer.engine.policy, "decode", lambda *args: 1 / 0)
    events.clear()
    with pytest.raises(ZeroDivisionError):
        rollout(trainer)
    assert events == ["cpu:0", "cpu"]


# ---- Pipelines that cannot be prepared ----


@pytest.mark.parametrize(
    "part", ["vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "scheduler"]
)
def test_a_pipeline_without_a_part(make, tiny_pipe, part):
    setattr(tiny_pipe, part, None)
    with pytest.raises(ValueError, match=f"`model` must be a pipeline with all of its parts, got None as its {part}"):
        make()


@pytest.mark.parametrize("kind", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_cpu_offload(make, tiny_pipe, kind):
    getattr(tiny_pipe, kind)(device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"without CPU offload.*Call `pipe.remove_all_hooks\(\)` first"):
        make()
    tiny_pipe.remove_all_hooks()
    trainer = make(max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


def test_group_offload(make, tiny_pipe):
    tiny_pipe.transformer.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match="without CPU offload, got group offloading.*Load the pipeline again"):
        make()
