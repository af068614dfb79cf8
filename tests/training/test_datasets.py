"""Datasets that can be used, and messages about those that cannot."""

import datasets
import pytest
from datasets import Dataset, DatasetDict
from helpers import PROMPTS, logged

from diffusers_mixgrpo.training.datasets import check_dataset


@pytest.mark.parametrize(
    "dataset, error, message",
    [
        ([], ValueError, "`train_dataset` must have at least one row with a 'prompt', got an empty dataset"),
        ([{"text": "a"}], ValueError, r"column 'prompt' of strings, got the columns \['text'\].*rename_column"),
        (["a", "b"], ValueError, "got 'a' in row 0"),
        ([{"prompt": 3}], ValueError, "column 'prompt' of strings, got 3 in row 0"),
        ([{"prompt": "a"}, {"prompt": None}], ValueError, "got None in row 1"),
        ([{"prompt": "a"}, {"prompt": "b"}, "c"], ValueError, "got 'c' in row 2"),
        ([{"prompt": "a"}, {"prompt": "\ud83d"}], ValueError, r"valid Unicode, got '\\ud83d' in row 1"),
        ([{"prompt": "a", "x": 1}, {"prompt": "b"}], ValueError, "got row 1 that differs from row 0 in 'x'"),
        ([{"prompt": "a"}, {"prompt": "b", "y": 1}], ValueError, "same columns .* row 1 .* in 'y'"),
        ([{"prompt": "a", "images": 1}], ValueError, r"rename_column\('images', 'dataset_images'\)"),
        ([{"prompt": "a", "log_metric": 1}], ValueError, r"must not have a column 'log_metric', .*rename_column"),
        (Dataset.from_dict({"prompt": ["a"], "trainer_state": [1]}), ValueError, "column 'trainer_state'"),
        ([{"prompt": "a", "log_extra": 1}], ValueError, "column 'log_extra'"),
        ([{"prompt": "a", 3: 1}], ValueError, "columns named by strings.*got 3"),
        (iter([{"prompt": "a"}]), TypeError, "must have a length and be indexable"),
        (Dataset.from_dict({"caption": ["a"]}), ValueError, r"got the columns \['caption'\]"),
        (Dataset.from_dict({"prompt": ["a", "b", None]}), ValueError, "got None in row 2"),
        (Dataset.from_dict({"prompt": [1, 2]}), ValueError, "got 1 in row 0"),
        (Dataset.from_dict({"prompt": ["a"], "prompts": ["b"]}), ValueError, "must not have a column 'prompts'"),
        (
            Dataset.from_dict({"text": ["a", None]}).with_transform(lambda rows: {"prompt": rows["text"]}),
            ValueError,
            "got None in row 1",
        ),
        (
            DatasetDict({"train": Dataset.from_dict({"prompt": ["a"]})}),
            TypeError,
            r"must be one dataset, got a DatasetDict of 'train'.*dataset\['train'\]",
        ),
        (Dataset.from_dict({"prompt": ["a"]}).to_iterable_dataset(), TypeError, "without `streaming=True`"),
    ],
)
def test_datasets_that_cannot_be_used(dataset, error, message):
    with pytest.raises(error, match=message):
        check_dataset("train_dataset", dataset)


def test_datasets_that_can_be_used():
    check_dataset("train_dataset", None)
    check_dataset("train_dataset", [{"prompt": "a", "more": 1}, {"more": None, "prompt": ""}])
    some = Dataset.from_dict({"prompt": ["a", None, "b"]}).select([2, 0])  # its table still has the None
    check_dataset("train_dataset", some)
    check_dataset("train_dataset", some.with_format("numpy"))
    check_dataset("train_dataset", some.cast_column("prompt", datasets.Value("large_string")))


def test_the_message_names_the_part_of_an_evaluation(make):
    with pytest.raises(ValueError, match=r"`eval_dataset\['b'\]` must have a column 'prompt' .* in row 1"):
        make(eval_dataset={"a": PROMPTS, "b": [{"prompt": "a"}, {"prompt": None}]})


@pytest.mark.parametrize("count", [1, 5])
def test_unusual_prompts_and_few_of_them(make, count):
    """Empty, long, right-to-left, of emoji, and twice the same: all are trained on, evaluated and drawn."""
    prompts = ["", "a cat " * 1700, "\u05e9\u05dc\u05d5\u05dd \u202e", "\U0001f600\u200d\U0001f525", ""]
    dataset = [{"prompt": prompt} for prompt in prompts[:count]]
    trainer = make(
        train_dataset=dataset, eval_dataset=DatasetDict({"x": Dataset.from_list(dataset)}), logging_images_steps=1
    )
    trainer.train()
    assert len(logged(trainer, "reward")) == 2 and trainer.evaluate()["eval_x_reward"] == pytest.approx(0, abs=1)
    trainer.create_model_card()
