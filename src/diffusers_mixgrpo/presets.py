"""
The published methods as configurations, what [`MixGRPOConfig.from_preset`] starts from, and what makes them cheaper.

`MixGRPOConfig.from_preset("mixgrpo", **ACCELERATIONS["all"])` is MixGRPO with all short-cuts of docs/performance.md.
"""

from typing import Any


# Preset -> the method's name in its paper
METHOD_NAMES = {
    "dancegrpo": "DanceGRPO",
    "flow-grpo": "Flow-GRPO",
    "mixgrpo": "MixGRPO",
    "mixgrpo-flash": "MixGRPO-Flash",
    "mixgrpo-flash-star": "MixGRPO-Flash*",
}

# What belongs to the papers' model. Pipelines of another class keep their own: `MixGRPOConfig.for_other_models`.
PAPERS_MODEL: dict[str, Any] = {"height": 720, "width": 720, "shift": 3.0, "guidance_scale": 3.5}

# Common to all: the comparison in the MixGRPO paper (arXiv 2507.21802) and its released scripts, on FLUX.1-dev.
_PAPER: dict[str, Any] = {
    **PAPERS_MODEL,
    "num_inference_steps": 25,
    "num_generations": 12,
    "per_device_train_batch_size": 3,
    "steps_per_generation": 4,
    "gradient_accumulation_steps": 1,
    "num_iterations": 1,
    "learning_rate": 1e-5,
    "weight_decay": 1e-4,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "constant",
    "epsilon": 1e-4,
    "advantage_clip": 5.0,
    "beta": 0.0,
    "loss_type": "grpo",
    "step_weighting": "none",
    "scale_rewards": "group",
    "window_last_start": None,
    "max_steps": 1200,  # 300 iterations of 4 optimizer steps
}
_MIXGRPO = {"sde_type": "flow", "eta": 0.7, "window_strategy": "progressive", "window_size": 4, "window_stride": 1}
_FLASH_SOLVER = {"ode_solver": "dpmsolver++", "solver_order": 2}
_ALL_BUT_THE_LAST = {"window_strategy": "frozen", "window_start": 0, "window_size": -1}

PRESETS: dict[str, dict[str, Any]] = {
    "mixgrpo": _PAPER | _MIXGRPO | {"window_interval": 25},
    "mixgrpo-flash": _PAPER | _MIXGRPO | _FLASH_SOLVER | {"window_interval": 20, "suffix_ratio": 0.4},
    "mixgrpo-flash-star": _PAPER | _MIXGRPO | _FLASH_SOLVER | {"window_strategy": "frozen", "suffix_ratio": 0.2},
    "flow-grpo": _PAPER | _ALL_BUT_THE_LAST | {"sde_type": "flow", "eta": 0.7},
    "dancegrpo": _PAPER | _ALL_BUT_THE_LAST | {"sde_type": "dance", "eta": 0.3, "window_train_fraction": 0.6},
}

_EXACT: dict[str, Any] = {"merge_lora": True}
_APPROXIMATE: dict[str, Any] = {"replay_top_k": 2, "prefix_ratio": 0.4, **_FLASH_SOLVER}
_APPROXIMATE |= {
    "ode_cache": {
        "name": "TaylorSeerCacheConfig",
        "cache_interval": 2,
        "disable_cache_before_step": 1,
        "max_order": 1,
        "use_lite_mode": True,
    }
}
ACCELERATIONS: dict[str, dict[str, Any]] = {
    "off": {"shared_noise": False},  # what is not shared is computed for each image
    "shared-prefix": {},  # the defaults of MixGRPOConfig
    "exact": _EXACT | {"reuse_rollout_graph": True},  # for one update per iteration
    "all": _EXACT | _APPROXIMATE,
}
