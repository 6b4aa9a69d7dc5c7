"""Shrinks any Transformers configuration to a few thousand weights, by the names of its fields."""

import dataclasses
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN = 32, 4, 4, 2, 8, 48
VOCABULARY, POSITIONS, IMAGE, PATCH = 97, 64, 32, 4
WINDOW = 4  # shorter than the text inputs, so that masks of windows differ from causal ones
EXPERTS, EXPERTS_PER_TOKEN = 4, 2

# value -> the fields that get it
_NAMES: tuple[tuple[int, str], ...] = (
    (
        WIDTH,
        "hidden_size d_model n_embd dim embed_dim embedding_size emb_dim text_hidden_size out_hidden_size output_dim "
        "projection_dim encoder_hidden_size hidden_size_global word_embed_proj_dim input_embedding_size "
        "output_embedding_size embedding_dim projector_hidden_size projection_size image_text_hidden_size lru_width "
        "attention_hidden_size d_latents pooler_output_size vision_output_dim projector_input_dim projector_output_dim "
        "decoder_hidden_size pred_hidden_size entity_emb_size shape_embed_dim pronunciation_embed_dim fusion_hidden_size "
        "adapter_out_dim adapter_in_dim adapter_input_size projection_hidden_size patch_embed_hidden_size "
        "router_hidden_size output_channels backbone_hidden_size prompt_mid_dim image_token_embed_dim vision_hidden_size "
        "prediction_head_size part_features hc_lowrank mamba_d_ssm auxiliary_channels base_channels audio_hidden_size "
        "ple_embed_dim qk_channels v_channels",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
        "num_decoder_layers layers depth num_blocks speech_encoder_layers t2u_encoder_layers t2u_decoder_layers "
        "decoder_num_hidden_layers pred_num_hidden_layers conf_num_hidden_layers max_window_layers "
        "num_self_attends_per_block num_spatial_layers",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
        "num_encoder_attention_heads num_decoder_attention_heads decoder_num_attention_heads pred_num_attention_heads "
        "swa_num_attention_heads num_sliding_attention_heads linear_num_value_heads linear_num_heads index_n_heads "
        "mamba_num_heads speech_encoder_attention_heads t2u_encoder_attention_heads t2u_decoder_attention_heads "
        "conf_num_attention_heads num_self_attention_heads num_cross_attention_heads resampler_n_heads resampler_heads",
    ),
    (
        KV_HEADS,
        "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_key_value_attention_heads",
    ),
    (
        HEAD_DIM,
        "head_dim kv_channels d_kv d_head dim_head attention_head_size swa_head_dim v_head_dim qk_nope_head_dim "
        "qk_rope_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_head mamba_head_dim "
        "rotary_dim resampler_head_dim resampler_dim_head query_pre_attn_scalar d_rel",
    ),
    (
        16,
        "index_head_dim kv_lora_rank q_lora_rank mamba_d_state state_size ssm_state_size o_lora_rank gated_norm_rank "
        "hidden_size_per_layer_input laurel_rank num_queries num_latents resampler_n_latents resampler_num_latents "
        "lang_embed_dim spkr_embed_dim adapter_rank num_mel_bins time_step_rank mamba_dt_rank dim_model_base "
        "mm_tokens_per_image downsample_hidden_size embedding_rank intra_bottleneck_size",
    ),
    (
        FFN,
        "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff d_inner moe_intermediate_size dim_ff dff "
        "ffn_hidden_size expert_ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size mlp_dim "
        "intermediate_size_mlp n_inner feed_forward_size dense_intermediate_size moe_shared_expert_intermediate_size "
        "shared_experts_intermediate_size decoder_intermediate_size share_expert_dim moe_hidden_size "
        "speech_encoder_intermediate_size t2u_encoder_ffn_dim t2u_decoder_ffn_dim alignment_intermediate_size "
        "projection_hidden_dim projection_intermediate_size",
    ),
    (
        VOCABULARY,
        "vocab_size src_vocab_size tgt_vocab_size unpadded_vocab_size decoder_vocab_size vocab_size_per_layer_input "
        "t2u_vocab_size char_vocab_size unit_hifi_gan_vocab_size audio_vocab_size entity_vocab_size "
        "encoder_hash_byte_group_vocab pronunciation_vocab_size shape_vocab_size num_embeddings mel_vocab_size",
    ),
    (
        POSITIONS,
        "codebook_size max_position_embeddings n_positions n_ctx max_seq_len max_source_positions max_target_positions "
        "context_length max_encoder_position_embeddings max_decoder_position_embeddings t2u_max_position_embeddings "
        "max_2d_position_embeddings original_max_position_embeddings num_position_embeddings position_embedding_size "
        "tpu_short_seq_length",
    ),
    (
        WINDOW,
        "sliding_window sliding_window_size local_attention attention_window_size keep_window_size "
        "local_attention_window_len attention_window attention_chunk_size index_topk",
    ),
    (
        EXPERTS,
        "num_experts num_local_experts latent_query_num n_routed_experts moe_num_experts prompt_length num_query_tokens",
    ),
    (
        EXPERTS_PER_TOKEN,
        "num_experts_per_tok moe_topk moe_k first_k_dense_replace num_kv_shared_layers num_groups n_group window_size "
        "num_frames num_dense_layers zero_expert_num index_topk_blocks",
    ),
    (
        1,
        "n_shared_experts num_shared_experts moe_num_shared_experts topk_group moe_layer_start_index n_groups "
        "mamba_n_groups num_first_full_attention_layers num_last_full_attention_layers num_nextn_predict_layers",
    ),
    (IMAGE, "image_size crop_size pretrain_image_size max_image_size max_img_size"),
    (PATCH, "patch_size chunk_size mamba_chunk_size block_size index_block_size encoder_stride"),
    (8, "num_detection_tokens mamba_n_heads n_mamba_heads expert_capacity"),
)
_VALUES: dict[str, Any] = {name: value for value, names in _NAMES for name in names.split()}

