"""Prompts encoded once: the same bits as the text encoders', read from disk, and noticed when they are others."""

import copy
import json
import os

import datasets
import numpy as np
import pytest
import torch
from conftest import build_pipeline, redness
from diffusers import FluxPipeline
from peft import LoraConfig
from transformers import CLIPTokenizer, T5EncoderModel

from diffusers_mixgrpo import FluxPolicy, MixGRPOConfig, MixGRPOTrainer
from diffusers_mixgrpo.preflight import preflight
from diffusers_mixgrpo.prompt_embeds import cache_folder, encode_prompts, prompts_of_run


PROMPTS = ["a cat", "two dogs", "sea", "red", "blue tree"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def make_policy(pipe, max_sequence_length=12) -> FluxPolicy:
    return FluxPolicy(pipe, height=32, width=32, num_inference_steps=4, max_sequence_length=max_sequence_length)


def encoded(pipe, prompts=PROMPTS, **kwargs):
    """A policy that has the prompts, and how often each of its encoders was called to get them."""
    policy, calls = make_policy(pipe, **kwargs), count_calls(pipe)
    policy.encoded = encode_prompts(policy, prompts, cache_folder(policy), CPU)
    return policy, calls


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
        assert conditioning.prompt_embeds.dtype == embeds.dtype
        assert torch.equal(conditioning.prompt_embeds[i], embeds[0])
        assert torch.equal(conditioning.pooled_prompt_embeds[i], pooled[0])
        assert torch.equal(conditioning.text_ids, ids)


# ---- Bits ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_the_encoders_bit_for_bit(tiny_pipe, dtype):
    policy, calls = encoded(tiny_pipe.to(dtype))
    assert calls == both(5)
    order = ["red", "a cat", "red"]
    conditioning = policy.encode(order)
    assert calls == both(5)  # from disk
    assert_the_pipelines(conditioning, tiny_pipe, order)
    assert not torch.equal(conditioning.prompt_embeds[0], conditioning.prompt_embeds[1])


def test_a_second_run_reads_them(shared_pipe, pipeline_folder):
    policy, _ = encoded(copy.deepcopy(shared_pipe))
    expected = policy.encode(PROMPTS)
    # Of the same content, but from another place, and with tokenizers that have not been called
    loaded = FluxPipeline.from_pretrained(pipeline_folder)
    again, calls = encoded(loaded, PROMPTS[::-1])
    conditioning = again.encode(PROMPTS)
    assert calls == both(0)
    for name, tensor in vars(expected).items():
        assert torch.equal(getattr(conditioning, name), tensor)


def test_only_new_prompts_are_encoded(tiny_pipe):
    encoded(copy.deepcopy(tiny_pipe), ["a cat", "sea"])
    policy, calls = encoded(tiny_pipe, [*PROMPTS, "sea", "red"])
    assert calls == both(3)
    assert len(policy.encoded) == 5
    assert_the_pipelines(policy.encode(PROMPTS), tiny_pipe, PROMPTS)


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
    encoded(copy.deepcopy(tiny_pipe))
    change(tiny_pipe)
    policy, calls = encoded(tiny_pipe)
    assert calls == both(5)
    assert_the_pipelines(policy.encode(PROMPTS), tiny_pipe, PROMPTS)


def test_the_strength_of_an_adapter_is_noticed(tiny_pipe):
    change_adapter(tiny_pipe)
    before = cache_folder(make_policy(tiny_pipe))
    for module in tiny_pipe.text_encoder.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.5)
    assert cache_folder(make_policy(tiny_pipe)) != before


def test_another_length_is_noticed(tiny_pipe):
    encoded(tiny_pipe, max_sequence_length=12)
    policy, calls = encoded(tiny_pipe, max_sequence_length=8)
    assert calls == both(5)
    assert policy.encode(PROMPTS).prompt_embeds.shape[1] == 8


def test_an_interrupted_run_leaves_nothing_wrong(tiny_pipe):
    def interrupt(*_):
        if calls["text_encoder"] == 3:
            raise KeyboardInterrupt

    calls, policy = count_calls(tiny_pipe), make_policy(tiny_pipe)
    hook = tiny_pipe.text_encoder_2.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        encode_prompts(policy, PROMPTS, cache_folder(policy), CPU)
    assert os.listdir(cache_folder(policy)) == []
    hook.remove()
    policy, calls = encoded(tiny_pipe)
    assert calls == both(5)
    assert_the_pipelines(policy.encode(PROMPTS), tiny_pipe, PROMPTS)


def test_weights_that_are_not_there(tiny_pipe):
    tiny_pipe.text_encoder_2.to("meta")
    with pytest.raises(ValueError, match="has to read the weights of `text_encoder_2`, which are offloaded"):
        cache_folder(make_policy(tiny_pipe))


# ---- Where the encoders are ----


def record_places(pipe, events):
    """Write into `events` where the encoders are sent, and when they are called."""
    for name in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipe, name)

        def to(device, name=name, move=encoder.to):
            events.append((name, str(device)))
            return move(device)

        encoder.to = to
        encoder.register_forward_hook(lambda *_, name=name: events.append((name, "called")))


# "cpu:0" is the CPU to torch, but not the same word: so both places can be told apart where there is no other device.
DEVICE = torch.device("cpu", 0)
COME = [("text_encoder", "cpu:0"), ("text_encoder_2", "cpu:0")]
GO = [("text_encoder", "cpu"), ("text_encoder_2", "cpu")]
CALLED = [("text_encoder", "called"), ("text_encoder_2", "called")]


