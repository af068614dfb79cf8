"""Families that edit an image: each does what its stock pipeline does, and trains. As `test_families.py`."""

import copy
import functools
import inspect
import json
import re

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from helpers import assert_same, assert_the_ratio_is_one, make_trainer, redness, trained
from miniatures import EDITING
from peft import LoraConfig
from PIL import Image

from diffusers_mixgrpo import MixedODESDEScheduler, hybrid_inference, policy_class, sample_trajectories
from diffusers_mixgrpo.commands import before_after, train
from diffusers_mixgrpo.commands import evaluate as evaluate_command
from diffusers_mixgrpo.policies import FAMILIES, PipelinePolicy
from diffusers_mixgrpo.policies.prompt_embeds import CachedPrompts, cache_folder, cache_prompts
from diffusers_mixgrpo.reports.html_report import write_report
from diffusers_mixgrpo.training.datasets import open_images


TEXTS = ["a cat", "two big dogs"]  # of different lengths
SEEDS = [11, 12]
STEPS = 4
# Guidance scales without and with a second pass. FLUX.1-Kontext has none.
SCALES = {"flux-kontext": (0.0, 3.5), "qwen-image-edit": (1.0, 4.0), "qwen-image-edit-plus": (1.0, 4.0)}
CASES = [(name, scale) for name, scales in SCALES.items() for scale in scales]
FAMILY = pytest.mark.parametrize("family", EDITING)
# Most of the time goes to the image of a megapixel that Qwen-Image-Edit encodes, whatever the size of its result.
SLOW_FAMILY = pytest.mark.parametrize(
    "family", ["flux-kontext", *(pytest.param(name, marks=pytest.mark.slow) for name in list(EDITING)[1:])]
)


