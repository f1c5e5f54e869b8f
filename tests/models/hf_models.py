"""Small random transformers models, and ours with the same weights."""

from __future__ import annotations

import torch
import transformers

from xtuner.models import build_model, config_from_hf, hf_map

FAMILIES = {
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "deepseek_v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
}
BASE = dict(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=256, use_cache=False, initializer_range=0.1,
)  # fmt: skip
MOE = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True, decoder_sparse_step=1)

DEEPSEEK = dict(
    num_key_value_heads=4, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=24,
    q_lora_rank=20, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=16, n_group=4, topk_group=2,
    first_k_dense_replace=1, routed_scaling_factor=2.5, norm_topk_prob=True, num_hidden_layers=3,
    num_nextn_predict_layers=0, head_dim=8,
)  # fmt: skip

# At least five shapes a family; each says what is special about it.
SHAPES = {
    "qwen3": {
        "gqa2": {},
        "mha": dict(num_key_value_heads=4),
        "mqa, tied": dict(num_key_value_heads=1, tie_word_embeddings=True),
        "head_dim != hidden/heads": dict(head_dim=32, num_attention_heads=6, num_key_value_heads=3),
        "bias, theta 1e6": dict(attention_bias=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    },
    "llama": {
        "gqa2": {},
        "mha": dict(num_key_value_heads=4),
        "9/3 heads, tied": dict(
            hidden_size=72, num_attention_heads=9, num_key_value_heads=3, head_dim=8, tie_word_embeddings=True
        ),
        "llama3 rope": dict(
            rope_parameters={
                "rope_type": "llama3", "rope_theta": 5e3, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            }
        ),
        "linear rope, eps": dict(
            rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, rms_norm_eps=1e-3
        ),
        "bias": dict(attention_bias=True),
    },
    "deepseek_v3": {
        "grouped": {},
        "direct queries, two shared experts": dict(q_lora_rank=None, n_shared_experts=2),
        "one group, raw weights, no dense layer": dict(
            n_group=1, topk_group=1, norm_topk_prob=False, first_k_dense_replace=0
        ),
        "yarn": dict(
            rope_parameters={
                "rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 64,
                "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
            }
        ),
        "yarn, other mscale": dict(
            rope_parameters={
                "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32,
                "mscale": 0.7, "mscale_all_dim": 1.2,
            }
        ),
        "biases, theta 5e4, values wider than keys without position": dict(
            attention_bias=True, qk_nope_head_dim=8, v_head_dim=16,
            rope_parameters={"rope_type": "default", "rope_theta": 5e4},
        ),
    },
    "qwen3_moe": {
        "6 experts top-2": {},
        "7 experts top-3, raw weights": dict(num_experts=7, num_experts_per_tok=3, norm_topk_prob=False),
        "dense first layer, tied": dict(mlp_only_layers=[0], tie_word_embeddings=True),
        "head_dim != hidden/heads": dict(head_dim=32, num_attention_heads=6, num_key_value_heads=1),
        "64 experts, most idle": dict(num_experts=64, num_experts_per_tok=1),
        "sparse step 2": dict(num_hidden_layers=4, decoder_sparse_step=2),
    },
}  # fmt: skip
CASES = [(family, shape) for family, shapes in SHAPES.items() for shape in shapes]


def make_hf(family: str, shape: str, seed: int = 0):
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(seed)
    fields = BASE | {"qwen3_moe": MOE, "deepseek_v3": DEEPSEEK}.get(family, {}) | SHAPES[family][shape]
    model = model_class(config_class(**fields)).float()
    with torch.no_grad():  # norms of one would hide a norm applied to the wrong place
        for name, param in model.named_parameters():
            if "norm" in name:
                param.uniform_(0.5, 1.5)
        for name, buffer in model.named_buffers():  # nor would biases of zero show
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.3)
    return model.train()


def split_experts(state: dict) -> dict:
    """transformers keeps experts fused in memory; on disk, and in our map, they are apart."""
    out = {}
    for name, tensor in state.items():
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(tensor):
                gate, up = both.chunk(2)
                prefix = name.replace("gate_up_proj", f"{e}.")
                out |= {f"{prefix}gate_proj.weight": gate, f"{prefix}up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(tensor):
                out[name.replace("down_proj", f"{e}.down_proj.weight")] = down
        else:
            out[name] = tensor
    return out


def make_ours(hf_model):
    """Our decoder with the weights of `hf_model`."""
    cfg = config_from_hf(hf_model.config.to_dict())
    model, tensors = build_model(cfg), split_experts(hf_model.state_dict())
    with torch.no_grad():
        for name, param in (*model.named_parameters(), *model.named_buffers()):
            for hf_name, start, rows in hf_map(cfg)[name]:
                param[start : start + rows] = tensors[hf_name]
    return model


def stacked(name_map: dict, name: str, tensors: dict):
    """The checkpoint tensors (here: gradients) that make up our parameter `name`."""
    return torch.cat([tensors[hf_name] for hf_name, *_ in name_map[name]])
