"""MixGRPO for diffusers: online reinforcement learning of flow-matching pipelines on a sliding window of steps."""

from .advantages import compute_advantages
from .hybrid_inference import HybridInferenceCallback
from .kernels import gaussian_kl, gaussian_log_prob
from .mixgrpo_config import MixGRPOConfig
from .mixgrpo_trainer import MixGRPOTrainer
from .policies import FluxPolicy
from .preflight_report import PreflightReport
from .reward_calls import RewardError
from .rewards import load_reward
from .rollout import Trajectory, replay_log_probs, sample_trajectories
from .scheduling_mixed_ode_sde import MixedODESDEScheduler, MixedODESDESchedulerOutput
from .window_schedule import WindowSchedule


__version__ = "0.1.0"

__all__ = [
    "FluxPolicy",
    "HybridInferenceCallback",
    "MixGRPOConfig",
    "MixGRPOTrainer",
    "MixedODESDEScheduler",
    "MixedODESDESchedulerOutput",
    "PreflightReport",
    "RewardError",
    "Trajectory",
    "WindowSchedule",
    "compute_advantages",
    "gaussian_kl",
    "gaussian_log_prob",
    "load_reward",
    "replay_log_probs",
    "sample_trajectories",
]
