"""What diffusers offers for speed and memory, reached through the configuration: the same numbers, the same files."""

import copy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import redness
from diffusers import FluxPipeline
from diffusers.models import attention_dispatch
from peft import LoraConfig
from safetensors.torch import load_file

from diffusers_mixgrpo import MixGRPOConfig, MixGRPOTrainer
from diffusers_mixgrpo.prepare_pipeline import compile_repeated_blocks, place_components
from diffusers_mixgrpo.quantization import make_quantization


PROMPTS = [{"prompt": text} for text in ("a cat", "two dogs", "sea", "red")]
INT8 = {
    "quant_backend": "torchao",
    "quant_kwargs": {"quant_type": "Int8WeightOnlyConfig"},
    "components_to_quantize": ["transformer", "text_encoder_2"],
}
NF4 = {
    "quant_backend": "bitsandbytes_4bit",
    "quant_kwargs": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
    "components_to_quantize": "transformer",
}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A trainer of two prompts with four images each per iteration, two optimizer steps in each."""
    registry = attention_dispatch._AttentionBackendRegistry  # diffusers keeps the last backend for the whole process
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)

    def make(model, lora=True, **kwargs):
        config = {
            "output_dir": str(tmp_path / "output"),
            "height": 32,
            "width": 32,
            "num_inference_steps": 5,
            "max_sequence_length": 12,
            "window_size": 2,
            "window_start": 1,
            "window_strategy": "frozen",
            "num_generations": 4,
            "per_device_train_batch_size": 4,
            "steps_per_generation": 2,
            "epsilon": 1e-2,
            "learning_rate": 1e-3,
            "max_steps": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        peft_config = LoraConfig(r=4, lora_alpha=8) if lora else None
        config = MixGRPOConfig(**(config | kwargs))
        return MixGRPOTrainer(model, redness, config, train_dataset=PROMPTS, peft_config=peft_config)

    return make


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.pipe.transformer.named_parameters() if p.requires_grad}


def rollout(trainer, iteration=0):
    return trainer._generate_rollout(PROMPTS[:2], iteration).trajectory


# ---- Attention ----


def test_the_attention_backend_is_used_in_sampling_and_in_training(make, tiny_pipe, monkeypatch):
    plain = rollout(make(tiny_pipe, attention_backend="native"))
    tiny_pipe.transformer.delete_adapters("default")
    backends = attention_dispatch._AttentionBackendRegistry._backends
    name, calls = attention_dispatch.AttentionBackendName._NATIVE_MATH, []
    math_attention = backends[name]

    def counting(*args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return math_attention(*args, **kwargs)

    monkeypatch.setitem(backends, name, counting)
    trainer = make(tiny_pipe, attention_backend="_native_math", max_steps=2)
    ours = rollout(trainer)
    # 2 prompts at once before the window and 8 images at once from there: 5 passes of 2 blocks
    assert calls == [False] * 10
    torch.testing.assert_close(ours.log_probs, plain.log_probs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.latents, plain.latents, rtol=1e-4, atol=1e-5)
    calls.clear()
    trainer.train()
    assert calls == [False] * 10 + [True] * 2 * 2  # two optimizer steps, each one replay in one pass
    assert max(logged(trainer, "ratio/on_policy_max_deviation")) < 1e-6


# ---- Compiled blocks ----


def compiled(transformer):
    return {name: m._compiled_call_impl for name, m in transformer.named_modules() if m._compiled_call_impl}


def test_blocks_are_compiled_once(make, tiny_pipe):
    first = make(tiny_pipe, compile_repeated_blocks=True)
    before = compiled(tiny_pipe.transformer)
    assert set(before) == {"transformer_blocks.0", "single_transformer_blocks.0"}
    second = make(tiny_pipe, lora=False, compile_repeated_blocks=True)  # goes on with the first one's LoRA
    assert compiled(second.pipe.transformer) == before and second.pipe is first.pipe
    compile_repeated_blocks(tiny_pipe.transformer)
    assert compiled(tiny_pipe.transformer) == before


def test_the_reference_is_compiled_as_the_policy_is(make, tiny_pipe):
    trainer = make(tiny_pipe, lora=False, beta=0.1, compile_repeated_blocks=True)
    assert compiled(trainer.reference).keys() == compiled(tiny_pipe.transformer).keys() != set()
    assert set(compiled(trainer.reference).values()).isdisjoint(compiled(tiny_pipe.transformer).values())


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("lora", [False, True])
def test_compiled_blocks_compute_and_save_the_same(make, shared_pipe, tmp_path, monkeypatch, lora):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))

    def train(**kwargs):
        pipe = FluxPipeline(**{name: copy.deepcopy(part) for name, part in shared_pipe.components.items()})
        pipe.set_progress_bar_config(disable=True)
        # With the LoRA, blocks are compiled for batches of any size: 2 before the window, and 8. Else for 8 alone.
        options = {"gradient_checkpointing": True, "max_steps": 2, "shared_noise": lora} | kwargs
        trainer = make(pipe, lora, output_dir=str(tmp_path / str(len(kwargs))), **options)
        trajectory = rollout(trainer)
        trainer.train()
        trainer.save_model()
        return trainer, trajectory

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, expected = train()
    assert not torch._dynamo.utils.counters["frames"]
    trainer, trajectory = train(compile_repeated_blocks=True)
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] == frames["total"] >= 4  # two kinds of blocks, with and without gradient; none given up
    torch.testing.assert_close(trajectory.log_probs, expected.log_probs, rtol=1e-5, atol=1e-6)
    assert max(logged(trainer, "ratio/on_policy_max_deviation")) < 1e-6
    for name in ("loss", "grad_norm"):  # of the first step: Adam moves weights whose gradient is rounding alone
        assert logged(trainer, name)[0] == pytest.approx(logged(plain, name)[0], rel=1e-3)
    assert weights(trainer).keys() == weights(plain).keys()
    file = "pytorch_lora_weights.safetensors" if lora else "transformer/diffusion_pytorch_model.safetensors"
    saved = load_file(f"{trainer.args.output_dir}/{file}")
    assert saved.keys() == load_file(f"{plain.args.output_dir}/{file}").keys()
    assert not any("_orig_mod" in name for name in saved)


# ---- Quantised weights ----


def test_lora_on_quantised_weights(make, pipeline_folder, tmp_path):
    pytest.importorskip("torchao")
    trainer = make(pipeline_folder, quantization=INT8, gradient_checkpointing=True)
    pipe, stock = trainer.pipe, FluxPipeline.from_pretrained(pipeline_folder)
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.base_layer.weight
    assert type(weight.data).__name__ == "Int8Tensor" and weight.qdata.dtype == torch.int8
    scale = stock.transformer.transformer_blocks[0].attn.to_q.weight.abs().amax(1, keepdim=True) / 127
    exact = stock.transformer.transformer_blocks[0].attn.to_q.weight
    assert ((weight.dequantize() - exact).abs() <= scale * 0.6).all()  # rounded to 8 bits, row by row
    assert "Int8Tensor" in {type(p.data).__name__ for p in pipe.text_encoder_2.parameters()}
    assert {type(p.data).__name__ for p in pipe.vae.parameters()} == {"Tensor"}
    assert all("lora" in name and value.dtype == torch.float32 for name, value in weights(trainer).items())
    # 8 bits and a scale per row: between a quarter and a half of the float32 weights
    frozen = trainer.preflight().memory["frozen weights"]
    assert 0.25 < frozen / sum(p.nbytes for p in stock.transformer.parameters()) < 0.5

    before, codes = weights(trainer), weight.qdata.clone()
    trainer.train()
    assert max(logged(trainer, "ratio/on_policy_max_deviation")) < 1e-6
    assert torch.equal(weight.qdata, codes)
    assert any(not torch.equal(value, before[name]) for name, value in weights(trainer).items())
    trainer.save_model()
    stock.load_lora_weights(trainer.args.output_dir)
    saved = load_file(f"{trainer.args.output_dir}/pytorch_lora_weights.safetensors")
    assert len(saved) == len(before) and all(value.dtype == torch.float32 for value in saved.values())
    stock.set_progress_bar_config(disable=True)
    options = {"height": 32, "width": 32, "num_inference_steps": 5, "max_sequence_length": 12}
    picture = stock("a cat", generator=torch.Generator().manual_seed(0), **options).images[0]
    difference = np.asarray(picture, dtype=int) - np.asarray(trainer.sample_images(["a cat"], [0])[0], dtype=int)
    assert 0 < abs(difference).max() <= 8  # of 255: the rounding of the base alone


def test_quantised_weights_are_not_trained_themselves(make, pipeline_folder, tiny_pipe):
    with pytest.raises(ValueError, match="`quantization=.*cannot be trained themselves.*`peft_config`"):
        make(pipeline_folder, lora=False, quantization=NF4)
    with pytest.raises(ValueError, match="`quantization=.* says how to load a pipeline, and `model` is one"):
        make(tiny_pipe, quantization=NF4)
    tiny_pipe.transformer.is_quantized = True
    with pytest.raises(ValueError, match="`model`: the transformer's quantised weights cannot be trained themselves"):
        make(tiny_pipe, lora=False)
    with pytest.raises(ValueError, match="`merge_lora=True` would round the LoRA"):
        make(tiny_pipe, merge_lora=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 4}, "`quantization` must have 'quant_backend' and 'components_to_quantize', .* 'bits': 4"),
        ({"components_to_quantize": None}, "`quantization` must have 'quant_backend' and 'components_to_quantize'"),
        ({"components_to_quantize": ["unet"]}, "must be among vae, text_encoder, .*transformer.* got unet"),
        ({"components_to_quantize": ["transformer", "tokenizer"]}, "must be among .* got tokenizer"),
        ({"quant_backend": "bnb"}, "'quant_backend' must be one of .*bitsandbytes_4bit.*torchao.*, got 'bnb'"),
        ({"quant_kwargs": {"load_in_4bit": "yes"}}, "`quantization=.*load_in_4bit must be a boolean"),
    ],
)
def test_quantization_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        make_quantization(NF4 | changes, FluxPipeline)


def test_a_backend_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match=r"`quantization` with 'torchao' needs a package .*\[quantization\]"):
        make_quantization(INT8, FluxPipeline)


def test_torchao_by_name_and_in_its_own_words():
    quantization = pytest.importorskip("torchao.quantization")
    from diffusers import TorchAoConfig
    from torchao.core.config import config_to_dict
    from transformers import TorchAoConfig as TransformersTorchAoConfig

    expected = quantization.Int8WeightOnlyConfig()
    for kind in ("Int8WeightOnlyConfig", config_to_dict(expected)):
        mapping = make_quantization(INT8 | {"quant_kwargs": {"quant_type": kind}}, FluxPipeline).quant_mapping
        assert type(mapping["transformer"]) is TorchAoConfig
        assert type(mapping["text_encoder_2"]) is TransformersTorchAoConfig
        assert mapping["transformer"].quant_type == mapping["text_encoder_2"].quant_type == expected
    with pytest.raises(ValueError, match="`quantization=.*Int3"):
        make_quantization(INT8 | {"quant_kwargs": {"quant_type": "Int3"}}, FluxPipeline)


# ---- The VAE on the CPU ----


def test_components_go_where_they_are_needed(tiny_pipe):
    args = SimpleNamespace(device=torch.device("meta"), offload_vae=True)
    place_components(tiny_pipe, args, stay=("text_encoder",))
    devices = {name: getattr(part, "device", torch.device("cpu")).type for name, part in tiny_pipe.components.items()}
    assert [name for name, device in devices.items() if device == "meta"] == ["text_encoder_2"]
    args.offload_vae = False
    place_components(tiny_pipe, args)
    assert tiny_pipe.vae.device.type == "meta" and tiny_pipe.transformer.device.type == "cpu"


def test_the_vae_comes_for_each_decoding_and_leaves(make, tiny_pipe, monkeypatch):
    trainer, events = make(tiny_pipe, offload_vae=True, sample_batch_size=4, decode_batch_size=2), []
    vae, to, decode = tiny_pipe.vae, tiny_pipe.vae.to, tiny_pipe.vae.decode
    monkeypatch.setattr(vae, "to", lambda device: events.append("out" if device == "cpu" else "in") or to(device))
    monkeypatch.setattr(vae, "decode", lambda *args, **kwargs: events.append("decode") or decode(*args, **kwargs))
    one = ["in", "decode", "decode", "out"]
    rollout(trainer)
    assert events == one * 2  # two prompts, each with four images that are decoded in pairs
    trainer.preflight()
    assert events == one * 2 + ["in", "decode", "out"] + one * 2
    events.clear()
    trainer.sample_images(["a cat", "sea"])
    assert events == ["in", "decode", "out"]
    monkeypatch.setattr(trainer.policy, "decode", lambda *args: 1 / 0)
    events.clear()
    with pytest.raises(ZeroDivisionError):
        rollout(trainer)
    assert events == ["in", "out"]
