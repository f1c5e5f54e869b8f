#include "xtuner/ops/ep_dispatch.h"

#include <numeric>

#include "cpu/cache.h"
#include "cpu/cpu.h"
#include "cpu/ep.h"
#include "cpu/kernels.h"

namespace xt::cpu {
namespace {

// The rows of x, and how they are written.
struct Rows {
  const char* x;
  char* out;
  int64_t bytes;
  bool stream_out, stream_sent;

  Rows(const Tensor& x_t, const Tensor& out_t, const RouteView& route)
      : x(x_t.ptr<char>()), out(out_t.ptr<char>()), bytes(row_bytes(x_t)), stream_out(worth_streaming(out_t)) {
    const int32_t* tokens = route.tokens + route.rank * route.world;
    const int64_t sent = std::accumulate(tokens, tokens + route.world, int64_t{0});
    stream_sent = worth_streaming(Tensor(nullptr, x_t.dtype, {sent, x_t.shape[1]}));
  }
};

// Token by token, so that each is read once: to the ranks it travels to, and to the rows of its experts at home.
void send(const RouteView& route, const Rows& rows, const Exchange& exchange, int num_threads) {
  const Kernels& isa = kernels();
  parallel_ranges(num_threads, route.num_tokens, rows_per_task(rows.bytes), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const char* x = rows.x + t * rows.bytes;
      for (int p = 0; p < route.world; ++p) {
        const int64_t place = route.slot[t * route.world + p];
        if (place >= 0) isa.copy_row(rows.stream_sent, x, exchange.data(p) + place * rows.bytes, rows.bytes);
      }
      for (int64_t i = t * route.num_choices; i < (t + 1) * route.num_choices; ++i) {
        if (route.dest[2 * i] != route.rank) continue;
        isa.copy_row(rows.stream_out, x, rows.out + route.dest[2 * i + 1] * rows.bytes, rows.bytes);
      }
    }
    isa.fence();
  });
}

void receive(const RouteView& route, const Rows& rows, const Exchange& exchange, int source, int num_threads) {
  const char* buffer = exchange.data(route.rank);
  const Kernels& isa = kernels();
  for_rows_from(route, source, rows.bytes, num_threads, [&](int64_t row, int64_t place) {
    isa.copy_row(rows.stream_out, buffer + place * rows.bytes, rows.out + row * rows.bytes, rows.bytes);
  });
}

// The scales of quantized rows: a column for each token or row at home, a row for each token under way, behind all rows
// of x in the receive buffer.
struct Scales {
  const Tensor &in, &out;
  int64_t row_bytes;  // of x

  int64_t count() const { return in.shape[0]; }
  float* buffer(const RouteView& route, const Exchange& exchange, int rank, int64_t place) const {
    const int64_t begin = (route.received[rank] * row_bytes + 3) / 4 * 4;
    return reinterpret_cast<float*>(exchange.data(rank) + begin) + place * count();
  }
  void copy(const float* from, int64_t from_step, float* to, int64_t to_step) const {
    for (int64_t s = 0; s < count(); ++s) to[s * to_step] = from[s * from_step];
  }
  float* out_column(int64_t row) const { return out.ptr<float>() + row; }
};

void send_scales(const RouteView& route, const Scales& scales, const Exchange& exchange, int num_threads) {
  const int64_t in_step = scales.in.shape[1], out_step = scales.out.shape[1];
  parallel_ranges(num_threads, route.num_tokens, 256, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* column = scales.in.ptr<float>() + t;
      for (int p = 0; p < route.world; ++p) {
        const int64_t place = route.slot[t * route.world + p];
        if (place >= 0) scales.copy(column, in_step, scales.buffer(route, exchange, p, place), 1);
      }
      for (int64_t i = t * route.num_choices; i < (t + 1) * route.num_choices; ++i) {
        if (route.dest[2 * i] != route.rank) continue;
        scales.copy(column, in_step, scales.out_column(route.dest[2 * i + 1]), out_step);
      }
    }
  });
  for (int64_t s = 0; s < scales.count(); ++s) {
    std::fill(scales.out_column(s * out_step + route.rows_used()), scales.out_column((s + 1) * out_step), 0.0f);
  }
}

void receive_scales(const RouteView& route, const Scales& scales, const Exchange& exchange, int source,
                    int num_threads) {
  for_rows_from(route, source, 4 * scales.count(), num_threads, [&](int64_t row, int64_t place) {
    scales.copy(scales.buffer(route, exchange, route.rank, place), 1, scales.out_column(row), scales.out.shape[1]);
  });
}

}  // namespace

void ep_dispatch(const Tensor& x, const Tensor* scales, const EpRoute& map, const Peers& peers, const Tensor& out,
                 const Tensor* out_scales, int num_threads) {
  const RouteView route("ep_dispatch", map, peers, num_threads);
  const Rows rows(x, out, route);
  route.check_fits(route.received, "tokens", rows.bytes + (scales ? 4 * scales->shape[0] + 4 : 0), peers);

  Exchange exchange(EpOp::dispatch, peers, {&map.counts, &map.tokens});
  send(route, rows, exchange, num_threads);
  if (scales) send_scales(route, {*scales, *out_scales, rows.bytes}, exchange, num_threads);
  exchange.publish();
  zero_rows(out, route.rows_used(), route.capacity, num_threads);
  exchange.in_order_of_arrival([&](int source) {
    receive(route, rows, exchange, source, num_threads);
    if (scales) receive_scales(route, {*scales, *out_scales, rows.bytes}, exchange, source, num_threads);
  });
}

}  // namespace xt::cpu
