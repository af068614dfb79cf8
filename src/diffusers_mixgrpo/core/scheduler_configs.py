"""Which schedulers of diffusers are of flow matching, and the configuration of such a one as a flow-match Euler."""

from collections.abc import Mapping
from typing import Any


# Arguments that mean the same in diffusers' multistep schedulers and in the flow-match Euler
_COMMON = ("num_train_timesteps", "use_dynamic_shifting", "time_shift_type", "shift_terminal", "solver_order")
_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
# Arguments of schedulers of other processes: Gaussian diffusion, discrete tokens, and flows in stages
_FOREIGN = (
    "prediction_type",
    "beta_schedule",
    "trained_betas",
    "beta_min",
    "sigma_min",
    "sigma_max",
    "scaler",
    "mask_token_id",
    "num_vec_classes",
    "stages",
    "confidence_threshold",
    "block_length",
    "corrector_steps",
    "entropy_bound",
    "n_grid",
)


def flow_matching_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """
    The configuration of a flow-matching scheduler, as [`MixedODESDEScheduler`] takes it.

    Diffusers' multistep schedulers (UniPC of Wan, DPM-Solver++ of Sana) are of flow matching with
    `prediction_type="flow_prediction"` and `use_flow_sigmas=True`. Their `flow_shift` becomes `shift`, and
    `use_flow_sigmas` says which of the two spacings they have.

    Args:
        config (`Mapping`): The `config` of a scheduler, or its `scheduler_config.json`.

    Raises:
        `ValueError`: If the scheduler is not one of flow matching, or has noise levels that are not of a flow.
    """
    foreign = [name for name in _FOREIGN if name in config]
    if not foreign:
        return config
    is_flow = config.get("prediction_type") == "flow_prediction" and config.get("use_flow_sigmas") is True
    spacings = [name for name in _SPACINGS if config.get(name)]
    if not is_flow or spacings or "stages" in config or config.get("final_sigmas_type", "zero") != "zero":
        names = ("prediction_type", "use_flow_sigmas", "final_sigmas_type", *spacings)
        found = [f"{name}={config[name]!r}" for name in names if name in config] or foreign
        raise ValueError(
            f"`scheduler` must be one of flow matching, got {config.get('_class_name', 'one')} with "
            f"{', '.join(found)}, whose model may not predict a velocity (noise - image). If it does, use a "
            "FlowMatchEulerDiscreteScheduler with its shift, or a scheduler with prediction_type='flow_prediction', "
            "use_flow_sigmas=True and its `flow_shift`."
        )
    defaults = config.get("_use_default_values", ())
    common = {name: config[name] for name in _COMMON if name in config and name not in defaults}
    spacing = "unipc" if "disable_corrector" in config else "dpmsolver"
    return common | {"shift": config.get("flow_shift", 1.0), "use_flow_sigmas": spacing}
