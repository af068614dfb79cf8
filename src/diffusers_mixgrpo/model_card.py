"""The model card of a trained policy: what it is and how to load it."""

import os
from typing import Any

from huggingface_hub import ModelCard, ModelCardData


LOAD_LORA = """pipe = FluxPipeline.from_pretrained("{base_model}", torch_dtype=torch.bfloat16)
pipe.load_lora_weights("{repo_id}", weight_name="pytorch_lora_weights.safetensors")"""

LOAD_FULL = """transformer = FluxTransformer2DModel.from_pretrained(
    "{repo_id}", subfolder="transformer", torch_dtype=torch.bfloat16
)
pipe = FluxPipeline.from_pretrained("{base_model}", transformer=transformer, torch_dtype=torch.bfloat16)"""

TEMPLATE = """# {name}

{kind} of {base_link}, trained online with
[MixGRPO](https://arxiv.org/abs/2507.21802) to raise {rewards}.

## Use

```python
import torch
from diffusers import {imports}

{load}
pipe.to("cuda")

image = pipe(
    "{prompt}",
    height={height},
    width={width},
    num_inference_steps={num_inference_steps},
    guidance_scale={guidance_scale},
    max_sequence_length={max_sequence_length},
    generator=torch.Generator("cpu").manual_seed(0),
).images[0]
```
{shift}
## Training

{optimizer_steps} optimizer steps in {iterations} iterations of {images} images
({num_generations} per prompt), learning rate {learning_rate}.

| | |
|---|---|
{rows}

Trained with diffusers-mixgrpo.
"""

SHIFT_NOTE = """
The policy was trained with a static timestep shift of {shift}; to sample at the same times:

```python
pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
    pipe.scheduler.config, shift={shift}, use_dynamic_shifting=False
)
```
"""


def mixgrpo_model_card(
    args: Any,
    repo_id: str,
    base_model: str | None,
    reward_names: list[str],
    is_lora: bool,
    optimizer_steps: int,
    num_processes: int,
    prompt: str,
    metadata: dict[str, Any],
) -> ModelCard:
    """
    Write the card of a trained LoRA or transformer.

    Args:
        args ([`MixGRPOConfig`]): What it was trained with.
        repo_id (`str`): Where it will be, for the loading code.
        base_model (`str`, *optional*): The pipeline it was trained from; named in the card if it is on the Hub.
        reward_names (`list[str]`): Names of the rewards.
        is_lora (`bool`): Whether it is a LoRA or a whole transformer.
        optimizer_steps (`int`): Steps trained.
        num_processes (`int`): Devices it was trained on.
        prompt (`str`): A prompt for the example.
        metadata (`dict`): More entries of the card's metadata.

    Returns:
        `huggingface_hub.ModelCard`.
    """
    settings = ["sde_type", "eta", "window_strategy", "window_size", "window_interval", "window_stride"]
    settings += ["num_inference_steps", "guidance_scale", "shift", "epsilon", "beta", "reward_weights"]
    imports = ["FluxPipeline"] + ([] if is_lora else ["FluxTransformer2DModel"])
    imports += [] if args.shift is None else ["FlowMatchEulerDiscreteScheduler"]
    on_hub = base_model is not None and base_model.count("/") == 1 and not os.path.exists(base_model)
    base_path = base_model if on_hub else "path/to/the/base/pipeline"
    data = ModelCardData(
        base_model=base_model if on_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        **{"tags": ["text-to-image", "flux", "mixgrpo", "grpo"] + (["lora"] if is_lora else []), **metadata},
    )
    text = TEMPLATE.format(
        name=repo_id.split("/")[-1],
        kind="A LoRA" if is_lora else "A full fine-tuning",
        base_link=f"[{base_model}](https://huggingface.co/{base_model})" if on_hub else "a local FLUX pipeline",
        rewards=" and ".join(f"`{name}`" for name in reward_names),
        imports=", ".join(sorted(imports)),
        load=(LOAD_LORA if is_lora else LOAD_FULL).format(base_model=base_path, repo_id=repo_id),
        prompt=prompt.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " "),
        height=args.height,
        width=args.width,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        max_sequence_length=args.max_sequence_length,
        shift="" if args.shift is None else SHIFT_NOTE.format(shift=args.shift),
        optimizer_steps=optimizer_steps,
        iterations=optimizer_steps // args.optimizer_steps_per_iteration,
        images=args.prompts_per_iteration * args.num_generations * num_processes,
        num_generations=args.num_generations,
        learning_rate=args.learning_rate,
        rows="\n".join(f"| `{name}` | {getattr(args, name)} |" for name in settings),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