# For fields that hold one number per stage: as many of these as there are stages.
_STAGES: dict[str, tuple[Any, ...]] = {
    "depths": (1, 1, 2, 1),
    "hidden_sizes": (16, 16, 32, 32),
    "embed_dim": (16, 32, 32, 32),
    "embed_dims": (16, 16, 32, 32),
    "num_heads": (1, 2, 4, 4),
    "num_attention_heads": (1, 2, 4, 4),
    "depth": (1, 1, 2, 2),
}
# Fields that hold None until a model reads them.
_NEVER_NONE = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts", "vocab_size")
# Ids of special tokens. Those of other kinds are told apart by the place of their field, and lie between the two ranges.
_TOKENS = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1, "sep": 3, "cls": 4, "mask": 5, "unk": 6}
_MEDIA = {"image": 96, "video": 95, "audio": 94, "vision_start": 93, "vision_end": 92}
ORDINARY_TOKENS = (10, 80)  # ids without a meaning of their own


def shrink(config_class: type[PreTrainedConfig], overrides: dict[str, Any] | None = None) -> PreTrainedConfig:
    """A small configuration of the class; ``overrides`` go before what the tables say, and a dictionary for a nested
    configuration overrides fields of that, or of the class of its "model_type".

    Where the class arranges layers of several types, all types that it has at its usual depth occur.
    """
    fields = {**CONFIGS.get(config_class.__name__, {}), **(overrides or {})}
    names = [field.name for field in dataclasses.fields(config_class)]
    usual = _usual(config_class)
    small: dict[str, Any] = {}
    for position, name in enumerate(names):
        value = _field(usual, name)
        if isinstance(value, PreTrainedConfig) or name in config_class.sub_configs:
            nested = fields.pop(name, None)
            if nested is not None and "model_type" in nested:
                small[name] = shrink(CONFIG_MAPPING[nested["model_type"]], nested)
            elif isinstance(value, PreTrainedConfig):
                small[name] = shrink(type(value), nested)
        elif name not in fields:
            replacement = _small(name, value, position)
            if replacement is not None:
                small[name] = replacement
    if "kv_lora_rank" in names:  # latent attention decompresses to as many keys as queries
        small["num_key_value_heads"] = HEADS
    small.update(fields, experts_implementation="batched_mm")  # the default, grouped_mm, has no eager float64 kernel
    config = config_class(**small)
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if name in names and name not in fields:
            kinds = list(dict.fromkeys(_field(usual, name) or ()))
            if len(kinds) > len(set(_field(config, name) or ())):
                small[name] = [kinds[i % len(kinds)] for i in range(max(LAYERS, len(kinds)))]
                if len(kinds) > LAYERS:
                    small["num_hidden_layers"] = len(kinds)
    return config_class(**small)


