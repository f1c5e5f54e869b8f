#pragma once
#include "xtuner/stream.h"
#include "xtuner/tensor.h"

namespace xt {

// softmax(q k^T * scale) v within each document of a packed sequence. Softmax and all sums are in fp32.
//   q       f32 | bf16 [Tq, Hq, D]   q, k and v may be strided, but are contiguous along D (parts of a fused projection)
//   k       as q [Tk, Hkv, D]        query head h looks at key head h / (Hq / Hkv); Hq is a multiple of Hkv > 0
//   v       as q [Tk, Hkv, Dv]       0 < Dv <= D
//   cu_q    i32 [S+1]                document s has queries cu_q[s] .. cu_q[s+1] - 1; from 0 to Tq
//   cu_k    i32 [S+1]                and keys cu_k[s] .. cu_k[s+1] - 1; from 0 to Tk
//   causal                           query i of a document's n sees all keys but its last n - 1 - i: the queries are the
//                                    document's last tokens, and it needs at least as many keys
//   out     as q [Tq, Hq, Dv]        zero for a query without keys
//   lse     f32 [Hq, Tq]             log of the sum of exp of the scores, for attention_bwd; -inf without keys
void attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q, const Tensor& cu_k, double scale,
               bool causal, const Tensor& out, const Tensor& lse, Stream stream);

// Gradient of attention; out and lse are what it gave. Zero for queries without keys and keys without queries.
//   dout    as q [Tq, Hq, Dv]
//   dq, dk, dv   contiguous, shaped as q, k and v
void attention_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                   const Tensor& lse, const Tensor& cu_q, const Tensor& cu_k, double scale, bool causal,
                   const Tensor& dq, const Tensor& dk, const Tensor& dv, Stream stream);

}  // namespace xt
