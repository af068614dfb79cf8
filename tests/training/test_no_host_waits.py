"""
The loops of sampling and training never make the host wait for the device, so that it can queue work ahead.

Nothing here needs a device. Tensors of torch's `meta` device have a shape and no values, and play those of the GPU:
whatever asks for a value (`.item()`, `if tensor:`, `.cpu()`, `nonzero`, a mask as an index, `unique`, ...) raises, at
the line that asks. What torch does not refuse there but waits for on CUDA is found by looking at each operation:
copies from the host that are not `non_blocking`, and the error check of `torch.linalg`.
"""

import traceback

import pytest
import torch
from helpers import PROMPTS, build_pipeline, make_trainer
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_mixgrpo import Conditioning, MixedODESDEScheduler, MixGRPOConfig, sample_trajectories
from diffusers_mixgrpo.policies.flux import FluxPolicy


STEPS = 6
WINDOW = 2
GROUP = 4
ROWS = PROMPTS[:2]


# ---- What waits ----


def is_meta(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


def on_host(value) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cpu"


def caller() -> str:
    """The line, outside torch and the two modes below, that an operation comes from."""
    own = ("__torch_dispatch__", "__torch_function__", "_note", "caller")
    stack = traceback.extract_stack()
    frame = next(f for f in reversed(stack) if "/torch/" not in f.filename and f.name not in own)
    return f"{frame.filename}:{frame.lineno} {frame.line}"


class _Operations(TorchDispatchMode):
    """Each operation of torch's core."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.removeprefix("aten::")
        if name == "_to_copy" and on_host(args[0]) and kwargs.get("device") == torch.device("meta"):
            self._note("a blocking copy to the device", not kwargs.get("non_blocking"))
        elif name == "copy_" and is_meta(args[0]) and on_host(args[1]):
            self._note("a blocking copy to the device", not (args[2] if len(args) > 2 else kwargs.get("non_blocking")))
        elif name.startswith("index") and is_meta(args[0]) and isinstance(args[1], (list, tuple)):
            self._note("device tensor indexed by one of the host", any(map(on_host, args[1])))
            self._note("a mask as an index", any(is_meta(i) and i.dtype == torch.bool for i in args[1]))
        elif name == "_linalg_check_errors":
            self._note("torch.linalg looks for errors", is_meta(args[0]))
        return func(*args, **kwargs)

    def _note(self, what: str, waits: bool) -> None:
        if waits:
            self.found.append(f"{what}: {caller()}")


class _Calls(TorchFunctionMode):
    """Tensors that torch makes of lists, on the host, and copies to the device before any operation is seen."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        made = name in ("tensor", "as_tensor") and torch.device(kwargs.get("device") or "cpu").type == "meta"
        made = made and not is_meta(args[0]) or name == "new_tensor" and is_meta(args[0])
        indices = args[1] if name in ("__getitem__", "__setitem__") and is_meta(args[0]) else ()
        if made or any(isinstance(i, list) for i in (indices if isinstance(indices, tuple) else (indices,))):
            self.found.append(f"a tensor of a list: {caller()}")
        return func(*args, **kwargs)


class HostWaits:
    """A context; `found` says what made the host wait inside, and where."""

    def __init__(self):
        self.found: list[str] = []
        self.modes = [_Operations(self.found), _Calls(self.found)]

    def __enter__(self):
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self.modes):
            mode.__exit__(*error)


DEVICE = torch.empty(3, device="meta")
HOST = torch.tensor([2, 0, 1])


