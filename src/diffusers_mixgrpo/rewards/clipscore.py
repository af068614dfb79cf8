"""CLIP score: how well a picture fits its prompt, by any CLIP or SigLIP model."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from ._clip import BatchedReward, embed_prompts, loading


class CLIPScoreReward(BatchedReward):
    """
    CLIP score: cosine similarity of image and prompt, in [-1, 1]; with the default model, pictures that fit their
    prompt score about 0.2 to 0.35. Neither scaled by 100 or 2.5 nor cut off at 0, as some variants are.

    Any CLIP or SigLIP model of transformers will do
    ([arXiv:2103.00020](https://huggingface.co/papers/2103.00020), [arXiv:2303.15343](https://huggingface.co/papers/2303.15343)),
    with its own tokenizer and its own preprocessing, done with PIL.

    Weights of the default model: MIT, a download of 1.7 GB. Memory: 1.7 GB in float32, 0.9 GB in bfloat16, and about
    0.1 GB for a batch of 32.

    Args:
        model (`str`, defaults to `"openai/clip-vit-large-patch14"`):
            A Hub repository or folder with the model, its tokenizer and its image processor.
        device (`str` or `torch.device`, defaults to `"cpu"`): Where to compute.
        dtype (`torch.dtype`, defaults to `torch.float32`): Type of the weights, such as `torch.bfloat16`.
        batch_size (`int`, defaults to 32): Most images at once.

    Raises:
        `OSError`: If the model cannot be loaded.
        `ValueError`: If it embeds no texts and images.

    Example:

    ```python
    reward = CLIPScoreReward("google/siglip-so400m-patch14-384", device="cuda", dtype=torch.bfloat16)
    scores = reward(["a cat"], [image])
    ```
    """

    __name__ = "clipscore"

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ):
        with loading("model", model):
            clip = AutoModel.from_pretrained(model, dtype=dtype)
            self.tokenizer = AutoTokenizer.from_pretrained(model)
            self.image_processor = AutoImageProcessor.from_pretrained(model, backend="pil")
        if not hasattr(clip, "get_text_features"):
            raise ValueError(
                f"`model={model!r}` is a {type(clip).__name__}, which does not embed texts and images together. Pass "
                "a CLIP or SigLIP model, such as 'openai/clip-vit-large-patch14'."
            )
        super().__init__(clip, device, batch_size)

    def _score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> torch.Tensor:
        inputs = self.image_processor(list(images), return_tensors="pt").to(self.device, self.model.dtype)
        image_features = self.model.get_image_features(**inputs).pooler_output.float()
        return F.cosine_similarity(image_features, embed_prompts(self.model, self.tokenizer, prompts))
