"""x-transformers' options that touch the residual stream, its norms or its sublayers (package x-transformers 2.31.10).

``EXPECTED`` is derived from the package's source, by hand. Four layers, width 32.
"""

import functools
from typing import Any

from entry import Case, Entry
from models import VOCABULARY
from own_parts import LAYERS, PRENORM, WIDTH, Verdict, case, normal, token_ids
from x_transformers import CrossAttender, Decoder, Encoder, TransformerWrapper, ViTransformerWrapper, XTransformer

GROUP = "x-transformers"
_CONDITION = {"condition": (2, WIDTH)}  # keyword argument of the call -> shape
_CONTEXT = {"context": (2, 7, WIDTH)}
_DEPTH_ATTENTION = {"attn_aggregated_residuals": True, "attn_aggregated_residual_kwargs": {"lora_rank": 8}}
_ADAPTIVE = {"dim_condition": WIDTH, "use_adaptive_layerscale": True}

# name -> options of the layers, and what should be found. A decoder has 8 sublayers: attention and MLP.
LAYER_OPTIONS: dict[str, tuple[dict[str, Any], Verdict]] = {
    "default": ({}, PRENORM),
    "RMSNorm": ({"use_rmsnorm": True}, PRENORM),
    "simple RMSNorm": ({"use_simple_rmsnorm": True}, PRENORM),
    "ScaleNorm": ({"use_scalenorm": True}, PRENORM),
    "no unit offset": ({"norm_add_unit_offset": False}, PRENORM),
    "sandwich norm": ({"sandwich_norm": True}, (("sandwich", 8, 8),)),
    "residual attention": ({"residual_attn": True}, PRENORM),
    "macaron": ({"macaron": True}, (("prenorm", 12, 12),)),
    "sandwich order": ({"sandwich_coef": 2}, PRENORM),
    "PAR order": ({"par_ratio": 2}, PRENORM),
    "attention only": ({"only_attn": True}, (("prenorm", 4, 4),)),
    "tied layers": ({"weight_tie_layers": True}, PRENORM),
    "residual scaled by weights": ({"scale_residual": True}, PRENORM),
    "residual scaled by a constant": ({"scale_residual_constant": 0.9}, PRENORM),
    "branches scaled by depth": ({"depth_scale_residual": 0.5}, PRENORM),
    "LayerScale": ({"use_layerscale": True}, PRENORM),
    "shifted tokens": ({"shift_tokens": 1}, PRENORM),
    "GLU": ({"ff_glu": True, "ff_swish": True, "ff_no_bias": True}, PRENORM),
    "rotary": ({"rotary_pos_emb": True}, PRENORM),
    "ALiBi": ({"alibi_pos_bias": True}, PRENORM),
    "T5 bias": ({"rel_pos_bias": True}, PRENORM),
    "memory keys and values": ({"attn_num_mem_kv": 2}, PRENORM),
    "query and key norm": ({"attn_qk_norm": True}, PRENORM),
    "gated values": ({"attn_gate_values": True}, PRENORM),
    "value residual": ({"add_value_residual": True}, PRENORM),
    "value residual, not learned": ({"add_value_residual": True, "learned_value_residual_mix": False}, PRENORM),
    "no final norm": ({"pre_norm_has_final_norm": False}, (("prenorm", 8, 7),)),
    "output clamped before the final norm": ({"softclamp_output": True}, (("prenorm", 8, 7),)),
    "post-norm": ({"pre_norm": False}, "post-norm"),
    "DeepNorm": ({"pre_norm": False, "scale_residual_constant": 1.7}, "post-norm"),
    "norms before and behind": ({"pre_and_post_norm": True}, "post-norm"),
    "GRU gate on the stream": ({"gate_residual": True}, ""),
    "hyper-connections": ({"num_residual_streams": 2}, ""),
    "dynamic tanh": ({"use_dynamic_tanh": True}, "scale invariant"),
    "error function for a norm": ({"use_derf": True}, "scale invariant"),
    "U-Net skips": ({"unet_skips": True}, "fragmented"),
    "depth attention": (_DEPTH_ATTENTION, "raw"),
    "LIMe": ({"integrate_layers": True}, "over depth"),
    # Both subtract from the branch what the raw stream has in it: the branch sees the norm, that reader keeps the plain sum.
    "orthogonal update": ({"orthog_residual": True}, PRENORM),
    "mean and variance split": ({"mv_split_residual": True}, PRENORM),
    "input injected before every norm": ({"reinject_input": True}, "raw"),
}
# name -> options of the layers, inputs besides the ids, and what should be found
CONDITIONED: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]], Verdict]] = {
    "cross attention": ({"cross_attend": True}, _CONTEXT, (("prenorm", 12, 12),)),
    "adaptive LayerNorm": ({"use_adaptive_layernorm": True, **_ADAPTIVE}, _CONDITION, PRENORM),
    "adaptive RMSNorm": ({"use_adaptive_rmsnorm": True, **_ADAPTIVE}, _CONDITION, PRENORM),
}
# options of the wrapper around a decoder; all keep it PreNorm
WRAPPER_OPTIONS: dict[str, dict[str, Any]] = {
    "memory tokens": {"num_memory_tokens": 2},
    "embeddings normed": {"post_emb_norm": True},
    "embeddings on the sphere": {"l2norm_embed": True},
    "embeddings of a smaller width": {"emb_dim": 16},
    "embeddings with a fraction of the gradient": {"emb_frac_gradient": 0.5},
}
_OPTIONS = {"dim": WIDTH, "depth": LAYERS, "heads": 4, "attn_dim_head": 8, "verbose": False}
_VOCABULARY = {"num_tokens": VOCABULARY, "max_seq_len": 32}