@pytest.mark.parametrize(
    "wait",
    [
        lambda: DEVICE[0].item(),
        lambda: float(DEVICE[0]),
        lambda: 1 if DEVICE.sum() > 0 else 2,
        lambda: DEVICE.tolist(),
        lambda: DEVICE.cpu(),
        lambda: DEVICE.to("cpu", non_blocking=True),
        lambda: DEVICE.numpy(),
        lambda: DEVICE.nonzero(),
        lambda: torch.where(DEVICE > 0),
        lambda: DEVICE[DEVICE > 0],
        lambda: DEVICE.index_put((DEVICE > 0,), DEVICE),
        lambda: DEVICE.masked_select(DEVICE > 0),
        lambda: DEVICE.unique(),
        lambda: DEVICE.repeat_interleave(DEVICE.long()),
        lambda: torch.equal(DEVICE, DEVICE),
        lambda: torch.allclose(DEVICE, DEVICE),
        lambda: torch.tensor([DEVICE[0], DEVICE[1]]),
        lambda: range(3)[DEVICE[0].long()],
        lambda: torch.linalg.solve(DEVICE.outer(DEVICE), DEVICE),
        lambda: HOST.to("meta"),
        lambda: DEVICE.copy_(HOST),
        lambda: DEVICE[HOST],
        lambda: DEVICE[[0, 2]],
        lambda: torch.tensor([1.0, 2.0], device="meta"),
        lambda: torch.as_tensor([1.0, 2.0], device="meta"),
        lambda: DEVICE.new_tensor([1.0]),
    ],
)
def test_what_waits_is_found(wait):
    with HostWaits() as waits:
        try:
            wait()
        except (RuntimeError, TypeError) as error:
            assert "meta" in str(error).lower()
            waits.found.append(str(error))
    assert waits.found


@pytest.mark.parametrize(
    "work",
    [
        lambda: HOST.to("meta", non_blocking=True) + HOST.to("meta", torch.float32, non_blocking=True),
        lambda: DEVICE[1:] * DEVICE[0] + torch.where(DEVICE[1:] > 0, 2.0, DEVICE[1:]),
        lambda: DEVICE[DEVICE.long()],
        lambda: torch.full([2], 3.5, device="meta").expand(3, 2) * torch.tensor(2.0),
        lambda: HOST.sum().item() + HOST[HOST > 0].sum() + torch.tensor([1.0]),
        lambda: DEVICE.repeat_interleave(2) @ torch.arange(6, device="meta", dtype=torch.float32),
    ],
)
def test_what_does_not_wait_is_not_found(work):
    with HostWaits() as waits:
        work()
    assert not waits.found


# ---- Sampling and replay ----


@pytest.fixture(scope="module")
def policy() -> FluxPolicy:
    return FluxPolicy(build_pipeline(), height=32, width=32, num_inference_steps=STEPS)


@pytest.fixture(scope="module")
def conditioning(policy) -> Conditioning:
    """Two prompts on the device, to which the policy's transformer has moved."""
    return move_to_device(policy)


def move_to_device(policy) -> Conditioning:
    """Move the transformer there, and run a first pass, which makes positions that later passes use again."""
    conditioning = policy.encode([row["prompt"] for row in ROWS]).to("meta")
    policy.pipe.transformer.to("meta")
    policy.velocity(initial_latents(policy)[:1], torch.empty((), device="meta"), conditioning[:1])
    return conditioning


