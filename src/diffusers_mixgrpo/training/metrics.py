"""[`MetricBuffer`]: measurements between two logs, reduced over time and ranks."""

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from .plan import IterationPlan


# Metrics whose largest value is logged instead of the mean
MAXIMA = ("ratio/max_deviation", "ratio/on_policy_max_deviation")


def by_place(values: Mapping[str, float | Tensor], plan: IterationPlan) -> dict[str, float | Tensor]:
    """Measurements under names that say where the window was: `grad_norm` at step 7 is `grad_norm_by_window/07`."""
    return {f"{name}_by_window/{plan.window.start:02d}": value for name, value in values.items()}


class MetricBuffer:
    """
    Collects measurements. Tensors stay on their device until they are logged, so that no pass waits for them.

    Args:
        accelerator ([`~accelerate.Accelerator`]): The ranks.
        device (`torch.device`): The device of the tensors.
    """

    def __init__(self, accelerator: Accelerator, device: torch.device) -> None:
        self.accelerator = accelerator
        self.device = device
        self._series: dict[str, list[float | Tensor]] = defaultdict(list)

    def add(self, values: Mapping[str, float | Tensor]) -> None:
        """Add a number, or a 0-d tensor, to the series of each name."""
        for name, value in values.items():
            self._series[name].append(value)

    def clear(self) -> None:
        self._series.clear()

    def pop(self) -> dict[str, float]:
        """
        The mean of each series, or its maximum for those in `MAXIMA`, over all ranks. The series start again.

        All ranks must call this, with the same names. A series that holds nothing but NaN is left out.
        """
        series = {
            name: torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.device) for v in values])
            for name, values in sorted(self._series.items())
        }
        self.clear()
        if not series:
            return {}
        takes_maximum = torch.tensor([name in MAXIMA for name in series], device=self.device)
        means = torch.stack([values.nanmean() for values in series.values()])
        maxima = torch.stack([values.max() for values in series.values()])
        reduced = torch.where(takes_maximum, maxima, means)
        if self.accelerator.num_processes > 1:
            everyone = self.accelerator.gather(reduced[None])
            reduced = torch.where(takes_maximum, everyone.amax(0), everyone.nanmean(0))
        numbers = zip(series, reduced.tolist(), strict=True)
        return {name: number for name, number in numbers if not math.isnan(number)}
