"""
The search for the number of transitions that fit, against passes that really run out of memory.

Run as a script, this file is what each of two processes does.
"""

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_pipeline
from peft import LoraConfig
from torch import nn
from transformers import TrainerCallback

from diffusers_mixgrpo import MixGRPOConfig, MixGRPOTrainer
from diffusers_mixgrpo import replay_batch_size as module
from diffusers_mixgrpo.preflight import preflight
from diffusers_mixgrpo.replay_batch_size import find_replay_batch_size, has_to_search, optimizer_memory


PROMPTS = [{"prompt": text} for text in ("a cat", "two dogs", "sea")]


def redness(prompts, images):
    return [float(np.asarray(image, dtype=float)[..., 0].mean()) for image in images]


def out_of_memory():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Limit:
    """A device that holds the activations of `most` images: more, with a graph, and the pass runs out of memory."""

    def __init__(self, transformer: nn.Module, most: int, at_block: bool = False):
        self.most, self.sizes, self.graphs = most, [], []
        transformer.register_forward_pre_hook(self.note, with_kwargs=True)
        where = transformer.single_transformer_blocks[-1] if at_block else transformer
        where.register_forward_pre_hook(self.check, with_kwargs=True)

    def note(self, model, args, kwargs):
        if torch.is_grad_enabled():
            self.sizes.append(len(kwargs["hidden_states"]))

    def check(self, model, args, kwargs):
        if torch.is_grad_enabled():
            hidden = kwargs["hidden_states"]
            if hidden.grad_fn is not None:
                self.graphs.append(weakref.ref(hidden))
            if len(hidden) > self.most:
                raise out_of_memory()


