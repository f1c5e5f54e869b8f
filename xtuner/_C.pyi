"""Compiled kernels. Outputs are allocated by the caller; shapes: T tokens, K experts per token, E experts, R rows.

Data tensors are float32 or bfloat16, contiguous and on one device; anything else raises Error naming the argument.
num_threads bounds the CPU threads used and never changes the result.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

class Error(ValueError): ...

def init_exchange(tensor_type: type, use_table: bool = True) -> None:
    """Call once with torch.Tensor. use_table=False reads tensors through __dlpack__ capsules, as on an older torch."""

def build_info() -> dict[str, Any]:
    """version, compiler, backends {cpu, cuda, ascend: bool}, isa (in use), isas (usable here, slowest first)."""

def watch_faults(word: Tensor) -> None:
    """Kernels of the GPU that holds `word` (int64[1], -1) note bad values there from now on; never free it."""

def describe_fault(word: int) -> str:
    """What a word other than -1 says."""

def force_isa(name: str | None) -> None:
    """For tests: run CPU kernels with one of build_info()["isas"]; None for the best one again."""

def keep_freed_memory() -> bool:
    """From now on large freed blocks of host memory are reused by this process, not returned; False without glibc."""

def route_map(
    topk_idx: Tensor,
    align: int,
    counts: Tensor,
    offsets: Tensor,
    row_of: Tensor,
    src: Tensor,
    num_threads: int,
    workspace: Tensor | None = None,
) -> None:
    """topk_idx i32|i64[T,K] (-1 drops) -> counts i32[E], offsets i64[E+1], row_of i32[T,K], src i32[R]."""

def route_map_workspace_size(topk_idx: Tensor, num_experts: int) -> int:
    """int32 values that route_map needs as workspace on the device of topk_idx; 0 on the CPU."""

topk_softmax_block_tokens: int

def topk_softmax(
    logits: Tensor,
    choice_bias: Tensor | None,
    topk_idx: Tensor | None,
    normalise: bool,
    weights: Tensor,
    idx: Tensor,
    probs: Tensor,
    logsumexp: Tensor,
    counts: Tensor,
    prob_sum: Tensor,
    z_sum: Tensor,
    entropy_sum: Tensor,
    workspace: Tensor,
    num_threads: int,
) -> None:
    """Routing from logits f32[T,E]: outputs are f32 but idx i64[T,K]; workspace f32 [ceil(T / block_tokens), 2E+2]."""

def topk_softmax_bwd(
    dweights: Tensor | None,
    dprob_sum: Tensor | None,
    dz_sum: Tensor | None,
    probs: Tensor,
    logsumexp: Tensor,
    idx: Tensor,
    normalise: bool,
    dlogits: Tensor,
    num_threads: int,
) -> None:
    """Gradient of topk_softmax into dlogits f32[T,E]."""

def permute(x: Tensor, row_of: Tensor, src: Tensor, out: Tensor, num_threads: int) -> None:
    """out[row_of[t,k]] = x[t], zero where src[r] == -1; row_of and src are each other's inverse."""

def unpermute(y: Tensor, row_of: Tensor, probs: Tensor | None, out: Tensor, num_threads: int) -> None:
    """out[t] = sum_k probs[t,k] * y[row_of[t,k]] in fp32 and k order; probs f32[T,K]."""

def unpermute_bwd(
    dout: Tensor,
    y: Tensor | None,
    src: Tensor,
    row_of: Tensor,
    probs: Tensor | None,
    dy: Tensor,
    dprobs: Tensor | None,
    num_threads: int,
) -> None:
    """Gradients of unpermute into dy[R,H] and, if wanted (needs y), dprobs f32[T,K]."""

def gemm_m_grouped(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    trans_b: bool,
    *,
    bias: Tensor | None = None,
    src: Tensor | None = None,
    num_experts_per_tok: int = 1,
    act: Tensor | None = None,
    alpha: float = 1.0,
    limit: float | None = None,
    up_offset: float = 0.0,
    accumulate: bool = False,
    out: Tensor,
    num_threads: int,
) -> None:
    """Per expert out = a @ b (b[E,Kd,N]), or a @ b.T (b[E,N,Kd]) with trans_b; rows >= offsets[E] become zero.

    bias [E,N] is added; with src, row r of a is a[src[r] // num_experts_per_tok]; act[R,N/2] becomes swiglu(out);
    accumulate adds to out, whose unused rows then stay as they are.
    """

