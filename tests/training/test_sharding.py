"""
FSDP2 and DeepSpeed with two processes over gloo, and launches that are refused.

Run as a script, this file is what each process does: the same runs with each sharding.
"""

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from diffusers import FluxTransformer2DModel
from helpers import build_pipeline, logged, make_trainer, once, redness, small_config
from safetensors.torch import load_file
from transformers import TrainerCallback

from diffusers_mixgrpo.training.checkpoints import is_whole
from diffusers_mixgrpo.training.plan import plan_iteration
from diffusers_mixgrpo.training.sharding import check_launch


TESTS = Path(__file__).parents[1]
KINDS = ["lora", "full"]
# ZeRO-2 first, since ZeRO-3 replaces `torch.nn.functional.linear`
DEEPSPEED = ["zero2", "zero2_bf16", "zero3", "zero3_bf16"]
# An update's largest error. DeepSpeed averages bfloat16 gradients: it rounds each rank's and the mean, each by up to
# 2**-8. ZeRO-3 also rounds before it adds a bias, in some eight layers behind one another.
TOLERANCES = {"zero2_bf16": 2 * 2**-8, "zero3_bf16": 8 * 2**-8}
WEIGHTS = {"lora": "pytorch_lora_weights.safetensors", "full": "transformer/diffusion_pytorch_model.safetensors"}
# One group of four images on each rank and one optimizer step, whose update is the gradient. The learning rate makes
# it as large as the weights, or their rounding to float32 would hide it.
ONE_STEP = {"steps_per_generation": 1, "max_steps": 1, "optim": "sgd", "learning_rate": 64.0}
ONE_STEP |= {"max_grad_norm": 0.0, "weight_decay": 0.0}
ONE_STEP |= {"scale_rewards": "group"}  # the process that is compared with has one rank's rewards at a time
FSDP = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["FluxTransformerBlock", "FluxSingleTransformerBlock"],
        "state_dict_type": "SHARDED_STATE_DICT",  # accelerate's default
    },
}


def launch(folder: Path, *shardings: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}
    command += [str(folder), *shardings]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    return once(tmp_path_factory, "fsdp", lambda folder: launch(folder, "fsdp2"))


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory):
    pytest.importorskip("deepspeed")
    return once(tmp_path_factory, "deepspeed", lambda folder: launch(folder, *DEEPSPEED))


@pytest.fixture(params=["fsdp2", *DEEPSPEED])
def runs(request):
    """The folder of the runs with each sharding."""
    return request.getfixturevalue("fsdp" if request.param == "fsdp2" else "deepspeed") / request.param


def one_process(folder: Path, runs: Path, kind: str) -> tuple[dict[str, torch.Tensor], float]:
    """The update by the images of both ranks, and the largest deviation of a ratio from 1."""
    prompts = [(runs / f"{kind}_rank{rank}" / "prompt.txt").read_text() for rank in range(2)]
    assert prompts[0] != prompts[1]
    is_half = runs.name.endswith("bf16")
    pipe = str(runs.parent / "pipeline_of_rank0") if is_half else None
    trainer = make_trainer(folder, pipe=pipe, lora=kind == "lora", bf16=is_half, **ONE_STEP)
    engine = trainer.engine
    transformer = trainer.pipe.transformer
    deviation = 0.0
    for rank, prompt in enumerate(prompts):
        plan = plan_iteration(trainer.args, engine.window_schedule, 0, [{"prompt": prompt}], rank)
        rollout = engine.roll_out(plan, transformer)
        trained = engine.backward(rollout, rollout.training_batches(4)[0], transformer, 8, 2)
        deviation = max(deviation, *((one.ratio - 1).abs().max().item() for one in trained.passes))
    update = {
        name: -64 * parameter.grad for name, parameter in transformer.named_parameters() if parameter.requires_grad
    }
    return update, deviation


