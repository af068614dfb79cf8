"""Model cards: what they say, and the code in them, which is run."""

import ast
import re

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from helpers import PROMPTS, build_pipeline, make_trainer, redness, small_config
from huggingface_hub import ModelCard
from peft import LoraConfig
from PIL import Image

from diffusers_mixgrpo import policy_class
from diffusers_mixgrpo.reports.model_card import mixgrpo_model_card


HUB_MODEL = "black-forest-labs/FLUX.1-dev"
TAGS = ["text-to-image", "diffusers", "flux", "mixgrpo", "grpo", "lora", "template:sd-lora"]


def card(tmp_path, prompt="a cat", base_model=HUB_MODEL, is_lora=True, num_processes=1, metadata=None, **changes):
    settings = small_config(tmp_path, **changes)
    pipe = build_pipeline()
    return mixgrpo_model_card(
        policy_class(type(pipe).__name__)(pipe, height=32, width=32, num_inference_steps=5),
        settings,
        repo_id="someone/red",
        base_model=base_model,
        reward_weights={"redness": 0.5, "clipscore": 0.5},
        is_lora=is_lora,
        optimizer_steps=6,
        num_processes=num_processes,
        prompt=prompt,
        metadata=metadata or {},
    )


def code_of(text: str) -> list[str]:
    return [block.split("```")[0] for block in text.split("```python\n")[1:]]


