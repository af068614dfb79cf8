"""The model card of a trained policy: how it was trained, what changed, and how to load it."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..mixgrpo_config import MixGRPOConfig
from ..policies import PipelinePolicy
from ..policies.trained_weights import EMA_FOLDER, LORA_WEIGHTS_NAME, TRANSFORMER_FOLDER
from .card_results import (
    BEFORE_AFTER,
    RewardChange,
    as_code,
    as_eval_results,
    as_table,
    reward_changes,
    widget_of,
)
from .logged_run import LoggedRun, as_object


LOAD_LORA = """pipe = {pipeline}.from_pretrained({base_model}, dtype=torch.bfloat16)
pipe.load_lora_weights({repo_id}, weight_name="{weight_name}")"""

LOAD_FULL = """transformer = {transformer}.from_pretrained(
    {repo_id}, subfolder="{folder}", dtype=torch.bfloat16
)
pipe = {pipeline}.from_pretrained({base_model}, transformer=transformer, dtype=torch.bfloat16)"""

IMAGE_IMPORTS = """
from diffusers.utils import load_image
from PIL import Image, ImageOps"""

# The image to edit, cropped and resized as in training; it is the first argument of these pipelines.
IMAGE = """image=ImageOps.fit(load_image("image.png"), {size}, Image.Resampling.LANCZOS),
    prompt={prompt}"""

TEMPLATE = """# {name}

