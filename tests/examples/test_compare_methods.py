"""The comparison of the methods: a small run of two of them, with costs worked out by hand."""

import importlib
import json
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image
from transformers import TrainerControl

from diffusers_mixgrpo import MixGRPOConfig, toy


STUDIES = Path(__file__).parents[2] / "examples" / "studies"
# Six steps, one prompt, two images, two optimizer steps. Settings of a method, or of the demo, must be ignored.
SMALL = {
    "reward_funcs": [f"diffusers_mixgrpo.toy:{name}" for name in ("toy_reward", "wholly_right", "extra_objects")],
    "reward_weights": [1.0, 0.0, 0.0],
    "num_eval_prompts": 50,
    "lora_rank": 2,
    "lora_alpha": 4,
    "height": 64,
    "width": 64,
    "max_sequence_length": 12,
    "num_inference_steps": 6,
    "num_generations": 2,
    "per_device_train_batch_size": 1,
    "steps_per_generation": 2,
    "learning_rate": 1e-3,
    "epsilon": 2.5e-2,
    "window_strategy": "frozen",
    "window_size": 4,
    "eta": 0.1,
    "max_steps": 3,
    "output_dir": "elsewhere",
}
FLAGS = "--presets mixgrpo-flash dancegrpo --seeds 0 --iterations 2 --eval_every 1 --num_eval_prompts 2"
FLAGS += " --window_size 2 --tune_learning_rates 1e-3 4e-3 --tune_iterations 1 --num_validation_prompts 3"


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDIES))
        yield importlib.import_module("compare_methods")