@pytest.mark.parametrize("lora", [True, False])
def test_the_code_makes_the_images_of_the_trained_policy(tmp_path, pipeline_folder, lora):
    """It is what a stranger will run. So run it, with the names of things that are here."""
    lora_config = LoraConfig(r=4, lora_alpha=64, init_lora_weights=False)  # it changes images from the start
    trainer = make_trainer(tmp_path / "output", lora=lora and lora_config, shift=3.0)
    if not lora:
        with torch.no_grad():
            for parameter in trainer.pipe.transformer.parameters():
                parameter *= 2
    trainer.save_model()
    trainer.create_model_card(model_name="red", tags="toy", finetuned_from=HUB_MODEL, dataset="someone/prompts")
    card = ModelCard.load(tmp_path / "output" / "README.md")
    assert card.data.base_model == HUB_MODEL and "toy" in card.data.tags and card.data.dataset == "someone/prompts"

    code, shift = code_of(card.text)
    code = code.replace(HUB_MODEL, pipeline_folder).replace('"red"', repr(str(tmp_path / "output")))
    code = code.replace("bfloat16", "float32").replace("cuda", "cpu")
    load, call = code.split("image = ")
    names: dict = {}
    exec(load + shift + "image = " + call, names)
    (expected,) = trainer.sample_images([PROMPTS[0]["prompt"]], [0])
    difference = np.asarray(names["image"], dtype=int) - np.asarray(expected, dtype=int)
    # The trainer's VAE has another memory format, whose convolutions round otherwise: at most by a step of 255.
    assert np.abs(difference).max() <= 1
    plain = build_pipeline()(
        PROMPTS[0]["prompt"],
        **{"height": 32, "width": 32, "max_sequence_length": 12, "num_inference_steps": 5},
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert np.abs(np.asarray(plain, dtype=int) - np.asarray(expected, dtype=int)).max() > 20


def test_what_a_card_says(tmp_path):
    made = card(tmp_path, num_processes=2, metadata={"tags": ["toy"], "license": "mit"}, epsilon=0.0125)
    assert made.data.library_name == "diffusers" and made.data.pipeline_tag == "text-to-image"
    assert made.data.tags == [*TAGS, "toy"] and made.data.license == "mit"
    assert card(tmp_path).data.tags == TAGS
    assert not {"lora", "template:sd-lora"} & set(card(tmp_path, is_lora=False).data.tags)
    assert made.text.startswith("# red\n") or "\n# red\n" in made.text
    assert "A LoRA of [black-forest-labs/FLUX.1-dev](https://huggingface.co/black-forest-labs/FLUX.1-dev)" in made.text
    assert "`redness` and `clipscore`" in made.text
    assert "6 optimizer steps in 3 iterations of 16 images\n(4 per prompt), learning rate 0.001" in made.text
    assert "| `epsilon` | 0.0125 |" in made.text and "| `window_size` | 2 |" in made.text
    assert "| `guidance_scale` | 3.5 |" in made.text  # the pipeline's own
    assert "A full fine-tuning of" in card(tmp_path, is_lora=False).text


def test_the_scheduler_is_shown_where_it_was_changed(tmp_path):
    assert len(code_of(card(tmp_path).text)) == 1
    text = card(tmp_path, shift=2.5).text
    assert len(code_of(text)) == 2 and "shift=2.5, use_dynamic_shifting=False" in text
    assert "FlowMatchEulerDiscreteScheduler" in code_of(text)[0].splitlines()[1]


@pytest.mark.parametrize("lora", [True, False])
def test_the_moving_average_is_named(tmp_path, pipeline_folder, lora):
    """Its argument in place of the code's loads the average."""
    trainer = make_trainer(tmp_path / "output", lora=lora, ema_decay=0.99)
    with trainer.ema.applied(), torch.no_grad():
        for parameter in trainer.engine.trained_parameters:
            parameter.fill_(0.125)
    trainer.save_model()
    trainer.create_model_card(model_name="red", finetuned_from=HUB_MODEL)
    text = ModelCard.load(tmp_path / "output" / "README.md").text
    argument = text.split("average of these weights (decay 0.99), load them with `")[1].split("`.")[0]
    code = code_of(text)[0].split("image = ")[0].replace("bfloat16", "float32").replace("cuda", "cpu")
    code = code.replace(HUB_MODEL, pipeline_folder).replace('"red"', repr(str(tmp_path / "output")))
    name = argument.split("=")[0]
    (own,) = re.findall(rf'{name}="[^"]*"', code)
    names: dict = {}
    exec(code.replace(own, argument), names)
    loaded = names["pipe"].transformer.named_parameters()
    assert all((value == 0.125).all() for name, value in loaded if "lora_" in name or not lora)
    assert "average" not in card(tmp_path, is_lora=lora).text


def test_any_prompt_is_a_string_of_the_code(tmp_path):
    prompt = 'a "sign"\\that says\nhello'
    (code,) = code_of(card(tmp_path, prompt=prompt).text)
    seen = []
    call = code.split("image = ")[1].replace("pipe(", "note(")
    exec(call, {"note": lambda prompt, **_: seen.append(prompt) or type("Out", (), {"images": [0]}), "torch": torch})
    assert seen == [prompt]


@pytest.mark.parametrize(
    "prompt",
    [
        "a\r```\r---\rtags: [x]\n---\n# no",
        "```\n</code></pre><script>alert(1)</script> {braces} $x$",
        '\'"""\\" \u2028 \u202e \x85 \x00 \U0001f600 \u05e9',
    ],
)
def test_no_prompt_breaks_a_card(tmp_path, prompt):
    card(tmp_path, prompt=prompt, metadata={"license": "mit"}).save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.license == "mit" and loaded.data.tags == TAGS
    lines = (tmp_path / "README.md").read_bytes().decode().splitlines()
    assert lines.count("---") == 2 and lines.count("```") == 2  # of the code and the citation
    assert lines.count("```python") == lines.count("```bibtex") == 1
    (code,) = code_of(loaded.text)
    constants = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert prompt in constants


@pytest.mark.parametrize("is_local", [True, False])
def test_a_pipeline_that_is_not_on_the_hub(tmp_path, pipeline_folder, is_local):
    made = card(tmp_path, base_model=pipeline_folder if is_local else None)
    assert pipeline_folder not in made.text and "path/to/the/base/pipeline" in made.text
    assert "a local FluxPipeline" in made.text and made.data.base_model is None


def test_a_trainer_knows_the_folder_that_it_was_given(tmp_path, pipeline_folder):
    trainer = make_trainer(tmp_path / "output", pipe=pipeline_folder)
    trainer.create_model_card()
    text = (tmp_path / "output" / "README.md").read_text()
    assert pipeline_folder not in text and "path/to/the/base/pipeline" in text
    assert 'pipe.load_lora_weights("output"' in text


def test_a_transformer_of_another_source_is_named(tmp_path, pipeline_folder):
    """The LoRA would give other images on the transformer of the base that the card names."""
    build_pipeline().transformer.save_pretrained(tmp_path / "other" / "transformer")
    for folder, is_named in ((pipeline_folder, False), (tmp_path / "other", True)):
        transformer = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")
        pipe = FluxPipeline.from_pretrained(pipeline_folder, transformer=transformer)
        make_trainer(tmp_path / "output", pipe=pipe).create_model_card()
        text = (tmp_path / "output" / "README.md").read_text()
        assert ("pass that one to\n`from_pretrained` as `transformer`" in text) == is_named
    make_trainer(tmp_path / "output", pipe=pipeline_folder).create_model_card()
    assert "pass that one" not in (tmp_path / "output" / "README.md").read_text()


def test_the_license_of_the_base(tmp_path):
    data = card(tmp_path).data
    assert (data.license, data.license_name) == ("other", "flux-1-dev-non-commercial-license")
    assert data.license_link == f"https://huggingface.co/{HUB_MODEL}/blob/main/LICENSE.md"
    krea = card(tmp_path, base_model="black-forest-labs/FLUX.1-Krea-dev").data
    assert (krea.license, krea.license_name) == (data.license, data.license_name)
    assert krea.license_link == "https://huggingface.co/black-forest-labs/FLUX.1-Krea-dev/blob/main/LICENSE.md"
    assert card(tmp_path, base_model="black-forest-labs/FLUX.1-schnell").data.license == "apache-2.0"
    assert card(tmp_path, base_model="someone/flux").data.license is None


@pytest.mark.parametrize("prompt", ["a red cat", "a: '\"---\n```\n<b> #x"])
def test_a_card_of_a_run_has_its_results(tmp_path, prompt):
    """What is read back from the file is what was measured and drawn."""

    def greenness(prompts, images, **columns):
        return [-value for value in redness(prompts, images)]

    def blueness(prompts, images, **columns):
        return [float(np.asarray(image)[..., 2].mean()) for image in images]

    rows = [{"prompt": prompt, "tag": -1}, *PROMPTS]
    trainer = make_trainer(
        tmp_path / "output",
        rewards=[redness, greenness],
        eval_reward_funcs=blueness,
        reward_weights=[1.0, 0.0],
        train_dataset=rows,
        eval_dataset=rows,
        logging_images_steps=2,
        num_logged_prompts=2,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    (tmp_path / "output" / "before_after.png").write_bytes(b"")
    trainer.create_model_card(finetuned_from=HUB_MODEL, tags=["toy", "lora"])

    loaded = ModelCard.load(tmp_path / "output" / "README.md")
    assert loaded.data.tags == [*TAGS, "toy"]
    results = {(result.metric_name, result.dataset_name): result.metric_value for result in loaded.data.eval_results}
    for name in ("redness", "greenness", "blueness"):
        for when, metrics in (("before", before), ("after", after)):
            measured = results[f"{name} {when} training", "6 held-out prompts"]
            assert measured == pytest.approx(metrics[f"eval_rewards/{name}/mean"], abs=1e-6)
    assert len(results) == 6
    assert [entry["text"] for entry in loaded.data.widget] == [row["prompt"] for row in rows[:2]]
    for entry in loaded.data.widget:
        assert Image.open(tmp_path / "output" / entry["output"]["url"]).size == (32, 32)

    error = before["eval_rewards/redness/std"] / 6**0.5
    assert f"| `redness` | {before['eval_reward']:.3f} \u00b1 {error:.3f} |" in loaded.text
    assert re.search(r"`greenness` \|.*\| only logged \|", loaded.text)
    assert re.search(r"`blueness` \|.*\| never trained on \|", loaded.text)
    assert "to raise `redness`. `greenness` and `blueness` were only watched." in loaded.text
    assert "](before_after.png)" in loaded.text and "arXiv:2507.21802" in loaded.text
    assert f"torch {torch.__version__}" in loaded.text and "| `eval_seed` |" in loaded.text


def test_results_of_several_datasets_with_images_that_no_reward_could_score(tmp_path):
    def picky(prompts, images, **columns):
        scores = redness(prompts, images)
        return [None if "dog" in prompt else score for prompt, score in zip(prompts, scores, strict=True)]

    picky.__name__ = "pi`cky"
    datasets = {"easy": PROMPTS[:4], "a|b": PROMPTS[:3]}
    trainer = make_trainer(tmp_path / "output", rewards=picky, eval_dataset=datasets)
    before = trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card()
    loaded = ModelCard.load(tmp_path / "output" / "README.md")
    failed = before["eval_easy_rewards/pi`cky/failed"]
    assert 0 < failed < 3
    error = before["eval_easy_rewards/pi`cky/std"] / (4 - failed) ** 0.5
    mean = before["eval_easy_rewards/pi`cky/mean"]
    assert f"| `` pi`cky `` | 4 held-out prompts of easy | {mean:.3f} \u00b1 {error:.3f} |" in loaded.text
    assert "| 3 held-out prompts of a\\|b |" in loaded.text and "to raise `` pi`cky ``." in loaded.text
    names = {result.dataset_name for result in loaded.data.eval_results}
    assert names == {"4 held-out prompts of easy", "3 held-out prompts of a|b"}


def test_an_evaluation_in_the_middle_is_not_one_before_training(tmp_path):
    trainer = make_trainer(tmp_path / "output", eval_dataset=PROMPTS, max_steps=4, eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert len(trainer.state.log_history) > 4
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "output" / "README.md")
    assert card.data.eval_results is None and "Results" not in card.text


def test_results_of_another_run_are_not_those_of_this_one(tmp_path):
    make_trainer(tmp_path / "output", eval_dataset=PROMPTS, max_steps=4, eval_strategy="steps", eval_steps=2).train()
    make_trainer(tmp_path / "output").create_model_card()
    card = ModelCard.load(tmp_path / "output" / "README.md")
    assert card.data.eval_results is None and "Results" not in card.text
