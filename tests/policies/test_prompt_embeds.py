"""Prompts that are encoded once: the text encoders' bits, from disk, and anew when the encoders have changed."""

import copy
import json
import os

import datasets
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from helpers import assert_same, make_trainer, trained
from peft import LoraConfig
from transformers import CLIPTokenizer, T5EncoderModel

from diffusers_mixgrpo import MixGRPOTrainer
from diffusers_mixgrpo.policies.flux import FluxPolicy
from diffusers_mixgrpo.policies.prompt_embeds import CachedPrompts, cache_folder, cache_prompts
from diffusers_mixgrpo.training.plan import prompts_of_run


PROMPTS = ["a cat", "two dogs", "sea", "red", "blue tree"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def make_policy(pipe, max_sequence_length=12) -> FluxPolicy:
    return FluxPolicy(pipe, height=32, width=32, num_inference_steps=4, max_sequence_length=max_sequence_length)


def cached(pipe, prompts=PROMPTS, **kwargs) -> tuple[CachedPrompts, dict[str, int]]:
    """The cached prompts, and how often each text encoder was called to get them."""
    calls = count_calls(pipe)
    return cache_prompts(make_policy(pipe, **kwargs), prompts, CPU), calls


def count_calls(pipe) -> dict[str, int]:
    calls = {"text_encoder": 0, "text_encoder_2": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    for name in calls:
        getattr(pipe, name).register_forward_hook(count(name))
    return calls


def both(count: int) -> dict[str, int]:
    return {"text_encoder": count, "text_encoder_2": count}


@torch.no_grad()
def assert_the_pipelines(conditioning, pipe, prompts):
    for i, prompt in enumerate(prompts):
        embeds, pooled, ids = pipe.encode_prompt(prompt, None, max_sequence_length=12)
        assert conditioning.rows["prompt_embeds"].dtype == embeds.dtype
        assert torch.equal(conditioning.rows["prompt_embeds"][i], embeds[0])
        assert torch.equal(conditioning.rows["pooled_prompt_embeds"][i], pooled[0])
        assert torch.equal(conditioning.shared["text_ids"], ids)


# ---- Bits ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_the_encoders_bit_for_bit(tiny_pipe, dtype):
    prompts, calls = cached(tiny_pipe.to(dtype))
    assert calls == both(5)
    order = ["red", "a cat", "red"]
    conditioning = prompts.encode(order)
    assert calls == both(5)  # from disk
    assert len(conditioning) == 3
    assert_the_pipelines(conditioning, tiny_pipe, order)
    embeds = conditioning.rows["prompt_embeds"]
    assert not torch.equal(embeds[0], embeds[1])


def test_a_second_run_reads_them(shared_pipe, pipeline_folder):
    prompts, _ = cached(copy.deepcopy(shared_pipe))
    expected = prompts.encode(PROMPTS)
    # Of the same content, but from another place, and with tokenizers that have not been called
    loaded = FluxPipeline.from_pretrained(pipeline_folder)
    again, calls = cached(loaded, PROMPTS[::-1])
    conditioning = again.encode(PROMPTS)
    assert calls == both(0)
    for actual, stored in ((conditioning.rows, expected.rows), (conditioning.shared, expected.shared)):
        assert actual.keys() == stored.keys()
        assert all(torch.equal(actual[name], tensor) for name, tensor in stored.items())


def test_only_new_prompts_are_encoded(tiny_pipe):
    cached(copy.deepcopy(tiny_pipe), ["a cat", "sea"])
    prompts, calls = cached(tiny_pipe, [*PROMPTS, "sea", "red"])
    assert calls == both(3)
    assert len(prompts) == 5 and "red" in prompts and "fog" not in prompts
    assert_the_pipelines(prompts.encode(PROMPTS), tiny_pipe, PROMPTS)


def change_weights(pipe):
    weight = pipe.text_encoder_2.encoder.block[0].layer[0].SelfAttention.q.weight
    with torch.no_grad():
        weight[3, 5] += 1e-3


def change_configuration(pipe):
    config = copy.deepcopy(pipe.text_encoder_2.config)
    config.layer_norm_epsilon = 1e-2
    weights = pipe.text_encoder_2.state_dict()
    pipe.text_encoder_2 = T5EncoderModel(config).eval()
    pipe.text_encoder_2.load_state_dict(weights)


def change_tokenizer(pipe):
    vocabulary = pipe.tokenizer.get_vocab()
    vocabulary["a</w>"], vocabulary["b</w>"] = vocabulary["b</w>"], vocabulary["a</w>"]
    pipe.tokenizer = CLIPTokenizer(vocabulary, [], model_max_length=16)


def change_precision(pipe):
    pipe.text_encoder.to(torch.bfloat16)
    pipe.text_encoder_2.to(torch.bfloat16)


def change_adapter(pipe):
    pipe.text_encoder.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))


