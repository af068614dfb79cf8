"""The search for the number of transitions that fit, against passes that run out of memory, and measured memory."""

import gc
import weakref

import pytest
import torch
from helpers import PROMPTS, assert_same, make_trainer, trained
from torch import nn

from diffusers_mixgrpo import Engine, MixGRPOConfig
from diffusers_mixgrpo.training import memory, preflight
from diffusers_mixgrpo.training.memory import (
    PeakMemory,
    find_pass_size,
    find_replay_batch_size,
    has_to_search,
    optimizer_memory,
    tensor_bytes,
)


# 8 images at two window steps each in one training batch: 16 transitions, one optimizer step per iteration
WHOLE = {"num_inference_steps": 4, "per_device_train_batch_size": 8, "steps_per_generation": 1, "max_steps": 1}


def out_of_memory():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Limit:
    """A device that holds the activations of `most` images: more, with a graph, and the pass runs out of memory."""

    def __init__(self, transformer: nn.Module, most: int, at_block: bool = False):
        self.most = most
        self.sizes = []
        self.graphs = []
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
    """A trainer of a new pipeline, with `WHOLE` and changes to it."""
    return lambda **changes: make_trainer(tmp_path, **(WHOLE | changes))


@pytest.fixture
def search(monkeypatch):
    """Search on the CPU too, where passes of these tests raise what an accelerator would."""

    def has_to_search(engine):
        return engine.settings.replay_batch_size is None and not engine.settings.reuse_rollout_graph

    monkeypatch.setattr(memory, "has_to_search", has_to_search)
    monkeypatch.setattr(preflight, "has_to_search", has_to_search)


def roll_out(engine):
    return engine.roll_out(engine.plan(0, PROMPTS[:2]))


def find(engine, rollout, optimizer=None):
    """The size that is found for the first training batch."""
    images = rollout.training_batches(engine.settings.per_device_train_batch_size)[0]
    return find_pass_size(engine, rollout, images, optimizer)


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
    weight = nn.Parameter(torch.ones(3))
    sizes = []

    def run_pass(size):
        sizes.append(size)
        if size > most:
            raise out_of_memory()
        (weight * size).sum().backward()

    assert find_replay_batch_size(run_pass, transitions, [weight]) == tried[-1]
    assert sizes == tried
    assert weight.grad is None


def test_if_nothing_fits_the_error_says_what_to_do():
    weight = nn.Parameter(torch.ones(3))
    weight.grad = before = torch.ones(3)

    def run_pass(size):
        raise out_of_memory()

    with pytest.raises(torch.OutOfMemoryError, match="gradient_checkpointing=True") as error:
        find_replay_batch_size(run_pass, 4, [weight])
    assert "Tried to allocate" in str(error.value.__context__)
    assert weight.grad is before


def test_another_error_is_not_taken_for_a_lack_of_memory():
    weight = nn.Parameter(torch.ones(3))
    sizes = []

    def run_pass(size):
        sizes.append(size)
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        find_replay_batch_size(run_pass, 4, [weight])
    assert sizes == [4]


def test_gradients_and_random_states_are_left_alone():
    weight = nn.Parameter(torch.ones(3))
    weight.grad = before = torch.full((3,), 7.0)
    state = torch.get_rng_state()

    def run_pass(size):
        (weight * torch.rand(3)).sum().backward()
        if size > 2:
            raise out_of_memory()

    assert find_replay_batch_size(run_pass, 8, [weight]) == 2
    assert weight.grad is before and before.tolist() == [7.0] * 3
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("accumulates", [False, True])
def test_a_pass_that_will_find_gradients_finds_them_in_the_search(accumulates):
    weight = nn.Parameter(torch.ones(3))
    found = {}

    def run_pass(size):
        found[size] = weight.grad is not None
        if size > 2:
            raise out_of_memory()

    find_replay_batch_size(run_pass, 4, [weight], accumulates=accumulates)
    assert found == {4: accumulates, 2: True}


def test_memory_is_held_for_what_is_to_come():
    """Of a device of 100 bytes: with 60 reserved only passes of up to 40 fit, one byte a transition."""
    weight = nn.Parameter(torch.ones(1))
    held = []
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
    engine = make(lora=lora).engine
    rollout = roll_out(engine)

    def gradient(pass_size):
        engine.policy.transformer.zero_grad()
        engine.backward(rollout, rollout.order, pass_size=pass_size)
        return {name: p.grad for name, p in engine.policy.transformer.named_parameters() if p.grad is not None}

    expected = gradient(16)
    limit = Limit(engine.policy.transformer, most=5)
    size = find(engine, rollout)
    found = gradient(size)
    assert size == 4
    assert limit.sizes == [16, 8, 4] + [4] * 4  # three to find it, then the batch of 16
    # The gradient of a weight sums over 16 transitions and 64 tokens in another order: float32's 6e-8 times the root
    # of their number, through some layers, is a few millionths of the largest element.
    scale = max(value.abs().max().item() for value in expected.values())
    assert scale > 1e-6
    assert_same(found, expected, atol=1e-4 * scale)


def test_the_search_leaves_no_trace(make, search):
    """Where all fits, a run with a search is bit for bit the one without."""
    plain = make(replay_batch_size=16, max_steps=2)
    searched = make(max_steps=2)
    limit = Limit(searched.pipe.transformer, most=16)
    for trainer in (plain, searched):
        torch.manual_seed(3)
        trainer.train()
    assert limit.sizes == [16] * 3  # one to find it, one in each iteration
    assert_same(trained(plain), trained(searched))
    for first, second in zip(plain.state.log_history, searched.state.log_history, strict=True):
        for name in first:
            if not name.startswith(("time/", "train_")) or name == "train_loss":
                assert first[name] == second[name], name


