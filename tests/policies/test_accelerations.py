"""Merged LoRAs and caches: the same passes or nearly so, and nothing left behind."""

import diffusers
import pytest
import torch
from conftest import build_pipeline
from peft import LoraConfig

from diffusers_mixgrpo import FluxPolicy
from diffusers_mixgrpo.accelerated_ode import accelerated_ode
from diffusers_mixgrpo.policies import FLUX_LORA_TARGET_MODULES


@pytest.fixture
def policy():
    pipe = build_pipeline()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=FLUX_LORA_TARGET_MODULES, init_lora_weights=False)
    pipe.transformer.requires_grad_(False)
    pipe.transformer.add_adapter(config)
    return FluxPolicy(pipe, height=32, width=32, num_inference_steps=4, max_sequence_length=12)


def velocity(policy):
    latents = policy.initial_latents([0, 1])
    return policy.velocity(latents, torch.tensor(700.0), policy.encode(["a cat", "two dogs"]))


def test_a_merged_lora_gives_the_same_velocities_without_being_computed(policy):
    transformer, calls = policy.pipe.transformer, []
    loras = [module for name, module in transformer.named_modules() if name.endswith("lora_A.default")]
    for module in loras:
        module.register_forward_hook(lambda *_: calls.append(1))
    before = {name: (p.data_ptr(), p.clone()) for name, p in transformer.named_parameters()}
    with torch.no_grad():
        expected = velocity(policy)
        assert len(calls) >= len(loras) > 0
        calls.clear()
        with accelerated_ode(transformer, merge_lora=True):
            torch.testing.assert_close(velocity(policy), expected, rtol=1e-5, atol=1e-5)
            assert not calls
            transformer.disable_adapters()
        without = velocity(policy)
        transformer.enable_adapters()
        assert (without - expected).abs().max() > 1e-2  # the LoRA has an effect
        assert torch.equal(velocity(policy), expected)
    assert {name: p.data_ptr() for name, p in transformer.named_parameters()} == {n: v[0] for n, v in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in transformer.named_parameters())


def test_a_graph_from_before_goes_on_through_the_weights_of_then(policy):
    transformer = policy.pipe.transformer
    velocity(policy).square().mean().backward()
    trained = [p for p in transformer.parameters() if p.requires_grad]
    expected = [p.grad.clone() for p in trained]
    transformer.zero_grad()
    loss = velocity(policy).square().mean()
    with accelerated_ode(transformer, merge_lora=True), torch.no_grad():
        velocity(policy)
    loss.backward()
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(trained, expected, strict=True))


def test_an_error_inside_leaves_all_as_it_was(policy):
    transformer = policy.pipe.transformer
    cache = diffusers.FirstBlockCacheConfig(threshold=0.1)
    with torch.no_grad():
        expected = velocity(policy)
        with pytest.raises(KeyboardInterrupt), accelerated_ode(transformer, cache, merge_lora=True):
            assert transformer.is_cache_enabled
            raise KeyboardInterrupt
        assert not transformer.is_cache_enabled
        assert torch.equal(velocity(policy), expected)


def test_in_bfloat16_the_weights_come_back_to_the_last_bit(policy):
    transformer = policy.pipe.transformer.to(torch.bfloat16)
    before = [p.clone() for p in transformer.parameters()]
    for _ in range(3):
        with accelerated_ode(transformer, merge_lora=True):
            assert any(not torch.equal(p, q) for p, q in zip(transformer.parameters(), before, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(transformer.parameters(), before, strict=True))
