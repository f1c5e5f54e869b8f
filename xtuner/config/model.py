"""The architecture of a language model, as numbers. Weights and their file names are the business of `models`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from xtuner.config.base import ConfigBase


class RopeConfig(ConfigBase):
    theta: float = Field(10_000.0, gt=0, description="base of the rotary frequencies")
    type: Literal["default", "linear", "llama3", "yarn"] = Field("default", description="how frequencies are scaled")
    factor: float = Field(1.0, gt=0, description="context extension factor (linear, llama3, yarn)")
    low_freq_factor: float = Field(1.0, gt=0, description="llama3: wavelengths above context/this are fully scaled")
    high_freq_factor: float = Field(4.0, gt=0, description="llama3: wavelengths below context/this are kept")
    original_max_position_embeddings: int = Field(
        8192, gt=0, description="llama3, yarn: context of pre-training, in tokens"
    )
    beta_fast: float = Field(32.0, gt=0, description="yarn: features that turn more often than this are kept")
    beta_slow: float = Field(1.0, gt=0, description="yarn: features that turn less often than this are fully scaled")
    mscale: float = Field(0.0, ge=0, description="yarn: growth of rotated features with log(factor); 0: by default")
    mscale_all_dim: float = Field(0.0, ge=0, description="yarn: growth of attention's logits with log(factor)")


class MoEConfig(ConfigBase):
    num_experts: int = Field(gt=0, description="experts per MoE layer")
    num_experts_per_tok: int = Field(gt=0, description="experts each token visits (top-k)")
    moe_intermediate_size: int = Field(gt=0, description="hidden width of one expert")
    norm_topk_prob: bool = Field(True, description="rescale the chosen experts' weights to sum to one")
    choice_bias: bool = Field(
        False, description="a bias per expert, added to the scores for the choice only; see loss.bias_update_rate"
    )

    scoring: Literal["softmax", "sigmoid"] = Field("softmax", description="from router logits to experts' scores")
    num_groups: int = Field(1, gt=0, description="sigmoid: groups of experts, of which topk_groups are left to choose")
    topk_groups: int = Field(1, gt=0, description="sigmoid: groups a token's experts may come from")
    routed_scaling_factor: float = Field(1.0, gt=0, description="sigmoid: factor on the chosen experts' weights")
    num_shared_experts: int = Field(0, ge=0, description="experts that every token visits, beside the chosen ones")

    @model_validator(mode="after")
    def _check(self):
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds num_experts={self.num_experts}"
            )
        if self.scoring == "softmax" and (self.num_groups > 1 or self.routed_scaling_factor != 1.0):
            raise ValueError("num_groups and routed_scaling_factor need scoring=sigmoid")
        if self.num_experts % self.num_groups:
            raise ValueError(f"num_experts={self.num_experts} is not divisible by num_groups={self.num_groups}")
        left = self.num_experts // self.num_groups * self.topk_groups
        if self.topk_groups > self.num_groups or self.num_experts_per_tok > left:
            raise ValueError(
                f"topk_groups={self.topk_groups} of num_groups={self.num_groups} leave {left} of the "
                f"{self.num_experts} experts to choose {self.num_experts_per_tok} from"
            )
        return self


class MLAConfig(ConfigBase):
    """Multi-head latent attention; `head_dim` of the model is then qk_rope_head_dim."""

    q_lora_rank: int | None = Field(None, gt=0, description="width of the queries' latent; None: made directly")
    kv_lora_rank: int = Field(gt=0, description="width of the latent that keys and values are made of")
    qk_nope_head_dim: int = Field(gt=0, description="features of a query or key head without position")
    qk_rope_head_dim: int = Field(gt=0, description="rotated features of a query or key head")
    v_head_dim: int = Field(gt=0, description="width of a value head")


class ModelConfig(ConfigBase):
    """A decoder-only transformer: GQA attention, SwiGLU feed-forward or mixture of experts, RMSNorm, RoPE."""

    family: Literal["qwen3", "qwen3_moe", "llama", "deepseek_v3"] = Field(
        description="which models/<family>.py describes it"
    )
    vocab_size: int = Field(gt=0, description="rows of the embedding")
    hidden_size: int = Field(gt=0, description="width of the residual stream")
    intermediate_size: int = Field(gt=0, description="hidden width of a dense feed-forward layer")
    num_hidden_layers: int = Field(gt=0, description="number of blocks")
    num_attention_heads: int = Field(gt=0, description="query heads")
    num_key_value_heads: int = Field(gt=0, description="key/value heads (GQA when fewer than query heads)")
    head_dim: int = Field(gt=0, description="width of one head; need not be hidden_size / heads")
    rms_norm_eps: float = Field(1e-6, gt=0, description="epsilon of every RMSNorm")
    rope: RopeConfig = Field(RopeConfig(), description="rotary position embedding")
    tie_word_embeddings: bool = Field(False, description="the output head shares the embedding's weight")
    attention_bias: bool = Field(False, description="biases on the q, k, v and o projections")
    max_position_embeddings: int = Field(32768, gt=0, description="longest context promised, in tokens")
    initializer_range: float = Field(0.02, gt=0, description="standard deviation of fresh weights")
    moe: MoEConfig | None = Field(None, description="mixture of experts; None for a dense model")
    mla: MLAConfig | None = Field(None, description="latent attention; None for grouped-query attention")
    dense_layers: tuple[int, ...] = Field((), description="indices of layers that stay dense in an MoE model")
    bos_token_id: int | None = Field(None, description="written to the exported config.json")
    eos_token_id: int | list[int] | None = Field(None, description="ends generation; written to config.json")
    pad_token_id: int | None = Field(None, description="written to the exported config.json")

    @property
    def qk_norm(self) -> bool:
        """Whether each query and key head is normalised before rotary embedding."""
        return self.family in ("qwen3", "qwen3_moe")

    def is_moe_layer(self, layer: int) -> bool:
        return self.moe is not None and layer not in self.dense_layers

    @model_validator(mode="after")
    def _check(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary embedding")
        if (self.moe is not None) != (self.family in ("qwen3_moe", "deepseek_v3")):
            raise ValueError(f"family={self.family} {'needs' if self.moe is None else 'takes no'} moe section")
        wrong = [i for i in self.dense_layers if not 0 <= i < self.num_hidden_layers]
        if wrong or (self.dense_layers and self.moe is None):
            raise ValueError(
                f"dense_layers={self.dense_layers} must name layers 0…{self.num_hidden_layers - 1} of an MoE model"
            )
        if (self.mla is not None) != (self.family == "deepseek_v3"):
            raise ValueError(f"family={self.family} {'needs an' if self.mla is None else 'takes no'} mla section")
        if self.mla is not None and self.head_dim != self.mla.qk_rope_head_dim:
            raise ValueError(f"head_dim={self.head_dim} must equal mla.qk_rope_head_dim={self.mla.qk_rope_head_dim}")
        return self