def test_it_searches_once_a_run(make, search):
    trainer = make(max_steps=2)
    limit = Limit(trainer.pipe.transformer, most=8)
    trainer.train()
    assert limit.sizes == [16, 8] + [8, 8] * 2
    limit.sizes.clear()
    limit.most = 4  # something else has come to lie on the device
    trainer.train()
    assert limit.sizes == [16, 8, 4] + [4] * 4 * 2


def test_a_failed_pass_keeps_no_activations(make, search):
    engine = make().engine
    rollout = roll_out(engine)
    limit = Limit(engine.policy.transformer, most=5, at_block=True)
    alive = []

    def look(model, args, kwargs):
        if torch.is_grad_enabled():
            alive.append(sum(graph() is not None for graph in limit.graphs))

    engine.policy.transformer.register_forward_pre_hook(look, with_kwargs=True)
    gc.disable()  # references alone must free it
    try:
        engine.backward(rollout, rollout.order, pass_size=find(engine, rollout))
    finally:
        gc.enable()
    assert limit.sizes == [16, 8, 4] + [4] * 4
    assert len(limit.graphs) == 7 and alive[:4] == [0] * 4


@pytest.mark.parametrize(
    "kwargs, size, tried",
    [
        ({}, 16, [16]),
        ({"replay_batch_size": 3}, 3, []),
        ({"reuse_rollout_graph": True}, 16, []),  # the graph is that of the rollout
        ({"per_device_train_batch_size": 4, "steps_per_generation": 2, "gradient_accumulation_steps": 2}, 8, [8]),
        # Images without an advantage count too, as they may have one in the next iteration.
        ({"replay_top_k": 1}, 16, [16]),
        ({"beta": 0.1}, 16, [16]),
    ],
)
def test_when_it_searches(make, search, kwargs, size, tried):
    engine = make(**kwargs).engine
    rollout = roll_out(engine)
    limit = Limit(engine.policy.transformer, most=100)
    assert find(engine, rollout) == size
    assert limit.sizes == tried
    assert all(p.grad is None for p in engine.trained_parameters)


def test_there_is_no_search_on_the_cpu_or_with_sharded_weights(make, monkeypatch):
    engine = make().engine
    assert not has_to_search(engine) and find(engine, roll_out(engine)) == 16
    monkeypatch.setattr(MixGRPOConfig, "device", torch.device("meta"))  # any accelerator
    assert has_to_search(engine)
    monkeypatch.setattr(Engine, "is_sharded", True)
    assert not has_to_search(engine)


def test_the_reference_uses_the_batches_of_sampling(make):
    engine = make(beta=0.1, sample_batch_size=4).engine
    sizes = []
    engine.policy.transformer.register_forward_pre_hook(
        lambda model, args, kwargs: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    roll_out(engine)
    assert max(sizes) == 4 and sizes[-4:] == [4] * 4  # 16 transitions


# ---- Memory of the optimizer ----


def test_the_memory_of_the_optimizer_is_held_before_its_first_step(make, search, monkeypatch):
    reserved = []
    real = memory.find_replay_batch_size

    def noted(*args, reserve, **kwargs):
        reserved.append(reserve)
        return real(*args, reserve=reserve, **kwargs)

    monkeypatch.setattr(memory, "find_replay_batch_size", noted)
    trainer = make(lora=False)
    trainer.train()
    state = trainer.optimizer.optimizer.state_dict()["state"].values()
    moments = sum(value.nbytes for entry in state for value in entry.values() if value.numel() > 1)
    weights = trainer.engine.trained_parameters
    assert reserved == [moments] and moments == 2 * tensor_bytes(weights)
    assert optimizer_memory(trainer.args, trainer.optimizer, weights) == moments
    find(trainer.engine, trainer.rollout, trainer.optimizer)
    assert reserved == [moments, 0]


# ---- Preflight ----


def test_preflight_finds_the_size_of_the_run(make, search):
    trainer = make()
    limit = Limit(trainer.pipe.transformer, most=5)
    report = trainer.preflight()
    assert report.replay_batch_size == 4
    assert "16 transitions per device, up to 4 in one pass, as memory allows" in str(report)
    assert all(p.grad is None for p in trainer.engine.trained_parameters)
    limit.sizes.clear()
    trainer.train()
    assert limit.sizes == [16, 8, 4] + [4] * 4  # it searches for itself, and finds the same
    small = make(replay_batch_size=4).preflight()
    assert report.memory["activations"] == pytest.approx(small.memory["activations"], rel=0.02)


def test_on_the_cpu_preflight_promises_nothing(make):
    report = make().preflight()
    assert report.replay_batch_size is None
    assert "16 transitions per device, up to 16 in one pass\n" in str(report)


# ---- Measuring ----


def test_peak_memory_counts_storages_while_they_live():
    before = torch.ones(1000)
    with PeakMemory(torch.device("cpu")) as peak:
        first = torch.ones(100)
        view = first.view(10, 10)[2:]  # no memory of its own
        before.add_(1)
        del first
        second = torch.ones(50)
        del view
        third = torch.ones(120)
        del second, third
    assert peak.bytes == 4 * (50 + 120)


def test_peak_memory_can_be_switched_off():
    with PeakMemory(torch.device("cpu"), active=False) as peak:
        torch.ones(100)
    assert peak.bytes == 0


def test_bytes_of_tensors():
    assert tensor_bytes([torch.ones(10), torch.ones(3, dtype=torch.bfloat16)]) == 40 + 6
    assert tensor_bytes([]) == 0
