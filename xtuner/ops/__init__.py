"""Torch operators over the compiled core: `torch.ops.xtuner.<name>`, and plain functions of the same names."""

from xtuner.ops._lib import OpError
from xtuner.ops.attention import attention
from xtuner.ops.chunked_loss import chunked_loss
from xtuner.ops.ep import EpGroup, EpRoute, HostEpGroup
from xtuner.ops.ep_combine import ep_combine
from xtuner.ops.ep_device import DeviceEpGroup
from xtuner.ops.ep_dispatch import ep_dispatch, ep_dispatch_quantized
from xtuner.ops.ep_prepare import ep_prepare
from xtuner.ops.faults import raise_faults, watch_faults
from xtuner.ops.gemm_fp8 import gemm_k_grouped_fp8, gemm_k_grouped_fp8_, gemm_m_grouped_fp8
from xtuner.ops.gemm_k_grouped import gemm_k_grouped, gemm_k_grouped_
from xtuner.ops.gemm_m_grouped import gemm_m_grouped, gemm_m_grouped_swiglu
from xtuner.ops.gemm_m_grouped_dswiglu import gemm_m_grouped_dswiglu
from xtuner.ops.grouped_mlp import grouped_mlp
from xtuner.ops.host import to_device, to_host
from xtuner.ops.linear import linear
from xtuner.ops.linear_cross_entropy import linear_cross_entropy
from xtuner.ops.linear_fp8 import Float8Weight, linear_fp8
from xtuner.ops.linear_qkv import linear_qkv
from xtuner.ops.permute import permute
from xtuner.ops.quantize import (
    dequantize,
    permute_quantize_rowcol,
    quantize_1x128,
    quantize_128x128,
    quantize_rowcol,
    swiglu_quantize_rowcol,
)
from xtuner.ops.rms_norm import rms_norm
from xtuner.ops.rms_norm_rotary import rms_norm_rotary
from xtuner.ops.rotary import rotary
from xtuner.ops.route_map import route_map
from xtuner.ops.swiglu import swiglu
from xtuner.ops.topk_softmax import topk_softmax
from xtuner.ops.unpermute import unpermute

__all__ = [
    "DeviceEpGroup",
    "EpGroup",
    "EpRoute",
    "Float8Weight",
    "HostEpGroup",
    "OpError",
    "attention",
    "chunked_loss",
    "dequantize",
    "ep_combine",
    "ep_dispatch",
    "ep_dispatch_quantized",
    "ep_prepare",
    "gemm_k_grouped",
    "gemm_k_grouped_",
    "gemm_k_grouped_fp8",
    "gemm_k_grouped_fp8_",
    "gemm_m_grouped",
    "gemm_m_grouped_dswiglu",
    "gemm_m_grouped_fp8",
    "gemm_m_grouped_swiglu",
    "grouped_mlp",
    "linear",
    "linear_cross_entropy",
    "linear_fp8",
    "linear_qkv",
    "permute",
    "permute_quantize_rowcol",
    "quantize_1x128",
    "quantize_128x128",
    "quantize_rowcol",
    "raise_faults",
    "rms_norm",
    "rms_norm_rotary",
    "rotary",
    "route_map",
    "swiglu",
    "swiglu_quantize_rowcol",
    "to_device",
    "to_host",
    "topk_softmax",
    "unpermute",
    "watch_faults",
]
