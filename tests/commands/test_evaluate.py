"""The evaluation command: its numbers against scores of images that a stock pipeline generates one by one."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from diffusers_mixgrpo import toy
from diffusers_mixgrpo.commands import evaluate as evaluate_command
from diffusers_mixgrpo.commands.command_line import TOY_CONFIGURATION, read_yaml
from diffusers_mixgrpo.reports.sample_grid import GAP, MARGIN


PROMPTS = toy.prompts("test", 5)
STEPS = {"num_inference_steps": 4, "height": 64, "width": 64, "max_sequence_length": 12}
OWN_REWARDS = """
import numpy as np

def redness(prompts, images, **columns):
    return [float(np.asarray(image)[..., 0].mean()) for image in images]

def moody(prompts, images, **columns):
    if "circle" in prompts[0]:
        raise KeyError("no circles")
    return [len(prompt) if "row" in prompt else None for prompt in prompts]

async def lookup(prompts, images, factor, **columns):
    return [f * len(prompt) for prompt, f in zip(prompts, factor)]
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A LoRA and a fully fine-tuned transformer, both with visible random changes, saved as by the trainer."""
    folder = tmp_path_factory.mktemp("trained")
    pipe = toy.load()
    generator = torch.Generator().manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v", "proj_out"])
    pipe.transformer.add_adapter(config)
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_" in name:
            parameter.data = 0.15 * torch.randn(parameter.shape, generator=generator)
    pipe.save_lora_weights(
        folder / "lora",
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    pipe.unload_lora_weights()
    for parameter in pipe.transformer.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    pipe.transformer.save_pretrained(folder / "full" / "transformer")
    return folder


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(OWN_REWARDS)
    (tmp_path / "prompts.txt").write_text("\n".join(["", *PROMPTS, "  ", ""]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def evaluate(flags: str) -> dict:
    evaluate_command.main([*flags.split(), "--num_inference_steps", "4", "--output_dir", "out"])
    return json.loads(Path("out/evaluation.json").read_text())


def generate(pipe: FluxPipeline, first_seed: int = 0, **kwargs) -> list[Image.Image]:
    """With the stock pipeline, one by one."""
    pipe.set_progress_bar_config(disable=True)
    images = []
    for seed, prompt in enumerate(PROMPTS, start=first_seed):
        generator = torch.Generator().manual_seed(seed)
        images += pipe(prompt, generator=generator, **(STEPS | kwargs)).images
    return images


def redness(images: list[Image.Image]) -> list[float]:
    return [sum(np.asarray(image)[..., 0].ravel().tolist()) / 4096 for image in images]


def check(summary: dict, scores: list[float]) -> None:
    """Batches of another size round differently, so a pixel may differ by 1."""
    assert summary["scores"] == pytest.approx(scores, abs=0.02)
    assert summary["mean"] == pytest.approx(statistics.mean(scores), abs=0.02)
    assert summary["standard_error"] == pytest.approx(statistics.stdev(scores) / len(scores) ** 0.5, abs=0.02)
    assert (summary["n"], summary["failed"]) == (len(scores), 0)


def test_base_and_lora_on_prompts_of_a_file(workplace, trained, capsys):
    flags = f"--lora {trained}/lora --compare_base --prompts prompts.txt --batch_size 2 --seed 7"
    record = evaluate(f"{flags} --reward_funcs my_rewards:redness diffusers_mixgrpo.toy:toy_reward")
    pipe = FluxPipeline.from_pretrained(toy.path())
    base = generate(pipe, 7)
    pipe.load_lora_weights(trained / "lora")
    lora = generate(pipe, 7)
    changes = [b - a for a, b in zip(redness(base), redness(lora), strict=True)]
    assert statistics.mean(map(abs, changes)) > 1  # otherwise the comparison would show nothing
    results = record["results"]
    check(results["base"]["redness"], redness(base))
    check(results["trained"]["redness"], redness(lora))
    check(results["difference"]["redness"], changes)
    check(results["trained"]["toy_reward"], toy.toy_reward(PROMPTS, lora))
    assert record["prompts"] == PROMPTS
    assert record["settings"]["guidance_scale"] == 3.5

    table = Path("out/evaluation.md").read_text()
    assert table in capsys.readouterr().out
    mean, error = (results["difference"]["redness"][key] for key in ("mean", "standard_error"))
    assert f"| redness | difference | {mean:.4f} | {error:.4f} | 5 | 0 |" in table
    grid = np.asarray(Image.open("out/grid.png").convert("RGB"), dtype=float)
    pair = np.concatenate([np.asarray(image, dtype=float).repeat(4, 0).repeat(4, 1) for image in (base[0], lora[0])])
    places = range(grid.shape[0] - 256)
    top = min(places, key=lambda y: np.abs(grid[y : y + 256, MARGIN : MARGIN + 256] - pair[:256]).mean())
    for column, image in enumerate((pair[:256], pair[256:])):
        left = MARGIN + column * (256 + GAP)
        assert np.abs(grid[top : top + 256, left : left + 256] - image).max() < 5


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_hybrid_inference(workplace, trained, kind):
    """Only the base model at ratio 0, only the trained model at ratio 1, and two steps of each at ratio 0.5."""
    flag = f"--lora {trained}/lora" if kind == "lora" else f"--transformer {trained}/full"
    flags = f"{flag} --prompts prompts.txt --num_prompts 2 --reward_funcs my_rewards:redness"
    zero = evaluate(f"{flags} --compare_base --cutoff_step_ratio 0")["results"]
    half = evaluate(f"{flags} --compare_base --cutoff_step_ratio 0.5")["results"]
    assert zero["trained"] == zero["base"] == half["base"]
    assert zero["difference"]["redness"]["scores"] == [0, 0]
    one = evaluate(f"{flags} --cutoff_step_ratio 1")["results"]
    plain = evaluate(flags)["results"]
    assert one == plain
    assert set(plain) == {"trained"}
    assert len({each["redness"]["mean"] for each in (zero["base"], half["trained"], plain["trained"])}) == 3


def test_all_weights_and_a_shift(workplace, trained):
    flags = f"--transformer {trained}/full/transformer --shift 2 --prompts prompts.txt --batch_size 5"
    record = evaluate(f"{flags} --reward_funcs my_rewards:redness")
    pipe = FluxPipeline.from_pretrained(toy.path())
    pipe.transformer = FluxTransformer2DModel.from_pretrained(trained / "full" / "transformer")
    changes = {"shift": 2.0, "use_dynamic_shifting": False}
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
    check(record["results"]["trained"]["redness"], redness(generate(pipe)))


def test_columns_and_failures(workplace, monkeypatch, caplog):
    """All columns reach the rewards, also the async ones; missing scores are counted, and the error is shown."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", workplace / "cache")
    texts = ["a small red circle at the top on gray", "two green crosses in a row on white", "a large blue square"]
    rows = [{"prompt": text, "factor": i + 1} for i, text in enumerate(texts)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    names = "my_rewards:moody my_rewards:lookup jpeg_compressibility"
    results = evaluate(f"--prompts rows.jsonl --batch_size 1 --reward_funcs {names}")["results"]["base"]
    assert results["moody"] == {"mean": 35, "standard_error": None, "n": 1, "failed": 2, "scores": [None, 35, None]}
    assert results["lookup"]["scores"] == [len(text) * (i + 1) for i, text in enumerate(texts)]
    assert all(-4 < score < -0.5 for score in results["jpeg_compressibility"]["scores"])
    table = Path("out/evaluation.md").read_text()
    assert "| moody | base | 35.0000 | - | 1 | 2 |" in table
    assert "no circles" in table


def test_the_benchmark_prompts(workplace, monkeypatch):
    """Read from the Hub's cache; the first prompts are of all styles."""
    folder = workplace / "hub" / "datasets--zhwang--HPDv2"
    for style in ("anime", "concept-art", "paintings", "photo"):
        file = folder / "snapshots" / "0123" / "benchmark" / f"{style}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([f"{style} {i}" for i in range(3)]))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(workplace / "hub"))
    rows = evaluate_command.load_rows(evaluate_command.EvaluationArguments(prompts="hpdv2", num_prompts=5))
    assert [row["prompt"] for row in rows] == ["anime 0", "concept-art 0", "paintings 0", "photo 0", "anime 1"]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(workplace / "empty"))
    with pytest.raises(ValueError, match="`prompts`='hpdv2'"):
        evaluate_command.load_rows(evaluate_command.EvaluationArguments(prompts="hpdv2"))


