"""The benchmark at a small size: forward passes worked out by hand, deliberate pauses, operations counted by torch."""

import importlib
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusers_mixgrpo import toy


pytestmark = pytest.mark.slow  # of interest where the benchmark is changed
EXAMPLES = Path(__file__).parents[2] / "examples"
# One prompt, two images, four steps of which the MixGRPO presets train one
TINY = "--prompts 1 --num_generations 2 --num_inference_steps 4 --window_size 1 --updates 2 --rounds 1"


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("benchmark_iteration")


def run(script, file, flags):
    script.main([*flags.split(), "--output", str(file)])
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def results(script, tmp_path_factory):
    """With the window at 0 and at 2."""
    file = tmp_path_factory.mktemp("benchmark") / "results.json"
    return run(script, file, f"{TINY} --presets mixgrpo dancegrpo --window_stride 2")


@pytest.fixture
def bench(script, tmp_path):
    flags = "--prompts 1 --num_generations 2 --num_inference_steps 5 --window_size 2 --updates 1 --rounds 1"
    (args,) = script.transformers.HfArgumentParser(script.BenchmarkArguments).parse_args_into_dataclasses(
        [*flags.split(), "--window_stride", "0"]
    )
    return script.Bench(args, str(tmp_path))


def test_entries_of_the_results(results):
    assert list(results["presets"]) == ["dancegrpo", "mixgrpo"]
    assert list(results["options"]) == ["off", "shared-prefix", "exact", "all", "one-by-one"]
    for entry in results["presets"].values():
        assert entry["seconds_per_iteration"] > 0 and entry["cpu_seconds_per_iteration"] > 0
        assert 0 < entry["transformer_share"] < 1 and entry["tflops"] < entry["tflops_in_transformer"]
        assert "ratio_under_same_options" in entry
    assert {name: entry["options"] for name, entry in results["presets"].items()} == {
        "dancegrpo": "off",
        "mixgrpo": "exact",
    }
    assert results["matmul_peak_tflops"] > 0 and results["one_by_one_speedup"] > 0


@pytest.mark.parametrize(
    ("option", "preset", "prefix", "window", "suffix", "replay"),
    [
        # Two images, and on average 1 step before the window and 2 after it
        ("off", "mixgrpo", 2, 2, 4, 2),
        ("shared-prefix", "mixgrpo", 1, 2, 4, 2),
        ("exact", "mixgrpo", 1, 2, 4, 0),
        ("all", "mixgrpo", 0.5, 2, 4, 2),  # of 2 steps before the window 40%, that is 1
        ("one-by-one", "mixgrpo", 2, 2, 4, 2),
        # All but the last step are stochastic, and of these 3 a share of 60% trained, that is 1
        ("off", "dancegrpo", 0, 6, 2, 2),
        ("exact", "dancegrpo", 0, 6, 2, 0),
    ],
)
def test_images_through_the_transformer(results, option, preset, prefix, window, suffix, replay):
    passes = results["options"][option][preset]["passes"]
    assert passes == {"prefix": prefix, "window": window, "suffix": suffix, "replay_forward": replay}


def test_the_parts_make_up_the_whole(results):
    for group in results["options"].values():
        for entry in group.values():
            assert sum(entry["parts"].values()) == pytest.approx(entry["seconds_per_iteration"])
            idle = [part for part, seconds in entry["parts"].items() if seconds == 0]
            assert idle == [part for part, count in entry["passes"].items() if count == 0]


