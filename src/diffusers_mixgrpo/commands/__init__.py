"""The command line: `diffusers-mixgrpo COMMAND`, or `python -m diffusers_mixgrpo COMMAND`.

One module per command, which is imported when the command runs. The scripts in `examples/` call the same modules.
"""

import argparse
import importlib
import sys


# Command -> its line in the help
COMMANDS = {
    "train": "train a LoRA or all weights; without arguments, on the bundled tiny model",
    "evaluate": "score the images of a pipeline, before or after training",
    "serve-rewards": "serve rewards over HTTP",
    "report": "one HTML page of a run, or of two runs, from its folder",
}


def main(argv: list[str] | None = None) -> None:
    """Run the command that the first argument names, with the other arguments."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="diffusers-mixgrpo",
        description="Reinforcement-learning fine-tuning of diffusers pipelines with MixGRPO.",
        epilog="`diffusers-mixgrpo COMMAND --help` lists the arguments of a command.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    command = parser.parse_args(argv[:1]).command
    sys.argv = [f"diffusers-mixgrpo {command}", *argv[1:]]  # the name that the command's own help shows
    importlib.import_module(f".{command.replace('-', '_')}", __name__).main()
