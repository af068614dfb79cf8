"""LoRAs to train: each that is accepted gives its images in a stock pipeline, and the others are refused at once."""

import numpy as np
import peft
import pytest
import torch
from diffusers import FluxPipeline
from helpers import build_pipeline, make_trainer, trained
from peft import LoraConfig

from diffusers_mixgrpo import MixGRPOTrainer


TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "proj_mlp"]


def sample(pipe) -> np.ndarray:
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    arguments = {"height": 32, "width": 32, "max_sequence_length": 12, "num_inference_steps": 4}
    pipe.set_progress_bar_config(disable=True)
    images = pipe(["a cat", "red"], generator=generators, **arguments).images
    return np.stack([np.asarray(image, dtype=int) for image in images])


def assert_reloads(trainer: MixGRPOTrainer, pipeline_folder: str) -> None:
    """
    The saved LoRA in a stock pipeline gives the images of the trained one, which are not those of the base model.

    The trainer's VAE has another memory format, whose convolutions round otherwise: at most by a step of 255.
    """
    trainer.save_model()
    stock = FluxPipeline.from_pretrained(pipeline_folder)
    untrained = sample(stock)
    stock.load_lora_weights(trainer.args.output_dir)
    expected = sample(trainer.pipe)
    assert np.abs(expected - untrained).max() > 8
    assert np.abs(sample(stock) - expected).max() <= 1


def train(tmp_path, **kwargs) -> MixGRPOTrainer:
    """A large learning rate makes a visible difference in two steps."""
    trainer = make_trainer(tmp_path / "output", **({"max_steps": 2, "learning_rate": 5e-2} | kwargs))
    trainer.train()
    return trainer


# ---- Kinds of LoRA ----

# Few layers need a larger effect
VISIBLE = {"init_lora_weights": False, "lora_alpha": 256}


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal", "r": 4},
        {"init_lora_weights": False},
        {"use_rslora": True},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True},
        {"lora_bias": True},
        {"lora_dropout": 0.2},
        {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 32}},
        {"target_modules": TARGETS, "exclude_modules": ["to_v"]},
        {"target_modules": r".*attn\.to_[qkv]", **VISIBLE},
        {
            "target_modules": ["to_q", "to_v", "to_out.0"],
            **VISIBLE,
            "layers_to_transform": [0],
            "layers_pattern": "transformer_blocks",
        },
    ],
    ids=str,
)
def test_a_lora_that_stock_pipelines_load(tmp_path, pipeline_folder, options):
    config = LoraConfig(**({"r": 4, "lora_alpha": 16} | options))
    assert_reloads(train(tmp_path, lora=config), pipeline_folder)


@pytest.mark.parametrize("name", ["LoHaConfig", "LoKrConfig", "OFTConfig", "IA3Config", "AdaLoraConfig", "VeraConfig"])
def test_other_adapters_are_refused(tmp_path, name):
    arguments = {"total_step": 10} if name == "AdaLoraConfig" else {}
    config = getattr(peft, name)(target_modules=TARGETS, **arguments)
    if name == "AdaLoraConfig":  # a LoraConfig to Python
        assert isinstance(config, LoraConfig)
    with pytest.raises(ValueError, match=rf"`peft_config` must be a LoraConfig, got {name}, .*Use LoraConfig\("):
        make_trainer(tmp_path, pipe="nowhere/nothing", lora=config)  # nothing is loaded


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "loftq", "eva", "corda", "lora_ga", "mica"])
def test_initializations_that_change_the_base_model_are_refused(tmp_path, start):
    config = LoraConfig()
    config.init_lora_weights = start  # some need further settings first
    with pytest.raises(ValueError, match=rf"must have an `init_lora_weights` that .*got '{start}'.*'orthogonal'"):
        make_trainer(tmp_path, pipe="nowhere/nothing", lora=config)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": "all"},
        {"modules_to_save": ["norm_out"]},
        {"target_parameters": ["a.weight"]},
        {"alora_invocation_tokens": [1]},
        {"use_qalora": True},
    ],
    ids=str,
)
def test_options_that_are_lost_are_refused(tmp_path, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"must have options that a stock pipeline loads, got {name}="):
        make_trainer(tmp_path, pipe="nowhere/nothing", lora=LoraConfig(**options))


def test_a_loaded_adapter_of_another_kind_is_refused(tmp_path):
    pipe = build_pipeline()
    pipe.transformer.add_adapter(LoraConfig(target_modules=["to_q"], init_lora_weights="pissa"), "mine")
    with pytest.raises(ValueError, match=r"`pipe.transformer.peft_config\['mine'\]` must have an `init_lora_weights`"):
        make_trainer(tmp_path, pipe=pipe, lora=False)


