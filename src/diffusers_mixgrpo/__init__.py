"""MixGRPO for diffusers: online reinforcement learning of flow-matching pipelines on a sliding window of steps."""

from .core.advantages import compute_advantages
from .core.policy import Conditioning
from .core.rollout import Trajectory, sample_trajectories
from .core.transitions import gaussian_kl, gaussian_log_prob
from .core.window_schedule import WindowSchedule
from .hybrid_inference import hybrid_inference
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
