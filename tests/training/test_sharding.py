"""
FSDP2 and DeepSpeed with two processes over gloo, and launches that are refused.

Run as a script, this file is what each process does: the same runs with each sharding.
"""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from diffusers import FluxTransformer2DModel
from helpers import build_pipeline, make_trainer, redness, small_config
from safetensors.torch import load_file

from diffusers_mixgrpo.training.plan import plan_iteration
from diffusers_mixgrpo.training.sharding import check_launch


TESTS = Path(__file__).parents[1]
KINDS = ["lora", "full"]
WEIGHTS = {"lora": "pytorch_lora_weights.safetensors", "full": "transformer/diffusion_pytorch_model.safetensors"}
# One group of four images on each rank and one optimizer step, whose update is the gradient. The learning rate makes
# it as large as the weights, or their rounding to float32 would hide it.
ONE_STEP = {"steps_per_generation": 1, "max_steps": 1, "optim": "sgd", "learning_rate": 64.0}
ONE_STEP |= {"max_grad_norm": 0.0, "weight_decay": 0.0}
FSDP = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["FluxTransformerBlock", "FluxSingleTransformerBlock"],
        "state_dict_type": "SHARDED_STATE_DICT",  # accelerate's default
    },
}


def launch(folder: Path, *shardings: str) -> Path:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*command, str(folder), *shardings], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("fsdp"), "fsdp2")


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory):
    pytest.importorskip("deepspeed")
    return launch(tmp_path_factory.mktemp("deepspeed"), "zero2", "zero3")


@pytest.fixture(params=["fsdp2", "zero2", "zero3"])
def runs(request):
    """The folder of the runs with each sharding."""
    return request.getfixturevalue("fsdp" if request.param == "fsdp2" else "deepspeed") / request.param


