#include "xtuner/ops/ep_dispatch.h"

#include "cpu/cpu.h"
#include "cpu/ep.h"
#include "cpu/kernels.h"

namespace xt::cpu {
namespace {

// Token by token, so that each is read once, straight into the rows of its experts. A row that is stored once for each
// of a token's experts on a rank costs less, in memory that all share, than one stored once there and copied on.
void send(const RouteView& route, const Tensor& x, bool stream, const PeerTensor& out, FirstBad& bad, int num_threads) {
  const Kernels& isa = kernels();
  const int64_t bytes = row_bytes(x);
  parallel_ranges(num_threads, route.num_tokens, rows_per_task(bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * route.num_choices; i < end * route.num_choices; ++i) {
      const int p = route.dest[2 * i];
      const int64_t row = route.dest[2 * i + 1];
      if (p == -1) continue;
      if (!out.holds(p, row)) return bad.report(i);
      isa.copy_row(stream, x.ptr<char>() + i / route.num_choices * bytes, out.data(p) + row * bytes, bytes);
    }
    isa.fence();
  });
}

// The scales of quantized rows: a column for each token, and for each row.
void send_scales(const RouteView& route, const Tensor& scales, const PeerTensor& out, int num_threads) {
  const int64_t count = scales.shape[0], step = scales.shape[1];
  parallel_ranges(num_threads, route.num_tokens, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * route.num_choices; i < end * route.num_choices; ++i) {
      const int p = route.dest[2 * i];
      if (p < 0) continue;
      const float* from = scales.ptr<float>() + i / route.num_choices;
      float* to = reinterpret_cast<float*>(out.data(p)) + route.dest[2 * i + 1];
      for (int64_t s = 0; s < count; ++s) to[s * out.size(p, 1)] = from[s * step];
    }
  });
}

}  // namespace

void ep_dispatch(const Tensor& x, const Tensor* scales, const EpRoute& map, const Peers& peers, const Tensor& out,
                 const Tensor* out_scales, int num_threads) {
  const RouteView route("ep_dispatch", map, peers);
  const Exchange begin(EpOp::dispatch, peers, &map.counts);
  PeerTensor::show(begin, peers, 0, out);
  if (scales) PeerTensor::show(begin, peers, 1, *out_scales);
  begin.meet();
  const PeerTensor rows(begin, peers, 0);

  FirstBad bad;
  send(route, x, route.worth_streaming(out), rows, bad, num_threads);
  if (bad.any()) route.fail_at(bad.at());
  const int64_t used = route.rows_used(out);
  zero_rows(out, used, out.shape[0], num_threads);
  if (scales) {
    send_scales(route, *scales, PeerTensor(begin, peers, 1), num_threads);
    float* of_rows = out_scales->ptr<float>();
    const int64_t step = out_scales->shape[1];
    for (int64_t s = 0; s < scales->shape[0]; ++s) std::fill(of_rows + s * step + used, of_rows + (s + 1) * step, 0.0f);
  }
  const Exchange end(EpOp::dispatch, peers, &map.counts);
  end.meet();
}

}  // namespace xt::cpu
