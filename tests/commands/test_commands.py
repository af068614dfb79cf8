"""The dispatcher of the command line, and the scripts in `examples/` that call the same code."""

import importlib
import re
import runpy
import sys
from pathlib import Path

import pytest

from diffusers_mixgrpo import commands


EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = {"train_flux_mixgrpo": "train", "evaluate": "evaluate", "serve_rewards": "serve_rewards"}


def test_the_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        commands.main(["--help"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith("usage: diffusers-mixgrpo")
    for name in commands.COMMANDS:
        assert re.search(rf"^ +{name}\b", output, re.MULTILINE)


@pytest.mark.parametrize("argv", [[], ["trian"], ["--train"]])
def test_only_commands_run(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        commands.main(argv)
    assert stop.value.code == 2
    assert "usage: diffusers-mixgrpo" in capsys.readouterr().err


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_each_command_has_its_own_help(monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", ["diffusers-mixgrpo", name, "--help"])
    with pytest.raises(SystemExit) as stop:
        commands.main()
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: diffusers-mixgrpo {name} ")


def test_arguments_reach_the_command(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["diffusers-mixgrpo"])
    with pytest.raises(ValueError, match="`lora_rank` must be an integer of 0 or more, got -1"):
        commands.main(["train", "--lora_rank", "-1"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_examples_are_the_commands(script):
    names = runpy.run_path(str(EXAMPLES / f"{script}.py"))
    command = importlib.import_module(f"diffusers_mixgrpo.commands.{SCRIPTS[script]}")
    assert names["main"] is command.main


def test_the_report_of_a_folder(tmp_path, capsys):
    (tmp_path / "history.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    commands.main(["report", str(tmp_path)])
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    assert "<html" in (tmp_path / "report.html").read_text()
    with pytest.raises(SystemExit):
        commands.main(["report", str(tmp_path / "missing")])
    assert "missing" in capsys.readouterr().err