# ---- A LoRA that is loaded ----


@pytest.fixture
def lora_folder(tmp_path, shared_pipe):
    """A LoRA with a visible effect, trained before."""
    config = LoraConfig(r=4, lora_alpha=64, init_lora_weights=False)
    trainer = make_trainer(tmp_path / "first", lora=config)
    trainer.save_model()
    return str(tmp_path / "first")


@pytest.mark.parametrize("weight", [0.3, -0.5, {"transformer_blocks": 0.3, "single_transformer_blocks": 0.7}], ids=str)
def test_the_weight_of_a_loaded_lora_is_kept(tmp_path, pipeline_folder, lora_folder, weight):
    pipe = FluxPipeline.from_pretrained(pipeline_folder)
    pipe.load_lora_weights(lora_folder, adapter_name="mine")
    full = sample(pipe)
    if isinstance(weight, dict):
        for name, module in pipe.transformer.named_modules():
            if hasattr(module, "set_scale"):
                module.set_scale("mine", weight[name.split(".")[0]])
    else:
        pipe.set_adapters("mine", weight)
    weighted = sample(pipe)
    assert np.abs(full - weighted).max() > 8
    trainer = make_trainer(tmp_path / "output", pipe=pipe, lora=False, max_steps=2)
    assert np.abs(sample(pipe) - weighted).max() <= 1  # the VAE's memory format
    assert_reloads(trainer, pipeline_folder)
    trainer.train()
    assert_reloads(trainer, pipeline_folder)
    pipe.set_adapters("mine", 1.0)  # which is now its weight
    trainer.train()
    assert_reloads(trainer, pipeline_folder)


def test_a_lora_that_is_switched_off_is_switched_on(tmp_path, pipeline_folder, lora_folder):
    pipe = FluxPipeline.from_pretrained(pipeline_folder)
    pipe.load_lora_weights(lora_folder)
    pipe.disable_lora()
    trainer = make_trainer(tmp_path / "output", pipe=pipe, lora=False, max_steps=2)
    before = trained(trainer)
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in trained(trainer).items())
    assert_reloads(trainer, pipeline_folder)


def test_a_weight_of_zero_is_refused(tmp_path, pipeline_folder, lora_folder):
    pipe = FluxPipeline.from_pretrained(pipeline_folder)
    pipe.load_lora_weights(lora_folder, adapter_name="mine")
    pipe.set_adapters("mine", 0.0)
    with pytest.raises(ValueError, match="must have a weight other than 0, got 0 for 'mine'"):
        make_trainer(tmp_path / "output", pipe=pipe, lora=False)


def test_a_resumed_run_must_have_the_same_scale(tmp_path, pipeline_folder):
    train(tmp_path, save_strategy="steps", save_steps=2)
    for config in (LoraConfig(r=4, lora_alpha=16), LoraConfig(r=4, lora_alpha=8, use_rslora=True)):
        trainer = make_trainer(tmp_path / "output", lora=config)
        with pytest.raises(ValueError, match="The LoRA in .* has another scale than this trainer's"):
            trainer.train(resume_from_checkpoint=True)


# ---- Other LoRAs ----


@pytest.mark.parametrize("is_unloaded", [True, False])
@pytest.mark.parametrize("lora", [LoraConfig(r=4), False])
def test_a_fused_lora_is_refused_and_the_advice_works(tmp_path, pipeline_folder, lora_folder, lora, is_unloaded):
    pipe = FluxPipeline.from_pretrained(pipeline_folder)
    pipe.load_lora_weights(lora_folder, adapter_name="style")
    pipe.fuse_lora()
    if is_unloaded:
        pipe.unload_lora_weights()
    fused = sample(pipe)
    with pytest.raises(ValueError, match="must be a pipeline without a fused LoRA, got one with style in its weights"):
        make_trainer(tmp_path / "output", pipe=pipe, lora=lora)
    if not is_unloaded or not lora:
        return
    pipe.save_pretrained(tmp_path / "fused")
    trainer = train(tmp_path, pipe=str(tmp_path / "fused"))
    assert np.abs(sample(trainer.pipe) - fused).max() > 8
    assert_reloads(trainer, str(tmp_path / "fused"))


def test_a_lora_of_a_text_encoder_is_refused(tmp_path):
    pipe = build_pipeline()
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="with a LoRA of its transformer only, got one of its text_encoder"):
        make_trainer(tmp_path, pipe=pipe)