class Small(nn.Module):
    """A transformer of one layer, for tests of the loops around it: each operation on the meta device takes long."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16, device="meta")

    def forward(self, hidden_states, **kwargs):
        return (self.layer(hidden_states),)


def initial_latents(policy) -> torch.Tensor:
    return torch.empty(len(ROWS), *policy.latent_shape, device="meta")


def sample(policy, conditioning, scheduler, **kwargs):
    """A trajectory, and what made the host wait for it."""
    latents = initial_latents(policy)
    with HostWaits() as waits:
        trajectory = sample_trajectories(policy, scheduler, conditioning, latents, num_generations=GROUP, **kwargs)
    assert trajectory.latents.is_meta and trajectory.states.is_meta and trajectory.log_probs.is_meta
    return trajectory, waits.found


@pytest.mark.parametrize(
    "kwargs",
    [
        {"sde_type": "flow"},
        {"sde_type": "dance"},
        {"sde_type": "cps"},
        {"sde_type": "dpm"},
        {"ode_solver": "dpmsolver++"},
        {"ode_solver": "dpmsolver++", "solver_order": 3, "prefix_ratio": 0.6, "suffix_ratio": 0.6},
        {"ode_solver": "unipc", "solver_order": 1},
    ],
)
def test_sampling_never_waits(policy, conditioning, kwargs):
    """Prefix, window and suffix of two batches. The schedule is made on the host and copied without waiting."""
    transformer = None if kwargs == {"sde_type": "flow"} else Small()
    scheduler = MixedODESDEScheduler(shift=3.0, window_start=2, window_size=WINDOW, **kwargs)
    trajectory, waits = sample(policy, conditioning, scheduler, batch_size=GROUP, transformer=transformer)
    assert trajectory.states.shape[1] == WINDOW + 1 and len(scheduler.timesteps) == trajectory.nfe
    assert waits == []


@pytest.mark.parametrize("order", [2, 3])
def test_unipc_waits_only_inside_diffusers(policy, conditioning, order):
    """Its corrector solves a system of `order` equations on the device, and torch looks whether that went well."""
    scheduler = MixedODESDEScheduler(window_start=2, window_size=WINDOW, ode_solver="unipc", solver_order=order)
    _, waits = sample(policy, conditioning, scheduler, transformer=Small())
    assert waits and all("scheduling_unipc_multistep.py" in w and "linalg.solve" in w for w in waits), waits


@pytest.mark.parametrize("sde_type", ["flow", "dance", "cps", "dpm"])
def test_replay_never_waits(policy, conditioning, sde_type):
    scheduler = MixedODESDEScheduler(sde_type=sde_type, window_start=2, window_size=WINDOW)
    transformer = Small()
    trajectory, _ = sample(policy, conditioning, scheduler, transformer=transformer)
    with HostWaits() as waits:
        trajectory.replay(policy, transformer=transformer).log_probs.sum().backward()
    assert waits.found == []
    assert all(p.grad is not None and p.grad.is_meta for p in transformer.parameters())


# ---- Training ----


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of autocast and checkpoints on the meta device
@pytest.mark.parametrize(
    "kwargs", [{"epsilon_high": 1e-3}, {"beta": 0.1}, {"gradient_checkpointing": True}, {"bf16": True}]
)
def test_training_never_waits(tmp_path, monkeypatch, kwargs):
    """Several forward and backward passes of one training batch, with everything that they record."""
    trainer = make_trainer(tmp_path, num_inference_steps=STEPS, window_size=WINDOW, **kwargs)
    engine = trainer.engine
    conditioning = move_to_device(engine.policy)
    monkeypatch.setattr(MixGRPOConfig, "device", torch.device("meta"))
    if trainer.args.gradient_checkpointing:
        trainer.pipe.transformer.enable_gradient_checkpointing()
    plan = engine.plan(0, ROWS)
    trajectory, _ = sample(engine.policy, conditioning, engine.scheduler, transformer=Small())
    advantages = torch.linspace(-1, 1, len(trajectory)).view(len(ROWS), GROUP)
    with HostWaits() as waits:
        means = engine.reference_means(plan, trajectory)
        rollout = engine.make_rollout(plan, trajectory, [], advantages.view(1, -1), advantages, means, statistics={})
        images = rollout.order[:GROUP]
        rollout.advantages[images[0]] = 0.0  # nothing of it is replayed, with beta=0
        batch = engine.backward(rollout, images, trainer.model_wrapped, pass_size=4)
        for training_pass in batch.passes:
            trainer.metrics.add(training_pass.statistics)
    assert waits.found == []
    transitions = (GROUP if trainer.args.beta > 0 else GROUP - 1) * WINDOW
    assert len(batch.passes) == -(-transitions // 4) > 1
    assert batch.loss.is_meta and all(p.grad.is_meta for p in engine.trained_parameters)