def update_of_one_process(folder: Path, kind: str, prompts: list[str]) -> dict[str, torch.Tensor]:
    """The update by the images of both ranks."""
    trainer = make_trainer(folder, lora=kind == "lora", **ONE_STEP)
    engine = trainer.engine
    transformer = trainer.pipe.transformer
    for rank, prompt in enumerate(prompts):
        plan = plan_iteration(trainer.args, engine.window_schedule, 0, [{"prompt": prompt}], rank)
        rollout = engine.roll_out(plan, transformer)
        engine.backward(rollout, rollout.training_batches(4)[0], transformer, 8, 2)
    return {
        name: -64 * parameter.grad for name, parameter in transformer.named_parameters() if parameter.requires_grad
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_stock_pipeline_loads_the_update_of_one_process(runs, kind, tmp_path):
    prompts = [(runs / f"{kind}_rank{rank}" / "prompt.txt").read_text() for rank in range(2)]
    assert prompts[0] != prompts[1]
    expected = update_of_one_process(tmp_path, kind, prompts)
    pipe = build_pipeline()
    folder = runs / f"{kind}_rank0"
    if kind == "lora":
        pipe.load_lora_weights(str(folder))
        # The other matrix has no gradient as long as this one is zero.
        loaded = {name.replace("default_0", "default"): p for name, p in pipe.transformer.named_parameters()}
        update = {name: loaded[name].detach() for name in expected if "lora_B" in name}
    else:
        before = pipe.transformer.state_dict()
        pipe.transformer = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")
        update = {name: value - before[name] for name, value in pipe.transformer.state_dict().items()}
        assert update.keys() == expected.keys()
    error = sum((value - expected[name]).double().square().sum() for name, value in update.items()).sqrt()
    size = sum(expected[name].double().square().sum() for name in update).sqrt()
    assert error < 1e-5 * size
    assert size > 1e-4
    assert pipe(
        "a cat", height=32, width=32, num_inference_steps=2, max_sequence_length=12, output_type="np"
    ).images.any()


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_is_exact(runs, kind):
    straight = load_file(runs / f"{kind}_straight" / WEIGHTS[kind])
    resumed = load_file(runs / f"{kind}_resumed" / WEIGHTS[kind])
    halfway = load_file(runs / f"{kind}_straight" / "checkpoint-2" / WEIGHTS[kind])
    assert straight.keys() == resumed.keys() == halfway.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())
    assert not all(torch.equal(value, halfway[name]) for name, value in straight.items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_rank_writes_its_shards_alone(runs, kind):
    written = {path.name for path in (runs / f"{kind}_rank1").rglob("*") if path.is_file()} - {"prompt.txt"}
    assert "rng_state_1.pth" in written
    shards = {"__1_0.distcp"} | {name for name in written if "zero_pp_rank_1_" in name}
    assert written <= {"rng_state_1.pth"} | shards


# ---- Launches that would not train as they ask for ----


def test_processes_that_would_not_train_together(tmp_path, monkeypatch):
    settings = small_config(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="`use_cpu` must be True for several processes .* 2 processes"):
        check_launch(settings)


def test_a_launcher_that_starts_one_process_of_several(tmp_path, monkeypatch, caplog):
    settings = small_config(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    check_launch(settings)
    assert "was asked for several processes" not in caplog.text
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    check_launch(settings)
    assert "was asked for several processes, but started this one alone" in caplog.text


def test_fsdp_that_accelerate_would_leave_out(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="`fsdp` must be off without GPUs .* got it with NO processes"):
        make_trainer(tmp_path)


def test_fsdp1(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    settings = small_config(tmp_path)
    monkeypatch.setattr(settings.distributed_state, "distributed_type", DistributedType.MULTI_GPU)
    with pytest.raises(ValueError, match="`fsdp_version` must be 2, got 1"):
        check_launch(settings)
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_launch(settings)


def test_deepspeed_that_accelerate_would_leave_out(tmp_path, monkeypatch):
    settings = small_config(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="`use_cpu` must be False with DeepSpeed, got True"):
        check_launch(settings)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_half_precision_with_deepspeed(tmp_path, monkeypatch, name):
    settings = small_config(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(settings, "use_cpu", False)
    check_launch(settings)
    monkeypatch.setattr(settings, name, True)
    with pytest.raises(ValueError, match=f"`{name}` must be False with DeepSpeed, got True"):
        check_launch(settings)


def test_resuming_without_a_random_state_says_so(tmp_path, caplog):
    make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    state = tmp_path / "checkpoint-2" / "rng_state.pth"
    make_trainer(tmp_path / "exact").train(resume_from_checkpoint=str(state.parent))
    assert "has no rng_state" not in caplog.text
    state.unlink()
    make_trainer(tmp_path / "other").train(resume_from_checkpoint=str(state.parent))
    assert "The checkpoint has no rng_state.pth" in caplog.text


# ---- What each process does ----


def main(folder: Path, shardings: list[str]) -> None:
    import helpers
    from accelerate import PartialState

    gc.freeze()  # as in conftest.py of this folder
    rank = int(os.environ["RANK"])
    prompts_seen: list[str] = []

    def scored(prompts, images, **columns):
        prompts_seen.extend(prompts)
        return redness(prompts, images)

    scored.__name__ = "redness"

    def small_config_of_fsdp(*args, **kwargs):
        settings = small_config(*args, **kwargs)
        PartialState().distributed_type = DistributedType.MULTI_GPU  # accelerate shards on accelerators alone
        return settings

    def make(name, sharding, kind, **changes):
        if sharding == "fsdp2":
            changes |= FSDP
            pipe = build_pipeline()
        else:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
            os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = sharding[-1]
            changes |= {"use_cpu": False, "ddp_backend": "gloo"}
            pipe = str(folder / f"pipeline_of_rank{rank}")
        return make_trainer(folder / sharding / name, pipe=pipe, rewards=scored, lora=kind == "lora", **changes)

    if "fsdp2" in shardings:
        helpers.small_config = small_config_of_fsdp
    else:
        build_pipeline().save_pretrained(folder / f"pipeline_of_rank{rank}")
    for sharding in shardings:
        for kind in KINDS:
            # A folder for each rank, to see what it writes
            trainer = make(f"{kind}_rank{rank}", sharding, kind, **ONE_STEP, save_strategy="steps", save_steps=1)
            prompts_seen.clear()
            trainer.train()
            trainer.save_model()
            (Path(trainer.args.output_dir) / "prompt.txt").write_text(prompts_seen[-1])

            batches = {"per_device_train_batch_size": 2, "replay_batch_size": 3}
            trainer = make(f"{kind}_straight", sharding, kind, **batches, save_strategy="steps", save_steps=2)
            trainer.train()
            trainer.save_model()
            trainer = make(f"{kind}_resumed", sharding, kind, **batches)
            trainer.train(resume_from_checkpoint=str(folder / sharding / f"{kind}_straight" / "checkpoint-2"))
            trainer.save_model()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