def test_encoders_come_to_the_device_and_leave_it(tiny_pipe, monkeypatch):
    monkeypatch.setattr(FluxPolicy, "device", DEVICE)
    record_places(tiny_pipe, events := [])
    policy = make_policy(tiny_pipe)
    policy.encode(["a cat"])
    assert events == CALLED  # without a cache nothing moves
    events.clear()
    policy.encoded = encode_prompts(policy, ["sea", "red"], cache_folder(policy), DEVICE)
    assert events == COME + CALLED * 2 + GO
    events.clear()
    policy.encode(["red", "sea"])
    assert events == []
    policy.encode(["red", "unknown"])
    assert events == COME + CALLED + GO
    events.clear()
    encode_prompts(policy, ["red"], cache_folder(policy), DEVICE)
    assert events == GO  # all is on disk, so they never come


def test_they_leave_after_an_error_too(tiny_pipe):
    record_places(tiny_pipe, events := [])
    policy = make_policy(tiny_pipe)
    tiny_pipe.text_encoder_2.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode_prompts(policy, ["sea"], cache_folder(policy), DEVICE)
    assert events[-2:] == GO


def test_encoders_that_stay(tiny_pipe):
    record_places(tiny_pipe, events := [])
    tiny_pipe.text_encoder._hf_hook = object()  # accelerate's, which moves it

    def refuse(device):
        raise ValueError("cannot be moved")

    tiny_pipe.text_encoder_2.to = refuse
    policy, calls = encoded(tiny_pipe, ["sea"])
    assert events == CALLED and calls == both(1)
    assert "sea" in policy.encoded


# ---- Training ----


def make_trainer(tmp_path, cached, pipe=None, evaluation=("fog", "a cat"), prompts=PROMPTS, **kwargs):
    """One prompt of four images in an iteration."""
    config = {
        "output_dir": str(tmp_path / "output"),
        "height": 32,
        "width": 32,
        "num_inference_steps": 4,
        "max_sequence_length": 12,
        "window_size": 2,
        "window_interval": 1,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 1,
        "steps_per_generation": 1,
        "epsilon": 1e-2,
        "learning_rate": 1e-2,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "cache_prompt_embeds": cached,
    }
    return MixGRPOTrainer(
        build_pipeline() if pipe is None else pipe,
        redness,
        MixGRPOConfig(**(config | kwargs)),
        train_dataset=[{"prompt": prompt} for prompt in prompts],
        eval_dataset=evaluation and [{"prompt": prompt} for prompt in evaluation],
        peft_config=LoraConfig(r=4, lora_alpha=8),
    )


def test_a_run_is_bit_for_bit_the_same(tmp_path):
    found = []
    for cached in (False, True):
        trainer = make_trainer(tmp_path, cached)
        calls = count_calls(trainer.pipe)
        trainer.train()
        trainer.evaluate()
        assert calls == both(0 if cached else 3 + 2)
        weights = [p.detach() for p in trainer.pipe.transformer.parameters() if p.requires_grad]
        times = ("time/", "runtime", "per_second", "flos")
        log = [{k: v for k, v in e.items() if not any(t in k for t in times)} for e in trainer.state.log_history]
        assert any("reward" in entry for entry in log) and any("eval_reward" in entry for entry in log)
        found.append((weights, log))
    (weights, log), (others, other_log) = found
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    assert json.dumps(log) == json.dumps(other_log)


@pytest.mark.parametrize(
    "kwargs, count",
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
def test_what_is_encoded_is_what_a_run_needs(tmp_path, kwargs, count):
    trainer = make_trainer(tmp_path, True, **kwargs)
    asked = []
    trainer.policy.encode = lambda prompts, encode=trainer.policy.encode: asked.extend(prompts) or encode(prompts)
    calls = count_calls(trainer.pipe)
    trainer.train()
    assert calls == both(0)
    assert set(prompts_of_run(trainer)) == set(asked) | {"fog", "a cat"}
    assert len(set(asked)) == count


def test_all_ranks_prompts(tmp_path):
    trainer = make_trainer(tmp_path, False, evaluation=None, max_steps=1, shuffle_dataset=False)
    assert prompts_of_run(trainer) == ["a cat"]
    trainer.accelerator = type("Accelerator", (), {"num_processes": 3})()
    assert prompts_of_run(trainer) == ["a cat", "two dogs", "sea"]
    trainer.eval_dataset = {"one": [{"prompt": "x"}], "two": [{"prompt": "y"}, {"prompt": "x"}]}
    assert set(prompts_of_run(trainer)) == {"a cat", "two dogs", "sea", "x", "y"}


def test_pictures_of_other_prompts(tmp_path):
    pictures = []
    for cached in (False, True):
        trainer = make_trainer(tmp_path, cached)
        calls = count_calls(trainer.pipe)
        pictures.append(np.stack([np.asarray(image) for image in trainer.sample_images(["fog", "a ship"])]))
        assert calls == both(1 if cached else 2)  # "fog" is in the evaluation
    assert (pictures[0] == pictures[1]).all()


def test_the_trainer_keeps_the_encoders_off_the_device(tmp_path):
    record_places(pipe := build_pipeline(), events := [])
    make_trainer(tmp_path, True, pipe, evaluation=None)
    assert events.count(("text_encoder_2", "called")) == 3  # of the run's three iterations
    assert events[-2:] == GO
    record_places(pipe := build_pipeline(), events := [])
    make_trainer(tmp_path, True, pipe, evaluation=None)
    assert events == GO


def test_a_preflight_does_not_call_them(tmp_path):
    trainer = make_trainer(tmp_path, True)
    calls = count_calls(trainer.pipe)
    preflight(trainer)
    assert calls == both(0)