def _usual(config_class: type[PreTrainedConfig]) -> Any:
    """The configuration of the usual size; the class, which holds raw defaults, where defaults contradict each other."""
    try:
        return config_class()
    except Exception:
        return config_class


def _field(config: Any, name: str) -> Any:
    """A field's value; the class's default for one that varies from layer to layer."""
    try:
        return getattr(config, name, None)
    except Exception:
        return getattr(type(config), name, None)


def _small(name: str, value: Any, position: int) -> Any:
    """What a field with the usual ``value`` gets; None leaves it as it is."""
    if value is None:
        return _VALUES[name] if name in _NEVER_NONE else None
    if isinstance(value, bool):
        return None
    if "drop" in name:
        return 0.0 if isinstance(value, float) else [0.0] * len(value) if isinstance(value, tuple | list) else None
    if name.endswith(("_token_id", "_token_index")):
        kind = name.removesuffix("_token_id").removesuffix("_token_index")
        return _TOKENS.get(kind, _MEDIA.get(kind, 91 - position % 10))
    if isinstance(value, tuple | list):
        if name in _STAGES and not isinstance(value[0], tuple | list):
            return [_STAGES[name][min(i, 3)] for i in range(len(value))]
        if name in _VALUES and all(isinstance(item, int) for item in value):
            return [_VALUES[name]] * len(value)
        return None
    if name == "rope_parameters" and isinstance(value, dict) and "mrope_section" in value:
        return {**value, "mrope_section": [2, 1, 1]}
    if isinstance(value, int | float) and value > 0:  # others turn something off
        return _VALUES.get(name)
    return None


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}
_RESNET = {"backbone_config": {"model_type": "resnet", "out_features": ["stage4"]}}
_WINDOWS = {"image_size": 64}  # four stages, and a window of two patches in the last

