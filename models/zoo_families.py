"""The families of the zoo: the class of each in transformers, the sizes that it is made in, and its inputs.

In the sizing `distinct` the sizes differ from one another, so that no mix-up goes unseen; in `collide` hidden,
feed-forward, vocabulary and positions are all 96 where the family allows, so that nothing can be told by its size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SIZINGS: dict[str, dict[str, int]] = {
    "distinct": {"hidden": 48, "heads": 6, "ffn": 56, "vocab": 101, "positions": 44, "layers": 2},
    "collide": {"hidden": 96, "heads": 8, "ffn": 96, "vocab": 96, "positions": 96, "layers": 2},
}

FIELDS: dict[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "heads": (
        "num_attention_heads",
        "n_head",
        "n_heads",
        "num_heads",
        "encoder_attention_heads",
        "decoder_attention_heads",
    ),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "ffn": (
        "intermediate_size",
        "n_inner",
        "ffn_dim",
        "ffn_hidden_size",
        "hidden_dim",
        "d_ff",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
    ),
    "vocab": ("vocab_size",),
    "positions": ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions"),
    "layers": (
        "num_hidden_layers",
        "n_layer",
        "n_layers",
        "num_layers",
        "num_decoder_layers",
        "encoder_layers",
        "decoder_layers",
    ),
}
"""The names of each size in configurations. A family with none of these names does not have that size."""

COMMON: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
TOKENS = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Family:
    """One row: the class of the model in transformers, its settings, and its inputs.

    Settings are named as in `FIELDS` or as in the model's own configuration. `sizings` are those that zoo.py
    exports: none of a model that `torch.onnx.export(dynamo=True)` cannot export.
    """

    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    distinct: Mapping[str, Any] = field(default_factory=dict)
    collide: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] = TOKENS
    sizings: tuple[str, ...] = ("distinct", "collide")
    output: str = "logits"
    arguments: Mapping[str, Any] = field(default_factory=dict)


Part = dict[str, Any]
GROUPED: Part = {"kv_heads": 2}
# Heads are wider than hidden / heads. In `collide`, all key/value heads together are as wide as hidden.
OWN_HEAD: Part = {"settings": GROUPED, "distinct": {"head_dim": 10}, "collide": {"head_dim": 48}}
SLIDING: Part = {
    "settings": GROUPED | {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
    "distinct": {"head_dim": 10, "query_pre_attn_scalar": 10},
    "collide": {"head_dim": 48, "query_pre_attn_scalar": 48},
}
# A quarter of a head is rotated, and it must be possible to halve that quarter.
QUARTER_ROTARY: Part = {"distinct": {"heads": 3}, "collide": {"heads": 6}}
SEQUENCES = (*TOKENS, "decoder_input_ids")
RELATIVE: Part = {"d_kv": 10, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 9}
DISENTANGLED: Part = {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_biased_input": False,
    "max_relative_positions": 8,
}

FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT2LMHeadModel"),
    # OPT's table of positions has two rows more than its configuration says.
    "opt": Family("OPTForCausalLM", {"pad_token_id": 1}, collide={"positions": 94}),
    "opt_350m": Family(
        "OPTForCausalLM",
        {"pad_token_id": 1, "do_layer_norm_before": False},
        distinct={"word_embed_proj_dim": 32},
        collide={"word_embed_proj_dim": 48, "positions": 94},
    ),
    "gpt_neox": Family("GPTNeoXForCausalLM", **QUARTER_ROTARY),
    "llama": Family("LlamaForCausalLM", GROUPED),
    "llama_mha": Family("LlamaForCausalLM"),
    "olmo": Family("OlmoForCausalLM"),
    "olmo2": Family("Olmo2ForCausalLM", GROUPED),
    "gemma": Family("GemmaForCausalLM", **OWN_HEAD),
    "gemma2": Family("Gemma2ForCausalLM", **SLIDING),
    "gemma3": Family("Gemma3ForCausalLM", **SLIDING),
    "qwen2": Family("Qwen2ForCausalLM", GROUPED),
    "qwen3": Family("Qwen3ForCausalLM", **OWN_HEAD),
    "phi": Family("PhiForCausalLM"),
    "phi3": Family("Phi3ForCausalLM", GROUPED),
    "bloom": Family("BloomForCausalLM"),
    "falcon_mq": Family("FalconForCausalLM", {"multi_query": True, "parallel_attn": True, "kv_heads": 1}),
    "falcon_new": Family("FalconForCausalLM", {"new_decoder_architecture": True, "kv_heads": 2}),
    "mpt": Family("MptForCausalLM"),
    "gptj": Family("GPTJForCausalLM", {"rotary_dim": 4}),
    "stablelm": Family("StableLmForCausalLM", {"use_qkv_bias": True}, **QUARTER_ROTARY),
    "starcoder2": Family("Starcoder2ForCausalLM", GROUPED),
    "cohere": Family("CohereForCausalLM", GROUPED | {"logit_scale": 0.25}),
    "granite": Family(
        "GraniteForCausalLM",
        GROUPED
        | {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
        },
    ),
    "bert": Family(
        "BertModel",
        inputs=(*TOKENS, "token_type_ids"),
        output="last_hidden_state",
        arguments={"add_pooling_layer": False},
    ),
    "roberta": Family("RobertaForMaskedLM", {"pad_token_id": 1}),
    "distilbert": Family("DistilBertForMaskedLM"),
    # ALBERT projects embeddings also if they are as wide as hidden; ELECTRA does not.
    "albert": Family("AlbertForMaskedLM", distinct={"embedding_size": 32}, collide={"embedding_size": 96}),
    "electra": Family(
        "ElectraModel",
        distinct={"embedding_size": 32},
        collide={"embedding_size": 48},
        output="last_hidden_state",
    ),
    # Positions are the patches and a class token: 4 * 4 + 1, and 5 * 19 + 1 to make 96.
    "vit": Family(
        "ViTForImageClassification",
        distinct={"heads": 4, "image_size": 32, "patch_size": 8, "num_labels": 11},
        collide={"image_size": (20, 76), "patch_size": 4, "num_labels": 96},
        inputs=("pixel_values",),
    ),
    "gpt_neo": Family("GPTNeoForCausalLM", {"attention_types": [[["global", "local"], 1]], "window_size": 3}),
    # Eight heads stand in four shards of two.
    "codegen": Family("CodeGenForCausalLM", {"rotary_dim": 4, "heads": 8}),
    "smollm3": Family("SmolLM3ForCausalLM", GROUPED | {"no_rope_layers": [1, 0]}),
    "nemotron": Family("NemotronForCausalLM", GROUPED | {"head_dim": 12}),
    "mamba": Family(
        "MambaForCausalLM",
        {"state_size": 5, "time_step_rank": 7, "conv_kernel": 3, "ffn": 96},
        inputs=("input_ids",),
        sizings=("distinct",),
    ),
    "modernbert": Family(
        "ModernBertForMaskedLM", {"local_attention": 4, "layer_types": ["full_attention", "sliding_attention"]}
    ),
    "deberta": Family("DebertaModel", DISENTANGLED, output="last_hidden_state", sizings=("distinct",)),
    "deberta_v2": Family(
        "DebertaV2Model",
        DISENTANGLED | {"position_buckets": 4, "norm_rel_ebd": "layer_norm", "share_att_key": True},
        output="last_hidden_state",
        sizings=("distinct",),
    ),
    "bart": Family("BartForConditionalGeneration", inputs=SEQUENCES),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        {"num_mel_bins": 14, "max_source_positions": 15, "decoder_start_token_id": 1},
        inputs=("input_features", "decoder_input_ids"),
        sizings=("distinct",),
    ),
    "clip_text": Family(
        "CLIPTextModelWithProjection", {"projection_dim": 28}, output="text_embeds", sizings=("distinct",)
    ),
    "clip_vision": Family(
        "CLIPVisionModelWithProjection",
        {"projection_dim": 28, "image_size": 32, "patch_size": 8, "heads": 4},
        inputs=("pixel_values",),
        output="image_embeds",
        sizings=("distinct",),
    ),
    "convnext": Family(
        "ConvNextForImageClassification",
        {"hidden_sizes": [24, 40], "depths": [2, 2], "num_stages": 2, "image_size": 32, "num_labels": 11}
        | {"layer_scale_init_value": 1.0},
        inputs=("pixel_values",),
        sizings=("distinct",),
    ),
    "resnet": Family(
        "ResNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [24, 40], "depths": [2, 2], "num_labels": 11},
        inputs=("pixel_values",),
        sizings=("distinct",),
    ),
    "t5": Family("T5ForConditionalGeneration", RELATIVE, inputs=SEQUENCES, sizings=()),
    "flan_t5": Family(
        "T5ForConditionalGeneration",
        RELATIVE | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        inputs=SEQUENCES,
        sizings=(),
    ),
    "swin": Family(
        "SwinForImageClassification",
        {"embed_dim": 24, "depths": [2, 1], "heads": [2, 4], "window_size": 2, "image_size": 32, "patch_size": 4}
        | {"num_labels": 11, "hidden": None, "layers": None},
        inputs=("pixel_values",),
        sizings=(),
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        {"moe_intermediate_size": 20, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 3}
        | {"kv_lora_rank": 18, "q_lora_rank": 22, "qk_rope_head_dim": 4, "v_head_dim": 10, "qk_nope_head_dim": 6}
        | {"first_k_dense_replace": 1, "head_dim": 4},
        sizings=(),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        GROUPED | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "head_dim": 10},
        sizings=(),
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        GROUPED
        | {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 10, "sliding_window": 3}
        | {"layer_types": ["sliding_attention", "full_attention"]},
        sizings=(),
    ),
}
