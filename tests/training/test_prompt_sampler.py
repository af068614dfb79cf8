"""Which prompts are trained when."""

import datasets
import pytest

from diffusers_mixgrpo.prompt_sampler import PromptSampler, check_dataset


def test_an_iterations_prompts_come_once_per_training_batch():
    assert list(PromptSampler(7, prompts_per_iteration=3, repeats=2, shuffle=False)) == [
        *[0, 1, 2, 0, 1, 2],
        *[3, 4, 5, 3, 4, 5],  # and 6 is left over
    ]


@pytest.mark.parametrize(
    "num_prompts, per_iteration, repeats", [(7, 3, 2), (6, 3, 1), (2, 5, 3), (1, 4, 2), (5, 5, 1)]
)
def test_length(num_prompts, per_iteration, repeats):
    sampler = PromptSampler(num_prompts, per_iteration, repeats)
    order = list(sampler)
    assert len(order) == len(sampler)
    assert len(order) % (per_iteration * repeats) == 0 and order
    assert set(order) <= set(range(num_prompts))


def test_a_small_data_set_is_gone_through_again():
    order = list(PromptSampler(3, prompts_per_iteration=7, repeats=1, seed=1))
    assert sorted(order[:3]) == sorted(order[3:6]) == [0, 1, 2]


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = PromptSampler(50, 5, 1, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3) != order(2, 5)
    assert sorted(order(1, 2)) == list(range(50))
    sampler = PromptSampler(50, 5, 1, seed=1)
    assert list(sampler) == list(sampler)  # no state


@pytest.mark.parametrize(
    "dataset, error, message",
    [
        ([], ValueError, "`train_dataset` is empty"),
        ([{"text": "a"}], ValueError, r"column 'prompt' of strings, but its columns are \['text'\].*rename_column"),
        (["a", "b"], ValueError, "its first row is 'a'"),
        ([{"prompt": 3}], ValueError, "column 'prompt' of strings"),
        (iter([{"prompt": "a"}]), TypeError, "must have a length and be indexable"),
        (datasets.Dataset.from_dict({"caption": ["a"]}), ValueError, r"its columns are \['caption'\]"),
        (
            datasets.Dataset.from_dict({"prompt": ["a"]}).to_iterable_dataset(),
            TypeError,
            "without `streaming=True`",
        ),
    ],
)
def test_data_sets_that_cannot_be_used(dataset, error, message):
    with pytest.raises(error, match=message):
        check_dataset("train_dataset", dataset)


def test_data_sets_that_can():
    check_dataset("train_dataset", None)
    check_dataset("train_dataset", [{"prompt": "a", "more": 1}])
    check_dataset("train_dataset", datasets.Dataset.from_dict({"prompt": ["a"]}))
