"""
Two processes on one machine (DDP over gloo). Run as a script, this file is what each of them does.

Starting them takes longer than what they do, so one start serves all tests.
"""

import gc
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from helpers import PROMPTS, make_trainer, once, redness


TESTS = Path(__file__).parents[1]


def greenness(prompts, images, **columns):
    return [-score for score in redness(prompts, images)]


# Five prompts, which two processes do not share evenly
EVALUATED: dict[str, Any] = {"eval_dataset": PROMPTS, "eval_reward_funcs": [greenness]}


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of the two processes has seen."""
    folder = once(tmp_path_factory, "two_processes", launch)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def launch(folder: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


def test_both_processes_train_one_policy_on_images_of_their_own(records):
    first, second = (record["straight"] for record in records)
    assert first["weights"] == second["weights"] != first["average"] == second["average"]
    assert first["log"] == second["log"]  # metrics are those of all images
    assert first["log"]["window/start"] == [0, 1]
    assert first["evaluation"] == second["evaluation"]
    assert first["evaluation"]["eval_alarms"] == 0
    assert len(first["images"]) == len(second["images"]) == 2
    assert not set(first["images"]) & set(second["images"])  # each with its own prompts and noise
    assert all(len(set(prompts)) == 1 for rank in (first, second) for prompts in rank["prompts"])  # whole groups


def test_evaluations_do_not_depend_on_the_number_of_processes(records, tmp_path):
    trainer = make_trainer(tmp_path, **EVALUATED)
    expected = trainer.evaluate()
    for record in records:
        assert record["before training"].keys() | {"eval_runtime"} == expected.keys()
        for name, value in record["before training"].items():
            # Batches of other sizes may change a pixel by 1 of 255, and with it a color's place in the histogram.
            assert value == pytest.approx(expected[name], abs=0.01), name


def test_images_come_from_both_processes(records, tmp_path):
    """Those of fixed prompts are shared out, and the best and the worst group are those of all processes."""
    samples = records[0]["straight"]["samples"]
    images = make_trainer(tmp_path).sample_images([row["prompt"] for row in PROMPTS[:3]])
    assert [sample["prompt"] for sample in samples[0]["samples"]] == [row["prompt"] for row in PROMPTS[:3]]
    rewards = [sample["reward"] for sample in samples[0]["samples"]]
    assert rewards == pytest.approx(redness([], images), abs=1 / 255)  # batches of other sizes, as above
    for iteration in range(2):
        means = [record["straight"]["rewards"][iteration] for record in records]
        groups = {group["which"]: group for group in samples[iteration]["groups"]}
        for which, expected in (("best", max(means)), ("worst", min(means))):
            own = groups[which]["images"]
            assert sum(image["reward"] for image in own) / len(own) == pytest.approx(expected)
            rank = means.index(expected)
            assert groups[which]["prompt"] == records[rank]["straight"]["prompts"][iteration][0]


def test_metrics_are_means_over_both_processes(records):
    rewards = zip(*(record["straight"]["rewards"] for record in records), strict=True)
    expected = [(first + second) / 2 for first, second in rewards]
    assert records[0]["straight"]["log"]["reward"] == pytest.approx(expected, rel=1e-5)


def test_resuming_is_exact(records):
    for record in records:
        assert record["resumed"]["weights"] == record["straight"]["weights"]
        assert record["resumed"]["average"] == record["straight"]["average"]
        assert record["resumed"]["images"] == record["straight"]["images"][1:]
        assert record["resumed"]["log"]["reward"] == record["straight"]["log"]["reward"]


def test_a_reward_that_fails_on_one_process_stops_both_and_saves(records):
    for record in records:
        assert "`redness` must return one score per image, got 3 scores for 4 images" in record["failed"]["error"]
        assert "checkpoint-2" in record["failed"]["note"]
        assert "pytorch_lora_weights.safetensors" in record["failed"]["saved"]
        assert record["failed"]["log"]["iteration"] == [0]  # and the second has not come to an update


def test_the_gradient_of_a_kept_graph_is_averaged(records):
    """The passes of the rollout do not go through DDP, and yet the gradient is that of a replay, which does."""
    first, second = (record["reused"] for record in records)
    assert first["weights"] == second["weights"]
    replayed = records[0]["replayed"]["weights"]
    assert len(replayed) == len(first["weights"]) > 0
    for (own, _), (other, size) in zip(first["weights"], replayed, strict=True):
        # float32 sums of other orders; plain SGD passes the gradient's error on
        assert abs(own - other) <= 1e-4 * size


def test_each_process_finds_the_size_of_its_passes(records):
    """One holds all transitions of a batch at once, the other two of them, and they train one policy."""
    first, second = (record["searched"] for record in records)
    assert first["sizes"] == [8] + [8] * 2
    assert second["sizes"] == [8, 4, 2] + [2] * 4 * 2
    assert first["weights"] == second["weights"]


def main(folder: Path) -> None:
    import torch
    from helpers import logged, trained

    from diffusers_mixgrpo import RewardError
    from diffusers_mixgrpo.training import memory

    gc.freeze()  # as in conftest.py of this folder
    rank = int(os.environ["RANK"])
    seen: dict[str, list] = {}

    def scored(prompts, images, **columns):
        scores = redness(prompts, images)
        if len(images) == 4:  # neither the trial before training nor an evaluation
            seen["prompts"].append(prompts)
            seen["images"].append(zlib.crc32(b"".join(image.tobytes() for image in images)))
            seen["rewards"].append(sum(scores) / len(scores))
            if seen["fails"] and rank == 1 and len(seen["images"]) == 2:
                return scores[:3]
        return scores

    scored.__name__ = "redness"

    def make(name, fails=False, **changes):
        seen.clear()
        seen.update(prompts=[], images=[], rewards=[], fails=fails)
        # One group of four images per process and iteration, two optimizer steps in each. There are several backward
        # passes in a step, and gradients are synchronized once.
        batches = {"per_device_train_batch_size": 2, "steps_per_generation": 2, "replay_batch_size": 3}
        return make_trainer(folder / name, rewards=scored, eval_dataset=PROMPTS[:3], **(batches | changes))

    def sums(trainer):
        return [[w.double().sum().item(), w.double().abs().sum().item()] for w in trained(trainer).values()]

    def record(trainer):
        weights = {"weights": sums(trainer)}
        if trainer.ema is not None:
            with trainer.ema.applied():
                weights["average"] = sums(trainer)
        log = {name: logged(trainer, name) for name in ("reward", "window/start", "iteration")}
        return weights | {"log": log} | {name: seen[name] for name in ("prompts", "images", "rewards")}

    def metrics_of(trainer):
        return {name: value for name, value in trainer.evaluate().items() if "runtime" not in name}

    records = {}
    images = {"logging_images_steps": 2, "num_logged_seeds": 1}  # three of them, for two processes
    trainer = make("straight", save_strategy="steps", save_steps=2, ema_decay=0.5, **images)
    trainer.train()
    records["straight"] = record(trainer) | {"evaluation": metrics_of(trainer)}
    trainer.accelerator.wait_for_everyone()
    written = [folder / "straight" / "images" / f"step_{step:06d}.json" for step in (0, 2, 4)]
    records["straight"]["samples"] = [json.loads(path.read_text()) for path in written]
    records["before training"] = metrics_of(make_trainer(folder / "evaluated", **EVALUATED))

    trainer = make("resumed", ema_decay=0.5)
    trainer.train(resume_from_checkpoint=str(folder / "straight" / "checkpoint-2"))
    records["resumed"] = record(trainer)

    trainer = make("failed", fails=True)
    try:
        trainer.train()
    except RewardError as error:
        records["failed"] = record(trainer) | {"error": str(error), "note": error.__notes__[0]}

    one_step = {"per_device_train_batch_size": 4, "steps_per_generation": 1, "max_steps": 1, "replay_batch_size": None}
    sgd = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "weight_decay": 0.0}
    for name in ("reused", "replayed"):
        trainer = make(name, **one_step, **sgd, reuse_rollout_graph=name == "reused")
        trainer.train()
        records[name] = record(trainer)

    memory.has_to_search = lambda engine: True  # as on an accelerator
    trainer = make("searched", **{**one_step, "max_steps": 2})
    most = 8 if rank == 0 else 3
    sizes = []

    def limit(model, args, kwargs):
        if torch.is_grad_enabled():
            sizes.append(len(kwargs["hidden_states"]))
            if sizes[-1] > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer.pipe.transformer.register_forward_pre_hook(limit, with_kwargs=True)
    trainer.train()
    records["searched"] = record(trainer) | {"sizes": sizes}
    # Here the other process is past its failure too.
    records["failed"]["saved"] = sorted(path.name for path in (folder / "failed" / "checkpoint-2").iterdir())
    (folder / f"{rank}.json").write_text(json.dumps(records))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
