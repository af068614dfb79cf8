"""
Miniature pipelines with random weights, one per family that is not FLUX.1. Their images are of 32x32 pixels; those of
Qwen-Image-Edit are of 64x64.
"""

import re
import string
from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from helpers import build_pipeline
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Punctuation, Sequence, Split
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    LlavaProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.utils import is_torchvision_available


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATE_WORDS = re.findall(
    "[A-Za-z]+|[:,]",
    "system user assistant Describe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:",
)


def chat_tokenizer(
    template_words: Iterable[str] = TEMPLATE_WORDS, more_special: Iterable[str] = ()
) -> PreTrainedTokenizerFast:
    """Reads the words of chat templates as one token each, and other words letter by letter."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *more_special]
    letters = list(string.ascii_letters)
    words = [*special, "[UNK]", "\n", *letters, *(f"##{letter}" for letter in letters), *template_words]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    newlines = Split(Regex("\n"), "isolated")
    tokenizer.pre_tokenizer = Sequence([Split(" ", "removed"), newlines, Punctuation()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[0],
        additional_special_tokens=special[1:],
        unk_token="[UNK]",
        chat_template=CHAT_TEMPLATE,
    )
    fast.padding_side = "right"
    return fast


def build_flux_schnell(seed: int = 0) -> FluxPipeline:
    """FLUX.1-schnell: as FLUX.1-dev, but its transformer knows no guidance scale, and the timesteps have no shift."""
    pipe = build_pipeline(seed, guidance_embeds=False)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)
    return pipe


def build_sd3(seed: int = 0, dual_attention: bool = True) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5: latents of 4 channels, 16x16."""
    flux = build_pipeline(seed)  # has both tokenizers, the T5 encoder and a VAE that fits
    clip = CLIPTextConfig(
        vocab_size=flux.text_encoder.config.vocab_size,
        hidden_size=16,
        projection_dim=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    text_encoder, text_encoder_2 = (CLIPTextModelWithProjection(clip).eval() for _ in range(2))
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        dual_attention_layers=(0,) if dual_attention else (),
    )
    return quiet(
        StableDiffusion3Pipeline(
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=flux.vae,
            text_encoder=text_encoder,
            tokenizer=flux.tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=flux.tokenizer,
            text_encoder_3=flux.text_encoder_2,
            tokenizer_3=flux.tokenizer_2,
        )
    )


def build_qwen_image(seed: int = 0) -> QwenImagePipeline:
    """Qwen-Image: 64 packed tokens of 16, with statistics of the latents that are not those of a standard normal."""
    torch.manual_seed(seed)
    tokenizer = chat_tokenizer()
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, -0.4],
        latents_std=[0.8, 1.1, 1.4, 0.9],
    )
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
    )
    return quiet(
        QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=vae.eval(),
            text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
            tokenizer=tokenizer,
            transformer=transformer.eval(),
        )
    )


def build_z_image(seed: int = 0) -> ZImagePipeline:
    """Z-Image: latents of 4 channels, 16x16."""
    torch.manual_seed(seed)
    tokenizer = chat_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():  # the class leaves these two as they are in memory
        transformer.x_pad_token.fill_(1.0)
        transformer.cap_pad_token.fill_(1.0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.36,
        shift_factor=0.12,
    )
    return quiet(
        ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae.eval(),
            text_encoder=Qwen3Model(qwen3_config(len(tokenizer), layers=2)).eval(),
            tokenizer=tokenizer,
            transformer=transformer.eval(),
        )
    )


def build_flux2_klein(seed: int = 0, is_distilled: bool = False) -> Flux2KleinPipeline:
    """FLUX.2-klein: 64 packed tokens of 16. Its encoder has the 27 layers that the pipeline reads."""
    torch.manual_seed(seed)
    tokenizer = chat_tokenizer()
    transformer, vae = flux2_models(guidance_embeds=False)
    return quiet(
        Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=vae,
            text_encoder=Qwen3ForCausalLM(qwen3_config(len(tokenizer), layers=27)).eval(),
            tokenizer=tokenizer,
            transformer=transformer,
            is_distilled=is_distilled,
        )
    )


def flux2_models(guidance_embeds: bool) -> tuple[Flux2Transformer2DModel, AutoencoderKLFlux2]:
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae.bn.running_mean.normal_(0, 0.2)
    vae.bn.running_var.uniform_(0.5, 1.5)
    return transformer.eval(), vae.eval()


def qwen3_config(vocab_size: int, layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
    )