@pytest.mark.parametrize(
    "change", [change_weights, change_configuration, change_tokenizer, change_precision, change_adapter]
)
def test_other_encoders_are_noticed(tiny_pipe, change):
    cached(copy.deepcopy(tiny_pipe), PROMPTS[:2])
    change(tiny_pipe)
    prompts, calls = cached(tiny_pipe, PROMPTS[:2])
    assert calls == both(2)
    assert_the_pipelines(prompts.encode(PROMPTS[:2]), tiny_pipe, PROMPTS[:2])


def test_the_strength_of_an_adapter_is_noticed(tiny_pipe):
    change_adapter(tiny_pipe)
    before = cache_folder(make_policy(tiny_pipe))
    for module in tiny_pipe.text_encoder.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.5)
    assert cache_folder(make_policy(tiny_pipe)) != before


def test_another_length_is_noticed(tiny_pipe):
    cached(tiny_pipe, PROMPTS[:2], max_sequence_length=12)
    prompts, calls = cached(tiny_pipe, PROMPTS[:2], max_sequence_length=8)
    assert calls == both(2)
    assert prompts.encode(PROMPTS[:2]).rows["prompt_embeds"].shape[1] == 8


def test_a_folder_of_the_callers_choice(tiny_pipe, tmp_path):
    policy = make_policy(tiny_pipe)
    cache_prompts(policy, ["sea"], CPU, folder=str(tmp_path / "mine"))
    assert len(list((tmp_path / "mine").glob("*.arrow"))) == 1
    assert not os.path.exists(cache_folder(policy))


def test_an_interrupted_run_stores_nothing_wrong(tiny_pipe):
    def interrupt(*_):
        if calls["text_encoder"] == 3:
            raise KeyboardInterrupt

    calls = count_calls(tiny_pipe)
    policy = make_policy(tiny_pipe)
    hook = tiny_pipe.text_encoder_2.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache_prompts(policy, PROMPTS, CPU)
    assert os.listdir(cache_folder(policy)) == []
    hook.remove()
    prompts, calls = cached(tiny_pipe)
    assert calls == both(5)
    assert_the_pipelines(prompts.encode(PROMPTS), tiny_pipe, PROMPTS)


def test_weights_that_are_not_in_memory(tiny_pipe):
    tiny_pipe.text_encoder_2.to("meta")
    with pytest.raises(ValueError, match="`cache_prompt_embeds` must be False while the weights of `text_encoder_2`"):
        cache_folder(make_policy(tiny_pipe))


# ---- Where the encoders are ----


def record_devices(pipe, events):
    """Append to `events` the devices that the encoders are moved to, and their calls."""
    for name in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipe, name)

        def to(device, name=name, move=encoder.to):
            events.append((name, str(device)))
            return move(device)

        encoder.to = to
        encoder.register_forward_hook(lambda *_, name=name: events.append((name, "called")))


# "cpu:0" is the CPU to torch, but not the same word: so both devices differ where there is no other.
DEVICE = torch.device("cpu", 0)
COME = [("text_encoder", "cpu:0"), ("text_encoder_2", "cpu:0")]
GO = [("text_encoder", "cpu"), ("text_encoder_2", "cpu")]
CALLED = [("text_encoder", "called"), ("text_encoder_2", "called")]


def test_encoders_come_to_the_device_and_leave_it(tiny_pipe, monkeypatch):
    monkeypatch.setattr(FluxPolicy, "device", DEVICE)
    record_devices(tiny_pipe, events := [])
    policy = make_policy(tiny_pipe)
    policy.encode(["a cat"])
    assert events == CALLED  # without a cache nothing moves
    events.clear()
    prompts = cache_prompts(policy, ["sea", "red"], DEVICE)
    assert events == COME + CALLED * 2 + GO
    events.clear()
    prompts.encode(["red", "sea"])
    assert events == []
    prompts.encode(["red", "unknown"])
    assert events == COME + CALLED + GO
    events.clear()
    cache_prompts(policy, ["red"], DEVICE)
    assert events == GO  # all prompts are on disk, so the encoders never come


def test_they_leave_after_an_error_too(tiny_pipe):
    record_devices(tiny_pipe, events := [])
    tiny_pipe.text_encoder_2.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cache_prompts(make_policy(tiny_pipe), ["sea"], DEVICE)
    assert events[-2:] == GO


