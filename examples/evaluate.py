"""Scores the images of a diffusers pipeline, before or after training, with any reward functions.

    python examples/evaluate.py --lora outputs/toy --compare_base  # the tiny FLUX before and after `make demo`
    python examples/evaluate.py --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev --lora flux-mixgrpo \
        --cutoff_step_ratio 0.8 --prompts hpdv2 --num_prompts 400 --reward_funcs hpsv2 pickscore imagereward

An installed package has the same command as `diffusers-mixgrpo evaluate`; its code is
`diffusers_mixgrpo/commands/evaluate.py`.
"""

from diffusers_mixgrpo.commands.evaluate import main


if __name__ == "__main__":
    main()
