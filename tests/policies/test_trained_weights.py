"""Trained weights on disk: diffusers' files, and back into a pipeline in training."""

import contextlib
import copy
import os
import pickle

import pytest
import torch
from diffusers import FluxPipeline
from helpers import make_trainer, small_config
from peft import LoraConfig

from diffusers_mixgrpo.policies.adapters import TrainedWeights
from diffusers_mixgrpo.policies.flux import FluxPolicy
from diffusers_mixgrpo.policies.preparation import prepare_pipeline
from diffusers_mixgrpo.policies.trained_weights import load_trained_weights, save_trained_weights


@pytest.fixture
def prepare(shared_pipe, tmp_path):
    """A copy of the miniature pipeline with trainable weights, moved at random as if they were trained."""

    def prepare(rank=4, seed=0, name=None) -> tuple[FluxPipeline, TrainedWeights]:
        pipe = FluxPipeline(**{name: copy.deepcopy(part) for name, part in shared_pipe.components.items()})
        pipe.set_progress_bar_config(disable=True)
        config = LoraConfig(r=rank, lora_alpha=3 * rank) if rank else None
        if name is not None:
            targets = list(FluxPolicy.lora_target_modules)
            pipe.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=targets), name)
            config = None
        weights = prepare_pipeline(FluxPolicy(pipe, 32, 32), config, small_config(tmp_path))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in trainable(pipe).values():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        return pipe, weights

    return prepare


def trainable(pipe) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in pipe.transformer.named_parameters() if p.requires_grad}


def predicted(pipe) -> torch.Tensor:
    policy = FluxPolicy(pipe, 32, 32, max_sequence_length=12)
    with torch.no_grad():
        return policy.velocity(policy.initial_latents([0]), torch.tensor(500.0), policy.encode(["a cat"]))


@pytest.mark.parametrize("rank", [4, 0])
def test_weights_come_back_to_the_last_bit(prepare, tmp_path, rank):
    pipe, weights = prepare(rank)
    save_trained_weights(pipe, str(tmp_path / "saved"), weights)
    other, other_weights = prepare(rank, seed=1)
    before = {name: p.clone() for name, p in trainable(other).items()}
    load_trained_weights(other, str(tmp_path / "saved"), other_weights)
    expected = trainable(pipe)
    assert trainable(other).keys() == expected.keys()
    for name, parameter in trainable(other).items():
        assert torch.equal(parameter, expected[name])
    assert any(not torch.equal(p, before[name]) for name, p in trainable(other).items())


@pytest.mark.parametrize("name", [None, "mine"])
def test_the_stock_pipeline_loads_the_lora(prepare, shared_pipe, tmp_path, name):
    pipe, weights = prepare(name=name)
    assert weights == (True, name or "default")
    save_trained_weights(pipe, str(tmp_path / "saved"), weights)
    stock = FluxPipeline(**{name: copy.deepcopy(part) for name, part in shared_pipe.components.items()})
    without = predicted(stock)
    stock.load_lora_weights(str(tmp_path / "saved"))  # with the alpha from its metadata
    expected = predicted(pipe)
    assert (predicted(stock) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (without - expected).abs().max() > 1e-2 * expected.abs().max()


def test_the_stock_transformer_loads_full_weights(prepare, tmp_path):
    pipe, weights = prepare(rank=0)
    save_trained_weights(pipe, str(tmp_path / "saved"), weights)
    loaded = type(pipe.transformer).from_pretrained(tmp_path / "saved" / "transformer")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in pipe.transformer.state_dict().items())


@pytest.mark.parametrize("rank", [4, 0])
def test_gathered_weights_are_saved_instead_of_the_pipelines_own(prepare, tmp_path, rank):
    pipe, weights = prepare(rank)
    other, _ = prepare(rank, seed=1)
    gathered = {name: value.clone() for name, value in other.transformer.state_dict().items()}
    save_trained_weights(pipe, str(tmp_path / "saved"), weights, state_dict=gathered)
    load_trained_weights(pipe, str(tmp_path / "saved"), weights)
    for name, parameter in trainable(pipe).items():
        assert torch.equal(parameter, trainable(other)[name])


@pytest.mark.parametrize("rank, missing", [(4, "pytorch_lora_weights.safetensors"), (0, "transformer")])
def test_a_folder_without_the_files(prepare, tmp_path, rank, missing):
    pipe, weights = prepare(rank)
    with pytest.raises(FileNotFoundError, match=f"`resume_from_checkpoint` must be .*got .*has no {missing}"):
        load_trained_weights(pipe, str(tmp_path), weights)


def test_a_lora_of_another_rank(prepare, tmp_path):
    pipe, weights = prepare(rank=4)
    save_trained_weights(pipe, str(tmp_path / "saved"), weights)
    other, weights = prepare(rank=2)
    with pytest.raises(ValueError, match="has other layers or another rank than this trainer's"):
        load_trained_weights(other, str(tmp_path / "saved"), weights)


# ---- Files that would run code ----


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


FILES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"]


@pytest.mark.parametrize("lora", [True, False])
def test_a_checkpoint_runs_no_code(tmp_path, make, lora):
    trainer = make(lora=lora, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    checkpoint = tmp_path / "output" / "checkpoint-2"
    weights = checkpoint if lora else checkpoint / "transformer"
    (name,) = [path.name for path in weights.glob("*.safetensors")]
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Malicious(marker)))
    assert marker.is_dir()  # so that this test can fail
    marker.rmdir()
    for file in [*(checkpoint / name for name in FILES), weights / name.replace("safetensors", "bin"), weights / name]:
        original = file.read_bytes() if file.exists() else None
        if file.suffix == ".bin" and original is None:
            (weights / name).rename(weights / "aside")  # or the other file would not be looked at
        torch.save({"a": Malicious(marker)}, file)
        with pytest.raises(Exception) if file.name != "training_args.bin" else contextlib.nullcontext():
            make_trainer(tmp_path / "output", lora=lora, max_steps=4).train(resume_from_checkpoint=str(checkpoint))
        assert not marker.exists(), file
        if (weights / "aside").exists():
            (weights / "aside").rename(weights / name)
            file.unlink()
        else:
            file.write_bytes(original)
