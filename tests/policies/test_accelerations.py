"""Merged LoRAs and caches: equal or nearly equal velocities, and a transformer that is as before afterwards."""

import diffusers
import pytest
import torch
from peft import LoraConfig

from diffusers_mixgrpo.policies.accelerations import accelerated_ode
from diffusers_mixgrpo.policies.flux import FluxPolicy


@pytest.fixture
def policy(tiny_pipe):
    torch.manual_seed(0)  # of the LoRA's weights
    targets = list(FluxPolicy.lora_target_modules)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    tiny_pipe.transformer.requires_grad_(False)
    tiny_pipe.transformer.add_adapter(config)
    return FluxPolicy(tiny_pipe, height=32, width=32, num_inference_steps=4, max_sequence_length=12)


def velocity(policy):
    latents = policy.initial_latents([0, 1])
    return policy.velocity(latents, torch.tensor(700.0), policy.encode(["a cat", "two dogs"]))


def test_a_merged_lora_gives_the_same_velocities_without_being_computed(policy):
    transformer = policy.pipe.transformer
    calls = []
    loras = [module for name, module in transformer.named_modules() if name.endswith("lora_A.default")]
    for module in loras:
        module.register_forward_hook(lambda *_: calls.append(1))
    before = {name: (p.data_ptr(), p.clone()) for name, p in transformer.named_parameters()}
    with torch.no_grad():
        expected = velocity(policy)
        assert len(calls) >= len(loras) > 0
        calls.clear()
        with accelerated_ode(transformer, merge_lora=True):
            assert (velocity(policy) - expected).abs().max() <= 1e-4 * expected.abs().max()
            assert not calls
            transformer.disable_adapters()
        without = velocity(policy)
        transformer.enable_adapters()
        assert (without - expected).abs().max() > 1e-2 * expected.abs().max()  # the LoRA has an effect
        assert torch.equal(velocity(policy), expected)
    assert {name: p.data_ptr() for name, p in transformer.named_parameters()} == {n: v[0] for n, v in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in transformer.named_parameters())


def test_a_graph_from_before_uses_the_weights_of_that_time(policy):
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


def test_the_transformer_is_as_before_after_an_error(policy):
    transformer = policy.pipe.transformer
    cache = diffusers.FirstBlockCacheConfig(threshold=0.1)
    with torch.no_grad():
        expected = velocity(policy)
        with pytest.raises(KeyboardInterrupt), accelerated_ode(transformer, cache, merge_lora=True):
            assert transformer.is_cache_enabled
            raise KeyboardInterrupt
        assert not transformer.is_cache_enabled
        assert torch.equal(velocity(policy), expected)


def test_weights_in_bfloat16_are_restored_to_the_last_bit(policy):
    transformer = policy.pipe.transformer.to(torch.bfloat16)
    before = [p.clone() for p in transformer.parameters()]
    for _ in range(3):
        with accelerated_ode(transformer, merge_lora=True):
            assert any(not torch.equal(p, q) for p, q in zip(transformer.parameters(), before, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(transformer.parameters(), before, strict=True))