@pytest.fixture
def make(tmp_path):
    """A trainer of 8 images, at two window steps each: one optimizer step per iteration."""

    def make(lora=True, **kwargs):
        config = {
            "output_dir": str(tmp_path / "output"),
            "height": 32,
            "width": 32,
            "num_inference_steps": 4,
            "max_sequence_length": 12,
            "window_size": 2,
            "num_generations": 4,
            "per_device_train_batch_size": 8,
            "steps_per_generation": 1,
            "epsilon": 1e-2,
            "max_steps": 1,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        args = MixGRPOConfig(**(config | kwargs))
        peft_config = LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian") if lora else None
        return MixGRPOTrainer(build_pipeline(), redness, args, PROMPTS, peft_config=peft_config)

    return make


@pytest.fixture
def search(monkeypatch):
    """Search on the CPU too, where passes of these tests raise what an accelerator would."""

    def has_to_search(trainer):
        return trainer.args.replay_batch_size is None and not trainer.args.reuse_rollout_graph

    monkeypatch.setattr(module, "has_to_search", has_to_search)
    monkeypatch.setattr("diffusers_mixgrpo.preflight.has_to_search", has_to_search)


def trained(trainer):
    return {n: p for n, p in trainer.pipe.transformer.named_parameters() if p.requires_grad}


def gradients(trainer):
    """Those of the last optimizer step of a run."""
    found = {}

    class Note(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            found.update({name: p.grad.clone() for name, p in trained(trainer).items()})

    trainer.add_callback(Note())
    trainer.train()
    return found


# ---- The search ----


@pytest.mark.parametrize(
    "transitions, most, tried",
    [
        (12, 100, [12]),
        (12, 12, [12]),
        (12, 11, [12, 6]),
        (12, 5, [12, 6, 3]),
        (9, 4, [9, 5, 3]),
        (7, 1, [7, 4, 2, 1]),
        (1, 1, [1]),
    ],
)
def test_it_halves_until_a_pass_fits(transitions, most, tried):
    weight, sizes = nn.Parameter(torch.ones(3)), []

    def run_pass(size):
        sizes.append(size)
        if size > most:
            raise out_of_memory()
        (weight * size).sum().backward()

    assert find_replay_batch_size(run_pass, transitions, [weight]) == tried[-1]
    assert sizes == tried
    assert weight.grad is None


def test_if_nothing_fits_it_says_what_to_do():
    weight, before = nn.Parameter(torch.ones(3)), torch.ones(3)
    weight.grad = before

    def run_pass(size):
        raise out_of_memory()

    with pytest.raises(torch.OutOfMemoryError, match="gradient_checkpointing=True") as error:
        find_replay_batch_size(run_pass, 4, [weight])
    assert "Tried to allocate" in str(error.value.__context__)
    assert weight.grad is before


def test_another_error_is_not_taken_for_a_lack_of_memory():
    weight, sizes = nn.Parameter(torch.ones(3)), []

    def run_pass(size):
        sizes.append(size)
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        find_replay_batch_size(run_pass, 4, [weight])
    assert sizes == [4]


def test_gradients_and_random_states_are_left_alone():
    weight, state = nn.Parameter(torch.ones(3)), torch.get_rng_state()
    weight.grad = before = torch.full((3,), 7.0)

    def run_pass(size):
        (weight * torch.rand(3)).sum().backward()
        if size > 2:
            raise out_of_memory()

    assert find_replay_batch_size(run_pass, 8, [weight]) == 2
    assert weight.grad is before and before.tolist() == [7.0] * 3
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("accumulates", [False, True])
def test_a_pass_that_will_find_gradients_finds_them_in_the_search(accumulates):
    weight, found = nn.Parameter(torch.ones(3)), {}

    def run_pass(size):
        found[size] = weight.grad is not None
        if size > 2:
            raise out_of_memory()

    find_replay_batch_size(run_pass, 4, [weight], accumulates=accumulates)
    assert found == {4: accumulates, 2: True}


def test_memory_is_held_for_what_is_to_come():
    """Of a device of 100 bytes: with 60 reserved only passes of up to 40 fit, one byte a transition."""
    weight, held = nn.Parameter(torch.ones(1)), []
    empty = torch.empty

    def run_pass(size):
        if size + sum(tensor.nbytes for tensor in (ref() for ref in held) if tensor is not None) > 100:
            raise out_of_memory()

    with pytest.MonkeyPatch.context() as patch:

        def noted(*args, **kwargs):
            tensor = empty(*args, **kwargs)
            held.append(weakref.ref(tensor))
            return tensor

        patch.setattr(torch, "empty", noted)
        assert find_replay_batch_size(run_pass, 64, [weight]) == 64
        assert find_replay_batch_size(run_pass, 64, [weight], reserve=60) == 32
    gc.collect()
    assert all(ref() is None for ref in held)


# ---- In training ----


@pytest.mark.parametrize("lora", [True, False])
def test_the_found_size_gives_the_gradient_of_all_at_once(make, search, lora):
    expected = gradients(make(lora=lora, replay_batch_size=16, max_grad_norm=0.0))
    trainer = make(lora=lora, max_grad_norm=0.0)
    limit = Limit(trainer.pipe.transformer, most=5)
    found = gradients(trainer)
    assert trainer._replay_size == 4
    assert limit.sizes == [16, 8, 4] + [4] * 4  # three to find it, then the batch of 16
    scale = max(value.abs().max() for value in expected.values())
    assert scale > 1e-6
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6 * scale.item(), msg=name)


def test_the_search_leaves_no_trace(make, search):
    """Where all fits, a run with a search is bit for bit the one without."""
    plain, searched = make(replay_batch_size=16, max_steps=2), make(max_steps=2)
    limit = Limit(searched.pipe.transformer, most=16)
    for trainer in (plain, searched):
        torch.manual_seed(3)
        trainer.train()
    assert limit.sizes == [16] * 3  # one to find it, one in each iteration
    for first, second in zip(trained(plain).values(), trained(searched).values(), strict=True):
        assert torch.equal(first, second)
    for first, second in zip(plain.state.log_history, searched.state.log_history, strict=True):
        for name in first:
            if not name.startswith(("time/", "train_")) or name == "train_loss":
                assert first[name] == second[name], name


def test_it_searches_once_a_run(make, search):
    trainer = make(max_steps=3)
    limit = Limit(trainer.pipe.transformer, most=8)
    trainer.train()
    assert limit.sizes == [16, 8] + [8, 8] * 3
    limit.sizes.clear()
    limit.most = 4  # something else has come to lie on the device
    trainer.train()
    assert limit.sizes == [16, 8, 4] + [4] * 4 * 3


def test_a_failed_pass_keeps_no_activations(make, search):
    trainer = make()
    limit = Limit(trainer.pipe.transformer, most=5, at_block=True)
    alive = []

    def look(model, args, kwargs):
        if torch.is_grad_enabled():
            alive.append(sum(graph() is not None for graph in limit.graphs))

    trainer.pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    gc.disable()  # references alone must free it
    try:
        trainer.train()
    finally:
        gc.enable()
    assert limit.sizes == [16, 8, 4] + [4] * 4
    assert len(limit.graphs) == 7 and alive[:4] == [0] * 4


def test_images_without_an_advantage_count_in_the_search(make, search):
    """As they may have one in the next iteration."""
    trainer = make(replay_top_k=1)
    limit = Limit(trainer.pipe.transformer, most=100)
    trainer.train()
    assert limit.sizes == [16, 8]  # of the groups of four, two each are replayed


@pytest.mark.parametrize(
    "kwargs, sizes",
    [
        ({"replay_batch_size": 3}, [3] * 5 + [1]),
        ({"reuse_rollout_graph": True}, [8] * 2),  # the rollout's own passes
        ({"beta": 0.1}, [16, 16]),
        ({"per_device_train_batch_size": 4, "steps_per_generation": 2, "gradient_accumulation_steps": 2}, [8, 8, 8]),
    ],
)
def test_when_it_searches(make, search, kwargs, sizes):
    trainer = make(**kwargs)
    limit = Limit(trainer.pipe.transformer, most=100)
    trainer.train()
    assert limit.sizes == sizes


def test_on_the_cpu_there_is_no_search(make):
    trainer = make()
    assert not has_to_search(trainer)
    limit = Limit(trainer.pipe.transformer, most=16)
    trainer.train()
    assert limit.sizes == [16]
    trainer = make()
    trainer.args.__dict__["_setup_devices"] = torch.device("meta")  # what `args.device` gives: any accelerator
    assert has_to_search(trainer)
    trainer.is_fsdp_enabled = True
    assert not has_to_search(trainer)


def test_the_reference_goes_in_batches_of_the_sampler(make):
    trainer, sizes = make(beta=0.1, sample_batch_size=4), []

    def note(model, args, kwargs):
        if not torch.is_grad_enabled():
            sizes.append(len(kwargs["hidden_states"]))

    trainer.pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    assert max(sizes) == 4 and sizes[-4:] == [4] * 4  # 16 transitions


@pytest.mark.slow
def test_two_processes_find_their_own_sizes(tmp_path):
    """One holds all transitions of a batch at once, the other two of them, and they train one policy."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["sizes"] == [8] * 5
    assert second["sizes"] == [8, 4, 2] + [2] * 16
    assert first["weights"] == second["weights"]


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    module.has_to_search = lambda trainer: True  # as on an accelerator
    args = MixGRPOConfig(
        output_dir=str(folder / "output"),
        height=32,
        width=32,
        num_inference_steps=4,
        max_sequence_length=12,
        window_size=2,
        num_generations=4,
        per_device_train_batch_size=4,
        steps_per_generation=2,
        learning_rate=1e-3,
        max_steps=4,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = MixGRPOTrainer(build_pipeline(), redness, args, PROMPTS, peft_config=LoraConfig(r=4))
    limit = Limit(trainer.pipe.transformer, most=8 if rank == 0 else 3)
    trainer.train()
    weights = [p.detach().double().abs().sum().item() for p in trained(trainer).values()]
    (folder / f"{rank}.json").write_text(json.dumps({"sizes": limit.sizes, "weights": weights}))


# ---- Memory of the optimizer ----


def test_the_optimizers_memory_is_held_before_its_first_step(make, search, monkeypatch):
    reserved, find = [], module.find_replay_batch_size

    def noted(*args, reserve, **kwargs):
        reserved.append(reserve)
        return find(*args, reserve=reserve, **kwargs)

    monkeypatch.setattr(module, "find_replay_batch_size", noted)
    trainer = make(lora=False)
    trainer.train()
    state = trainer.optimizer.optimizer.state_dict()["state"].values()
    moments = sum(value.nbytes for entry in state for value in entry.values() if value.numel() > 1)
    assert reserved == [moments] and moments == 2 * sum(p.nbytes for p in trained(trainer).values())
    assert optimizer_memory(trainer, list(trained(trainer).values())) == moments
    module.replay_batch_size(trainer, *(torch.arange(2) for _ in range(2)))
    assert reserved == [moments, 0]


# ---- The self-check ----


def test_the_preflight_finds_the_size_of_the_run(make, search):
    trainer = make()
    limit = Limit(trainer.pipe.transformer, most=5)
    report = preflight(trainer)
    assert report.replay_batch_size == 4
    assert "16 transitions per device, up to 4 in one pass, as memory allows" in str(report)
    assert trainer._replay_size is None and all(p.grad is None for p in trained(trainer).values())
    trainer.train()
    assert trainer._replay_size == 4 and set(limit.sizes) == {16, 8, 4}
    small = preflight(make(replay_batch_size=4))
    assert report.memory["activations"] == pytest.approx(small.memory["activations"], rel=0.02)


def test_on_the_cpu_the_preflight_promises_nothing(make):
    report = preflight(make())
    assert report.replay_batch_size is None
    assert "16 transitions per device, up to 16 in one pass\n" in str(report)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
