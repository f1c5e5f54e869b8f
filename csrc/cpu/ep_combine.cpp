#include "xtuner/ops/ep_combine.h"

#include "cpu/cache.h"
#include "cpu/cpu.h"
#include "cpu/ep.h"
#include "cpu/kernels.h"

namespace xt::cpu {

void ep_combine(const Tensor& y, const EpRoute& map, const Peers& peers, const Tensor* probs, const Tensor& out,
                int num_threads) {
  const RouteView route("ep_combine", map, peers);
  const Exchange exchange(EpOp::combine, peers, &map.counts);
  PeerTensor::show(exchange, peers, 0, y);
  exchange.meet();
  const PeerTensor rows(exchange, peers, 0);

  UnpermuteRows a = {};
  a.dtype = y.dtype;
  a.hidden = y.shape[1];
  a.num_experts_per_tok = route.num_choices;
  a.probs = probs ? probs->ptr<float>() : nullptr;
  a.out = out.data;
  a.stream = worth_streaming(out);
  a.far = true;
  const PeerTable table = {route.dest, rows.table()};
  const Kernels& isa = kernels();
  FirstBad bad;
  parallel_ranges(num_threads, route.num_tokens, rows_per_copy_task(row_bytes(y) * (route.num_choices + 1)),
                  [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin * route.num_choices; i < end * route.num_choices; ++i) {
                      const int32_t p = route.dest[2 * i];
                      if (p != -1 && !rows.holds(p, route.dest[2 * i + 1])) return bad.report(i);
                    }
                    isa.unpermute_peers(a, table, begin, end);
                  });
  if (bad.any()) route.fail_at(bad.at());
}

void ep_combine_bwd(const Tensor& dout, const Tensor& y, const EpRoute& map, const Peers& peers, const Tensor& probs,
                    const Tensor& dy, const Tensor& dprobs_t, int num_threads) {
  const RouteView route("ep_combine_bwd", map, peers);
  const Exchange begin(EpOp::combine_bwd, peers, &map.counts);
  PeerTensor::show(begin, peers, 0, y);
  PeerTensor::show(begin, peers, 1, dy);
  begin.meet();
  const PeerTensor y_rows(begin, peers, 0), dy_rows(begin, peers, 1);

  const Kernels& isa = kernels();
  const bool stream = route.worth_streaming(dy);
  const int64_t hidden = y.shape[1], bytes = row_bytes(y), k_count = route.num_choices;
  float* dprobs = dprobs_t.ptr<float>();
  FirstBad bad;
  parallel_ranges(num_threads, route.num_tokens, rows_per_task(bytes), [&](int64_t first, int64_t last) {
    const auto y_row = [&](int64_t i) { return y_rows.data(route.dest[2 * i]) + route.dest[2 * i + 1] * bytes; };
    for (int64_t i = first * k_count; i < last * k_count; ++i) {
      const int p = route.dest[2 * i];
      const int64_t row = route.dest[2 * i + 1];
      dprobs[i] = 0.0f;
      if (p == -1) continue;
      if (!y_rows.holds(p, row) || !dy_rows.holds(p, row)) return bad.report(i);
      const int64_t next = i + 1 < last * k_count && y_rows.holds(route.dest[2 * i + 2], route.dest[2 * i + 3]) ? i + 1 : i;
      dprobs[i] = isa.scale_and_dot({y.dtype, stream, hidden, probs.ptr<float>()[i],
                                     dout.ptr<char>() + i / k_count * bytes, y_row(i), y_row(next),
                                     dy_rows.data(p) + row * bytes});
    }
    isa.fence();
  });
  if (bad.any()) route.fail_at(bad.at());
  zero_rows(dy, route.rows_used(dy), dy.shape[0], num_threads);
  const Exchange end(EpOp::combine_bwd, peers, &map.counts);
  end.meet();
}

}  // namespace xt::cpu
