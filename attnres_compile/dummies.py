"""Example arguments of Transformers models, made from their config and from what their forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_FRAMES, _SAMPLES = 128, 16000  # of a spectrogram whose length the config leaves open, and of a wave form


def dummy_inputs(model: nn.Module) -> dict[str, Any]:
    """Example arguments of a Transformers model, on its device and without a key-value cache; empty for other models.

    They are the model's own dummy inputs, completed by what its forward requires, by its main input, and by the inputs of
    both sides of an encoder-decoder or of a pair of encoders. A text model that may also see images gets none.
    """
    config, first = getattr(model, "config", None), next(model.parameters(), None)
    if config is None or first is None or not hasattr(model, "dummy_inputs"):
        return {}
    parameters = inspect.signature(model.forward).parameters
    wanted = _wanted(model, config, parameters)
    given: Mapping[str, Any] = model.dummy_inputs  # type: ignore[assignment]
    found = {name: value for name, value in given.items() if name in parameters and (name in wanted or "input_ids" in wanted)}
    for name in wanted:
        make = _MAKERS.get(name)
        if make is not None and name not in found:
            found[name] = make(config)
    if "decoder_input_ids" not in given and {"input_ids", "decoder_input_ids"} <= found.keys():
        found["decoder_input_ids"] = torch.ones_like(found["input_ids"])  # in batches of the same size
    found = {name: _placed(value, config, first) for name, value in found.items()}
    if getattr(config, "use_cache", None) and ("use_cache" in parameters or _takes_any(parameters)):
        found["use_cache"] = False
    return found


def _wanted(model: nn.Module, config: Any, parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """Names of the arguments to give."""
    wanted = [getattr(model, "main_input_name", "input_ids")]
    wanted += [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    if getattr(config, "is_encoder_decoder", False):
        wanted.append("decoder_input_ids")
    sees_tokens = any("token" in key and "image" in key for key in vars(config))  # images stand among the text's tokens
    if "input_ids" in wanted and "pixel_values" in parameters and not sees_tokens:
        wanted.append("pixel_values")
    if "input_ids" in wanted and "input_features" in parameters and not any("audio_token" in key for key in vars(config)):
        wanted.append("input_features")
    return [name for name in dict.fromkeys(wanted) if name in parameters]


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def _placed(value: Any, config: Any, first: nn.Parameter) -> Any:
    """Ids within the vocabulary, floats in the model's dtype, all on its device."""
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        return value.to(first.device, first.dtype)
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if value.dtype == torch.int64 and isinstance(vocabulary, int):
        value = value % vocabulary
    return value.to(first.device)


def _field(config: Any, name: str, default: Any) -> Any:
    """A field of the config, or of the part of it that describes the modality."""
    for part in ("", "vision_config", "audio_config", "encoder", "backbone_config"):
        owner = getattr(config, part, None) if part else config
        value = getattr(owner, name, None)
        if value is not None:
            return value
    return default


def _pixel_values(config: Any) -> Tensor:
    size = _field(config, "image_size", 224)
    if isinstance(size, dict):
        size = (size["height"], size["width"])
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    frames = [config.num_frames] if isinstance(getattr(config, "num_frames", None), int) else []
    return torch.zeros(1, *frames, _field(config, "num_channels", 3), height, width)


def _input_features(config: Any) -> Tensor:
    """Spectrograms: bands before frames where the encoder is convolutional (Whisper), behind them elsewhere."""
    bands, positions = _field(config, "num_mel_bins", None), _field(config, "max_source_positions", None)
    if bands is not None and positions is not None and _field(config, "input_feat_per_channel", None) is None:
        return torch.zeros(1, bands, 2 * positions)
    for name in ("input_feat_per_channel", "feature_projection_input_dim"):
        bands = bands or _field(config, name, None)
    return torch.zeros(1, _FRAMES, bands or 80)


def _input_values(config: Any) -> Tensor:
    bands = _field(config, "num_mel_bins", None)
    if bands is not None and _field(config, "patch_size", None) is not None:  # patches of a spectrogram
        return torch.zeros(1, _field(config, "max_length", _FRAMES), bands)
    channels = getattr(config, "audio_channels", None)
    return torch.zeros(1, *([channels] if channels else []), _SAMPLES)


def _ids(config: Any) -> Tensor:
    return torch.ones(1, 5, dtype=torch.int64)


_MAKERS: dict[str, Callable[[Any], Tensor]] = {
    "input_ids": _ids,
    "decoder_input_ids": _ids,
    "pixel_values": _pixel_values,
    "input_features": _input_features,
    "input_values": _input_values,
}