def test_encoders_that_stay(tiny_pipe):
    record_devices(tiny_pipe, events := [])
    tiny_pipe.text_encoder._hf_hook = object()  # accelerate's, which moves it

    def refuse(device):
        raise ValueError("cannot be moved")

    tiny_pipe.text_encoder_2.to = refuse
    prompts, calls = cached(tiny_pipe, ["sea"])
    assert events == CALLED and calls == both(1)
    assert "sea" in prompts


# ---- Training ----


def make_run(
    tmp_path, is_cached, evaluation=("fog", "a cat"), prompts=PROMPTS, pipe=None, **changes
) -> MixGRPOTrainer:
    """Three iterations with one prompt of four images each."""
    changes = {"steps_per_generation": 1, "max_steps": 3, "per_device_eval_batch_size": 1} | changes
    return make_trainer(
        tmp_path / "output",
        pipe=pipe,
        train_dataset=[{"prompt": prompt} for prompt in prompts],
        eval_dataset=evaluation and [{"prompt": prompt} for prompt in evaluation],
        cache_prompt_embeds=is_cached,
        **changes,
    )


def test_a_run_is_bit_for_bit_the_same(tmp_path):
    found = []
    for is_cached in (False, True):
        trainer = make_run(tmp_path, is_cached)
        calls = count_calls(trainer.pipe)
        trainer.train()
        trainer.evaluate()
        assert calls == both(0 if is_cached else 3 + 2 * 2)  # evaluations make two images of a prompt
        times = ("time/", "runtime", "per_second", "flos")
        log = [{k: v for k, v in e.items() if not any(t in k for t in times)} for e in trainer.state.log_history]
        assert any("reward" in entry for entry in log) and any("eval_reward" in entry for entry in log)
        found.append((trained(trainer), log))
    (weights, log), (other_weights, other_log) = found
    assert_same(weights, other_weights)
    assert json.dumps(log) == json.dumps(other_log)


@pytest.mark.parametrize(
    "changes, count",
    [
        ({"max_steps": 2}, 2),
        ({"max_steps": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_generations": 8}, 2),
        ({"max_steps": 8}, 5),  # into the second epoch
        ({"max_steps": -1, "num_train_epochs": 0.6}, 3),
        ({"max_steps": 4, "shuffle_dataset": False, "prompts": ["a", "a", "b", "c", "d"]}, 3),
        # Two prompts in an iteration: one is left over, and comes in the next epoch.
        ({"max_steps": 4, "steps_per_generation": 2, "data_seed": 5}, 4),
        ({"max_steps": 6, "steps_per_generation": 2, "data_seed": 5}, 5),
    ],
)
def test_the_prompts_that_are_encoded_are_those_that_a_run_asks_for(tmp_path, changes, count):
    trainer = make_run(tmp_path, True, num_inference_steps=3, window_size=1, **changes)
    calls = count_calls(trainer.pipe)
    asked = set()
    encode = trainer.engine.encode
    trainer.engine.encode = lambda prompts: asked.update(prompts) or encode(prompts)
    trainer.train()
    assert calls == both(0)
    assert len(asked) == count
    evaluations = [trainer.eval_dataset]
    assert set(prompts_of_run(trainer.args, trainer.train_dataset, evaluations, 1)) == asked | {"fog", "a cat"}


def test_images_of_other_prompts(tmp_path):
    images = []
    for is_cached in (False, True):
        trainer = make_run(tmp_path, is_cached)
        calls = count_calls(trainer.pipe)
        images.append(np.stack([np.asarray(image) for image in trainer.sample_images(["fog", "a ship"])]))
        assert calls == both(1 if is_cached else 2)  # "fog" is in the evaluation
    assert (images[0] == images[1]).all()


def test_the_trainer_keeps_the_encoders_off_the_device(tmp_path, tiny_pipe):
    second_pipe = copy.deepcopy(tiny_pipe)
    record_devices(tiny_pipe, events := [])
    make_run(tmp_path, True, evaluation=None, pipe=tiny_pipe)
    assert events.count(("text_encoder_2", "called")) == 3  # of the run's three iterations
    assert events[-2:] == GO
    record_devices(second_pipe, events := [])
    make_run(tmp_path, True, evaluation=None, pipe=second_pipe)
    assert events == GO


def test_a_preflight_does_not_call_them(tmp_path):
    trainer = make_run(tmp_path, True)
    calls = count_calls(trainer.pipe)
    trainer.preflight()
    assert calls == both(0)
