"""Loading a pipeline: missing paths, precision, and quantized weights under a LoRA."""

import json
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
)
from helpers import build_pipeline, logged, make_trainer, small_config, trained
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from diffusers_mixgrpo.policies.loading import check_source, load_pipeline, make_quantization


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


def load(tmp_path, model, with_lora=True, **changes):
    return load_pipeline(model, small_config(tmp_path, **changes), with_lora)


# ---- Folders and repositories ----


def test_the_weights_are_those_of_the_folder(tmp_path, pipeline_folder, shared_pipe):
    pipe = load(tmp_path, pipeline_folder)
    assert type(pipe) is FluxPipeline
    for key, value in shared_pipe.transformer.state_dict().items():
        assert torch.equal(pipe.transformer.state_dict()[key], value)


def test_a_loaded_pipeline_is_used_as_it_is(tmp_path, shared_pipe):
    assert load(tmp_path, shared_pipe) is shared_pipe


@pytest.mark.parametrize(
    "path, problem",
    [
        ("./no/such/folder", "`model` must be a folder or a Hub repository .* there is no such folder"),
        ("nowhere", "`model` must be a folder or a Hub repository .* there is no such folder"),
        ("someone/something-that-is-not-there", "`model`='someone/.*could not be loaded"),
    ],
)
def test_a_missing_path(tmp_path, path, problem):
    with pytest.raises(FileNotFoundError, match=problem) as caught:
        load(tmp_path, path)
    assert path in str(caught.value)


def test_a_folder_without_a_pipeline(tmp_path):
    with pytest.raises(FileNotFoundError, match="`model` must be a pipeline's folder, got .* has no model_index.json"):
        load(tmp_path, tmp_path)


