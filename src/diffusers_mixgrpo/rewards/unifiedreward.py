"""UnifiedReward: a vision-language model trained to score images."""

from typing import Any

from .vlm_judge import VLMJudge, parse_score


# The prompt that the model was trained on for pointwise scores of generated images; other wordings score worse.
# Source: https://github.com/CodeGoat24/UnifiedReward (MIT license).
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
    UnifiedReward's pointwise score in [1, 5]: how well the image matches its caption, and how good it looks.

    This is a [`VLMJudge`] with the model's own question, parser and image format, as used by the authors of MixGRPO.
    It is made for the models of the first series (`CodeGoat24/UnifiedReward-qwen-3b`, `-7b`, `-32b`,
    `UnifiedReward-7b-v1.5`). The models of the 2.0 series are trained to give three scores (alignment, coherence,
    style) to another question; use a [`VLMJudge`] with that question instead.

    Paper: Wang et al., "Unified Reward Model for Multimodal Understanding and Generation", arXiv 2503.05236. The
    weights have the MIT license; the server needs about 18 GB of GPU memory for the 7B model in bfloat16.

    Args:
        url (`str`, defaults to `"http://localhost:8000/v1"`): Base URL of the server's API.
        model (`str`, defaults to `"CodeGoat24/UnifiedReward-qwen-7b"`): The model's name on the server.
        options: Other arguments of [`VLMJudge`].

    Example:

    ```python
    # vllm serve CodeGoat24/UnifiedReward-qwen-7b
    scores = asyncio.run(UnifiedReward()(["a cat"], [image]))
    ```
    """

    def __init__(
        self, url: str = "http://localhost:8000/v1", model: str = "CodeGoat24/UnifiedReward-qwen-7b", **options: Any
    ) -> None:
        defaults: dict[str, Any] = {
            "name": "unifiedreward",
            "question": QUESTION,
            "parse": parse_final_score,
            "image_format": "JPEG",
            "max_tokens": 1024,
        }
        super().__init__(url, model, **(defaults | options))


def parse_final_score(text: str) -> float | None:
    """The number in [1, 5] after the last `Final Score:`, or `None`."""
    return parse_score(text, label="Final Score", low=1, high=5)
