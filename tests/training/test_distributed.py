"""Two processes on one machine (DDP over gloo). Run as a script, this file is what each of them does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(tmp_path), *arguments], env=environment, capture_output=True, text=True, timeout=250
    )


def results(tmp_path: Path, name: str) -> list[dict]:
    return [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_two_processes(tmp_path):
    done = run(tmp_path, "straight")
    assert done.returncode == 0, done.stderr
    first, second = results(tmp_path, "straight")
    assert first["weights"] == second["weights"]  # one policy
    assert first["window"] == second["window"] == [0, 1, 2, 3]
    assert first["evaluation"] == second["evaluation"]
    assert first["log"] == second["log"]  # metrics are those of all images
    assert not set(first["pictures"]) & set(second["pictures"])  # each with its own prompts and noise
    assert all(len(set(prompts)) == 1 for rank in (first, second) for prompts in rank["prompts"])  # whole groups

    done = run(tmp_path, "resume")
    assert done.returncode == 0, done.stderr
    assert results(tmp_path, "resume")[0]["weights"] == first["weights"]


@pytest.mark.slow
def test_a_reward_that_fails_on_one_process_stops_both_and_saves(tmp_path):
    done = run(tmp_path, "fail")
    assert done.returncode != 0
    assert done.stderr.count("`redness` returned 3 scores for 4 images") >= 2
    assert (tmp_path / "output" / "checkpoint-4" / "pytorch_lora_weights.safetensors").exists()


def main(folder: Path, mode: str) -> None:
    import numpy as np
    from conftest import build_pipeline
    from peft import LoraConfig

    from diffusers_mixgrpo import MixGRPOConfig, MixGRPOTrainer

    rank = int(os.environ["RANK"])
    record: dict = {"prompts": [], "pictures": []}

    def redness(prompts, images, **columns):
        pixels = np.stack([np.asarray(image, dtype=float) for image in images])
        if len(images) == 4:
            record["prompts"].append(prompts)
            record["pictures"].append(pixels.sum())
            if mode == "fail" and rank == 1 and len(record["prompts"]) == 3:
                return [0.0] * 3
        return (pixels[..., 0] - pixels[..., 1]).mean((1, 2)).tolist()

    args = MixGRPOConfig(
        output_dir=str(folder / "output"),
        height=32,
        width=32,
        num_inference_steps=6,
        window_size=2,
        window_interval=1,
        max_sequence_length=12,
        learning_rate=1e-2,
        epsilon=1e-2,
        per_device_train_batch_size=2,
        steps_per_generation=2,
        num_generations=4,
        replay_batch_size=3,  # several backward passes, and one synchronisation
        max_steps=8,
        logging_steps=2,
        save_strategy="no" if mode == "fail" else "steps",
        save_steps=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    prompts = [{"prompt": text} for text in ("a cat", "dog", "red", "blue", "tree")]
    trainer = MixGRPOTrainer(
        build_pipeline(), redness, args, prompts, eval_dataset=prompts[:3], peft_config=LoraConfig(r=4)
    )
    trainer.train(resume_from_checkpoint=mode == "resume" and str(folder / "output" / "checkpoint-4"))
    weights = [p.detach().double() for p in trainer.pipe.transformer.parameters() if p.requires_grad]
    record["weights"] = [[w.sum().item(), w.abs().sum().item()] for w in weights]
    record["evaluation"] = trainer.evaluate()["eval_reward"]
    history = trainer.state.log_history
    record["window"] = [int(entry["window/start"]) for entry in history if "window/start" in entry]
    record["log"] = [entry["reward"] for entry in history if "reward" in entry]
    (folder / f"{mode}-{rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