def test_the_toy_is_the_default(workplace):
    record = evaluate("--num_prompts 2")
    configuration = read_yaml(TOY_CONFIGURATION)
    assert record["prompts"] == toy.prompts("test")[:2]
    assert list(record["results"]["base"]) == [name.split(":")[1] for name in configuration["reward_funcs"]]
    assert record["settings"]["height"] == 64
    assert record["settings"]["max_sequence_length"] == 12


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--lora gone/at/all --prompts prompts.txt", "`lora`='gone/at/all'"),
        ("--lora ./gone.safetensors", "`lora`='./gone.safetensors'"),
        ("--transformer ./gone", "`transformer`='./gone'"),
        ("--prompts gone.txt", "`prompts`='gone.txt'.*No such file"),
        ("--prompts nobody/nothing", "`prompts`='nobody/nothing'"),
        ("--prompts titles.jsonl", "`prompts`='titles.jsonl'.*must have a column 'prompt', got title"),
        ("--prompts prompts.txt --num_prompts 6", "`num_prompts` must be in \\[1, 5\\].*got 6"),
        (
            "--pretrained_model_name_or_path ./gone --prompts prompts.txt --reward_funcs jpeg_compressibility",
            "_path`='./gone'",
        ),
        ("--pretrained_model_name_or_path ./gone", "`prompts` must be a file, a dataset or hpdv2.*got None"),
        ("--pretrained_model_name_or_path ./gone --prompts prompts.txt", "`reward_funcs`"),
        ("--reward_funcs my_rewards:gone", "my_rewards:gone"),
        ("--reward_init_kwargs {hpsv2}", "`reward_init_kwargs`='{hpsv2}'"),
        ('--reward_init_kwargs {"hpsv2":{}}', "must be in `reward_funcs`.*got hpsv2"),
        ("--compare_base", "`compare_base` must be False.*got True. Set `lora` or `transformer`"),
        ("--cutoff_step_ratio 0.8", "`cutoff_step_ratio` must be unset.*got 0.8. Set `lora` or `transformer`"),
        ("--lora lora --cutoff_step_ratio 1.2", r"`cutoff_step_ratio` must be in \[0, 1\], got 1.2"),
        ("--lora lora --transformer full", "`lora` and `transformer` must not both be set"),
    ],
)
def test_mistakes_are_named(workplace, monkeypatch, flags, said):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", workplace / "cache")
    Path("titles.jsonl").write_text('{"title": "a cat"}\n')
    with pytest.raises(ValueError, match=said):
        evaluate(flags)
    assert not Path("out").exists()


def test_a_lora_of_something_else_is_refused(workplace):
    """Otherwise the scores of the base model would be reported as the LoRA's."""
    pipe = toy.load()
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    pipe.save_lora_weights("text", text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder))
    with pytest.raises(ValueError, match="`lora`='text'.*no LoRA for the pipeline's transformer"):
        evaluate("--lora text --num_prompts 1")
