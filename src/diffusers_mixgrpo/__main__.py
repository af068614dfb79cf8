"""`python -m diffusers_mixgrpo`, and `accelerate launch -m diffusers_mixgrpo`."""

from .commands import main


if __name__ == "__main__":
    main()