def test_a_pipeline_of_another_family(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    with pytest.raises(TypeError, match="`model` must be one of the supported diffusers pipelines .*got DiTPipeline"):
        load(tmp_path, tmp_path)


# ---- What is found before weights are loaded ----


@pytest.fixture(scope="session")
def sd3_folder(shared_pipe, tmp_path_factory):
    """A miniature SD3 with random weights."""
    config = shared_pipe.text_encoder.config.to_dict() | {"projection_dim": 32}
    clip = CLIPTextModelWithProjection(CLIPTextConfig(**config))
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=shared_pipe.vae,
        text_encoder=clip,
        tokenizer=shared_pipe.tokenizer,
        text_encoder_2=clip,
        tokenizer_2=shared_pipe.tokenizer,
        text_encoder_3=shared_pipe.text_encoder_2,
        tokenizer_3=shared_pipe.tokenizer_2,
    )
    folder = tmp_path_factory.mktemp("sd3")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def no_weights(monkeypatch):
    """Fails a test in which the weights of a pipeline are loaded."""

    def touched(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", touched)


def test_the_folder_of_another_family(tmp_path, no_weights):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    with pytest.raises(TypeError, match=r"`model` must be .*pipelines \(FluxPipeline, .*\), got WanPipeline"):
        check_source(tmp_path, small_config(tmp_path))
    with pytest.raises(TypeError, match="got WanPipeline"):
        make_trainer(tmp_path, pipe=str(tmp_path), rewards="no_such_module:reward")


def test_a_folder_is_loaded_by_its_own_class(tmp_path, sd3_folder):
    check_source(sd3_folder, small_config(tmp_path))
    assert type(load_pipeline(sd3_folder, small_config(tmp_path), with_lora=True)) is StableDiffusion3Pipeline


def test_another_family_loaded_by_the_wrong_class(tmp_path, sd3_folder):
    """diffusers does so with no more than a line in the log, and the first rollout died of it."""
    pipe = FluxPipeline.from_pretrained(sd3_folder)
    message = (
        "`model` must have a transformer of its own family, FluxTransformer2DModel, got a FluxPipeline with a SD3"
    )
    with pytest.raises(TypeError, match=message):
        make_trainer(tmp_path, pipe=pipe, rewards="no_such_module:reward")


@pytest.mark.parametrize("is_loaded", [False, True])
def test_the_layers_of_a_lora(tmp_path, pipeline_folder, shared_pipe, no_weights, is_loaded):
    """Before rewards and weights are loaded, from the configuration of the transformer."""
    lora = LoraConfig(target_modules=["attn.to_q", "attn.to_qq"])
    pipe = shared_pipe if is_loaded else pipeline_folder
    with pytest.raises(ValueError, match=r"`peft_config.target_modules` .* got 'attn.to_qq', .*Did you mean 'attn.to"):
        make_trainer(tmp_path, pipe=pipe, lora=lora, rewards="no_such_module:reward")
    state = torch.get_rng_state()
    check_source(pipe, small_config(tmp_path), LoraConfig(target_modules=["attn.to_q", "proj_mlp"]))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_layers_of_a_lora_for_a_transformer_that_is_passed(tmp_path, pipeline_folder, no_weights):
    transformer = build_pipeline().transformer
    transformer.extra = torch.nn.Linear(2, 2)
    lora = LoraConfig(target_modules=["extra"])
    check_source(pipeline_folder, small_config(tmp_path, model_init_kwargs={"transformer": transformer}), lora)
    with pytest.raises(ValueError, match="got 'extra', which no layer has"):
        check_source(pipeline_folder, small_config(tmp_path), lora)


def test_parts_that_are_left_out(tmp_path, pipeline_folder, no_weights):
    settings = small_config(tmp_path, model_init_kwargs={"text_encoder_2": None})
    with pytest.raises(ValueError, match="got None as its text_encoder_2. Load it without `text_encoder_2=None`"):
        check_source(pipeline_folder, settings)


def test_parts_that_a_folder_has_not(tmp_path, shared_pipe, no_weights):
    parts = dict(shared_pipe.components, text_encoder=None)
    FluxPipeline(**parts).save_pretrained(tmp_path / "pipe")
    with pytest.raises(ValueError, match="got None as its text_encoder. "):
        check_source(tmp_path / "pipe", small_config(tmp_path))
    settings = small_config(tmp_path, model_init_kwargs={"text_encoder": shared_pipe.text_encoder})
    check_source(tmp_path / "pipe", settings)


def test_the_scheduler_of_a_folder(tmp_path, shared_pipe, pipeline_folder, no_weights):
    check_source(pipeline_folder, small_config(tmp_path))
    parts = dict(shared_pipe.components, scheduler=DDIMScheduler(prediction_type="v_prediction"))
    FluxPipeline(**parts).save_pretrained(tmp_path / "pipe")
    with pytest.raises(
        ValueError, match="`scheduler` must be one of flow matching, got DDIMScheduler with prediction_"
    ):
        check_source(tmp_path / "pipe", small_config(tmp_path))
    check_source(tmp_path / "pipe", small_config(tmp_path, model_init_kwargs={"scheduler": shared_pipe.scheduler}))


def test_a_multistep_scheduler_of_flow_matching_is_trained_with_its_shift(tmp_path, tiny_pipe):
    tiny_pipe.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    trainer = make_trainer(tmp_path, pipe=tiny_pipe, max_steps=2)
    assert trainer.engine.scheduler.config.shift == 5.0
    trainer.train()
    tiny_pipe.scheduler.set_timesteps(5)
    assert trainer.rollout.trajectory.transitions.timesteps.tolist() == tiny_pipe.scheduler.timesteps[:2].tolist()


def test_the_revision_is_also_that_of_the_configuration(tmp_path, monkeypatch):
    asked = {}

    def load_config(name, **kwargs):
        asked.update(kwargs, name=name)
        raise OSError("offline")

    monkeypatch.setattr(DiffusionPipeline, "load_config", load_config)
    kwargs = {"revision": "refs/pr/1", "local_files_only": True, "torch_dtype": "bfloat16"}
    with pytest.raises(FileNotFoundError, match="`model`='owner/name' could not be loaded: offline"):
        load(tmp_path, "owner/name", model_init_kwargs=kwargs)
    assert asked == {"name": "owner/name", "revision": "refs/pr/1", "local_files_only": True}


# ---- Precision ----


@pytest.mark.parametrize("with_lora", [True, False])
@pytest.mark.parametrize("bf16", [True, False])
def test_only_weights_to_train_are_in_float32(tmp_path, pipeline_folder, with_lora, bf16):
    pipe = load(tmp_path, pipeline_folder, with_lora, bf16=bf16)
    half = torch.bfloat16 if bf16 else torch.float32
    assert pipe.transformer.dtype == (half if with_lora else torch.float32)
    assert pipe.vae.dtype == pipe.text_encoder.dtype == pipe.text_encoder_2.dtype == half


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_arguments_of_from_pretrained(tmp_path, pipeline_folder, shared_pipe, dtype):
    kwargs = {"torch_dtype": dtype, "text_encoder": shared_pipe.text_encoder}
    pipe = load(tmp_path, pipeline_folder, model_init_kwargs=kwargs)
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe.text_encoder is shared_pipe.text_encoder


# ---- Quantized weights ----


def test_lora_on_quantized_weights(make, pipeline_folder):
    pytest.importorskip("torchao")
    trainer = make(pipe=pipeline_folder, quantization=INT8, gradient_checkpointing=True, max_steps=2)
    pipe = trainer.pipe
    stock = FluxPipeline.from_pretrained(pipeline_folder)
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.base_layer.weight
    assert type(weight.data).__name__ == "Int8Tensor" and weight.qdata.dtype == torch.int8
    exact = stock.transformer.transformer_blocks[0].attn.to_q.weight
    scale = exact.abs().amax(1, keepdim=True) / 127
    assert ((weight.dequantize() - exact).abs() <= scale * 0.6).all()  # rounded to 8 bits, row by row
    assert "Int8Tensor" in {type(p.data).__name__ for p in pipe.text_encoder_2.parameters()}
    assert {type(p.data).__name__ for p in pipe.vae.parameters()} == {"Tensor"}
    before = trained(trainer)
    assert all("lora" in name and value.dtype == torch.float32 for name, value in before.items())
    # 8 bits and a scale per row: between a quarter and a half of the float32 weights
    frozen = trainer.preflight().memory["frozen weights"]
    assert 0.25 < frozen / sum(p.nbytes for p in stock.transformer.parameters()) < 0.5

    codes = weight.qdata.clone()
    trainer.train()
    assert max(logged(trainer, "ratio/on_policy_max_deviation")) <= 1e-5
    assert torch.equal(weight.qdata, codes)
    assert any(not torch.equal(value, before[name]) for name, value in trained(trainer).items())
    trainer.save_model()
    stock.load_lora_weights(trainer.args.output_dir)
    saved = load_file(f"{trainer.args.output_dir}/pytorch_lora_weights.safetensors")
    assert len(saved) == len(before) and all(value.dtype == torch.float32 for value in saved.values())
    stock.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = stock("a cat", generator=generator, **trainer.engine.policy.call_arguments).images[0]
    difference = np.asarray(image, dtype=int) - np.asarray(trainer.sample_images(["a cat"], [0])[0], dtype=int)
    assert 0 < abs(difference).max() <= 8  # of 255: the rounding of the base alone


def test_quantized_weights_are_not_trained_themselves(make, pipeline_folder, tiny_pipe):
    with pytest.raises(ValueError, match="`quantization=.*cannot be trained themselves.*`peft_config`"):
        make(pipe=pipeline_folder, lora=False, quantization=NF4)
    with pytest.raises(
        ValueError, match="`quantization` must be None for a pipeline that is loaded already, got {'qu"
    ):
        make(quantization=NF4)
    tiny_pipe.transformer.is_quantized = True
    with pytest.raises(ValueError, match="`model`: quantized weights cannot be trained themselves"):
        make(lora=False)
    with pytest.raises(ValueError, match="`merge_lora` must be False with quantized weights, got True"):
        make(merge_lora=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"components_to_quantize": ["unet"]}, "must be among vae, text_encoder, .*transformer.* got unet"),
        ({"components_to_quantize": ["transformer", "tokenizer"]}, "must be among .* got tokenizer"),
        ({"quant_backend": "bnb"}, "'quant_backend' must be one of .*bitsandbytes_4bit.*torchao.*, got 'bnb'"),
        ({"quant_kwargs": {"load_in_4bit": "yes"}}, "`quantization=.*load_in_4bit must be a boolean"),
    ],
)
def test_quantization_that_is_not_possible(changes, message):
    with pytest.raises(ValueError, match=message):
        make_quantization(NF4 | changes, FluxPipeline)


def test_a_backend_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match=r"`quantization` with 'torchao' needs a package .*\[quantization\]"):
        make_quantization(INT8, FluxPipeline)


def test_torchao_by_name_and_by_its_own_configuration():
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
