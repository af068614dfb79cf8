"""Trains a LoRA, or all weights, of a FLUX pipeline with MixGRPO.

On the bundled tiny FLUX, in minutes on a laptop:

    python examples/train_flux_mixgrpo.py

On FLUX.1-dev, with your own reward and prompts (one per line, or a dataset with a column "prompt"):

    accelerate launch examples/train_flux_mixgrpo.py --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev \
        --reward_funcs my_module:my_reward --dataset_name prompts.txt --output_dir flux-mixgrpo --push_to_hub

Every field of `MixGRPOConfig` is a flag, and can be set in a YAML file that is passed with `--config`. An installed
package has the same command as `diffusers-mixgrpo train`; its code is `diffusers_mixgrpo/commands/train.py`.
"""

from diffusers_mixgrpo.commands.train import main


if __name__ == "__main__":
    main()
