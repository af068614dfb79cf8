"""Serves rewards over HTTP, so that they can run on another machine or in a separate environment.

    python examples/serve_rewards.py --reward_funcs hpsv2 my_module:my_reward --host 0.0.0.0 --port 8100

An installed package has the same command as `diffusers-mixgrpo serve-rewards`; its code is
`diffusers_mixgrpo/commands/serve_rewards.py`, which says more.
"""

from diffusers_mixgrpo.commands.serve_rewards import main


if __name__ == "__main__":
    main()