def test_ratios_are_those_of_the_times(results):
    options = results["options"]
    for clock in ("", "cpu_"):
        seconds = {o: {n: e[f"{clock}seconds_per_iteration"] for n, e in g.items()} for o, g in options.items()}
        for option in ("off", "shared-prefix", "exact", "all"):
            own, entry = seconds[option]["mixgrpo"], options[option]["mixgrpo"]
            assert entry[f"{clock}ratio_to_dancegrpo"] == pytest.approx(own / seconds["off"]["dancegrpo"])
            assert entry[f"{clock}ratio_under_same_options"] == pytest.approx(own / seconds[option]["dancegrpo"])
    speedup = options["one-by-one"]["mixgrpo"]["seconds_per_iteration"]
    assert results["one_by_one_speedup"] == pytest.approx(
        speedup / options["shared-prefix"]["mixgrpo"]["seconds_per_iteration"]
    )


def test_a_ratio_is_the_median_of_those_of_the_rounds(script):
    names = ("seconds_per_iteration_of_rounds", "cpu_seconds_per_iteration_of_rounds")
    entry, base = dict.fromkeys(names, [1.0, 2.0, 9.0]), dict.fromkeys(names, [2.0, 8.0, 10.0])
    script.compare(entry, base, "ratio")
    assert entry["ratio"] == entry["cpu_ratio"] == 0.5  # of 0.5, 0.25 and 0.9
    script.compare(entry, {"error": "out of memory"}, "ratio")
    assert entry["ratio"] is None


def test_time_is_found_where_it_is_spent(script, bench):
    """A pause in each forward pass, in each backward pass, while decoding and while scoring."""
    pause = 0.05
    case = script.make_case(bench.args, "mixgrpo", "shared-prefix")  # at 1: 1 step before the window, 2 after it
    bench.score = lambda prompts, images: time.sleep(4 * pause) or [0.0] * len(images)
    bench.pipe.vae.decoder.register_forward_hook(lambda *_: time.sleep(3 * pause))
    bench.pipe.transformer.proj_out.register_forward_hook(lambda *_: time.sleep(pause))
    bench.pipe.transformer.proj_out.register_full_backward_hook(lambda *_: time.sleep(2 * pause))
    record = bench.run("case", case, case.positions[0])
    parts = record["parts"]
    pauses = {"prefix": 1, "window": 2, "suffix": 2, "decode": 3, "reward": 4, "replay_forward": 1}
    for part, count in (pauses | {"replay_backward": 2}).items():
        assert parts[part] > count * pause, part
    assert parts["optimizer"] > 0 and sum(parts.values()) == pytest.approx(record["seconds_per_iteration"])
    forward = sum(parts[part] for part in ("prefix", "window", "suffix", "replay_forward"))
    assert 6 * pause < record["forward_seconds"] < forward


def test_a_case_that_does_not_fit_into_memory_is_left_out(script, bench):
    def too_large(module, args, kwargs):
        if torch.is_grad_enabled() and bench.stopwatch.phase_name == "sampling":
            raise torch.OutOfMemoryError

    cases = {option: script.make_case(bench.args, "mixgrpo", option) for option in ("exact", "shared-prefix")}
    bench.pipe.transformer.register_forward_pre_hook(too_large, with_kwargs=True)
    entries = bench.measure(cases)
    assert entries["exact"] == {"error": "out of memory"} and entries["shared-prefix"]["seconds_per_iteration"] > 0


def test_cost_as_numbers_grow(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "GROW", {"num_generations": (2, 4), "size": (32,)})
    results = run(script, tmp_path / "grow.json", f"{TINY} --grow --presets mixgrpo")
    images = {value: sum(e["mixgrpo"]["passes"].values()) for value, e in results["grow"]["num_generations"].items()}
    assert images == {"2": 1 + 2 + 4 + 2, "4": 1 + 4 + 8 + 4}  # at 1: a shared step, the window, 2 steps, replay
    assert results["grow"]["size"]["32"]["mixgrpo"]["seconds_per_iteration"] > 0
    assert "| num_generations | 4 | MixGRPO |" in capsys.readouterr().out
    assert np.asarray(Image.open(tmp_path / "grow.png")).std() > 10