def photo(seed: int, size: tuple[int, int]) -> Image.Image:
    colors = np.random.default_rng(seed).integers(0, 255, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(colors).resize(size, Image.Resampling.BICUBIC)


PHOTOS = [photo(0, (90, 60)), photo(1, (70, 100))]  # one with the aspect ratio of the results, and one without


@functools.cache
def shared(family: str) -> DiffusionPipeline:
    """The miniature pipeline of a family; tests must leave it as it is."""
    return EDITING[family]()


def copied(family: str) -> DiffusionPipeline:
    pipe = shared(family)
    own = type(pipe)(**{name: copy.deepcopy(part) for name, part in pipe.components.items()})
    own.set_progress_bar_config(disable=True)
    return own


def size_of(family: str) -> dict[str, int]:
    return {"height": 32, "width": 48} if family == "flux-kontext" else {"height": 64, "width": 96}


def make_policy(family, scale, length=24, pipe=None) -> PipelinePolicy:
    pipe = shared(family) if pipe is None else pipe
    policy = policy_class(type(pipe).__name__)
    return policy(pipe, **size_of(family), num_inference_steps=STEPS, guidance_scale=scale, max_sequence_length=length)


def like_stock(family, scale, texts) -> PipelinePolicy:
    """With texts padded to the longest of them, as the stock pipelines do that pad to the longest of a call."""
    if family == "flux-kontext":
        return make_policy(family, scale)
    conditioning = encode(family, 1.0, tuple(texts), tuple(range(len(texts))))
    unused = conditioning.rows["prompt_mask"].shape[1] - int(conditioning.rows["prompt_mask"].sum(1).max())
    return make_policy(family, scale, 24 - unused)


@functools.cache
def encode(family, scale, texts, photos, length=24):
    """The conditioning of the shared pipeline; it takes long, and nothing changes it."""
    policy = make_policy(family, scale, length)
    return policy.encode(texts, [policy.fit_image(PHOTOS[i]) for i in photos])


def conditioning_of(policy, texts, photos):
    family = next(name for name in EDITING if shared(name) is policy.pipe)
    return encode(family, policy.guidance_scale, tuple(texts), tuple(photos), policy.max_sequence_length)


def stock(policy, texts, photos, seeds=SEEDS, **arguments):
    """The output of the stock pipeline's `__call__`, which gets the images as they are."""
    arguments = policy.arguments_of(texts, [PHOTOS[i] for i in photos]) | arguments
    generators = [torch.Generator().manual_seed(seed) for seed in seeds[: len(texts)]]
    return policy.pipe(generator=generators, **arguments).images


def roll_out(policy, texts, photos, seeds=SEEDS, group=1, start=0, size=0, **config):
    scheduler = MixedODESDEScheduler.from_config(
        policy.pipe.scheduler.config, window_start=start, window_size=size, **config
    )
    return sample_trajectories(
        policy,
        scheduler,
        conditioning_of(policy, texts, photos),
        policy.initial_latents(seeds[: len(texts)]),
        num_generations=group,
        generator=torch.Generator().manual_seed(0),
    )


def assert_same_images(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for own, other in zip(ours, theirs, strict=True):
        assert np.array_equal(np.asarray(own), np.asarray(other))
        assert np.asarray(own).std() > 5


# ---- Rollouts ----


def is_slow(family, scale, photos):
    """All but one case of a family that encodes images of a megapixel: a guided one with as many as it takes."""
    return family != "flux-kontext" and (scale == 1 or photos != ([1] if family.endswith("plus") else [0, 1]))


@pytest.mark.parametrize(
    "family, scale, photos",
    [
        pytest.param(family, scale, photos, marks=[pytest.mark.slow] if is_slow(family, scale, photos) else [])
        for family, scale in CASES
        for photos in ([0], [1], [0, 1])
        if photos != [0, 1] or family != "qwen-image-edit-plus"  # whose pipeline takes one prompt at a time
    ],
)
def test_a_rollout_without_a_window_is_the_stock_pipeline(family, scale, photos):
    texts = [TEXTS[i] for i in photos]
    policy = like_stock(family, scale, texts)
    assert policy.is_guided == (family != "flux-kontext" and scale > 1)
    trajectory = roll_out(policy, texts, photos)
    assert torch.equal(trajectory.latents, torch.as_tensor(stock(policy, texts, photos, output_type="latent")))
    assert_same_images(policy.decode(trajectory.latents), stock(policy, texts, photos))


@pytest.mark.parametrize("family", ["flux-kontext", pytest.param("qwen-image-edit", marks=pytest.mark.slow)])
def test_an_image_of_the_right_aspect_ratio_is_used_as_the_stock_pipeline_uses_it(family):
    """Not so with Qwen-Image-Edit-Plus, whose language model sees a smaller image: one that is resized twice."""
    policy = like_stock(family, SCALES[family][1], TEXTS[:1])
    whole = policy.call_arguments | {"prompt": TEXTS[0], "image": PHOTOS[0]}
    if family == "flux-kontext":  # which takes an image as large as it comes, unless it chooses a size itself
        whole["image"] = PHOTOS[0].resize((policy.width, policy.height), Image.Resampling.LANCZOS)
    images = policy.pipe(generator=torch.Generator().manual_seed(SEEDS[0]), **whole).images
    assert_same_images(policy.decode(roll_out(policy, TEXTS[:1], [0]).latents), images)


@SLOW_FAMILY
def test_the_shared_prefix_is_the_stock_pipelines(family):
    policy = like_stock(family, SCALES[family][1], TEXTS[:1])
    states = []

    def keep(pipe, step, timestep, tensors):
        states.append(tensors["latents"])
        return {}

    stock(policy, TEXTS[:1], [1], output_type="latent", callback_on_step_end=keep)
    trajectory = roll_out(policy, TEXTS[:1], [1], group=3, start=2, size=1)
    assert trajectory.states.shape == (3, 2, *policy.latent_shape)
    assert torch.equal(trajectory.states[:, 0], states[1].repeat_interleave(3, 0))


@pytest.mark.parametrize("sde_type", ["flow", "dance", "cps", "dpm"])
@SLOW_FAMILY
def test_the_ratio_is_one_before_the_first_update(family, sde_type):
    policy = make_policy(family, SCALES[family][1])
    trajectory = roll_out(policy, TEXTS, [0, 1], group=2, start=1, size=2, sde_type=sde_type)
    assert_the_ratio_is_one(policy, trajectory)


@SLOW_FAMILY
def test_a_prompt_is_the_same_in_each_batch(family):
    together, alone = encode(family, 4.0, tuple(TEXTS), (0, 1)), encode(family, 4.0, tuple(TEXTS[1:]), (1,))
    for name, rows in together.rows.items():
        torch.testing.assert_close(rows[1:], alone.rows[name], rtol=1e-5, atol=1e-5)
    assert torch.equal(together.rows["image_latents"][1:], alone.rows["image_latents"])  # encoded one by one


@FAMILY
@torch.no_grad()
def test_another_image_is_another_velocity(family):
    """By the transformer's tokens of it, and with Qwen-Image-Edit by what the language model sees of it too."""
    policy = make_policy(family, SCALES[family][1])
    latents = policy.initial_latents(SEEDS[:1])
    first, second = (encode(family, SCALES[family][1], (TEXTS[0],), (i,)) for i in range(2))
    velocity = policy.velocity(latents, torch.tensor(700.0), first)
    assert velocity.shape == latents.shape
    changed = [name for name, rows in first.rows.items() if not torch.equal(rows, second.rows[name])]
    assert set(changed) == {"image_latents"} | (
        {"prompt_embeds", "negative_prompt_embeds"}
        & set(first.rows) - ({"prompt_embeds"} if family == "flux-kontext" else set())
    )
    for name in changed:
        other = type(first)(first.rows | {name: second.rows[name]}, first.shared)
        assert (policy.velocity(latents, torch.tensor(700.0), other) - velocity).abs().max() > 1e-4


def test_images_are_cropped_around_their_center():
    policy = make_policy("flux-kontext", 3.5)
    marked = Image.new("RGBA", (300, 32), "red")
    marked.paste("blue", (126, 0, 174, 32))  # the 48 columns in the middle
    fitted = policy.fit_image(marked)
    assert (fitted.size, fitted.mode) == ((48, 32), "RGB")
    assert np.array_equal(np.asarray(fitted), np.asarray(Image.new("RGB", (48, 32), "blue")))
    assert policy.fit_image(fitted).tobytes() == fitted.tobytes()


@pytest.mark.parametrize("height, width", [(64, 64), (64, 96), (64, 160), (1328, 800), (480, 2048), (1024, 1536)])
def test_the_size_that_qwen_image_edit_encodes_is_its_pipelines_own(height, width):
    pipe = shared("qwen-image-edit")
    policy = policy_class("QwenImageEditPipeline")(pipe, height=height // 32 * 32, width=width)
    width_to_edit, height_to_edit = policy.condition_size
    assert 0.9 < width_to_edit * height_to_edit / 2**20 < 1.1
    # Each side is rounded by up to 16 pixels, at most twice, and the shorter one has about 500.
    assert width_to_edit / height_to_edit == pytest.approx(policy.width / policy.height, rel=0.1)
    module = inspect.getmodule(type(pipe))
    assert module.calculate_dimensions(2**20, width_to_edit / height_to_edit)[:2] == policy.condition_size


# ---- Training ----


def rows_of(family) -> list[dict]:
    texts = ["a cat", "two dogs", "sea", "red", "blue tree"]
    return [{"prompt": text, "image": photo(i, (90, 60 + 10 * (i % 2)))} for i, text in enumerate(texts)]


def likeness(prompts, images, image, **columns):
    """A reward: minus the mean difference from the image to edit, of 1."""
    scores = []
    for own, condition in zip(images, image, strict=True):
        condition = condition.convert("RGB").resize(own.size)
        scores.append(-np.abs(np.asarray(own, dtype=float) - np.asarray(condition, dtype=float)).mean() / 255)
    return scores


def trainer_of(family, output_dir, **changes):
    """As a rule with cached embeddings, since encoding takes most of the time."""
    rows = rows_of(family)
    settings = {"pipe": copied(family), "guidance_scale": SCALES[family][1], "max_sequence_length": 20}
    settings |= size_of(family) | {"train_dataset": rows, "eval_dataset": rows[:2], "cache_prompt_embeds": True}
    return make_trainer(output_dir, **settings | changes)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LoraConfig(r=4, lora_alpha=64), False], ids=["lora", "full"])
@FAMILY
def test_training_raises_a_reward(family, lora, tmp_path):
    settings = {"learning_rate": 5e-2 if lora else 1e-2, "max_steps": 40, "per_device_train_batch_size": 8}
    settings |= {"eval_dataset": rows_of(family), "logging_steps": 40, "num_generations": 8}
    trainer = trainer_of(family, tmp_path, lora=lora, **settings)
    before = trainer.evaluate()
    trainer.train()
    assert trainer.evaluate()["eval_reward"] > before["eval_reward"] + before["eval_rewards/redness/std"]


@SLOW_FAMILY
def test_the_saved_lora_gives_the_trainers_images_in_the_stock_pipeline(family, tmp_path):
    trainer = trainer_of(family, tmp_path, lora=LoraConfig(r=4, lora_alpha=256), max_steps=4, learning_rate=5e-2)
    trainer.train()
    trainer.save_model()
    row = trainer.train_dataset[1]
    images = trainer.sample_images([row["prompt"]], [3], [row["image"]])
    pipe = copied(family)
    policy = trainer.evaluator.policy
    arguments = policy.arguments_of([row["prompt"]], [row["image"]])

    def sample():
        return pipe(generator=torch.Generator().manual_seed(3), **arguments).images[0]

    untrained = np.asarray(sample(), dtype=int)
    pipe.load_lora_weights(str(tmp_path))
    difference = np.asarray(sample(), dtype=int) - np.asarray(images[0], dtype=int)
    assert np.abs(difference).max() <= 1
    assert np.abs(untrained - np.asarray(images[0], dtype=int)).max() > 5
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: image-to-image" in card
    Image.fromarray(np.asarray(row["image"])).save(tmp_path / "image.png")
    assert_the_cards_code_gives(images[0], card, tmp_path, pipe, row["prompt"])


def assert_the_cards_code_gives(image, card, folder, pipe, prompt):
    """Its call, by the pipeline with the LoRA."""
    code = card.split("```python")[1].split("```")[0]
    call = code[code.index("image = pipe(") :].replace('"image.png"', repr(str(folder / "image.png")))
    call = re.sub(r"    prompt=.*\n", f"    prompt={prompt!r},\n", call).replace("manual_seed(0)", "manual_seed(3)")
    names = {"pipe": pipe}
    exec("import torch\n" + code[: code.index("pipe = ")] + call, names)
    assert np.abs(np.asarray(names["image"], dtype=int) - np.asarray(image, dtype=int)).max() <= 1


@SLOW_FAMILY
def test_a_resumed_run_is_the_uninterrupted_one(family, tmp_path):
    whole = trainer_of(family, tmp_path / "whole", max_steps=4, rewards=likeness)
    whole.train()
    saves = {"save_strategy": "steps", "save_steps": 2}
    first = trainer_of(family, tmp_path / "parts", max_steps=4, rewards=likeness, **saves)
    first.train()
    second = trainer_of(family, tmp_path / "parts", max_steps=4, rewards=likeness)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert_same(trained(second), trained(whole))


@SLOW_FAMILY
def test_the_options_of_a_run(family, tmp_path):
    """The preflight, cached embeddings, hybrid inference, gradient checkpointing, bfloat16, the VAE off the device."""
    options = {"gradient_checkpointing": True, "bf16": True, "offload_vae": True, "logging_images_steps": 2}
    trainer = trainer_of(family, tmp_path, max_steps=2, **options)
    report = trainer.preflight()
    passes = trainer.engine.policy.passes_per_step
    assert report.nfe_per_image == passes * 5 and "ratio" in str(report)
    trainer.train()
    assert trainer.state.log_history[0]["nfe"] == passes * 5
    assert (tmp_path / "images" / "step_000000.png").is_file() and (tmp_path / "images" / "step_000002.png").is_file()
    arguments = [TEXTS[0]], [3], [PHOTOS[1]]
    trained_images = trainer.sample_images(*arguments)
    with hybrid_inference(trainer.pipe, trained_ratio=0):
        base_images = trainer.sample_images(*arguments)
    untrained = trainer_of(family, tmp_path / "untrained", bf16=True)
    expected = untrained.sample_images(*arguments)
    assert np.array_equal(np.asarray(base_images[0]), np.asarray(expected[0]))
    assert not np.array_equal(np.asarray(trained_images[0]), np.asarray(expected[0]))


def test_rewards_get_the_image_of_each_result(tmp_path):
    """In training, in evaluations, and for fixed prompts: the image of the dataset, neither cropped nor resized."""
    known = {row["prompt"]: row["image"].tobytes() for row in rows_of("flux-kontext")}
    seen = []

    def looks(prompts, images, image, **columns):
        assert all(known[prompt] == each.tobytes() for prompt, each in zip(prompts, image, strict=True))
        seen.append(len(image))
        return [float(i) for i in range(len(images))]

    trainer = trainer_of("flux-kontext", tmp_path, rewards=looks, max_steps=2, logging_images_steps=1)
    trainer.train()
    trainer.evaluate()
    assert {8, 2} <= set(seen)  # two groups of four, and the evaluation


def test_each_prompt_of_an_iteration_is_encoded_once(tmp_path):
    """A group shares the tokens of its image."""
    trainer = trainer_of("flux-kontext", tmp_path, cache_prompt_embeds=False, eval_dataset=None)
    calls = []
    trainer.pipe.vae.encoder.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    plan = trainer.engine.plan(0, trainer.train_dataset[:2])
    rollout = trainer.engine.roll_out(plan)
    assert len(rollout.images) == 8 and calls == [1, 1]
    assert len(rollout.trajectory.conditioning) == 2
    # As a run that is resumed inside the iteration does:
    restored = trainer.engine.restore(plan, rollout.state_dict())
    assert_same(restored.trajectory.conditioning.rows, rollout.trajectory.conditioning.rows)


def test_a_run_with_a_cache_is_bit_for_bit_the_one_without(tmp_path):
    """With an evaluation of another size, whose images to edit have that size too."""
    found = []
    for is_cached in (False, True):
        trainer = trainer_of(
            "flux-kontext",
            tmp_path / str(is_cached),
            cache_prompt_embeds=is_cached,
            rewards=likeness,
            eval_height=48,
            steps_per_generation=1,
            per_device_eval_batch_size=1,
        )
        calls = []
        trainer.pipe.vae.encoder.register_forward_hook(lambda module, args, output, calls=calls: calls.append(1))
        trainer.train()
        found.append((trained(trainer), trainer.evaluate()["eval_reward"]))
        assert bool(calls) != is_cached
    assert_same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_the_cache_tells_images_apart(tmp_path):
    policy = make_policy("flux-kontext", 3.5, pipe=copied("flux-kontext"))
    images = [policy.fit_image(image) for image in PHOTOS]
    calls = []
    policy.pipe.vae.encoder.register_forward_hook(lambda *_: calls.append(1))
    prompts = [("a cat", images[0]), ("a cat", images[1]), ("a dog", images[1]), ("a cat", images[0].copy())]
    cached = cache_prompts(policy, prompts, torch.device("cpu"), str(tmp_path))
    assert isinstance(cached, CachedPrompts) and len(cached) == len(calls) == 3
    tokens = cached.encode(["a cat", "a cat"], images).rows["image_latents"]
    assert len(calls) == 3
    assert torch.equal(tokens, policy.encode(["a cat", "a cat"], images).rows["image_latents"])
    assert not torch.equal(*tokens)


def test_the_cache_depends_on_the_vae_and_on_the_processor():
    kontext, qwen = copied("flux-kontext"), copied("qwen-image-edit")
    before = [cache_folder(make_policy("flux-kontext", 3.5, pipe=kontext))]
    before.append(cache_folder(make_policy("qwen-image-edit", 4.0, pipe=qwen)))
    with torch.no_grad():
        kontext.vae.encoder.conv_in.bias += 1e-3
    qwen.processor.image_processor.size["longest_edge"] *= 2
    assert cache_folder(make_policy("flux-kontext", 3.5, pipe=kontext)) != before[0]
    assert cache_folder(make_policy("qwen-image-edit", 4.0, pipe=qwen)) != before[1]


# ---- Datasets ----


@pytest.fixture
def files(tmp_path) -> list[str]:
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    for path, image in zip(paths, PHOTOS, strict=True):
        image.save(path)
    return paths


def as_dataset(kind, files):
    """Two rows, whose images are those of `files`."""
    if kind == "paths in a list":
        return [{"prompt": text, "image": path} for text, path in zip(TEXTS, files, strict=True)]
    dataset = Dataset.from_dict({"prompt": TEXTS, "image": files})
    if kind == "paths in a dataset":
        return dataset
    if kind == "images in a dataset":
        return dataset.cast_column("image", datasets.Image())
    if kind == "undecoded":
        return dataset.cast_column("image", datasets.Image(decode=False))
    return [{"prompt": text, "image": image} for text, image in zip(TEXTS, PHOTOS, strict=True)]


@pytest.mark.parametrize(
    "kind", ["images", "paths in a list", "paths in a dataset", "images in a dataset", "undecoded"]
)
def test_datasets_with_images(kind, files, tmp_path):
    dataset = as_dataset(kind, files)
    opened = open_images("train_dataset", dataset, "FluxKontextPipeline")
    assert len(opened) == 2 and opened[1].keys() == {"prompt", "image"}
    assert opened[1]["image"].tobytes() == PHOTOS[1].tobytes()
    assert open_images("train_dataset", opened, "FluxKontextPipeline")[0]["image"].tobytes() == PHOTOS[0].tobytes()
    trainer = trainer_of(
        "flux-kontext", tmp_path / "run", train_dataset=dataset, eval_dataset={"x": dataset}, rewards=likeness
    )
    trainer.train()
    assert -1 < trainer.evaluate()["eval_x_reward"] < 0
    assert -1 < trainer.evaluate(dataset)["eval_reward"] < 0


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"prompt": "a"}], r"must have a column 'image' for a FluxKontextPipeline.*got the columns \['prompt'\]"),
        ([{"prompt": "a", "image": PHOTOS[0]}, {"prompt": "b", "image": None}], "got None in row 1"),
        ([{"prompt": "a", "image": "gone.png"}], r"got 'gone.png' in row 0 \(.*No such file.*working directory"),
        ([{"prompt": "a", "image": __file__}], r"test_editing.py' in row 0 \(cannot identify image file"),
        ([{"prompt": "a", "image": np.zeros((4, 4, 3))}], "of PIL images or their paths, got array"),
        (Dataset.from_dict({"prompt": ["a"], "picture": [1]}), r"got the columns \['prompt', 'picture'\]"),
        (Dataset.from_dict({"prompt": ["a"], "image": ["gone.png"]}), "got 'gone.png' in row 0"),
        (
            Dataset.from_list([{"prompt": "a", "image": PHOTOS[0]}, {"prompt": "b", "image": None}]),
            "got None in row 1",
        ),
    ],
)
def test_datasets_that_cannot_be_edited_are_refused_before_anything_is_loaded(rows, message, tmp_path):
    pipe = copied("flux-kontext")
    pipe.save_pretrained(tmp_path / "pipe")
    (tmp_path / "pipe" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()  # it cannot be loaded
    with pytest.raises(ValueError, match=f"`train_dataset` .*{message}"):
        trainer_of("flux-kontext", tmp_path, pipe=str(tmp_path / "pipe"), train_dataset=rows, eval_dataset=None)
    with pytest.raises(ValueError, match=r"`eval_dataset\['x'\]` "):
        trainer_of("flux-kontext", tmp_path, pipe=str(tmp_path / "pipe"), eval_dataset={"x": rows})


def test_images_have_to_be_passed_to_sample_images(tmp_path):
    trainer = trainer_of("flux-kontext", tmp_path)
    with pytest.raises(ValueError, match="`images` must be the images to edit.*FluxKontextPipeline, got None"):
        trainer.sample_images(["a cat"])
    with pytest.raises(ValueError, match="`images` must be the images to edit, one per prompt, got None"):
        trainer.engine.policy.encode(["a cat"])


def test_an_image_is_an_ordinary_column_where_nothing_is_edited(tmp_path):
    seen = []

    def looks(prompts, images, image, **columns):
        seen.extend(image)
        return redness(prompts, images)

    rows = [{"prompt": text, "image": value} for text, value in zip(TEXTS, ["gone.png", None], strict=True)]
    trainer = make_trainer(tmp_path, rewards=looks, train_dataset=rows, max_steps=2)
    trainer.train()
    assert set(seen) == {"gone.png", None}


# ---- Commands, and what they show ----

FLAGS = "--height 32 --width 48 --num_inference_steps 4 --window_size 2 --max_sequence_length 12 --num_generations 4"
FLAGS += " --per_device_train_batch_size 4 --steps_per_generation 2 --max_steps 4 --logging_steps 1 --epsilon 1e-2"
FLAGS += " --save_strategy no --report_to none --use_cpu --learning_rate 1e-3 --lora_alpha 8 --logging_images_steps 4"


@pytest.fixture(scope="module")
def kontext_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("kontext")
    shared("flux-kontext").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a reward, and a dataset as a file of paths and as a folder of images."""
    (tmp_path / "my_rewards.py").write_text(
        "import numpy as np\n"
        "def likeness(prompts, images, image, **columns):\n"
        "    pairs = zip(images, [each.resize(images[0].size) for each in image])\n"
        "    return [-float(np.abs(np.asarray(a, float) - np.asarray(b, float)).mean()) for a, b in pairs]\n"
    )
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = [row | {"file_name": f"{i}.png"} for i, row in enumerate(rows_of("flux-kontext"))]
    for row in rows:
        row["image"].save(folder / row["file_name"])
    names = [{"prompt": row["prompt"], "file_name": row["file_name"]} for row in rows]
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(name)}\n" for name in names))
    paths = [{"prompt": row["prompt"], "image": f"photos/{row['file_name']}"} for row in rows]
    (tmp_path / "edits.jsonl").write_text("".join(f"{json.dumps(path)}\n" for path in paths))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name, rank", [("edits.jsonl", 4), ("photos", 0)])
def test_the_train_and_evaluate_commands(workplace, kontext_folder, name, rank):
    flags = f"--pretrained_model_name_or_path {kontext_folder} --reward_funcs my_rewards:likeness"
    train.main(
        f"{flags} --dataset_name {name} --num_eval_prompts 2 --output_dir out --lora_rank {rank} {FLAGS}".split()
    )
    summary = json.loads((workplace / "out" / "summary.json").read_text())
    assert summary["optimizer_steps"] == 4 and summary["eval_prompts"] == 2
    assert (workplace / "out" / "report.html").is_file()
    for drawn in ("before_after.png", "images/step_000000.png", "images/step_000004.png"):
        assert np.asarray(Image.open(workplace / "out" / drawn)).std() > 10
    weights = "--lora out" if rank else "--transformer out"
    prompts = "edits.jsonl" if name == "edits.jsonl" else "photos --split train"
    size = "--height 32 --width 48 --num_inference_steps 4 --max_sequence_length 12"
    evaluate_command.main(f"{flags} {weights} --prompts {prompts} --output_dir scores {size}".split())
    results = json.loads((workplace / "scores" / "evaluation.json").read_text())["results"]["trained"]
    assert len(results["likeness"]["scores"]) == 5 and results["likeness"]["failed"] == 0


def test_a_file_of_prompts_has_no_images(workplace, kontext_folder):
    (workplace / "prompts.txt").write_text("a cat\na dog\n")
    flags = f"--pretrained_model_name_or_path {kontext_folder} --reward_funcs my_rewards:likeness {FLAGS}"
    with pytest.raises(ValueError, match=r"`train_dataset` must have a column 'image' .*got the columns \['prompt'\]"):
        train.main(f"{flags} --dataset_name prompts.txt --num_eval_prompts 0".split())


def test_grids_show_the_image_to_edit(tmp_path):
    """Before the results, enlarged by a whole factor."""
    red = Image.new("RGB", (90, 60), "red")
    rows = [row | {"image": red} for row in rows_of("flux-kontext")]
    changes = {"logging_images_steps": 4, "num_logged_prompts": 1, "num_logged_seeds": 2}
    trainer = trainer_of("flux-kontext", tmp_path, train_dataset=rows, eval_dataset=None, max_steps=2, **changes)
    trainer.train()
    grid = np.asarray(Image.open(tmp_path / "images" / "step_000000.png").convert("RGB")).astype(int)
    is_red = (grid == (255, 0, 0)).all(-1)
    assert is_red.sum() == (7 * 48) * (7 * 32)
    assert is_red.any(0).nonzero()[0].max() < grid.shape[1] / 2


def test_the_report_shows_the_image_to_edit(tmp_path):
    """Once for each fixed prompt, before its images."""
    rows = [row | {"image": Image.new("RGB", (90, 60), "red")} for row in rows_of("flux-kontext")]
    changes = {"logging_images_steps": 1, "num_logged_prompts": 2, "num_logged_seeds": 1}
    trainer_of("flux-kontext", tmp_path, train_dataset=rows, eval_dataset=None, max_steps=4, **changes).train()
    images = json.loads((tmp_path / "images" / "step_000000.json").read_text())["samples"]
    for sample in images:
        edited = Image.open(tmp_path / "images" / sample["condition"])
        assert np.array_equal(np.asarray(edited), np.asarray(Image.new("RGB", (48, 32), "red")))
    page = write_report(tmp_path).read_text()
    assert page.count(">image to edit<") == 2
    film = page[page.index('class="film"') :]
    assert film.index("image to edit") < film.index("step 0")


def test_before_and_after_show_the_image_to_edit(tmp_path):
    rows = [row | {"image": Image.new("RGB", (90, 60), "red")} for row in rows_of("flux-kontext")]
    trainer = trainer_of("flux-kontext", tmp_path, eval_dataset=rows)
    evaluation = before_after.evaluate(trainer)
    examples = before_after.sample_examples(trainer, evaluation, evaluation)
    assert {example.condition.tobytes() for example in examples} == {Image.new("RGB", (48, 32), "red").tobytes()}
    before_after.draw_before_after(examples, str(tmp_path))
    drawn = np.asarray(Image.open(tmp_path / "before_after.png").convert("RGB"))
    assert (drawn == (255, 0, 0)).all(-1).mean() > 0.05


# ---- What a family declares ----


@FAMILY
def test_lora_targets_exist(family):
    policy = policy_class(type(shared(family)).__name__)
    names = [name for name, _ in shared(family).transformer.named_modules()]
    for target in policy.lora_target_modules:
        assert any(name.endswith(f".{target}") for name in names), target


@FAMILY
def test_defaults_are_those_of_the_pipelines_call(family):
    pipe = shared(family)
    policy = policy_class(type(pipe).__name__)
    defaults = {name: parameter.default for name, parameter in inspect.signature(pipe.__call__).parameters.items()}
    assert policy.default_guidance_scale == defaults[policy.guidance_argument]
    assert policy.default_sequence_length == defaults["max_sequence_length"]


def test_every_family_is_tested():
    tested = {type(shared(family)).__name__ for family in EDITING}
    assert tested == {name for name in FAMILIES if policy_class(name).takes_image}