def gemm_m_grouped_dswiglu(
    dy: Tensor,
    b: Tensor,
    offsets: Tensor,
    x: Tensor,
    *,
    weights: Tensor | None = None,
    alpha: float = 1.0,
    limit: float | None = None,
    up_offset: float = 0.0,
    dx: Tensor,
    act: Tensor,
    dweights: Tensor | None = None,
    workspace: Tensor | None = None,
    num_threads: int,
) -> None:
    """With g = dy @ b per expert (b[E,D,I]): dx[R,2I] = gradient of swiglu(x) for weights * g, act[R,I] =
    weights * swiglu(x), dweights f32[R] = <g, swiglu(x)>. weights f32[R], dweights, workspace come together or not."""

def gemm_m_grouped_dswiglu_workspace_size(x: Tensor) -> int:
    """float32 values of workspace on the device of x."""

def gemm_k_grouped(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    beta: float,
    *,
    src: Tensor | None = None,
    num_experts_per_tok: int = 1,
    out: Tensor,
    num_threads: int,
) -> None:
    """Per expert out[e] = beta * out[e] + a_e.T @ b_e; beta is 0 or 1; src maps rows of b as in gemm_m_grouped."""

def cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor, gradient: bool, losses: Tensor, num_threads: int
) -> None:
    """losses f32[T] = weights * cross-entropy of logits[T,V]; gradient: logits become the gradient of their sum."""

rms_norm_block_rows: int

def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, inverse_rms: Tensor, num_threads: int) -> None:
    """out[R,D] = x * inverse_rms * weight; inverse_rms f32[R] = 1 / sqrt(mean(x^2) + eps)."""

def rms_norm_bwd(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    inverse_rms: Tensor,
    dx: Tensor,
    dweight: Tensor,
    workspace: Tensor,
    num_threads: int,
) -> None:
    """Gradients of rms_norm; workspace f32 [ceil(R / rms_norm_block_rows), D]."""

def rms_norm_rotary(
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    out: Tensor,
    inverse_rms: Tensor,
    num_threads: int,
) -> None:
    """rotary of rms_norm of each head of x[T,H,D]; inverse_rms f32 [T,H]."""

def rms_norm_rotary_bwd(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    inverse_rms: Tensor,
    dx: Tensor,
    dweight: Tensor,
    workspace: Tensor,
    num_threads: int,
) -> None:
    """Gradients of rms_norm_rotary; workspace f32 [ceil(T * H / rms_norm_block_rows), D]."""

def rotary(x: Tensor, cos: Tensor, sin: Tensor, back: bool, out: Tensor, num_threads: int) -> None:
    """x[T,H,D] turned by the angles of cos, sin [T,D/2], feature i with i + D/2; back turns the other way."""

def swiglu(
    x: Tensor,
    offsets: Tensor | None,
    alpha: float,
    limit: float | None,
    up_offset: float,
    out: Tensor,
    num_threads: int,
) -> None:
    """out[R,I] = gate * sigmoid(alpha * gate) * (up + up_offset) with gate, up = x[R,2I] halves, clamped by limit."""

def swiglu_bwd(
    dout: Tensor,
    x: Tensor,
    offsets: Tensor | None,
    alpha: float,
    limit: float | None,
    up_offset: float,
    dx: Tensor,
    num_threads: int,
) -> None:
    """Gradient of swiglu into dx[R,2I]."""

def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    causal: bool,
    out: Tensor,
    lse: Tensor,
    num_threads: int,
) -> None:
    """Per document out = softmax(q k^T * scale) v; q, k, v contiguous in the last dim only; lse f32[Hq,Tq]."""

def attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    causal: bool,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    num_threads: int,
) -> None:
    """Gradients of attention into dq, dk and dv."""

def quantize_1x128(
    x: Tensor,
    offsets: Tensor | None,
    power_of_two: bool,
    eps: float,
    q: Tensor,
    scale: Tensor,
    num_threads: int,
) -> None:
    """q float8 [R,H] and scale f32[H/128, R rounded up to 4] of x[R,H]: one scale per row and 128 columns."""

def quantize_128x128(
    w: Tensor, power_of_two: bool, eps: float, q: Tensor, qt: Tensor, scale: Tensor, num_threads: int
) -> None:
    """q float8 [E,N,K], its transpose qt[E,K,N] and scale f32[E,N/128,K/128] of w[E,N,K]."""

def quantize_rowcol(
    x: Tensor,
    offsets: Tensor,
    power_of_two: bool,
    eps: float,
    q: Tensor,
    scale: Tensor,
    qt: Tensor,
    scale_t: Tensor,
    num_threads: int,
) -> None:
    """As quantize_1x128, and qt[H,P] with scale_t f32[P/128,H]: transposed, every expert padded to 128 columns."""