def _decoder(options: dict[str, Any], inputs: dict[str, tuple[int, ...]], wrapper: dict[str, Any]) -> Case:
    model = TransformerWrapper(**_VOCABULARY, attn_layers=Decoder(**_OPTIONS, **options), **wrapper)
    return case(model, token_ids(), **{name: normal(*shape) for name, shape in inputs.items()})


def _encoder_with_cls() -> Case:
    model = TransformerWrapper(**_VOCABULARY, attn_layers=Encoder(**_OPTIONS), use_cls_token=True, logits_dim=7)
    return case(model, token_ids())


def _vit() -> Case:
    layers = Encoder(**_OPTIONS)
    model = ViTransformerWrapper(image_size=16, patch_size=4, num_classes=7, num_register_tokens=2, attn_layers=layers)
    return case(model, normal(2, 3, 16, 16))


def _encoder_decoder() -> Case:
    options = {"num_tokens": VOCABULARY, "max_seq_len": 32, "depth": LAYERS, "heads": 4, "attn_dim_head": 8}
    sides = {f"{side}_{name}": value for side in ("enc", "dec") for name, value in options.items()}
    return case(XTransformer(dim=WIDTH, **sides), token_ids(), token_ids(2, 8))


def _cross_attender() -> Case:
    return case(CrossAttender(**_OPTIONS), normal(2, 11, WIDTH), context=normal(2, 7, WIDTH, seed=2))


EXPECTED: dict[str, Verdict] = {
    **{name: verdict for name, (_, verdict) in LAYER_OPTIONS.items()},
    **{name: verdict for name, (_, _, verdict) in CONDITIONED.items()},
    **dict.fromkeys((*WRAPPER_OPTIONS, "encoder with CLS", "ViT", "cross attention alone"), PRENORM),
    "encoder and decoder": (("prenorm", 8, 8), ("prenorm", 12, 12)),
}


def entries() -> list[Entry]:
    build = functools.partial(functools.partial, _decoder)
    return [
        *(Entry(name, GROUP, build(options, {}, {})) for name, (options, _) in LAYER_OPTIONS.items()),
        *(Entry(name, GROUP, build(options, inputs, {})) for name, (options, inputs, _) in CONDITIONED.items()),
        *(Entry(name, GROUP, build({}, {}, options)) for name, options in WRAPPER_OPTIONS.items()),
        Entry("encoder with CLS", GROUP, _encoder_with_cls),
        Entry("ViT", GROUP, _vit),
        Entry("cross attention alone", GROUP, _cross_attender),
        Entry("encoder and decoder", GROUP, _encoder_decoder),
    ]