{kind} of {base_link}, trained online with
[MixGRPO](https://arxiv.org/abs/2507.21802) to raise {rewards}.{watched}
{results}
## Use

```python
import torch
from diffusers import {imports}{more_imports}

{load}
pipe.to("cuda")

image = pipe(
    {prompt},
{arguments}
    generator=torch.Generator("cpu").manual_seed(0),
).images[0]
```
{other_transformer}{ema}{shift}
## Training

{optimizer_steps} optimizer steps in {iterations} iterations of {images} images
({num_generations} per prompt), learning rate {learning_rate}.

| | |
|---|---|
{rows}

Trained with diffusers-mixgrpo{versions}.

## Citation

```bibtex
@article{{li2025mixgrpo,
  title   = {{MixGRPO: Unlocking Flow-based GRPO Efficiency with Mixed ODE-SDE}},
  author  = {{Li, Junzhe and Cui, Yutao and Huang, Tao and Ma, Yinping and Fan, Chun and Yang, Miles and Zhong, Zhao}},
  journal = {{arXiv preprint arXiv:2507.21802}},
  year    = {{2025}}
}}
```
"""

RESULTS = """
## Results

Means over {prompts} before and after training, with standard errors over the prompts:

{table}

A higher reward is what the training aimed at; whether the images are better is for eyes to judge.
"""

PICTURE = """
![The same prompts and seeds before and after training]({file})
"""

TRANSFORMER_NOTE = """
The LoRA was trained on the transformer of {source}, not on that of the pipeline above: pass that one to
`from_pretrained` as `transformer`.
"""

SHIFT_NOTE = """
The policy was trained with a static timestep shift of {shift}; to sample at the same timesteps:

```python
pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
    pipe.scheduler.config, shift={shift}, use_dynamic_shifting=False
)
```
"""

EMA_NOTE = """
For the exponential moving average of these weights (decay {decay}), load them with `{argument}`.
"""

SETTINGS = (
    "sde_type",
    "eta",
    "window_strategy",
    "window_size",
    "window_interval",
    "window_stride",
    "num_inference_steps",
    "guidance_scale",
    "shift",
    "epsilon",
    "beta",
    "reward_weights",
    "seed",
    "eval_seed",
)


def mixgrpo_model_card(
    policy: PipelinePolicy,
    settings: MixGRPOConfig,
    repo_id: str,
    base_model: str | None,
    reward_weights: Mapping[str, float],
    is_lora: bool,
    optimizer_steps: int,
    num_processes: int,
    prompt: str,
    metadata: dict[str, Any],
    eval_reward_names: Sequence[str] = (),
    run: LoggedRun | None = None,
    num_eval_prompts: int | Mapping[str, int] | None = None,
) -> ModelCard:
    """
    Write the card of a trained LoRA or transformer.

    Args:
        policy ([`PipelinePolicy`]): The policy; it names the classes to load and the arguments to sample with.
        settings ([`MixGRPOConfig`]): The configuration of the training run.
        repo_id (`str`): The repository, for the loading code.
        base_model (`str`, *optional*): The base pipeline; the card names it if it is on the Hub.
        reward_weights (`Mapping[str, float]`): The weight of each reward. Those with 0 were only logged.
        is_lora (`bool`): Whether a LoRA was trained, or the whole transformer.
        optimizer_steps (`int`): Optimizer steps taken.
        num_processes (`int`): Devices of the training run.
        prompt (`str`): A prompt for the example.
        metadata (`dict`): More entries of the card's metadata. Its `"tags"` are added to the card's own.
        eval_reward_names (`Sequence[str]`): Rewards that were never trained on.
        run ([`LoggedRun`], *optional*): What the run has logged. Without it the card shows no results.
        num_eval_prompts (`int` or `dict[str, int]`, *optional*): The number of held-out prompts, or that of each
            dataset.

    Returns:
        `huggingface_hub.ModelCard`.
    """
    pipeline = type(policy.pipe).__name__
    transformer = type(policy.pipe.transformer).__name__
    is_on_hub = base_model is not None and base_model.count("/") == 1 and not os.path.exists(base_model)
    imports = [pipeline]
    if not is_lora:
        imports.append(transformer)
    if settings.shift is not None:
        imports.append("FlowMatchEulerDiscreteScheduler")
    task = "image-to-image" if policy.takes_image else "text-to-image"
    tags = [task, "diffusers", policy.family, "mixgrpo", "grpo"]
    tags += ["lora", "template:sd-lora"] if is_lora else []
    changes = [] if run is None else reward_changes(run, [*reward_weights, *eval_reward_names], num_eval_prompts)
    entries: dict[str, Any] = dict(policy.licenses.get(base_model or "", {}))
    if run is not None and (widget := widget_of(run)):
        entries["widget"] = widget
    if changes:
        entries["model_name"] = repo_id.split("/")[-1]
        entries["eval_results"] = as_eval_results(changes)
    entries |= metadata
    entries["tags"] = list(dict.fromkeys([*tags, *metadata.get("tags", [])]))
    data = ModelCardData(
        base_model=base_model if is_on_hub else None,
        library_name="diffusers",
        pipeline_tag=task,
        **entries,
    )
    load = (LOAD_LORA if is_lora else LOAD_FULL).format(
        pipeline=pipeline,
        transformer=transformer,
        base_model=_literal(base_model if is_on_hub and base_model else "path/to/the/base/pipeline"),
        repo_id=_literal(repo_id),
        weight_name=LORA_WEIGHTS_NAME,
        folder=TRANSFORMER_FOLDER,
    )
    # Not `subfolder` for a LoRA: in a local folder diffusers takes the file of that name outside it.
    average = (
        f'weight_name="{EMA_FOLDER}/{LORA_WEIGHTS_NAME}"'
        if is_lora
        else f'subfolder="{EMA_FOLDER}/{TRANSFORMER_FOLDER}"'
    )
    text = TEMPLATE.format(
        name=repo_id.split("/")[-1],
        kind="A LoRA" if is_lora else "A full fine-tuning",
        base_link=f"[{base_model}](https://huggingface.co/{base_model})" if is_on_hub else f"a local {pipeline}",
        rewards=" and ".join(as_code(name) for name, weight in reward_weights.items() if weight),
        watched=_watched([name for name, weight in reward_weights.items() if not weight], eval_reward_names),
        results=_results(run, changes, reward_weights),
        versions=_versions(run),
        imports=", ".join(sorted(imports)),
        load=load,
        more_imports=IMAGE_IMPORTS if policy.takes_image else "",
        prompt=IMAGE.format(size=policy.condition_size, prompt=_literal(prompt))
        if policy.takes_image
        else _literal(prompt),
        other_transformer=_transformer_note(policy) if is_lora else "",
        arguments="\n".join(f"    {name}={value!r}," for name, value in policy.call_arguments.items()),
        ema="" if settings.ema_decay is None else EMA_NOTE.format(decay=settings.ema_decay, argument=average),
        shift="" if settings.shift is None else SHIFT_NOTE.format(shift=settings.shift),
        optimizer_steps=optimizer_steps,
        iterations=optimizer_steps // settings.optimizer_steps_per_iteration,
        images=settings.prompts_per_iteration * settings.num_generations * num_processes,
        num_generations=settings.num_generations,
        learning_rate=settings.learning_rate,
        rows="\n".join(
            f"| `{name}` | {getattr(policy if name == 'guidance_scale' else settings, name)} |" for name in SETTINGS
        ),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _watched(logged: Sequence[str], untrained: Sequence[str]) -> str:
    """A sentence on the rewards that were not trained on."""
    names = [as_code(name) for name in [*logged, *untrained]]
    verb = "was" if len(names) == 1 else "were"
    return f" {' and '.join(names)} {verb} only watched." if names else ""


def _results(run: LoggedRun | None, changes: Sequence[RewardChange], reward_weights: Mapping[str, float]) -> str:
    text = ""
    if changes:
        prompts = {change.prompts for change in changes}
        text = RESULTS.format(
            prompts=prompts.pop() if len(prompts) == 1 else "held-out prompts",
            table=as_table(changes, dict(reward_weights)),
        )
    if run is not None and (run.path / BEFORE_AFTER).is_file():
        text += PICTURE.format(file=BEFORE_AFTER)
    return text


def _transformer_note(policy: PipelinePolicy) -> str:
    """Which transformer the LoRA needs, if the pipeline was loaded with another one than its own."""
    base, source = (str(part.config.get("_name_or_path") or "") for part in (policy.pipe, policy.pipe.transformer))
    if not base or not source or source.startswith(base) or f"models--{base.replace('/', '--')}" in source:
        return ""
    is_local = os.path.exists(source)
    name = "another pipeline in a local folder" if is_local else f"[{source}](https://huggingface.co/{source})"
    return TRANSFORMER_NOTE.format(source=name)


def _versions(run: LoggedRun | None) -> str:
    versions = as_object(run.info.get("versions")) if run is not None else {}
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return f" ({known})" if known else ""


def _literal(text: str) -> str:
    """A text as a Python string in double quotes, on one line and without anything that ends a code block."""
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    escaped = "".join(c if c.isprintable() else repr(c)[1:-1] for c in quoted)
    return f'"{escaped}"'.replace("```", "\\x60" * 3)
