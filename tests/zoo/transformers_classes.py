"""Every class in the auto mappings of Transformers that models language or images, built small with random weights.

The lists of classes come from the installed Transformers, so a new class shows up by itself, as a row that works or as one
whose ``build`` says what is missing.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from entry import Case, Entry
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers_configs import CONFIGS, IMAGE, ORDINARY_TOKENS, shrink

# heading -> mapping in transformers.models.auto.modeling_auto
GROUPS = {
    "causal LM": "CAUSAL_LM",
    "masked LM": "MASKED_LM",
    "seq2seq": "SEQ_TO_SEQ_CAUSAL_LM",
    "image classification": "IMAGE_CLASSIFICATION",
    "backbone": "BACKBONE",
    "video": "VIDEO_CLASSIFICATION",
    "vision encoder": "IMAGE",
    "text encoder": "TEXT_ENCODING",
    "vision + text": "IMAGE_TEXT_TO_TEXT",
}

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Parameters that mean something else than a weight: rates of decay, time steps, temperatures.
_KEPT = re.compile(r"A_log|dt_bias|^D$|decay|time_|lambda|recurrent_param|logit_scale|temperature|inv_freq|a_param")


def entries() -> list[Entry]:
    """One entry per class, under the first heading whose mapping holds it."""
    return [Entry(name, group, functools.partial(build, name)) for name, group in _classes()]


def build(name: str, seed: int = 0) -> Case:
    """The class ``name`` with a small configuration, and arguments with which it can be called."""
    model_class = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = shrink(model_class.config_class, CONFIGS.get(name))
        model = randomise(model_class(config), seed).eval()
    return Case(model, kwargs=inputs(model))


def _classes() -> Iterator[tuple[str, str]]:
    seen = set()
    for group, mapping in GROUPS.items():
        for names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values():
            for name in (names,) if isinstance(names, str) else names:
                if name not in seen:
                    seen.add(name)
                    yield name, group


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Draw every parameter anew, in place, so that no weight is neutral and every branch is as large as the stream.

    Vectors lie within 0.3 of their identity, which is 0 for those that begin as zeros and 1 for others, and biases within
    0.1 of zero; a matrix has a variance of 1 / fan-in. Parameters of recurrences stay about where their class puts them.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            owner, _, name = path.rpartition(".")
            uniform = 2 * torch.rand(parameter.shape, generator=generator) - 1
            if _KEPT.search(name):
                new = parameter + 0.01 * uniform
            elif parameter.dim() > 1:
                fan_in = parameter[0].numel() if isinstance(modules[owner], _CONVOLUTIONS) else parameter.shape[-1]
                new = torch.randn(parameter.shape, generator=generator) * fan_in**-0.5
            elif name.endswith("bias"):
                new = 0.1 * uniform
            else:
                new = 0.3 * uniform + (1.0 if parameter.any() else 0.0)
            parameter.copy_(new)
    return model


class _Draw:
    """Random inputs. A model gets the same ones each time."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def ids(self, *shape: int) -> Tensor:
        return torch.randint(*ORDINARY_TOKENS, shape, generator=self.generator)

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def images(self, config: Any) -> Tensor:
        """Two images as large as the configuration, or the one that it holds for images, expects."""
        vision = config
        for name in ("encoder", "vision_config"):
            vision = getattr(vision, name, vision)
        size = getattr(vision, "image_size", None) or 2 * IMAGE
        height, width = (size, size) if isinstance(size, int) else size
        return self.floats(2, getattr(vision, "num_channels", 3), height, width)

    def video(self, config: Any) -> Tensor:
        """Two videos of a few frames."""
        frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", 2)
        images = [self.images(config) for _ in range(frames)]
        return torch.stack(images, dim=1)


def inputs(model: Any) -> dict[str, Any]:
    """Arguments of a call, by what the signature of ``model.forward`` names."""
    config, draw = model.config, _Draw()
    accepted = inspect.signature(model.forward).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    kwargs: dict[str, Any] = {}
    if "input_ids" in accepted:
        kwargs["input_ids"] = draw.ids(2, 9)
    if "decoder_input_ids" in accepted and (config.is_encoder_decoder or "input_ids" not in accepted):
        kwargs["decoder_input_ids"] = draw.ids(2, 7)
    if "pixel_values" in accepted and (
        "input_ids" not in accepted or accepted["pixel_values"].default is inspect.Parameter.empty
    ):
        kwargs["pixel_values"] = draw.images(config)
    if "pixel_values_videos" in accepted and "input_ids" not in accepted:
        kwargs["pixel_values_videos"] = draw.video(config)
    if "use_cache" in accepted or (open_ended and hasattr(config.get_text_config(), "use_cache")):
        kwargs["use_cache"] = False
    name = type(model).__name__
    if name in PICTURED:
        kwargs |= _pictured(model, draw)
    if name in INPUTS:
        kwargs |= INPUTS[name](config, draw)
    return kwargs


def _codes(config: Any, draw: _Draw) -> dict[str, Any]:
    return {"input_ids": draw.ids(2 * config.num_codebooks, 9)}


def _video(config: Any, draw: _Draw) -> dict[str, Any]:
    return {"pixel_values": draw.video(config)}


def _queries(config: Any, draw: _Draw) -> dict[str, Any]:
    images = torch.full((2, config.num_query_tokens), config.image_token_index)
    return {"input_ids": torch.cat([images, draw.ids(2, 9)], dim=1), "pixel_values": draw.images(config)}


def _instructed_queries(config: Any, draw: _Draw) -> dict[str, Any]:
    return {"qformer_input_ids": draw.ids(2, 5), **_queries(config, draw)}