def build_flux2(seed: int = 1) -> Flux2Pipeline:  # of seed 0 a small LoRA hardly changes the images
    """FLUX.2-dev: 64 packed tokens of 16. Its encoder has the 30 layers that the pipeline reads."""
    torch.manual_seed(seed)
    processor = mistral_processor()
    layer = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 8}
    config = Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": len(processor.tokenizer),
            "num_hidden_layers": 30,
            "num_key_value_heads": 2,
            **layer,
        },
        vision_config={
            "model_type": "pixtral",
            "num_hidden_layers": 1,
            "image_size": 28,
            "patch_size": 14,
            **layer,
        },
        image_token_index=processor.image_token_id,
    )
    transformer, vae = flux2_models(guidance_embeds=True)
    return quiet(
        Flux2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=vae,
            text_encoder=Mistral3ForConditionalGeneration(config).eval(),
            tokenizer=processor,
            transformer=transformer,
        )
    )


MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% set text = m['content'] | map(attribute='text') | join %}"
    "{% if m['role'] == 'system' %}[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]{% else %}[INST]{{ text }}[/INST]"
    "{% endif %}{% endfor %}"
)


def mistral_processor() -> ProcessorMixin:
    """
    Reads FLUX.2-dev's system message as one token, and prompts letter by letter. It pads on the left, as Mistral's.

    PixtralProcessor needs torchvision; without it, another processor of the same base class takes its place.
    """
    marks = ["<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    tokenizer = chat_tokenizer()
    tokenizer.add_special_tokens({"bos_token": marks[0], "additional_special_tokens": marks[1:]})
    tokenizer.add_tokens([SYSTEM_MESSAGE])
    tokenizer.padding_side = "left"
    tokenizer.chat_template = None
    if is_torchvision_available():
        from transformers import PixtralImageProcessorPil, PixtralProcessor

        return PixtralProcessor(PixtralImageProcessorPil(), tokenizer, chat_template=MISTRAL_TEMPLATE)
    images = CLIPImageProcessorPil()
    return LlavaProcessor(images, tokenizer, image_token="[IMG]", chat_template=MISTRAL_TEMPLATE)


def quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


MINIATURES: dict[str, Callable[..., DiffusionPipeline]] = {
    "flux": build_pipeline,
    "flux2": build_flux2,
    "flux2-klein": build_flux2_klein,
    "qwen-image": build_qwen_image,
    "stable-diffusion-3": build_sd3,
    "z-image": build_z_image,
}


# ---- Image editing ----


EDIT_WORDS = re.findall(
    "[A-Za-z]+|[^A-Za-z ]",
    "system user assistant Describe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate. "
    "Picture 1:",
)
VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


class StillImageProcessor(Qwen2VLProcessor):
    """Without its part for videos, which would need torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(VISION[2:])
        ProcessorMixin.__init__(self, image_processor, tokenizer)


def build_flux_kontext(seed: int = 0) -> FluxKontextPipeline:
    """FLUX.1-Kontext: the parts of the miniature FLUX.1."""
    return quiet(FluxKontextPipeline(**build_pipeline(seed).components))


def build_qwen_image_edit(
    seed: int = 0, pipeline: type[DiffusionPipeline] = QwenImageEditPipeline
) -> QwenImageEditPipeline | QwenImageEditPlusPipeline:
    """
    Qwen-Image-Edit: 4 packed tokens of 16 for an image, since its VAE scales down 16 times. The image to edit is of
    about 1024x1024 pixels as in the large model: 1024 tokens, and at most 4 in the language model.
    """
    torch.manual_seed(seed)
    tokenizer = chat_tokenizer(EDIT_WORDS, VISION)
    ids = dict(zip(VISION, tokenizer.convert_tokens_to_ids(VISION), strict=True))
    processor = StillImageProcessor(
        image_processor=Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 4 * 28 * 28}),
        tokenizer=tokenizer,
    )
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    text_encoder = Qwen2_5_VLForConditionalGeneration(config)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=4,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=0,
        temperal_downsample=[False] * 4,
        latents_mean=[0.01, -0.02, 0.03, -0.04],
        latents_std=[0.08, 0.11, 0.14, 0.09],
    )
    with torch.no_grad():  # so that images depend on the latents, which small random biases would outweigh
        for name, parameter in vae.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
        vae.decoder.conv_out.weight.mul_(4)
    return quiet(
        pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=vae.eval(),
            text_encoder=text_encoder.eval(),
            tokenizer=tokenizer,
            processor=processor,
            transformer=transformer.eval(),
        )
    )


def build_qwen_image_edit_plus(seed: int = 0) -> QwenImageEditPlusPipeline:
    """Qwen-Image-Edit-Plus: the parts of the miniature Qwen-Image-Edit."""
    return build_qwen_image_edit(seed, QwenImageEditPlusPipeline)


EDITING: dict[str, Callable[..., DiffusionPipeline]] = {
    "flux-kontext": build_flux_kontext,
    "qwen-image-edit": build_qwen_image_edit,
    "qwen-image-edit-plus": build_qwen_image_edit_plus,
}
