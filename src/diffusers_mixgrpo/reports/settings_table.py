"""The settings of one run or two, those that matter first."""

import dataclasses
import enum
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.trainer_pt_utils import AcceleratorConfig

from ..mixgrpo_config import MixGRPOConfig


MAX_LENGTH = 300
# Where a run is written differs from run to run and says nothing about it.
PLACES = ("output_dir", "logging_dir", "run_name")
# Values that the configuration resolves from the machine or from other settings if they are not given
RESOLVED = ("bf16", "dataloader_pin_memory", "disable_tqdm", "do_eval", "greater_is_better", "metric_for_best_model")
SECRETS = ("hub_token", "push_to_hub_token")


@dataclass(frozen=True)
class Setting:
    """A row of the table: the setting of each run, and its default."""

    name: str
    values: list[str]
    default: str


@dataclass(frozen=True)
class SettingGroup:
    title: str
    is_open: bool
    settings: list[Setting]


def setting_groups(runs: Sequence[dict[str, Any]]) -> list[SettingGroup]:
    """
    The settings in groups: those that differ between runs, the others that differ from the defaults, and the rest.

    Args:
        runs (sequence of `dict`): The configuration of each run, as `MixGRPOConfig.to_dict()` returns it.
    """
    defaults = _defaults()
    between: list[Setting] = []
    changed: list[Setting] = []
    rest: list[Setting] = []
    for name in sorted({name for settings in runs for name in settings if name not in SECRETS}):
        values = [settings.get(name) for settings in runs]
        has_default = name in defaults
        row = Setting(name, [_text(value) for value in values], _text(defaults[name]) if has_default else "—")
        if len(runs) > 1 and name not in PLACES and not all(_same(value, values[0]) for value in values):
            between.append(row)
        elif name not in PLACES + RESOLVED and has_default and not all(_same(v, defaults[name]) for v in values):
            changed.append(row)
        else:
            rest.append(row)
    groups = [
        SettingGroup("Different in the two runs", True, between),
        SettingGroup("Different from the defaults", True, changed),
        SettingGroup("At their defaults, or following from other settings", False, rest),
    ]
    return [group for group in groups if group.settings]


def _defaults() -> dict[str, Any]:
    """The default of each argument of [`MixGRPOConfig`]."""
    defaults: dict[str, Any] = {}
    for field in dataclasses.fields(MixGRPOConfig):
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
    return defaults | {"accelerator_config": AcceleratorConfig().to_dict()}


def _same(first: Any, second: Any) -> bool:
    """Whether two values mean the same: `None`, False, "none" and what is empty do, also in a `dict`."""
    return _plain(first) == _plain(second)


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if _plain(item) is not None}
    is_nothing = value is None or value is False or value == "none" or value in ("", [], {})
    return None if is_nothing else value


def _text(value: Any) -> str:
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, dict | list | tuple):
        text = json.dumps(value, default=str)
    else:
        text = str(value)
    return text if len(text) <= MAX_LENGTH else text[: MAX_LENGTH - 1] + "…"
