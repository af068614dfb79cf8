"""CLIP score: how well an image matches its prompt, according to any CLIP or SigLIP model."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from ._clip import BatchedReward, embed_prompts, loading


class CLIPScoreReward(BatchedReward):
    """
    CLIP score: cosine similarity of image and prompt, in [-1, 1]. With the default model, images that match their
    prompt score about 0.2 to 0.35. Unlike some variants, the score is not scaled by 100 or 2.5 and not clipped at 0.

    Works with any CLIP or SigLIP model of transformers
    ([arXiv:2103.00020](https://huggingface.co/papers/2103.00020), [arXiv:2303.15343](https://huggingface.co/papers/2303.15343)),
    with its own tokenizer and its own preprocessing, done with PIL.

    Weights of the default model: MIT, a download of 1.7 GB. Memory: 1.7 GB in float32, 0.9 GB in bfloat16, plus about
    0.1 GB for a batch of 32.

    Args:
        model (`str`, defaults to `"openai/clip-vit-large-patch14"`):
            A Hub repository or folder with the model, its tokenizer and its image processor.
        device (`str` or `torch.device`, defaults to `"cpu"`): Device of the model.
        dtype (`torch.dtype`, defaults to `torch.float32`): Data type of the weights, such as `torch.bfloat16`.
        batch_size (`int`, defaults to 32): Maximum number of images per forward pass.

    Raises:
        `OSError`: If the model cannot be loaded.
        `ValueError`: If the model does not embed both texts and images.

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
    ) -> None:
        with loading("model", model):
            clip = AutoModel.from_pretrained(model, dtype=dtype)
            self.tokenizer = AutoTokenizer.from_pretrained(model)
            self.image_processor = AutoImageProcessor.from_pretrained(model, backend="pil")
        if not hasattr(clip, "get_text_features"):
            raise ValueError(
                f"`model` must be a CLIP or SigLIP model, got {model!r}, which is a {type(clip).__name__}. Pass one "
                "that embeds texts and images together, such as 'openai/clip-vit-large-patch14'."
            )
        super().__init__(clip, device, batch_size)

    def _score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> torch.Tensor:
        inputs = self.image_processor(list(images), return_tensors="pt").to(self.device, self.model.dtype)
        image_features = self.model.get_image_features(**inputs).pooler_output.float()
        return F.cosine_similarity(image_features, embed_prompts(self.model, self.tokenizer, prompts))