# Fields that the names above can't tell, by class of configuration or, before that, of the model.
CONFIGS: dict[str, dict[str, Any]] = {
    "CohereCompassTextConfig": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": _MROPE["rope_parameters"], "full_attention": None},
    },
    "DbrxAttentionConfig": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    "DbrxFFNConfig": {"moe_top_k": 2},
    "Dots1Config": {"n_shared_experts": 1},
    "FalconH1Config": {"mamba_d_ssm": 64},
    "Gemma3nTextConfig": {"intermediate_size": 48, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0]},
    "Gemma4AssistantConfig": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 4,
        }
    },
    "Gemma4UnifiedAssistantConfig": {"text_config": {"model_type": "gemma4_unified_text", "num_kv_shared_layers": 4}},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 2]]},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * 2},
    "LongT5Config": {"local_radius": 3},
    "Mamba2Config": {"num_heads": 8},
    "ReformerModelWithLMHead": {"is_decoder": True},
    "ReformerConfig": {
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 8],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "Zamba2Config": {"layers_block_type": ["linear_attention"] * 3 + ["hybrid"]},
    "ZayaConfig": {"num_experts_per_tok": 1},
    "EsmConfig": {"mask_token_id": 5, "pad_token_id": 0},
    "EsmcConfig": {"num_key_value_heads": 4},
    "Glm5NextTextConfig": {"num_key_value_heads": 4, "index_kpool": 2},
    "NeoMMEConfig": {"head_dim": 16},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "GraniteSpeechEncoderConfig": {"hidden_dim": 32},
    "GraniteSpeechPlusEncoderConfig": {"hidden_dim": 32},
    "VibeVoiceAcousticTokenizerEncoderConfig": {"num_filters": 2},
    # images
    "DonutSwinConfig": _WINDOWS,
    "SwinConfig": _WINDOWS,
    "Swinv2Config": _WINDOWS,
    "MaskFormerSwinConfig": _WINDOWS,
    "Swin2SRConfig": {"patch_size": 1},
    "HGNetV2Config": {
        "stem_channels": [3, 8, 16],
        "stage_in_channels": [16, 16, 32, 32],
        "stage_mid_channels": [8, 8, 16, 16],
        "stage_out_channels": [16, 32, 32, 64],
        "stage_numb_of_layers": [2, 2, 2, 2],
        "hidden_sizes": [16, 32, 32, 64],
    },
    "CvtConfig": {"depth": [1, 2, 3]},
    "DepthProConfig": {
        "patch_size": 32,
        "image_size": 128,
        "intermediate_hook_ids": [3, 1],
        "intermediate_feature_dims": [16, 16],
        "scaled_images_feature_dims": [16, 16, 16],
    },
    "EfficientNetConfig": {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320},
    "HieraConfig": {"patch_size": [7, 7], "num_heads": [1, 2, 4, 8]},
    "LevitConfig": {"patch_size": 16, "image_size": 64, "hidden_sizes": [32, 32, 32], "num_attention_heads": [4, 4, 4]},
    "MobileViTV2Config": {"patch_size": 2, "image_size": 64},
    "MobileViTConfig": {"patch_size": 2, "image_size": 64},
    "MobileNetV1Config": {"depth_multiplier": 0.25},
    "MobileNetV2Config": {"depth_multiplier": 0.25},
    "PPLCNetConfig": {"scale": 0.25, "class_expand": 64},
    "PPLCNetV3Config": {"scale": 0.25},
    "PerceiverConfig": {"num_cross_attention_heads": 1, "num_blocks": 2},
    "ShieldGemma2Config": {"yes_token_index": 20, "no_token_index": 21},
    "LwDetrViTConfig": {"num_windows": 4},
    "TextNetConfig": {"stem_out_channels": 16},
    "VJEPA2Config": {"frames_per_clip": 4},
    "VitPoseBackboneConfig": {"image_size": [64, 48], "patch_size": [16, 16], "num_experts": 1},
    "ConditionalDetrConfig": _RESNET,
    "DabDetrConfig": _RESNET,
    "DeformableDetrConfig": {"backbone_config": {"model_type": "resnet", "out_features": ["stage2", "stage3", "stage4"]}},
    "DetrConfig": _RESNET,
    "TableTransformerConfig": _RESNET,
    "Llama4VisionConfig": {"intermediate_size": 128},
    # images and text
    "ChameleonConfig": {"vocabulary_map": {"<image>": 96}},
    "Emu3Config": {"vocabulary_map": {"<image>": 96}},
    "Blip2Config": {"image_token_index": 96},
    "InstructBlipConfig": {"image_token_index": 96},
    "InstructBlipVideoConfig": {"video_token_index": 95},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "DiffusionGemmaTextConfig": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    "Dots3NoteTextConfig": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "Dots3NoteVisionConfig": {"mlp_layer_types": ["dense", "dense", "sparse", "sparse"]},
    "Qwen2_5_VLVisionConfig": {"window_size": 16, "fullatt_block_indexes": [1, 3]},
    "Qwen2_5OmniVisionEncoderConfig": {"window_size": 16, "fullatt_block_indexes": [1, 3]},
    "Exaone4_5_VisionConfig": {"window_size": 16, "fullatt_block_indexes": [1, 3]},
    "Ernie4_5_VLMoeTextConfig": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}},
    "Granite4VisionConfig": {
        "vision_config": {"hidden_size": 64},
        "deepstack_layer_map": [[-2, 1], [-1, 2]],
        "spatial_target_layers": [3],
        "downsample_rate": "1/2",
    },
    "HunYuanVLTextConfig": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 1, 1]}},
    "MllamaTextConfig": {"cross_attention_layers": [1, 3]},
    "MllamaVisionConfig": {"intermediate_layers_indices": [1, 3], "num_global_layers": 2},
    "Molmo2AdapterConfig": {"vision_feature_layer": [3, 1]},
    "NemotronH_Omni_Reasoning_V3_Config": {"vision_config": {"video_temporal_patch_size": 2}},
    "VipLlavaConfig": {"vision_feature_layers": [-2, -1]},
    "VisionEncoderDecoderConfig": {
        "encoder": {"model_type": "vit"},
        "decoder": {"model_type": "gpt2", "is_decoder": True, "add_cross_attention": True},
    },
    "Glm4vTextConfig": _MROPE,
    "Glm4vMoeTextConfig": {**_MROPE, "rope_parameters": {**_MROPE["rope_parameters"], "partial_rotary_factor": 1.0}},
    "GlmOcrTextConfig": _MROPE,
    "PPFormulaNetVisionConfig": {"post_conv_in_channels": 32, "post_conv_mid_channels": 32, "post_conv_out_channels": 32},
    "PaddleOCRTextConfig": _MROPE,
    "Qwen2_5OmniTextConfig": _MROPE,
    "Qwen2_5_VLTextConfig": _MROPE,
    "Qwen2VLTextConfig": _MROPE,
    "Step3p7TextConfig": {"sliding_window": 4},
}
