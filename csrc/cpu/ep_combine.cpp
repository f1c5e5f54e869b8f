#include "xtuner/ops/ep_combine.h"

#include "cpu/cache.h"
#include "cpu/cpu.h"
#include "cpu/ep.h"
#include "cpu/kernels.h"

namespace xt::cpu {
namespace {

// Copies the rows that other ranks will ask for to this rank's data area; those of its own tokens stay where they are.
void show_rows(const RouteView& route, const Tensor& y, char* area, int num_threads) {
  const int64_t bytes = row_bytes(y), grain = rows_per_task(bytes);
  std::vector<int64_t> pieces;  // begin and end of rows, at most `grain` of them
  int64_t shown = 0;
  const auto add = [&](int64_t begin, int64_t end) {
    shown += end - begin;
    for (; begin < end; begin += grain) pieces.insert(pieces.end(), {begin, std::min(end, begin + grain)});
  };
  for (int64_t e = 0; e < route.experts_here; ++e) {
    add(route.first(e, 0), route.first(e, route.rank));
    add(route.first(e, route.rank + 1), route.first(e, route.world));
  }
  const bool stream = worth_streaming(Tensor(nullptr, y.dtype, {shown, y.shape[1]}));
  const Kernels& isa = kernels();
  parallel_for(num_threads, static_cast<int64_t>(pieces.size()) / 2, [&](int64_t i) {
    const int64_t begin = pieces[2 * i] * bytes, end = pieces[2 * i + 1] * bytes;
    isa.copy_row(stream, y.ptr<char>() + begin, area + begin, end - begin);
    isa.fence();
  });
}

// Where dout goes on its way back: as in dispatch to the other ranks, along with the weight of each row; what stays at
// home is finished here.
struct BackwardRows {
  DType dtype;
  bool stream;
  int64_t hidden, bytes;
  const char *dout, *y;
  const float* probs;
  char* dy;
  float* dprobs;
  const Kernels& isa;

  // dy[row] = prob * dout; returns <dout, y[row]>
  float row(int64_t row, float prob, const char* from) const {
    return isa.scale_and_dot({dtype, stream, hidden, prob, from, y + row * bytes, dy + row * bytes});
  }
};

void send_gradients(const RouteView& route, const BackwardRows& rows, const Exchange& exchange, int num_threads) {
  const int world = route.world;
  parallel_ranges(num_threads, route.num_tokens, rows_per_task(rows.bytes), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const char* dout = rows.dout + t * rows.bytes;
      for (int p = 0; p < world; ++p) {
        const int64_t place = route.slot[t * world + p];
        if (place >= 0) std::memcpy(exchange.data(p) + place * rows.bytes, dout, static_cast<size_t>(rows.bytes));
      }
      for (int64_t i = t * route.num_choices; i < (t + 1) * route.num_choices; ++i) {
        const int p = route.dest[2 * i];
        const int64_t row = route.dest[2 * i + 1];
        if (p == route.rank) {
          rows.dprobs[i] = rows.row(row, rows.probs[i], dout);
        } else if (p < 0) {
          rows.dprobs[i] = 0.0f;
        } else {
          reinterpret_cast<float*>(exchange.index(p))[row] = rows.probs[i];
        }
      }
    }
    rows.isa.fence();
  });
}

}  // namespace

void ep_combine(const Tensor& y, const EpRoute& map, const Peers& peers, const Tensor* probs, const Tensor& out,
                int num_threads) {
  const RouteView route("ep_combine", map, peers, num_threads);
  const int64_t bytes = row_bytes(y);
  route.check_fits(route.rows, "rows", bytes, peers);

  Exchange exchange(EpOp::combine, peers, {&map.counts, &map.tokens});
  show_rows(route, y, exchange.data(route.rank), num_threads);
  exchange.publish();
  exchange.wait_all();

  std::vector<const void*> base;
  for (int p = 0; p < route.world; ++p) base.push_back(p == route.rank ? y.data : exchange.data(p));
  UnpermuteRows a = {};
  a.dtype = y.dtype;
  a.hidden = y.shape[1];
  a.num_experts_per_tok = route.num_choices;
  a.probs = probs ? probs->ptr<float>() : nullptr;
  a.out = out.data;
  a.stream = worth_streaming(out);
  const PeerTable table = {route.dest, base.data()};
  const Kernels& isa = kernels();
  parallel_ranges(num_threads, route.num_tokens, rows_per_copy_task(bytes * (route.num_choices + 1)),
                  [&](int64_t begin, int64_t end) { isa.unpermute_peers(a, table, begin, end); });
}

void ep_combine_bwd(const Tensor& dout, const Tensor& y, const EpRoute& map, const Peers& peers, const Tensor& probs,
                    const Tensor& dy, const Tensor& dprobs, int num_threads) {
  const RouteView route("ep_combine_bwd", map, peers, num_threads);
  const BackwardRows rows = {y.dtype, worth_streaming(dy), y.shape[1], row_bytes(y), dout.ptr<char>(), y.ptr<char>(),
                             probs.ptr<float>(), dy.ptr<char>(), dprobs.ptr<float>(), kernels()};
  route.check_fits(route.received, "tokens", rows.bytes, peers);
  for (int p = 0; p < route.world; ++p) {
    if (route.rows[p] * 4 > peers.index_bytes) {
      fail(route.op, ": the weights of the ", route.rows[p], " rows of rank ", p, " do not fit an index area of ",
           peers.index_bytes, " bytes");
    }
  }

  std::vector<float> row_dprob(static_cast<size_t>(route.rows_used()));
  {
    Exchange exchange(EpOp::combine_bwd, peers, {&map.counts, &map.tokens});
    send_gradients(route, rows, exchange, num_threads);
    exchange.publish();
    zero_rows(dy, route.rows_used(), route.capacity, num_threads);
    const char* buffer = exchange.data(route.rank);
    const float* row_prob = reinterpret_cast<const float*>(exchange.index(route.rank));
    exchange.in_order_of_arrival([&](int source) {
      for_rows_from(route, source, rows.bytes, num_threads, [&](int64_t row, int64_t place) {
        row_dprob[row] = rows.row(row, row_prob[row], buffer + place * rows.bytes);
      });
    });
  }
  Exchange exchange(EpOp::combine_bwd, peers, {&map.counts, &map.tokens});
  std::copy(row_dprob.begin(), row_dprob.end(), reinterpret_cast<float*>(exchange.index(route.rank)));
  exchange.publish();
  exchange.wait_all();
  parallel_ranges(num_threads, route.num_tokens * route.num_choices, 16384, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int p = route.dest[2 * i];
      if (p < 0 || p == route.rank) continue;
      rows.dprobs[i] = reinterpret_cast<const float*>(exchange.index(p))[route.dest[2 * i + 1]];
    }
  });
}

}  // namespace xt::cpu