def _instructed_video(config: Any, draw: _Draw) -> dict[str, Any]:
    frames = 4
    videos = torch.full((2, frames * config.num_query_tokens), config.video_token_index)
    return {
        "qformer_input_ids": draw.ids(2, 5),
        "input_ids": torch.cat([videos, draw.ids(2, 9)], dim=1),
        "pixel_values": torch.stack([draw.images(config) for _ in range(frames)], dim=1),
    }


def _one_image_each(config: Any, draw: _Draw) -> dict[str, Any]:
    return {"pixel_values": draw.images(config)[:, None], "image_attention_mask": torch.ones(2, 9, 1, dtype=torch.long)}


def _image_first(config: Any, draw: _Draw) -> dict[str, Any]:
    count = config.latent_query_num
    mask = torch.arange(9).expand(2, -1) < count
    return {"pixel_values": draw.images(config), "image_embeds_position_mask": mask}


def _flat_patches(config: Any, draw: _Draw) -> dict[str, Any]:
    rows_and_columns = torch.cartesian_prod(torch.arange(1, 5), torch.arange(1, 5)).expand(2, -1, -1).float()
    patches = draw.floats(2, 16, config.vision_config.patch_embed_hidden_size)
    return {"flattened_patches": torch.cat([rows_and_columns, patches], dim=-1)}


def _page(config: Any, draw: _Draw) -> dict[str, Any]:
    corners = torch.rand(2, 9, 2, generator=draw.generator) / 2
    return {"bbox": torch.cat([corners, corners + 0.25], dim=-1), "pixel_values": draw.images(config)}


def _speech(config: Any, draw: _Draw) -> dict[str, Any]:
    frames = 9 * config.audio_length_per_tok
    return {"input_features": draw.floats(2, config.audio_config.num_mel_bins, frames), "num_delay_tokens": 6}


def _image_to_text(config: Any, draw: _Draw) -> dict[str, Any]:
    return {"pixel_values": draw.images(config), "decoder_input_ids": draw.ids(2, 7), "input_ids": None}


def _tiles(config: Any, draw: _Draw) -> dict[str, Any]:
    tiles = torch.stack([draw.images(config)] * config.max_num_tiles, dim=1)[:, None]
    return {
        "pixel_values": tiles,
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, config.max_num_tiles, dtype=torch.long),
    }


def _patches(config: Any, draw: _Draw) -> dict[str, Any]:
    vision = config.vision_config
    return {
        "pixel_values": draw.floats(2, 16, vision.num_channels * vision.patch_size**2),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }


def _robot(config: Any, draw: _Draw) -> dict[str, Any]:
    vision = config.vlm_config.vision_config
    images = torch.full((2, (vision.image_size // vision.patch_size) ** 2), config.vlm_config.image_token_id)
    return {
        "input_ids": torch.cat([images, draw.ids(2, 9)], dim=1),
        "pixel_values": draw.images(config.vlm_config)[:, None],
        "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
        "state": draw.floats(2, config.max_state_dim),
        "noise": draw.floats(2, config.chunk_size, config.max_action_dim),
        "timestep": torch.tensor([0.25, 0.75]),
    }


def _pictured(model: Any, draw: _Draw) -> dict[str, Any]:
    """An image each, and as many image tokens before the text as the model makes of it."""
    config, images = model.config, draw.images(model.config)
    see = model.get_image_features if hasattr(model, "get_image_features") else model.model.get_image_features
    with torch.no_grad():
        found = see(pixel_values=images)
    features = found.last_hidden_state if found.pooler_output is None else found.pooler_output
    count = sum(feature.numel() for feature in features) // (2 * config.get_text_config().hidden_size)
    token = getattr(config, "image_token_id", None) or config.image_token_index
    return {"input_ids": torch.cat([torch.full((2, count), token), draw.ids(2, 9)], dim=1), "pixel_values": images}


# Classes that see an image. The others that can take images and text get text alone, since what they do with an image
# depends on its size, which they hold in tensors, or can't be traced for another reason.
PICTURED = {
    "AyaVisionForConditionalGeneration",
    "Cohere2VisionForConditionalGeneration",
    "DeepseekVLForConditionalGeneration",
    "Florence2ForConditionalGeneration",
    "Gemma3ForConditionalGeneration",
    "GotOcr2ForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "JanusForConditionalGeneration",
    "Llama4ForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "PaliGemmaForConditionalGeneration",
    "QianfanOCRForConditionalGeneration",
    "ShieldGemma2ForImageClassification",
    "T5Gemma2ForConditionalGeneration",
    "VideoLlavaForConditionalGeneration",
    "VipLlavaForConditionalGeneration",
}

# Classes that need other arguments than the signature tells.
INPUTS: dict[str, Callable[[Any, _Draw], dict[str, Any]]] = {
    "MusicgenForCausalLM": _codes,
    "MusicgenMelodyForCausalLM": _codes,
    "TimesformerForVideoClassification": _video,
    "TimesformerModel": _video,
    "VideoMAEForVideoClassification": _video,
    "VideoMAEModel": _video,
    "VivitForVideoClassification": _video,
    "VivitModel": _video,
    "MllamaVisionModel": _tiles,
    "Siglip2ForImageClassification": _patches,
    "VoxtralRealtimeForConditionalGeneration": _speech,
    "Blip2ForConditionalGeneration": _queries,
    "InstructBlipForConditionalGeneration": _instructed_queries,
    "InstructBlipVideoForConditionalGeneration": _instructed_video,
    "IdeficsForVisionText2Text": _one_image_each,
    "Kosmos2ForConditionalGeneration": _image_first,
    "Pix2StructForConditionalGeneration": _flat_patches,
    "UdopForConditionalGeneration": _page,
    "PI0ForConditionalGeneration": _robot,
    "PPFormulaNetForConditionalGeneration": _image_to_text,
}
