"""What a LoRA's configuration names must be in the transformer: PEFT itself lets most mistakes pass."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from helpers import build_pipeline
from peft import LoraConfig

from diffusers_mixgrpo.policies.flux import FluxPolicy
from diffusers_mixgrpo.policies.lora_targets import check_targets


OWN = FluxPolicy.lora_target_modules
IN_BLOCK_0 = {"layers_to_transform": [0], "layers_pattern": "transformer_blocks"}


@pytest.fixture(scope="module")
def transformer():
    """FLUX.1-dev's with fewer blocks, and without weights."""
    with torch.device("meta"):
        return FluxTransformer2DModel(num_layers=3, num_single_layers=5)


@pytest.mark.parametrize(
    "options, problem",
    [
        (
            {"target_modules": ["to_q", "attn.to_qq"]},
            r"target_modules` \(`--lora_t.*got 'attn.to_qq'.*mean 'attn.to_q",
        ),
        (
            {"target_modules": ["to_q", "q"]},
            "target_modules` .* must end names of layers, got 'q', which no layer has",
        ),
        ({"target_modules": ["to_q", "all-linear"]}, "target_modules` .*got 'all-linear', which no layer has"),
        ({"target_modules": ["to_q", ".*to_k"]}, r"target_modules` .*got '\.\*to_k', which no layer has"),
        ({"target_modules": []}, "target_modules` .*must name layers, got an empty list. Without it .* proj_mlp"),
        ({"target_modules": "to_[qk]"}, r"target_modules` .*must match whole names of layers, .*got 'to_\[qk\]'"),
        ({"target_modules": "*to_q"}, r"must have valid regular expressions, got '\*to_q': nothing to repeat"),
        (
            {"target_modules": ["to_q", "attn"]},
            "got 'attn', which is also the FluxAttention transformer_blocks.0.attn",
        ),
        ({"target_modules": r".*blocks\.0\.attn.*"}, "which is also the FluxAttention transformer_blocks.0.attn"),
        (
            {"exclude_modules": ["to_vv"]},
            "exclude_modules` must end names of layers, got 'to_vv'.*Did you mean 'to_v'",
        ),
        ({"exclude_modules": "to_v"}, "exclude_modules` must match whole names of layers, .*got 'to_v'"),
        ({"exclude_modules": "(to_v"}, r"must have valid regular expressions, got '\(to_v'"),
        ({"target_modules": "all-linear", "exclude_modules": ["to_vv"]}, "exclude_modules` .*got 'to_vv'"),
        ({"target_modules": "all-linear", "exclude_modules": ".*"}, "must leave layers to adapt, got an `exclude_mod"),
        ({"exclude_modules": list(OWN)}, "must leave layers to adapt"),
        (
            {**IN_BLOCK_0, "target_modules": ["to_q", "proj_mlp"]},
            "in the blocks of `layers_to_transform`, got 'proj_mlp'",
        ),
        ({**IN_BLOCK_0, "layers_to_transform": [0, 3]}, r"layers_to_transform` .*got 3. .* are 0, 1, 2\.$"),
        ({**IN_BLOCK_0, "layers_to_transform": 3}, "layers_to_transform` .*got 3"),
        (
            {**IN_BLOCK_0, "layers_pattern": ["transformer_blocks", "layers"]},
            "layers_pattern` .*got 'layers'. .* single",
        ),
        (
            {"layers_to_transform": [0]},
            "layers_pattern` must be .*got None. .*transformer_blocks, single_transformer_b",
        ),
        ({"rank_pattern": {"to_q": 2, "to_qq": 4}}, "rank_pattern` .*got 'to_qq'. Did you mean 'to_q'"),
        (
            {"rank_pattern": {"norm_out.linear": 4}},
            "rank_pattern` .*got 'norm_out.linear'. .*Adapted are, for example",
        ),
        ({"alpha_pattern": {r"blocks\.99\..*": 4}}, "alpha_pattern` .*got 'blocks"),
        ({**IN_BLOCK_0, "alpha_pattern": {"proj_mlp": 4}}, "alpha_pattern` .*got 'proj_mlp'"),
    ],
    ids=str,
)
def test_what_names_no_layer_is_refused(transformer, options, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        check_targets(transformer, LoraConfig(**options), OWN)
    assert str(caught.value).startswith("`peft_config")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": "ALL-LINEAR", "exclude_modules": ["norm_out.linear"]},
        {"target_modules": ["to_q", "transformer_blocks.0.attn.to_k"], "exclude_modules": ["norm_out"]},
        {"target_modules": r".*attn\.to_[qkv]", "exclude_modules": r"single_.*"},
        {"exclude_modules": ["attn.to_q"]},
        {"exclude_modules": []},
        IN_BLOCK_0,
        {"layers_to_transform": [0, 4], "layers_pattern": ["transformer_blocks", "single_transformer_blocks"]},
        {
            "layers_to_transform": [],
            "rank_pattern": {r"transformer_blocks\.[01]\..*": 2},
            "alpha_pattern": {"to_k": 32},
        },
    ],
    ids=str,
)
def test_what_names_layers_is_accepted_and_left_alone(transformer, options):
    config = LoraConfig(**options)
    before = config.to_dict()
    check_targets(transformer, config, OWN)
    assert config.to_dict() == before


@pytest.mark.parametrize("options", [{"target_modules": "all-linear"}, {"target_modules": ["attn.to_q", "proj_mlp"]}])
def test_what_is_accepted_can_be_added(options):
    transformer = build_pipeline().transformer
    check_targets(transformer, LoraConfig(**options), OWN)
    transformer.add_adapter(LoraConfig(**options))
