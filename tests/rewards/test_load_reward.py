"""Rewards by name: built-in ones, functions and classes of a module, and names that must not resolve."""

import pytest

from diffusers_mixgrpo import load_reward, toy
from diffusers_mixgrpo.rewards.jpeg_compressibility import jpeg_compressibility


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a module of rewards."""
    (tmp_path / "my_rewards.py").write_text(
        "answer = 42\n"
        "def greenness(prompts, images, **columns):\n"
        "    return [0.5] * len(images)\n"
        "class Constant:\n"
        "    def __init__(self, value=0.0):\n"
        "        self.value = value\n"
        "    def __call__(self, prompts, images, **columns):\n"
        "        return [self.value] * len(images)\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_builtin_reward():
    assert load_reward("jpeg_compressibility") is jpeg_compressibility


@pytest.mark.parametrize("name", ["toy_reward", "wholly_right", "extra_objects"])
def test_the_rewards_of_the_toy(name):
    reward = load_reward(f"diffusers_mixgrpo.toy:{name}")
    assert reward is getattr(toy, name)
    assert reward.__name__ == name


@pytest.mark.parametrize("name", ["random", "load", "path", "judge", "toy_reward", "toy:toy_reward"])
def test_names_of_the_toy_need_their_module(name):
    with pytest.raises(ValueError, match=f"`reward_funcs` must be .*got '{name}'"):
        load_reward(name)


def test_functions_and_classes_of_a_module(folder):
    assert load_reward("my_rewards:greenness")(["a"], [None]) == [0.5]
    assert load_reward("my_rewards:Constant", value=3.0)(["a"], [None]) == [3.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_rewards:gone", "must be importable, got 'my_rewards:gone' .*no attribute 'gone'"),
        ("no_such_module:reward", "must be importable, got 'no_such_module:reward' .*No module named"),
        ("my_rewards:answer", "must be callable, got 'my_rewards:answer', of type int"),
        ("hps", "must be one of hpsv2, pickscore, .*got 'hps'"),
    ],
)
def test_names_that_do_not_exist(folder, name, message):
    with pytest.raises(ValueError, match=message):
        load_reward(name)


def test_a_function_takes_no_arguments(folder):
    with pytest.raises(ValueError, match="`reward_init_kwargs` must be empty for 'my_rewards:greenness'.*got"):
        load_reward("my_rewards:greenness", value=3.0)
