"""A velocity network of two layers: a policy without a pipeline, for tests of the algorithm alone."""

import numpy as np
import torch
from torch import Tensor, nn

from diffusers_mixgrpo import Conditioning, MixedODESDEScheduler


TOKENS = 16
CHANNELS = 8
WIDTH = 12


class VelocityNetwork(nn.Module):
    """Velocities of latents `(B, L, C)` at times `(B, 1, 1)` in [0, 1], given one embedding `(B, W)` per image."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(CHANNELS, WIDTH)
        self.time = nn.Linear(2, WIDTH)
        self.mix = nn.Linear(TOKENS, TOKENS)
        self.outer = nn.Linear(WIDTH, CHANNELS)

    def forward(self, latents: Tensor, time: Tensor, embedding: Tensor, positions: Tensor) -> Tensor:
        times = self.time(torch.cat([time, torch.cos(3 * time)], dim=-1))
        hidden = torch.tanh(self.inner(latents) + times + embedding.unsqueeze(1) + positions.unsqueeze(-1))
        mixed = self.mix(hidden.transpose(1, 2)).transpose(1, 2)
        return self.outer(hidden + mixed) - 0.3 * latents


class SmallPolicy:
    """A policy of [`VelocityNetwork`], with latents of shape `(TOKENS, CHANNELS)`."""

    def __init__(self, num_inference_steps: int = 6, dtype: torch.dtype = torch.float32) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = VelocityNetwork().to(dtype)
        self.num_inference_steps = num_inference_steps
        self.dtype = dtype
        self.calls: list[int] = []  # the batch size of each forward pass

    def encode(self, prompts: int) -> Conditioning:
        generator = torch.Generator().manual_seed(10)
        embedding = torch.randn(prompts, WIDTH, generator=generator).to(self.dtype)
        positions = torch.linspace(-1, 1, TOKENS).to(self.dtype)
        return Conditioning(rows={"embedding": embedding}, shared={"positions": positions})

    def noise(self, count: int) -> Tensor:
        latents = torch.randn(count, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(20))
        return latents.to(torch.promote_types(self.dtype, torch.float32))

    def prepare_scheduler(self, scheduler: MixedODESDEScheduler) -> None:
        steps = self.num_inference_steps
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
        scheduler.set_begin_index(0)

    def velocity(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, transformer: nn.Module | None = None
    ) -> Tensor:
        self.calls.append(len(latents))
        assert len(conditioning) == len(latents)
        network = self.network if transformer is None else transformer
        time = timestep.expand(len(latents)).to(self.dtype).reshape(-1, 1, 1) / 1000
        velocity = network(
            latents.to(self.dtype), time, conditioning.rows["embedding"], conditioning.shared["positions"]
        )
        return velocity.to(latents.dtype)
