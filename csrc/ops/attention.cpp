#include "xtuner/ops/attention.h"

#include "cpu/cpu.h"
#include "ops/checks.h"

namespace xt {
namespace {

void check_inputs(ArgChecker& check, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q,
                  const Tensor& cu_k) {
  check.rows("q", q, data_dtypes, {{"Tq"}, {"Hq"}, {"D"}});
  check.rows("k", k, {q.dtype}, {{"Tk"}, {"Hkv"}, {"D", q.shape[2]}});
  check.rows("v", v, {q.dtype}, {{"Tk", k.shape[0]}, {"Hkv", k.shape[1]}, {"Dv"}});
  check.require(q.shape[2] > 0 && v.shape[2] > 0, "q, k and v must have at least one column, got D=", q.shape[2],
                " and Dv=", v.shape[2]);
  check.require(v.shape[2] <= q.shape[2], "v must not be wider than q and k, got Dv=", v.shape[2], " and D=", q.shape[2]);
  check.require(k.shape[1] > 0 && q.shape[1] % k.shape[1] == 0, "q has ", q.shape[1],
                " heads, which is no multiple of k's ", k.shape[1]);
  check.tensor("cu_q", cu_q, {DType::i32}, {{"S+1"}});
  check.require(cu_q.shape[0] > 0, "cu_q must have at least one element, the boundary 0");
  check.tensor("cu_k", cu_k, {DType::i32}, {{"S+1", cu_q.shape[0]}});
}

}  // namespace

void attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q, const Tensor& cu_k, double scale,
               bool causal, const Tensor& out, const Tensor& lse, Stream stream) {
  ArgChecker check("attention");
  check_inputs(check, q, k, v, cu_q, cu_k);
  const Dim tokens = {"Tq", q.shape[0]}, heads = {"Hq", q.shape[1]};
  check.tensor("out", out, {q.dtype}, {tokens, heads, {"Dv", v.shape[2]}});
  check.tensor("lse", lse, {DType::f32}, {heads, tokens});
  switch (check.device().type) {
    case DeviceType::cpu: return cpu::attention(q, k, v, cu_q, cu_k, scale, causal, out, lse, stream.num_threads);
    default: check.no_kernel();
  }
}

void attention_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                   const Tensor& lse, const Tensor& cu_q, const Tensor& cu_k, double scale, bool causal,
                   const Tensor& dq, const Tensor& dk, const Tensor& dv, Stream stream) {
  ArgChecker check("attention_bwd");
  check_inputs(check, q, k, v, cu_q, cu_k);
  const Dim tokens = {"Tq", q.shape[0]}, heads = {"Hq", q.shape[1]}, width = {"D", q.shape[2]};
  const Dim keys = {"Tk", k.shape[0]}, key_heads = {"Hkv", k.shape[1]}, value_width = {"Dv", v.shape[2]};
  check.tensor("dout", dout, {q.dtype}, {tokens, heads, value_width});
  check.tensor("out", out, {q.dtype}, {tokens, heads, value_width});
  check.tensor("lse", lse, {DType::f32}, {heads, tokens});
  check.tensor("dq", dq, {q.dtype}, {tokens, heads, width});
  check.tensor("dk", dk, {q.dtype}, {keys, key_heads, width});
  check.tensor("dv", dv, {q.dtype}, {keys, key_heads, value_width});
  switch (check.device().type) {
    case DeviceType::cpu:
      return cpu::attention_bwd(dout, q, k, v, out, lse, cu_q, cu_k, scale, causal, dq, dk, dv, stream.num_threads);
    default: check.no_kernel();
  }
}

}  // namespace xt
