"""UnifiedReward: a vision-language model trained to score pictures."""

from typing import Any

from .vlm_judge import VLMJudge, parse_score


# The words that the model was trained on for pointwise scores of generated images; other words are worth less.
# Source: https://github.com/CodeGoat24/UnifiedReward (MIT licence).
QUESTION = (
    "You are given a text caption and a generated image based on that caption. Your task is to evaluate this image "
    "based on two key criteria:\n"
    "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the "
    "accuracy of depicted objects, their relationships, and attributes as described in the caption.\n"
    "2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, "
    "color accuracy, and overall aesthetic appeal.\n"
    "Extract key elements from the provided text caption, evaluate their presence in the generated image using the "
    "format: 'element (type): value' (where value=0 means not generated, and value=1 means generated), and assign a "
    "score from 1 to 5 after 'Final Score:'.\n"
    "Your task is provided as follows:\n"
    "Text Caption: [{prompt}]"
)


class UnifiedReward(VLMJudge):
    """
    UnifiedReward's pointwise score in [1, 5]: how well the picture fits its caption, and how good it looks.

    A [`VLMJudge`] with that model's own question, parser and picture format, as MixGRPO's authors use it. Made for
    the models of the first series (`CodeGoat24/UnifiedReward-qwen-3b`, `-7b`, `-32b`, `UnifiedReward-7b-v1.5`); those
    of the series 2.0 are trained to give three scores (alignment, coherence, style) to another question: ask it with
    a [`VLMJudge`].

    Paper: Wang et al., "Unified Reward Model for Multimodal Understanding and Generation", arXiv 2503.05236. Weights
    under the MIT licence; the server needs about 18 GB of GPU memory for 7b in bfloat16.

    Args:
        url (`str`, defaults to `"http://localhost:8000/v1"`): Where the server's API begins.
        model (`str`, defaults to `"CodeGoat24/UnifiedReward-qwen-7b"`): The model's name on the server.
        options: All else of [`VLMJudge`].

    Example:

    ```python
    # vllm serve CodeGoat24/UnifiedReward-qwen-7b
    scores = asyncio.run(UnifiedReward()(["a cat"], [image]))
    ```
    """

    def __init__(
        self, url: str = "http://localhost:8000/v1", model: str = "CodeGoat24/UnifiedReward-qwen-7b", **options: Any
    ):
        own: dict[str, Any] = {
            "name": "unifiedreward",
            "question": QUESTION,
            "parse": parse_final_score,
            "image_format": "JPEG",
            "max_tokens": 1024,
        }
        super().__init__(url, model, **(own | options))


def parse_final_score(text: str) -> float | None:
    """The number in [1, 5] after the last `Final Score:`, or `None`."""
    return parse_score(text, label="Final Score", low=1, high=5)
