"""MixGRPO for diffusers: online reinforcement learning of flow-matching pipelines on a sliding window of steps.

Public names are imported when they are first used, so that the scheduler alone does not wait for the trainer.
"""

import importlib
from typing import TYPE_CHECKING, Any

# Not on first use: importing the module of this name would set the package's attribute to the module.
from .hybrid_inference import hybrid_inference


if TYPE_CHECKING:
    from .core.advantages import compute_advantages
    from .core.policy import Conditioning
    from .core.rollout import Trajectory, sample_trajectories
    from .core.transitions import gaussian_kl, gaussian_log_prob
    from .core.window_schedule import WindowSchedule
    from .mixgrpo_config import MixGRPOConfig
    from .mixgrpo_trainer import MixGRPOTrainer
    from .policies import PipelinePolicy, policy_class
    from .rewards import load_reward
    from .rewards.runner import RewardError
    from .scheduling_mixed_ode_sde import MixedODESDEScheduler, MixedODESDESchedulerOutput
    from .training.engine import Engine
    from .training.preflight_report import PreflightReport


__version__ = "0.1.0"

__all__ = [
    "Conditioning",
    "Engine",
    "MixGRPOConfig",
    "MixGRPOTrainer",
    "MixedODESDEScheduler",
    "MixedODESDESchedulerOutput",
    "PipelinePolicy",
    "PreflightReport",
    "RewardError",
    "Trajectory",
    "WindowSchedule",
    "compute_advantages",
    "gaussian_kl",
    "gaussian_log_prob",
    "hybrid_inference",
    "load_reward",
    "policy_class",
    "sample_trajectories",
]

# Public name -> its module, as in the imports above
_MODULES = {
    "Conditioning": "core.policy",
    "Engine": "training.engine",
    "MixGRPOConfig": "mixgrpo_config",
    "MixGRPOTrainer": "mixgrpo_trainer",
    "MixedODESDEScheduler": "scheduling_mixed_ode_sde",
    "MixedODESDESchedulerOutput": "scheduling_mixed_ode_sde",
    "PipelinePolicy": "policies",
    "PreflightReport": "training.preflight_report",
    "RewardError": "rewards.runner",
    "Trajectory": "core.rollout",
    "WindowSchedule": "core.window_schedule",
    "compute_advantages": "core.advantages",
    "gaussian_kl": "core.transitions",
    "gaussian_log_prob": "core.transitions",
    "load_reward": "rewards",
    "policy_class": "policies",
    "sample_trajectories": "core.rollout",
}


if not TYPE_CHECKING:  # or type checkers would accept any name

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