def test_a_small_pipeline_in_the_layout_of_flux_dev(script, tmp_path, capsys):
    flags = "--flux_dev --flux_dev_layers 1 1 --flux_dev_heads 1 --size 32 --max_sequence_length 12"
    flags += " --presets mixgrpo-flash dancegrpo --gradient_checkpointing --replay_batch_size 1"
    results = run(script, tmp_path / "flux.json", f"{TINY} {flags}")
    passes = results["presets"]["mixgrpo-flash"]["passes"]  # at 1: of the 2 steps after it 40%, that is 1
    assert passes == {"prefix": 1, "window": 2, "suffix": 2, "replay_forward": 2}
    assert results["presets"]["mixgrpo-flash"]["ratio_to_dancegrpo"] > 0
    assert "one_by_one_speedup" not in results
    assert "| shared-prefix | MixGRPO-Flash |" in capsys.readouterr().out
    assert np.asarray(Image.open(tmp_path / "flux.png")).std() > 10


def test_the_large_flux_is_flux_dev():
    """The classes' own defaults are FLUX.1's, of 12 billion weights."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    config = transformer.config
    assert (config.num_layers, config.num_single_layers, config.num_attention_heads) == (19, 38, 24)
    assert (config.joint_attention_dim, config.pooled_projection_dim, config.in_channels) == (4096, 768, 64)
    assert sum(weight.numel() for weight in transformer.parameters()) == pytest.approx(11.9e9, rel=0.01)


def test_operations_are_those_that_torch_counts(script):
    """Forward, and the backward pass when all weights are trained."""
    transformer = toy.load().transformer
    config, image_tokens, text_tokens = transformer.config, 64, 40

    def velocity():
        return transformer(
            hidden_states=torch.randn(1, image_tokens, config.in_channels),
            encoder_hidden_states=torch.randn(1, text_tokens, config.joint_attention_dim),
            pooled_projections=torch.randn(1, config.pooled_projection_dim),
            timestep=torch.ones(1),
            guidance=torch.ones(1),
            img_ids=torch.zeros(image_tokens, 3),
            txt_ids=torch.zeros(text_tokens, 3),
        ).sample

    counts = []
    for backward in (False, True):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            velocity().sum().backward() if backward else velocity()
        counts.append(counter.get_total_flops())
    linear, attention = importlib.import_module("random_flux").pass_flops(config, image_tokens, text_tokens)
    assert linear + attention == pytest.approx(counts[0])
    pipe = toy.load()
    settings = {"height": 16 * 8, "width": 16 * 8, "max_sequence_length": text_tokens, "reuse_rollout_graph": False}
    passes = {"prefix": 0, "window": 0, "suffix": 0, "replay_forward": 1}
    assert script.iteration_flops(pipe, settings, passes, full=True) == pytest.approx(counts[1], rel=0.02)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--presets mixgrpo grpo", "`presets`"),
        ("--options exact none", "`options`"),
        ("--updates 5", "`updates` must divide .* got 5"),
        ("--load_in_4bit", "`load_in_4bit` must be False"),
        ("--flux_dev --text_encoders half", "`text_encoders` must be among one_layer, full, full_4bit, got 'half'"),
    ],
)
def test_mistakes_are_named(script, flags, said):
    with pytest.raises(ValueError, match=said):
        script.main(flags.split())


def test_the_ratio_is_that_before_the_first_update(script, bench):
    """Weights that change between the rollout and its replay are seen in it."""
    case = script.make_case(bench.args, "mixgrpo", "shared-prefix")
    quiet = bench.run("quiet", case, case.positions[0])["ratio_deviation"]
    engine = bench.trainers["quiet"].engine
    backward = engine.backward

    def change_and_go_backward(*args, **kwargs):
        for parameter in engine.trained_parameters:
            parameter.data += 0.1
        return backward(*args, **kwargs)

    engine.backward = change_and_go_backward
    assert bench.run("quiet", case, case.positions[0])["ratio_deviation"] > 100 * max(quiet, 1e-6)
