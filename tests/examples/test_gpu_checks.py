"""The checks for a GPU with a small transformer: the same code, on the CPU."""

import importlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        patch.syspath_prepend(str(EXAMPLES / "studies"))
        yield importlib.import_module("gpu_checks")


def arguments(script, flags):
    parser = transformers.HfArgumentParser(script.benchmark.BenchmarkArguments)
    return parser.parse_args_into_dataclasses(flags)[0]


def test_each_check_is_a_command(script):
    checks = script.all_checks(script.BACKENDS)
    assert [name for name in checks if not name.startswith("backend-")] == [
        "presets",
        "no-checkpointing",
        "compile",
        "recipe-24",
        "recipe-48",
        "recipe-80",
        "resume",
    ]
    for name, flags in checks.items():
        args = arguments(script, flags)
        assert args.flux_dev and args.images == 12 and args.num_inference_steps == 25
        assert name.startswith("recipe") or (args.lora_rank, args.size) == (64, 720)
    assert arguments(script, checks["presets"]).presets == list(script.benchmark.METHODS)


def test_the_recipes_are_those_of_the_documentation(script):
    checks = script.all_checks([])
    args = {gb: arguments(script, checks[f"recipe-{gb}"]) for gb in script.RECIPES}
    assert {gb: a.memory_gb for gb, a in args.items()} == {24: 24, 48: 48, 80: 80}
    assert [a.load_in_4bit for a in args.values()] == [True, False, False]
    assert [a.text_encoders for a in args.values()] == ["full_4bit", "full_4bit", "full"]
    assert [a.size for a in args.values()] == [512, 720, 720]
    assert [a.lora_rank for a in args.values()] == [32, 64, 64]
    assert [a.compile for a in args.values()] == [False, True, True]
    assert all(a.gradient_checkpointing for a in args.values())
    cases = [script.benchmark.make_case(a, "mixgrpo", "shared-prefix").settings for a in args.values()]
    assert [case["sample_batch_size"] for case in cases] == [2, 4, 12]
    assert [case["replay_batch_size"] for case in cases] == [1, 2, 6]
    assert all(case["cache_prompt_embeds"] for case in cases)
    with pytest.raises(ValueError, match="must have a recipe under '### 12 GB'"):
        script.recipe_flags(script.DOCUMENT.read_text(), 12)


def test_results_and_errors_of_small_checks(script, tmp_path, capsys):
    """A recipe in 4 bits fails where bitsandbytes is missing, which ends nothing else."""
    flags = ["--output", str(tmp_path), "--small", "--same_process", "--backends", "native", "none"]
    script.main([*flags, "--only", "backend-none", "recipe-24", "backend-native"])
    script.main([*flags, "--only", "resume"])  # keeps the results of the others
    results = json.loads((tmp_path / "gpu_checks.json").read_text())
    assert list(results) == ["backend-native", "backend-none", "recipe-24", "resume"]
    entry = results["backend-native"]["options"]["shared-prefix"]["mixgrpo"]
    assert len(entry["seconds_per_iteration_of_rounds"]) == 3
    assert entry["preflight_memory_gb"] > 0 and entry["preflight_seconds"] > 0
    assert 0 <= entry["ratio_deviation"] < 1e-3
    assert "attention_backend" in results["backend-none"]["error"]
    if importlib.util.find_spec("bitsandbytes") is None:
        assert "needs bitsandbytes" in results["recipe-24"]["error"]
    assert results["resume"]["resume"]["difference"] == 0 < results["resume"]["resume"]["size_of_update"]
    table = (tmp_path / "gpu_checks.md").read_text()
    assert "| backend-native | MixGRPO | " in table and "- `backend-none` failed: " in table
    assert "- `resume`: bit for bit the same weights" in table
    assert table in capsys.readouterr().out


def test_mistakes_are_named(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main(["--output", str(tmp_path), "--small", "--only", "resume", "recipes"])
    assert "`only` must be among presets, " in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            script.main(["--output", str(tmp_path)])
        assert "`small` must be set without a GPU, got False" in capsys.readouterr().err


def test_full_text_encoders_have_the_size_of_flux_dev(script):
    random_flux = importlib.import_module("random_flux")
    with torch.device("meta"):
        t5 = transformers.T5EncoderModel(transformers.T5Config(**random_flux.T5_XXL, vocab_size=32128))
    assert sum(weight.numel() for weight in t5.parameters()) == pytest.approx(4.76e9, rel=0.01)
