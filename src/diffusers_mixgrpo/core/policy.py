"""What a rollout needs of a policy, and [`Conditioning`], the encoded prompts that it passes through."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn


@dataclass(frozen=True)
class Conditioning:
    """
    `P` encoded prompts, under the names that the policy which encoded them gives to its tensors.

    Args:
        rows (`dict[str, torch.Tensor]`): Tensors of shape `(P, ...)`, one row per prompt, such as embeddings.
        shared (`dict[str, torch.Tensor]`): Tensors that are the same for all prompts, such as token positions.
    """

    rows: dict[str, Tensor]
    shared: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> "Conditioning":
        """The rows of some prompts."""
        return Conditioning({name: tensor[index] for name, tensor in self.rows.items()}, self.shared)

    def repeat_interleave(self, repeats: int) -> "Conditioning":
        """Each row `repeats` times in succession: the conditioning of a group of images per prompt."""
        rows = {name: tensor.repeat_interleave(repeats, dim=0) for name, tensor in self.rows.items()}
        return Conditioning(rows, self.shared)

    def to(self, target: torch.device | torch.dtype | str) -> "Conditioning":
        """All tensors on another device, or those of floating point in another dtype."""

        def move(tensor: Tensor) -> Tensor:
            if isinstance(target, torch.dtype) and not tensor.is_floating_point():
                return tensor
            return tensor.to(target)

        rows = {name: move(tensor) for name, tensor in self.rows.items()}
        shared = {name: move(tensor) for name, tensor in self.shared.items()}
        return Conditioning(rows, shared)

    @classmethod
    def concatenate(cls, parts: Sequence["Conditioning"]) -> "Conditioning":
        """The prompts of all parts in one. The shared tensors are those of the first part."""
        names = parts[0].rows
        return cls({name: torch.cat([part.rows[name] for part in parts]) for name in names}, parts[0].shared)


class Policy(Protocol):
    """A velocity model with a schedule. [`~policies.base.PipelinePolicy`] makes one of a diffusers pipeline."""

    def prepare_scheduler(self, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        """Set `scheduler` to the policy's timesteps, and to the first of them."""

    def velocity(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, transformer: nn.Module | None = None
    ) -> Tensor:
        """
        The predicted velocity `noise - x_0` of `B` images: one forward pass, or two with classifier-free guidance.

        Args:
            latents (`torch.Tensor` of shape `(B, ...)`): Noisy latents.
            timestep (`torch.Tensor` of shape `()` or `(B,)`): `sigma * 1000`, one for all images or one per image.
            conditioning ([`Conditioning`] of length `B`): The encoded prompts.
            transformer (`torch.nn.Module`, *optional*): The module to call instead of the policy's own, such as the
                same one wrapped for distributed training.

        Returns:
            `torch.Tensor` of the shape and dtype of `latents`.
        """
        ...