@pytest.fixture
def report(script):
    return importlib.import_module("compare_report")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags for a small configuration file."""
    file = tmp_path_factory.mktemp("config") / "small.yaml"
    file.write_text(yaml.safe_dump(SMALL))
    return ["--config", str(file)]


@pytest.fixture(scope="module")
def compared(script, small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    script.main([*small, *FLAGS.split(), "--output_dir", str(folder)])
    return folder


def summaries(folder):
    return json.loads((folder / "results.json").read_text())["summaries"]


def rows(folder, column):
    """The rows of the table of `results.md` that has this column: by method, the cells by column."""
    blocks = (folder / "results.md").read_text().split("\n\n")
    lines = next(b for b in blocks if b.startswith("|") and f" {column} |" in b.splitlines()[0]).splitlines()
    header, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(header, row, strict=True)) for row in body}


def test_files_of_a_comparison(compared):
    files = {str(file.relative_to(compared)) for file in compared.rglob("*") if file.is_file()}
    names = ("dancegrpo", "mixgrpo-flash")
    tuning = {f"tuning/{name}_{rate}.json" for name in names for rate in ("0.001", "0.004")}
    results = {"results.md", "results.json", "results.png", "by_window.png"}
    assert files == results | tuning | {f"runs/{name}_0.json" for name in names}  # and no checkpoints
    for name in ("results.png", "by_window.png"):
        assert np.asarray(Image.open(compared / name)).std() > 10
    assert list(rows(compared, "NFE")) == ["DanceGRPO", "MixGRPO-Flash"]


def test_costs_are_those_of_the_formulae(compared):
    """
    DanceGRPO: all 6 steps, stochastic from the first; of 5 in the window, 60% are trained. Flash: a window of 2 at 0
    and then at 1, since two iterations over four places make tau 1; after it ceil(0.4 * 4) and ceil(0.4 * 3) steps;
    the step before it is computed once for two images.
    """
    dance, flash = (summaries(compared)[name] for name in ("dancegrpo", "mixgrpo-flash"))
    assert (dance["nfe"], dance["nfe_computed"], dance["steps_trained"]) == (6, 6, 3)
    assert flash["nfe"] == ((2 + 2) + (1 + 2 + 2)) / 2
    assert flash["nfe_computed"] == ((2 + 2) + (0.5 + 2 + 2)) / 2
    assert flash["steps_trained"] == 2
    # Passes of an image: those of the rollout, and two for each trained step; two images an iteration
    assert dance["curve"]["passes"] == [[0, 2 * (6 + 6), 4 * (6 + 6)]]
    assert flash["curve"]["passes"] == [[0, 2 * (4 + 4), 2 * (4 + 4) + 2 * (4.5 + 4)]]
    shown = rows(compared, "NFE")
    cells = [[shown[name][column] for column in ("NFE", "Forward passes computed", "Steps trained")] for name in shown]
    assert cells == [["6", "6", "3"], ["**4.5**", "**4.25**", "**2**"]]


def test_the_ratio_is_that_of_the_runs(compared):
    runs = {name: json.loads((compared / "runs" / f"{name}_0.json").read_text()) for name in summaries(compared)}
    median = {name: statistics.median(e["seconds"] for e in run["iterations"]) for name, run in runs.items()}
    ratio = median["mixgrpo-flash"] / median["dancegrpo"]
    shown = {name: row["Time relative to DanceGRPO"].strip("*") for name, row in rows(compared, "NFE").items()}
    assert shown == {"DanceGRPO": "1.00", "MixGRPO-Flash": f"{ratio:.2f}"}
    cpu = {name: statistics.median(e["cpu_seconds"] for e in run["iterations"]) for name, run in runs.items()}
    shown = rows(compared, "Sampling (s)")["MixGRPO-Flash"]["CPU time relative to DanceGRPO"]
    assert shown.strip("*") == f"{cpu['mixgrpo-flash'] / cpu['dancegrpo']:.2f}"
    for run in runs.values():
        for entry in run["iterations"]:
            assert entry["seconds"] >= sum(value for name, value in entry.items() if name.startswith("time/")) > 0


def test_all_start_alike_and_gains_are_paired(compared):
    dance, flash = (summaries(compared)[name] for name in ("dancegrpo", "mixgrpo-flash"))
    assert dance["reward_before"] == flash["reward_before"]
    for summary in (dance, flash):
        (curve,) = summary["curve"]["reward"]
        assert summary["curve"]["iteration"] == [[0, 1, 2]] and len(curve) == 3
        assert summary["gain"] == [curve[2] - curve[0]]
        assert summary["difference"] == [summary["reward_after"][0] - dance["reward_after"][0]]
    # The fastest method has its last reward when it finishes
    fastest = min((dance, flash), key=lambda summary: summary["curve"]["seconds"][0][-1])
    assert fastest["reward_same_time"] == fastest["reward_after"]


def test_each_method_gets_its_best_learning_rate(compared, report):
    for name in summaries(compared):
        scores = {}
        for file in (compared / "tuning").glob(f"{name}_*.json"):
            record = json.loads(file.read_text())
            assert record["settings"]["eval_on"] == "validation" and record["settings"]["seed"] == 1000
            scores[record["settings"]["learning_rate"]] = record["evaluations"][-1]["reward"]
        chosen = json.loads((compared / "runs" / f"{name}_0.json").read_text())["settings"]["learning_rate"]
        assert len(scores) == 2 and scores[chosen] == max(scores.values())
        shown = rows(compared, "0.004")[report.title(name)]
        assert shown[f"{chosen:g}"] == f"**{scores[chosen]:.3f}**"


def test_a_rerun_trains_nothing_and_writes_the_report_again(script, small, compared):
    before = {file: file.stat().st_mtime_ns for file in compared.rglob("*_*.json")}
    text = (compared / "results.md").read_text()
    (compared / "results.md").unlink()
    script.main([*small, *FLAGS.split(), "--output_dir", str(compared)])
    assert len(before) == 6
    assert {file: file.stat().st_mtime_ns for file in compared.rglob("*_*.json")} == before
    assert (compared / "results.md").read_text() == text


def test_runs_of_other_settings_are_not_mixed_in(script, small, compared):
    before = sorted(compared.rglob("*"))
    with pytest.raises(ValueError, match="must have the settings.*lora_alpha: 4, now 8.*output_dir"):
        file = Path(small[1]).with_name("other.yaml")
        file.write_text(yaml.safe_dump(SMALL | {"lora_alpha": 8}))
        script.main(["--config", str(file), *FLAGS.split(), "--output_dir", str(compared)])
    assert sorted(compared.rglob("*")) == before


def test_an_ablation(script, small, tmp_path):
    """Windows of 1 and 2 of 3 steps, at the beginning: 3 passes in the rollout, and 2 for each trained step."""
    file = tmp_path / "three_steps.yaml"
    file.write_text(yaml.safe_dump(SMALL | {"num_inference_steps": 3}))
    flags = "--ablate window_size --seeds 0 --iterations 1 --num_eval_prompts 1"
    script.main(["--config", str(file), *flags.split(), "--output_dir", str(tmp_path / "out")])
    found = summaries(tmp_path / "out")
    assert {name: s["curve"]["passes"][0][-1] for name, s in found.items()} == {"w = 1": 2 * 5, "w = 2": 2 * 7}
    # The published share of 3 steps is one step or less: that is the one to compare with
    assert found["w = 1"]["ratio"] == 1
    assert "Time relative to w = 1" in rows(tmp_path / "out", "NFE")["w = 2"]


# ---- Without training ----


def arguments(script, **changes):
    args = script.CompareArguments(**changes)
    return args, script.read_shared(args)


def configuration(settings, folder):
    known = {k: v for k, v in settings.items() if hasattr(MixGRPOConfig, k) or k in MixGRPOConfig.__annotations__}
    return MixGRPOConfig.from_preset(settings["preset"], output_dir=folder, max_steps=4, use_cpu=True, **known)


def test_the_presets_scaled_to_the_toy(script, tmp_path):
    args, shared = arguments(script, iterations=72)
    configs = {name: configuration(shared | script.method(name, args, shared), tmp_path) for name in script.METHODS}
    assert len(configs) == 5
    for config in configs.values():
        assert (config.num_inference_steps, config.num_generations, config.epsilon) == (10, 8, 2.5e-2)
        assert config.shift is None and config.prompts_per_iteration == 16 and config.steps_per_generation == 4
    windows = {name: {config.window_schedule().schedule(i) for i in range(72)} for name, config in configs.items()}
    assert windows["dancegrpo"] == windows["flow-grpo"] == {(0, 9)}
    assert windows["mixgrpo"] == windows["mixgrpo-flash"] == {(start, 2) for start in range(8)}  # a whole sweep
    assert windows["mixgrpo-flash-star"] == {(0, 2)}
    assert [config.window_train_fraction for config in configs.values()] == [0.6, 1, 1, 1, 1]
    assert [config.suffix_ratio for config in configs.values()] == [1, 1, 1, 0.4, 0.2]
    assert [config.sde_type for config in configs.values()] == ["dance", *["flow"] * 4]
    assert [config.eta for config in configs.values()] == [0.3, *[0.7] * 4]


def test_the_time_to_the_best_reward_of_another(report):
    def curve(seconds, rewards):
        return {"curve": {"seconds": [seconds], "reward": [rewards], "iteration": [[0, 1, 2]]}}

    summaries = {
        "dancegrpo": curve([0, 50, 100], [0.5, 0.7, 0.6]),
        "fast": curve([0, 10, 20], [0.5, 0.6, 0.9]),
        "never": curve([0, 10, 20], [0.5, 0.6, 0.65]),
    }
    found = report.time_to_best_of(summaries, "dancegrpo")
    assert found == {"dancegrpo": 1.0, "fast": pytest.approx((10 + 10 / 3) / 50), "never": None}


@pytest.mark.parametrize("iterations", [1, 70])
@pytest.mark.parametrize(
    "axis",
    [
        "window_size",
        "window_interval",
        "window_stride",
        "strategy",
        "beta",
        "kl",
        "eta",
        "group_size",
        "solver",
        "top_k",
        "cache",
    ],
)
def test_ablations_change_one_thing(script, report, axis, iterations, tmp_path):
    args, shared = arguments(script, ablate=axis, iterations=iterations)
    variants = script.ablation(args, shared)
    base = script.method("mixgrpo", args, shared)
    if axis == "kl":
        base = variants["none"]
    assert variants[script.find_base(args, shared, variants)].items() >= base.items()
    allowed = {
        "window_size": {"window_size", "window_interval"},
        "strategy": {"window_strategy", "window_decay_rate", "window_decay_start"},
        "solver": {"ode_solver", "solver_order", "suffix_ratio"},
        "kl": {"kl_type", "beta"},
        "group_size": {"num_generations"},
        "top_k": {"replay_top_k"},
        "cache": {"ode_cache"},
    }.get(axis, {axis})
    for changes in variants.values():
        configuration(shared | changes, tmp_path)  # which checks them
        assert {k for k, v in changes.items() if base.get(k) != v} <= allowed
    assert len({json.dumps(changes, sort_keys=True) for changes in variants.values()}) == len(variants) > 1
    assert len({script.as_file(name) for name in variants}) == len(variants) <= len(report.COLORS)


def test_only_windowed_methods_run_under_all_accelerations(script, tmp_path):
    args, shared = arguments(script, accelerations=["shared-prefix", "exact", "all"])
    variants = script.methods(args, shared)
    assert list(variants)[:5] == list(script.METHODS)
    windowed = [f"mixgrpo{flash}, {option}" for option in ("exact", "all") for flash in ("", "-flash", "-flash-star")]
    assert list(variants)[5:] == windowed
    configs = {name: configuration(shared | changes, tmp_path) for name, changes in variants.items()}
    images = {c.per_device_train_batch_size * c.steps_per_generation for c in configs.values()}
    assert len(images) == 1  # all sample as many
    assert {c.steps_per_generation for name, c in configs.items() if "exact" in name} == {1}
    assert {c.replay_top_k for name, c in configs.items() if name.endswith("all")} == {2}
    assert {c.suffix_ratio for name, c in configs.items() if "flash-star" in name} == {0.2}


def test_remedies_change_one_thing_of_each_method(script, tmp_path):
    args = script.CompareArguments(
        presets=["mixgrpo", "dancegrpo"],
        remedies=["published", "rectified", "bounded"],
        baseline_remedies=["rectified"],
        iterations=42,
        lora_rank=0,
        config=str(Path(script.EXAMPLES, "configs", "toy_25_steps.yaml")),
    )
    shared = script.read_shared(args)
    assert shared["lora_rank"] == 0
    base = {"preset": "mixgrpo", "window_size": 4, "window_interval": 2}
    assert script.methods(args, shared) == {
        "mixgrpo": base,
        "mixgrpo, rectified": base | {"step_weighting": "rectified"},
        "mixgrpo, bounded": base | {"window_interval": 3, "window_last_start": 0.5},  # 13 places in place of 21
        "dancegrpo, rectified": {"preset": "dancegrpo", "step_weighting": "rectified"},
    }
    args.sweeps = 2
    assert script.methods(args, shared)["mixgrpo"]["window_interval"] == 1
    for changes in script.REMEDIES.values():
        MixGRPOConfig.from_preset("mixgrpo", output_dir=str(tmp_path), **changes)


def test_prompts_have_nothing_in_common(script):
    _, shared = arguments(script)
    parts = script.prompts(shared)
    assert len(parts["validation"]) == 128 and len(parts["test"]) == shared["num_eval_prompts"]
    assert not set(parts["train"]) & set(parts["validation"]) and not set(parts["train"]) & set(parts["test"])
    assert set(parts["train"]) | set(parts["validation"]) == set(toy.prompts("train"))


def test_evaluations_are_not_timed(script):
    """Two optimizer steps of 3 s, and 100 s after each of them that must not count."""
    recorder = script.Recorder(eval_every=1, progress_bar=SimpleNamespace(update=lambda: None))
    now = [0.0]
    recorder.clocks = dict.fromkeys(recorder.clocks, lambda: now[0])
    args = SimpleNamespace(
        optimizer_steps_per_iteration=2,
        window_train_fraction=0.6,
        num_iterations=1,
        beta=0.1,
        reuse_rollout_graph=False,
        replay_top_k=None,
        per_device_train_batch_size=4,
        steps_per_generation=2,
    )
    due = []
    for step in (1, 2):
        control = TrainerControl()
        recorder.on_step_begin(args, None, control)
        now[0] += 3
        recorder.on_step_end(args, SimpleNamespace(global_step=step, max_steps=8), control)
        now[0] += 100
        due.append(control.should_evaluate)
    recorder.on_log(args, None, None, {"nfe": 10, "nfe_amortized": 8.5, "window/size": 9, "loss": 0.0})
    assert due == [False, True]
    # 60% of 9 are 5 trained steps, each worth two passes and one of the reference
    args.beta, args.reuse_rollout_graph, args.replay_top_k, args.num_generations = 0, True, 1, 8
    recorder.on_log(args, None, None, {"nfe": 10, "nfe_amortized": 8.5, "window/size": 9, "loss": 0.0})
    assert recorder.iterations.pop()["passes"] == 8 * (8.5 + 5 / 4)  # of 8 images 2 go backward, and none forward
    assert recorder.iterations == [
        {"seconds": 6, "cpu_seconds": 6, "nfe": 10, "nfe_computed": 8.5, "steps_trained": 5, "passes": 8 * 23.5}
    ]


def test_means_and_standard_errors(report):
    assert report.plus_minus([0.5, 0.7, 0.6]) == "0.600 ± 0.058"  # 0.1 / sqrt(3)
    assert report.plus_minus([0.5]) == "0.500"
    assert report.plus_minus([-0.25, 0.75], "+.2f") == "+0.25 ± 0.50"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--presets mixgrpo ppo", "`presets` must be among .*got ppo"),
        ("--seeds 0 1 --tune_seed 1", r"`tune_seed` must not be in `seeds`=\[0, 1\], got 1"),
    ],
)
def test_mistakes_are_named(script, flags, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        script.main([*flags.split(), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
