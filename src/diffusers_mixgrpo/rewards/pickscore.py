"""PickScore: which image people prefer for a prompt, from a CLIP ViT-H/14 fine-tuned on Pick-a-Pic."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from ._clip import BatchedReward, embed_prompts, loading


class PickScoreReward(BatchedReward):
    """
    PickScore: cosine similarity of image and prompt times the model's temperature (about 100). Images of current
    models score about 18 to 24.

    The model is a CLIP ViT-H/14 fine-tuned on users' choices between generated images
    ([arXiv:2305.01569](https://huggingface.co/papers/2305.01569)). Scores equal those of the original. Some trainers
    divide them by 26 to bring them close to other rewards; `reward_weights` can do the same. The division has no
    effect on advantages that are divided by the group's standard deviation.

    Weights: see the model card for their license; a download of 4 GB. Memory: 3.9 GB in float32, 2 GB in bfloat16,
    plus about 0.1 GB for a batch of 32.

    Args:
        model (`str`, defaults to `"yuvalkirstain/PickScore_v1"`): A Hub repository or folder with the model.
        processor (`str`, defaults to `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`):
            A Hub repository or folder with the tokenizer and the image processor.
        device (`str` or `torch.device`, defaults to `"cpu"`): Device of the model.
        dtype (`torch.dtype`, defaults to `torch.float32`): Data type of the weights, such as `torch.bfloat16`.
        batch_size (`int`, defaults to 32): Maximum number of images per forward pass.

    Raises:
        `OSError`: If the model or the processor cannot be loaded.

    Example:

    ```python
    reward = PickScoreReward(device="cuda", dtype=torch.bfloat16)
    scores = reward(["a cat"], [image])
    ```
    """

    __name__ = "pickscore"

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        *,
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ) -> None:
        with loading("processor", processor):
            self.tokenizer = AutoTokenizer.from_pretrained(processor)
            # The original resizes with PIL in 8 bits.
            self.image_processor = AutoImageProcessor.from_pretrained(processor, backend="pil")
        with loading("model", model):
            clip = CLIPModel.from_pretrained(model, dtype=dtype)
        super().__init__(clip, device, batch_size)

    def _score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> torch.Tensor:
        pixels = self.image_processor(list(images), return_tensors="pt").pixel_values
        pixels = pixels.to(self.device, self.model.dtype)
        image_features = self.model.get_image_features(pixels).pooler_output.float()
        text_features = embed_prompts(self.model, self.tokenizer, prompts)
        return self.model.logit_scale.float().exp() * F.cosine_similarity(image_features, text_features)
