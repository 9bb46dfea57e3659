"""A tiny random model of each kind of mixture, and of other architectures, by transformers' ``model_type``."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import VOCAB
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# Of these a config gets what it has.
_NAMES = {
    0: "pad_token_id num_kv_shared_layers",
    1: "bos_token_id n_shared_experts zero_expert_num n_group topk_group expert_layer_offset attn_layer_offset "
    "n_groups mamba_n_groups first_k_dense_replace num_dense_layers moe_layer_start_index",
    2: "eos_token_id num_hidden_layers num_layers n_layers num_key_value_heads num_experts_per_tok expert_layer_period "
    "num_experts_per_token top_k moe_k moe_topk o_groups index_n_heads linear_num_key_heads mamba_expand "
    "attn_layer_period",
    4: "num_attention_heads n_heads num_experts num_local_experts n_routed_experts moe_num_experts index_topk "
    "linear_num_value_heads mamba_n_heads",
    8: "sliding_window mamba_d_state mamba_num_heads ssm_state_size mamba_dt_rank laurel_rank",
    16: "head_dim kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim o_lora_rank linear_key_head_dim "
    "linear_value_head_dim mamba_head_dim hidden_size_per_layer_input",
    32: "moe_intermediate_size moe_intermediate_dim expert_ffn_hidden_size shared_expert_intermediate_size "
    "moe_shared_expert_intermediate_size shared_intermediate_size q_lora_rank qk_head_dim index_head_dim mamba_d_head "
    "pronunciation_vocab_size shape_vocab_size",
    64: "hidden_size d_model",
    96: "intermediate_size ffn_hidden_size",
    VOCAB: "vocab_size vocab_size_per_layer_input max_position_embeddings",
}
SIZES: dict[str, Any] = {name: size for size, names in _NAMES.items() for name in names.split()}
SIZES["mlp_only_layers"] = [0]
_LATENT = (
    "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 dots3_note_text glm4_moe_lite glm_moe_dsa longcat_flash sarvam_mla"
)
OTHERS: dict[str, dict[str, Any]] = {
    **{kind: {"num_key_value_heads": 4} for kind in _LATENT.split()},
    "qwen3_next": {"layer_types": ["full_attention", "linear_attention"]},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
}

# Every layout of experts, and every way in which the files of a mixture are read.
MIXTURES = "qwen2_moe qwen3_moe qwen3_next deepseek_v3 glm4_moe mixtral gpt_oss llama4_text"
MORE_MIXTURES = (
    "afmoe aria_text axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_v2 deepseek_v32 deepseek_v4 doge dots1 "
    "dots3_note_text ernie4_5_moe exaone_moe flex_olmo flint glm4_moe_lite glm_moe_dsa granitemoe granitemoe_swa "
    "granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 inkling2_loop_text inkling2_text inkling_text jamba "
    "jetmoe kimi_linear kolibri1 lara_mini lfm2_moe longcat_flash mellum mimo_v2_flash minimax minimax_m2 "
    "minimax_m3_vl_text nemotron_h olmoe phimoe qwen3_5_moe_text qwen4_exp_text sarvam_mla sarvam_moe solar_open zaya"
)


def known(kinds: str) -> list[str]:
    """Those that the installed transformers has."""
    return [kind for kind in kinds.split() if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]


def make(kind: str, **changes: Any) -> PreTrainedModel:
    """A causal LM of that model_type, fp32, without zeros and undefined numbers, so that nothing is lost unseen."""
    made = CONFIG_MAPPING[kind]
    names = {*dir(made), *made().to_dict()}
    names -= {name for name in names if isinstance(getattr(made, name, None), property)}
    sizes = {name: value for name, value in SIZES.items() if name in names}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made(**{**sizes, "use_cache": False, **OTHERS.get(kind, {}), **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_constant = parameter.min() == parameter.max() and "norm" not in name
            if is_constant or not parameter.any() or not parameter.isfinite().all():
                parameter.normal_(0, 0.02)
    return model.float().eval()
