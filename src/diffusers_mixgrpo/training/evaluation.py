"""[`Evaluator`]: images of the deterministic sampler on held-out prompts, and what they score."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor, nn
from transformers.utils import logging

from ..core.advantages import combine_rewards
from ..core.rollout import sample_trajectories
from ..rewards.runner import RewardRunner, reward_statistics, statistics_by_reward
from .engine import Engine, make_scheduler, with_logged
from .hacking_guard import IMAGES, REWARD, UNTRAINED
from .image_statistics import downsample, image_statistics, spread
from .nonfinite import NonFiniteError
from .plan import PromptDataset, Row


logger = logging.get_logger(__name__)

MAX_PAIRS = 16  # prompts with a second image


@dataclass(frozen=True)
class Evaluation:
    """
    The result of an evaluation on `n` prompts.

    Args:
        rewards (`torch.Tensor` of shape `(K, n)`): The trained rewards, NaN where an image could not be scored.
        series (`dict[str, torch.Tensor]`): What [`HackingGuard.judge`] compares: the weighted trained reward, each
            reward that is not trained on, and the image statistics, with one value per prompt.
        statistics (`dict[str, float]`): What to log.
    """

    rewards: Tensor
    series: dict[str, Tensor]
    statistics: dict[str, float]


class Evaluator:
    """
    Samples images with the engine's policy and without noise, and scores them.

    Args:
        engine ([`~training.engine.Engine`]): Its policy is evaluated, and its rewards are the trained ones.
        rewards ([`RewardRunner`], *optional*): Rewards that are never trained on.

    Attributes:
        policy ([`PipelinePolicy`]): The policy with the number of steps and the image size of evaluations.
    """

    def __init__(self, engine: Engine, rewards: RewardRunner | None = None) -> None:
        settings = engine.settings
        self.engine = engine
        self.settings = settings
        self.rewards = rewards
        self.policy = engine.policy.with_sampling(
            settings.eval_num_inference_steps, settings.eval_height, settings.eval_width
        )

    @property
    def _runners(self) -> list[RewardRunner]:
        return [self.engine.rewards] if self.rewards is None else [self.engine.rewards, self.rewards]

    @property
    def reward_names(self) -> list[str]:
        """The names of all rewards: the trained ones, and those that are never trained on."""
        return [name for runner in self._runners for name in runner.names]

    def try_rewards(self, dataset: PromptDataset) -> None:
        """As [`Engine.try_rewards`], of the rewards that are never trained on."""
        if self.rewards is not None:
            self.rewards.try_on_gray_images(dataset, (self.policy.width, self.policy.height))

    def clear(self) -> None:
        """Discard images whose scores have not been collected."""
        for runner in self._runners:
            runner.clear()

    def evaluate(self, dataset: PromptDataset, transformer: nn.Module | None = None) -> Evaluation:
        """
        Rewards and statistics of the deterministic sampler's images of `n` prompts. Ranks share the prompts evenly.

        The first prompts, at most `MAX_PAIRS`, have a second image for the statistic `spread`, which is not scored.
        Images that are infinite or NaN are reported with their prompts, and left out as images without a score.

        Args:
            dataset ([`PromptDataset`] of length `n`): The prompts. Prompt `i` is sampled with seed `eval_seed + i`,
                and its second image with `eval_seed + n + i`.
            transformer (`torch.nn.Module`, *optional*): The module to call instead of the policy's own transformer.

        Raises:
            [`NonFiniteError`]: On all ranks, if no image is finite.
        """
        count = len(dataset)
        seed = self.settings.eval_seed
        scores = []
        pixels = []
        finite = []
        for rows, images, are_finite in self._share_of_images(dataset, range(seed, seed + count), transformer):
            scores.append(self._scores(rows, images, are_finite))
            pixels.append(torch.from_numpy(downsample(images)))
            finite.append(are_finite)
        pairs = min(count, MAX_PAIRS)
        seconds = list(self._share_of_images(dataset, range(seed + count, seed + count + pairs), transformer))
        other_pixels = [torch.from_numpy(downsample(images)) for _, images, _ in seconds]
        other_finite = self.engine.gather(torch.cat([are_finite for _, _, are_finite in seconds]))[:pairs]
        all_finite = self.engine.gather(torch.cat(finite))[:count]
        if not all_finite.any():
            raise NonFiniteError(
                f"All {count} images of the evaluation are infinite or NaN: the weights, or their precision, are "
                "broken. Resume from an earlier checkpoint with a lower `learning_rate`, or use bf16 or float32."
            )

        everyone = self.engine.gather(torch.cat(scores))[:count].movedim(0, 1)
        small = self.engine.gather(torch.cat(pixels))[:count].numpy()
        statistics = image_statistics(small)
        statistics["spread"] = spread(small[:pairs], self.engine.gather(torch.cat(other_pixels))[:pairs].numpy())
        series = {name: torch.from_numpy(values) for name, values in statistics.items()}
        for name, values in series.items():
            counts = all_finite[:pairs] & other_finite if name == "spread" else all_finite
            series[name] = values.masked_fill(~counts, math.nan)
        evaluation = self._evaluation(everyone, series)
        logged = {name: value for runner in self._runners for name, value in runner.pop_metrics().items()}
        own = evaluation.statistics | {"nonfinite/images": int((~all_finite).sum())}
        return replace(evaluation, statistics=with_logged(own, logged))

    def sample(
        self, rows: Sequence[Row], seeds: Sequence[int], transformer: nn.Module | None = None
    ) -> tuple[list[Image.Image], Tensor]:
        """
        The images of `n` dataset rows and their scores. Ranks share the images evenly; all of them must call this.

        Args:
            rows (`Sequence[dict]` of length `n`): Their rows.
            seeds (`Sequence[int]` of length `n`): Their seeds.
            transformer (`torch.nn.Module`, *optional*): The module to call instead of the policy's own transformer.

        Returns:
            `tuple[list[PIL.Image.Image], torch.Tensor]`: `n` images, and scores of shape `(K, n)` of the trained
            rewards and those that are never trained on, NaN where an image could not be scored.
        """
        settings = self.settings
        # No more images at once than in a rollout, which is known to fit
        in_rollout = settings.sample_batch_size or settings.prompts_per_iteration * settings.num_generations
        images: list[Image.Image] = []
        scores = []
        for some_rows, some_images, are_finite in self._share_of_images(rows, seeds, transformer, in_rollout):
            images += some_images
            scores.append(self._scores(some_rows, some_images, are_finite))
        if self.engine.accelerator.num_processes > 1:
            images = gather_object(images)
        return images[: len(rows)], self.engine.gather(torch.cat(scores))[: len(rows)].movedim(0, 1)

    def _scores(self, rows: list[Row], images: list[Image.Image], are_finite: Tensor) -> Tensor:
        """The scores of `n` images by all rewards, of shape `(n, K)`, NaN where an image is not finite."""
        for runner in self._runners:
            runner.start(rows, images)
        scores = torch.cat([runner.finish() for runner in self._runners]).movedim(1, 0)
        return scores.masked_fill(~are_finite[:, None], math.nan)

    def _share_of_images(
        self,
        dataset: PromptDataset,
        seeds: Sequence[int],
        transformer: nn.Module | None,
        batch_size: int | None = None,
    ) -> Iterator[tuple[list[Row], list[Image.Image], Tensor]]:
        """This rank's share of the images of the first prompts, one for each of `seeds`, and which are finite."""
        count = len(seeds)
        share = math.ceil(count / self.engine.accelerator.num_processes)
        first = self.engine.accelerator.process_index * share
        # The last ranks may repeat some prompts, to run as many passes as the others.
        indices = [i % count for i in range(first, first + share)]
        size = self.settings.per_device_eval_batch_size
        size = size if batch_size is None else min(size, batch_size)
        steps = math.ceil(share / size) * self.policy.num_inference_steps
        with self.engine.progress.bar(f"Sampling {share} images without noise", steps) as on_step:
            for start in range(0, share, size):
                chosen = indices[start : start + size]
                rows = [dict(dataset[i]) for i in chosen]
                yield rows, *self._sample(rows, [seeds[i] for i in chosen], transformer, on_step)

    def _evaluation(self, scores: Tensor, images: dict[str, Tensor]) -> Evaluation:
        """From the scores of the trained rewards and the others, one row each, and the image statistics."""
        trained = self.engine.rewards.names
        rewards, others = scores[: len(trained)], scores[len(trained) :]
        names = [] if self.rewards is None else self.rewards.names
        series = {REWARD: combine_rewards(rewards, self.engine.reward_weights)}
        series |= {f"{UNTRAINED}{name}": values for name, values in zip(names, others, strict=True)}
        series |= {f"{IMAGES}{name}": values for name, values in images.items()}
        statistics = reward_statistics(rewards, trained, self.engine.reward_weights)
        statistics |= statistics_by_reward(others, names)
        statistics |= {f"{IMAGES}{name}": float(values.nanmean()) for name, values in images.items()}
        return Evaluation(rewards, series, statistics)

    def sample_images(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        transformer: nn.Module | None = None,
        on_step: Callable[[], object] = lambda: None,
        images: Sequence[Image.Image] | None = None,
    ) -> list[Image.Image]:
        """
        Images of the current policy by the deterministic sampler.

        Args:
            prompts (`Sequence[str]` of length `n`): The prompts.
            seeds (`Sequence[int]` of length `n`): Their seeds.
            transformer (`torch.nn.Module`, *optional*): The module to call instead of the policy's own transformer.
            on_step (`Callable`, *optional*): Called after each denoising step of a batch.
            images (`Sequence[PIL.Image.Image]` of length `n`, *optional*): The images to edit.

        Returns:
            `list[PIL.Image.Image]` of length `n`: those of the stock pipeline with the same prompts and generators.
        """
        rows: list[Row] = [{"prompt": prompt} for prompt in prompts]
        if images is not None:
            rows = [row | {"image": image} for row, image in zip(rows, images, strict=True)]
        elif self.policy.takes_image:
            raise ValueError(
                f"`images` must be the images to edit, one per prompt, for a {type(self.policy.pipe).__name__}, got "
                "None. Pass PIL images."
            )
        return self._sample(rows, seeds, transformer, on_step)[0]

    @torch.no_grad()
    def _sample(
        self,
        rows: Sequence[Row],
        seeds: Sequence[int],
        transformer: nn.Module | None,
        on_step: Callable[[], object],
    ) -> tuple[list[Image.Image], Tensor]:
        """The images of [`sample_images`], and which of their latents are finite, of shape `(n,)` on the CPU."""
        settings = self.settings
        policy = self.policy
        scheduler = make_scheduler(policy.pipe.scheduler, settings, evaluation=True)
        images: list[Image.Image] = []
        finite: list[Tensor] = []
        size = settings.per_device_eval_batch_size
        for start in range(0, len(rows), size):
            conditioning = self.engine.condition(policy, rows[start : start + size])
            latents = policy.initial_latents(seeds[start : start + size])
            with self.engine.autocast():
                trajectory = sample_trajectories(
                    policy, scheduler, conditioning, latents, transformer=transformer, on_step=on_step
                )
            finite.append(trajectory.latents.isfinite().flatten(1).all(1))
            latents = trajectory.latents.nan_to_num(0.0, 0.0, 0.0)
            images += self.engine.decode(policy, latents, settings.decode_batch_size)
        are_finite = torch.cat(finite).cpu() if finite else torch.ones(0, dtype=torch.bool)
        if not are_finite.all():
            broken = [rows[i]["prompt"] for i in (~are_finite).nonzero().flatten().tolist()]
            logger.warning(f"{len(broken)} of {len(images)} images are infinite or NaN. Prompts: {broken}.")
        return images, are_finite
