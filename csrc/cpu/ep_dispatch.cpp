#include "xtuner/ops/ep_dispatch.h"

#include "cpu/cpu.h"
#include "cpu/ep.h"

namespace xt::cpu {
namespace {

// A tensor whose rows travel, and where they lie in a receive buffer.
struct Payload {
  const char* x;
  char* out;
  int64_t bytes;
  std::vector<int64_t> at;  // byte of each rank's data area where its rows begin

  void copy(const char* from, char* to) const { std::memcpy(to, from, static_cast<size_t>(bytes)); }
};

// Token by token, so that each is read once: to the ranks it travels to, and to the rows of its experts at home.
void send(const RouteView& route, const Payload& payload, const Exchange& exchange, int num_threads) {
  const int world = route.world;
  std::vector<char*> buffer;
  for (int p = 0; p < world; ++p) buffer.push_back(exchange.data(p) + payload.at[p]);
  parallel_ranges(num_threads, route.num_tokens, rows_per_task(payload.bytes), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const char* x = payload.x + t * payload.bytes;
      for (int p = 0; p < world; ++p) {
        const int64_t place = route.slot[t * world + p];
        if (place >= 0) payload.copy(x, buffer[p] + place * payload.bytes);
      }
      for (int64_t i = t * route.num_choices; i < (t + 1) * route.num_choices; ++i) {
        if (route.dest[2 * i] == route.rank) payload.copy(x, payload.out + route.dest[2 * i + 1] * payload.bytes);
      }
    }
  });
}

void receive(const RouteView& route, const Payload& payload, const Exchange& exchange, int source, int num_threads) {
  const char* buffer = exchange.data(route.rank) + payload.at[route.rank];
  for_rows_from(route, source, payload.bytes, num_threads, [&](int64_t row, int64_t place) {
    payload.copy(buffer + place * payload.bytes, payload.out + row * payload.bytes);
  });
}

}  // namespace

void ep_dispatch(const Tensor& x, const Tensor* scales, const EpRoute& map, const Peers& peers, const Tensor& out,
                 const Tensor* out_scales, int num_threads) {
  const RouteView route("ep_dispatch", map, peers, num_threads);
  std::vector<Payload> payloads = {{x.ptr<char>(), out.ptr<char>(), row_bytes(x), {}}};
  if (scales) payloads.push_back({scales->ptr<char>(), out_scales->ptr<char>(), row_bytes(*scales), {}});
  int64_t bytes = 0;
  for (Payload& payload : payloads) {
    for (int p = 0; p < route.world; ++p) payload.at.push_back(bytes * route.received[p]);
    bytes += payload.bytes;
  }
  route.check_fits(route.received, "tokens", bytes, peers);

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
