#include "xtuner/ops/ep_dispatch.h"

#include <numeric>

#include "cpu/cache.h"
#include "cpu/cpu.h"
#include "cpu/ep.h"
#include "cpu/kernels.h"

namespace xt::cpu {
namespace {

// A tensor whose rows travel, and where they lie in a receive buffer.
struct Payload {
  const char* x;
  char* out;
  int64_t bytes;
  std::vector<int64_t> at;  // byte of each rank's data area where its rows begin
  bool stream_out, stream_sent;

  // `row_at`: bytes of a token that lie before this tensor's rows.
  Payload(const Tensor& x_t, const Tensor& out_t, int64_t row_at, const RouteView& route)
      : x(x_t.ptr<char>()), out(out_t.ptr<char>()), bytes(row_bytes(x_t)) {
    for (int p = 0; p < route.world; ++p) at.push_back(row_at * route.received[p]);
    const int32_t* tokens = route.tokens + route.rank * route.world;
    const int64_t sent = std::accumulate(tokens, tokens + route.world, int64_t{0});
    stream_out = worth_streaming(out_t);
    stream_sent = row_at % 64 == 0 && worth_streaming(Tensor(nullptr, x_t.dtype, {sent, x_t.shape[1]}));
  }
};

// Token by token, so that each is read once: to the ranks it travels to, and to the rows of its experts at home.
void send(const RouteView& route, const Payload& payload, const Exchange& exchange, int num_threads) {
  const int world = route.world;
  const Kernels& isa = kernels();
  std::vector<char*> buffer;
  for (int p = 0; p < world; ++p) buffer.push_back(exchange.data(p) + payload.at[p]);
  parallel_ranges(num_threads, route.num_tokens, rows_per_task(payload.bytes), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const char* x = payload.x + t * payload.bytes;
      for (int p = 0; p < world; ++p) {
        const int64_t place = route.slot[t * world + p];
        if (place >= 0) isa.copy_row(payload.stream_sent, x, buffer[p] + place * payload.bytes, payload.bytes);
      }
      for (int64_t i = t * route.num_choices; i < (t + 1) * route.num_choices; ++i) {
        if (route.dest[2 * i] != route.rank) continue;
        isa.copy_row(payload.stream_out, x, payload.out + route.dest[2 * i + 1] * payload.bytes, payload.bytes);
      }
    }
    isa.fence();
  });
}

void receive(const RouteView& route, const Payload& payload, const Exchange& exchange, int source, int num_threads) {
  const char* buffer = exchange.data(route.rank) + payload.at[route.rank];
  const Kernels& isa = kernels();
  for_rows_from(route, source, payload.bytes, num_threads, [&](int64_t row, int64_t place) {
    isa.copy_row(payload.stream_out, buffer + place * payload.bytes, payload.out + row * payload.bytes, payload.bytes);
  });
}

}  // namespace

void ep_dispatch(const Tensor& x, const Tensor* scales, const EpRoute& map, const Peers& peers, const Tensor& out,
                 const Tensor* out_scales, int num_threads) {
  const RouteView route("ep_dispatch", map, peers, num_threads);
  std::vector<Payload> payloads = {Payload(x, out, 0, route)};
  if (scales) payloads.emplace_back(*scales, *out_scales, row_bytes(x), route);
  route.check_fits(route.received, "tokens", row_bytes(x) + (scales ? row_bytes(*scales) : 0), peers);

  Exchange exchange(EpOp::dispatch, peers, {&map.counts, &map.tokens});
  for (const Payload& payload : payloads) send(route, payload, exchange, num_threads);
  exchange.publish();
  zero_rows(out, route.rows_used(), route.capacity, num_threads);
  if (scales) zero_rows(*out_scales, route.rows_used(), route.capacity, num_threads);
  exchange.in_order_of_arrival([&](int source) {
    for (const Payload& payload : payloads) receive(route, payload, exchange, source, num_threads);
  });
}

}  // namespace xt::cpu