def permute_quantize_rowcol(
    x: Tensor,
    src: Tensor,
    num_experts_per_tok: int,
    offsets: Tensor,
    power_of_two: bool,
    eps: float,
    q: Tensor,
    scale: Tensor,
    qt: Tensor,
    scale_t: Tensor,
    num_threads: int,
) -> None:
    """quantize_rowcol of the rows that permute gathers from x[T,H] by src i32[R]."""

def swiglu_quantize_rowcol(
    x: Tensor,
    offsets: Tensor,
    alpha: float,
    limit: float | None,
    up_offset: float,
    power_of_two: bool,
    eps: float,
    q: Tensor,
    scale: Tensor,
    qt: Tensor,
    scale_t: Tensor,
    num_threads: int,
) -> None:
    """quantize_rowcol of swiglu(x[R,2H])."""

def dequantize(q: Tensor, scale: Tensor, out: Tensor, num_threads: int) -> None:
    """out = q * scale for q[R,H] with row scales or q[E,N,K] with block scales."""

signal_bytes: int

class Peers:
    """Where the memory of each rank is, as this rank sees it. memory: the address of each rank's signal page of
    signal_bytes zeros, behind which are two index areas and the data area."""

    def __init__(
        self, rank: int, memory: Sequence[int], index_bytes: int, data_bytes: int, timeout_s: float
    ) -> None: ...

class SharedMemory:
    """One rank's share of a group's memory and its view of the others'. Making one is collective: every rank calls
    all_gather twice. data_bytes bounds what a rank shares at a time; it is taken from the machine only when used."""

    def __init__(
        self, rank: int, world: int, data_bytes: int, timeout_s: float, all_gather: Callable[[bytes], Sequence[bytes]]
    ) -> None: ...
    @property
    def allocated(self) -> int:
        """Bytes of live pieces, and of dead ones that other ranks may still be reading."""

    @property
    def reached(self) -> int:
        """Bytes that pieces have ever been taken from: what the share has cost the machine."""

    @property
    def peers(self) -> Peers: ...
    def owns(self, tensor: Tensor) -> bool:
        """Whether the other ranks reach this tensor where it is."""

class SharedPiece:
    """num_bytes of this rank's share as a writable buffer, given back when it is deleted."""

    def __init__(self, memory: SharedMemory, num_bytes: int) -> None: ...

def ep_prepare(
    topk_idx: Tensor,
    capacity: int | None,
    peers: Peers,
    counts: Tensor,
    dest: Tensor,
    offsets: Tensor,
    num_threads: int,
    workspace: Tensor | None = None,
) -> None:
    """topk_idx i32|i64[T,K] -> counts i32[W,E], dest i32[T,K,2], offsets i64[E/W+1]. Drops rows from capacity on."""

def ep_prepare_workspace_size(topk_idx: Tensor, num_experts: int) -> int:
    """int32 values of workspace that ep_prepare needs on the device of topk_idx; 0 on the CPU."""

def ep_dispatch(
    x: Tensor,
    scales: Tensor | None,
    counts: Tensor,
    dest: Tensor,
    peers: Peers,
    out: Tensor,
    out_scales: Tensor | None,
    num_threads: int,
) -> None:
    """Rows of x[T,H] (and columns of scales f32[S,ld]) to out[R,H] of their experts' ranks, all of it owned memory."""

def ep_combine(
    y: Tensor,
    counts: Tensor,
    dest: Tensor,
    peers: Peers,
    probs: Tensor | None,
    out: Tensor,
    num_threads: int,
) -> None:
    """out[t] = sum_k probs[t,k] * (row dest[t,k,1] of rank dest[t,k,0]) in fp32 and k order; y[R,H] is owned memory."""

def ep_combine_bwd(
    dout: Tensor,
    y: Tensor,
    counts: Tensor,
    dest: Tensor,
    peers: Peers,
    probs: Tensor,
    dy: Tensor,
    dprobs: Tensor,
    num_threads: int,
) -> None:
    """Gradients of ep_combine into dy[R,H] and dprobs f32[T,K]; y and dy are owned memory."""

def gemm_m_grouped_fp8(
    a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, offsets: Tensor, out: Tensor, num_threads: int
) -> None:
    """Per expert out = a @ b.T, float8 a[R,K], b[E,N,K] with scales f32[K/128,ld], [E,N/128,K/128] per 128 k."""

def gemm_k_grouped_fp8(
    a: Tensor,
    scale_a: Tensor,
    b: Tensor,
    scale_b: Tensor,
    offsets: Tensor,
    beta: float,
    out: Tensor,
    num_threads: int,
) -> None:
    """Per expert out[e] = beta * out[e] + a_e @ b_e.T for float8 a[M,P], b[N,P] with scales f32[P/128,M], [P/128,N]."""