@pytest.mark.parametrize("kind", KINDS)
def test_the_stock_pipeline_loads_the_update_of_one_process(runs, kind, tmp_path):
    expected, deviation = one_process(tmp_path, runs, kind)
    is_half = runs.name.endswith("bf16")
    pipe = build_pipeline()
    folder = runs / f"{kind}_rank0"
    if kind == "lora":
        pipe.load_lora_weights(str(folder))
        # The other matrix has no gradient as long as this one is zero.
        loaded = {name.replace("default_0", "default"): p for name, p in pipe.transformer.named_parameters()}
        update = {name: loaded[name].detach() for name in expected if "lora_B" in name}
    else:
        before = pipe.transformer.to(torch.bfloat16 if is_half else torch.float32).state_dict()
        pipe.transformer = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")
        update = {name: value - before[name] for name, value in pipe.transformer.state_dict().items()}
        assert update.keys() == expected.keys()
    error = sum((value - expected[name]).double().square().sum() for name, value in update.items()).sqrt()
    size = sum(expected[name].double().square().sum() for name in update).sqrt()
    assert error < TOLERANCES.get(runs.name, 1e-5) * size
    assert size > 1e-4
    assert float((folder / "deviation.txt").read_text()) == pytest.approx(deviation, rel=0.1, abs=1e-6)
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
    # The straight run alone has images, which all processes sample together.
    images = runs / f"{kind}_straight" / "images"
    assert [len(list((images / f"step_{step:06d}").glob("sample_*"))) for step in (0, 2, 4)] == [4] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_rank_writes_its_shards_alone(runs, kind):
    written = {path.name for path in (runs / f"{kind}_rank1").rglob("*") if path.is_file()}
    written -= {"prompt.txt", "deviation.txt"}
    assert "rng_state_1.pth" in written
    shards = {"__1_0.distcp"} | {name for name in written if "zero_pp_rank_1_" in name}
    assert written <= {"rng_state_1.pth"} | shards


def test_a_signal_to_one_process_stops_all_and_loses_nothing(fsdp):
    runs = fsdp / "fsdp2"
    stopped = runs / "lora_stopped"
    assert [(stopped / f"exit_of_rank{rank}.txt").read_text() for rank in range(2)] == ["143 after step 1"] * 2
    assert is_whole(str(stopped / "checkpoint-1"))
    straight = load_file(runs / "lora_straight" / WEIGHTS["lora"])
    resumed = load_file(runs / "lora_resumed_after_signal" / WEIGHTS["lora"])
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


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


def test_float16_with_deepspeed(tmp_path, monkeypatch):
    settings = small_config(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(settings, "use_cpu", False)
    check_launch(settings)
    monkeypatch.setattr(settings, "bf16", True)
    check_launch(settings)
    monkeypatch.setattr(settings, "fp16", True)
    with pytest.raises(ValueError, match="`fp16` must be False with DeepSpeed, got True"):
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


class SignalsOneProcess(TrainerCallback):
    """SIGTERM to the second process alone, after the first optimizer step of an iteration of two."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def main(folder: Path, shardings: list[str]) -> None:
    import helpers
    import transformers.training_args
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
            os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = sharding.removeprefix("zero")[0]
            changes |= {"use_cpu": False, "ddp_backend": "gloo", "bf16": sharding.endswith("bf16")}
            pipe = str(folder / f"pipeline_of_rank{rank}")
        return make_trainer(folder / sharding / name, pipe=pipe, rewards=scored, lora=kind == "lora", **changes)

    if "fsdp2" in shardings:
        helpers.small_config = small_config_of_fsdp
    else:
        build_pipeline().save_pretrained(folder / f"pipeline_of_rank{rank}")
        # transformers wants `use_cpu` for bf16 on a CPU, which would train without DeepSpeed.
        transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    batches = {"per_device_train_batch_size": 2, "replay_batch_size": 3}
    for sharding in shardings:
        for kind in KINDS:
            # A folder for each rank, to see what it writes
            trainer = make(f"{kind}_rank{rank}", sharding, kind, **ONE_STEP, save_strategy="steps", save_steps=1)
            prompts_seen.clear()
            trainer.train()
            dtypes = {parameter.dtype for parameter in trainer.pipe.transformer.parameters()}
            assert dtypes == {torch.bfloat16 if sharding.endswith("bf16") else torch.float32}
            trainer.save_model()
            (Path(trainer.args.output_dir) / "prompt.txt").write_text(prompts_seen[-1])
            deviation = logged(trainer, "ratio/on_policy_max_deviation")[0]
            (Path(trainer.args.output_dir) / "deviation.txt").write_text(str(deviation))

            saves = {"save_strategy": "steps", "save_steps": 2, "logging_images_steps": 2, "num_logged_seeds": 1}
            trainer = make(f"{kind}_straight", sharding, kind, **batches, **saves)
            trainer.train()
            trainer.save_model()
            trainer = make(f"{kind}_resumed", sharding, kind, **batches)
            trainer.train(resume_from_checkpoint=str(folder / sharding / f"{kind}_straight" / "checkpoint-2"))
            trainer.save_model()

    if "fsdp2" in shardings:
        trainer = make("lora_stopped", "fsdp2", "lora", **batches, callbacks=[SignalsOneProcess()])
        try:
            trainer.train()
        except SystemExit as error:
            stopped = Path(trainer.args.output_dir)
            (stopped / f"exit_of_rank{rank}.txt").write_text(f"{error.code} after step {trainer.state.global_step}")
        trainer = make("lora_resumed_after_signal", "fsdp2", "lora", **batches)
        trainer.train(resume_from_checkpoint=str(stopped / "checkpoint-1"))
        trainer.save_model()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
