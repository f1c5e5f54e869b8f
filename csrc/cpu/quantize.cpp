#include <vector>

#include "cpu/cache.h"
#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"

namespace xt::cpu {
namespace {

constexpr int64_t block = 128;
constexpr int64_t tiles_per_task = 8;  // side by side: 2 or 4 KiB of each row

// Which block of rows, and of columns.
struct Tile {
  int64_t row, col;
};

ScaleRule rule_of(QuantizeParams params) { return {static_cast<float>(params.eps), params.power_of_two}; }

char* address(const Tensor& t, int64_t element) { return t.ptr<char>() + element * size_of(t.dtype); }

// t[:, begin:] = 0
void zero_columns(const Tensor& t, int64_t begin, int num_threads) {
  const int64_t width = t.shape[1], bytes = (width - begin) * size_of(t.dtype);
  if (bytes == 0) return;
  parallel_ranges(num_threads, t.shape[0], rows_per_task(bytes), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) std::memset(address(t, i * width + begin), 0, static_cast<size_t>(bytes));
  });
}

// A block of one expert's rows.
struct RowBlock {
  int64_t first, count;  // rows of x
  int64_t padded;        // where they start in qt
};

std::vector<RowBlock> row_blocks(const Tensor& offsets) {
  std::vector<RowBlock> blocks;
  const int64_t* at = offsets.ptr<int64_t>();
  int64_t padded = 0;
  for (int64_t e = 0; e + 1 < offsets.shape[0]; ++e) {
    for (int64_t r = at[e]; r < at[e + 1]; r += block, padded += block) {
      blocks.push_back({r, std::min(block, at[e + 1] - r), padded});
    }
  }
  return blocks;
}

// body(tile, a later one) for rows x columns, a few side by side per task. The later one is two on: memory answers too
// late for the next.
template <class Body>
void for_each_tile(int num_threads, int64_t num_rows, int64_t num_cols, Body&& body) {
  const int64_t parts = (num_cols + tiles_per_task - 1) / tiles_per_task;
  parallel_for(num_threads, num_rows * parts, [&](int64_t task) {
    const int64_t row = task / parts, begin = task % parts * tiles_per_task;
    const int64_t end = std::min(num_cols, begin + tiles_per_task);
    for (int64_t col = begin; col < end; ++col) {
      const int64_t at = row * num_cols + col, later = std::min(at + 2, num_rows * num_cols - 1);
      body(Tile{row, col}, Tile{later / num_cols, later % num_cols});
    }
  });
}

// Where a tile of numbers is, from one of its rows to the next, and where those of a tile soon to come are (or null).
struct Numbers {
  const void* at;
  int64_t row;
  const void* later;
  int64_t skip = 0;  // elements, from `at` on
};

// Numbers that are made on the way: fill(rows, first column, width, strip) makes those of all tiles of a task at once, which
// keeps to long stretches of memory; they stay in this thread's L2.
template <class Fill>
struct Strips {
  const Fill& fill;
  int64_t hidden;

  Numbers operator()(const RowBlock& b, int64_t col, const RowBlock&, int64_t) const {
    const int64_t first = col / tiles_per_task * tiles_per_task;
    const int64_t width = std::min(tiles_per_task * block, hidden - first * block);
    float* strip = thread_scratch(block * tiles_per_task * block);
    if (col == first) fill(b, first * block, width, strip);
    return {strip, width, nullptr, (col - first) * block};
  }
};
template <class Fill>
Strips(const Fill&, int64_t) -> Strips<Fill>;

// The outputs of quantize_rowcol and its kin.
struct RowCol {
  const Tensor &q, &scale, &qt, &scale_t;
};

// numbers(rows, block of columns, and of a later tile) -> Numbers of dtype `from`.
template <class Source>
void quantize_rowcol_of(const char* op, DType from, const Tensor& offsets, QuantizeParams params, const RowCol& out,
                        int num_threads, const Source& numbers) {
  const int64_t rows = out.q.shape[0], hidden = out.q.shape[1], used = used_rows(op, offsets, rows);
  const std::vector<RowBlock> blocks = row_blocks(offsets);
  const int64_t num_blocks = static_cast<int64_t>(blocks.size()), padded = num_blocks * block;
  const Kernels& isa = kernels();
  const bool stream = worth_streaming(out.q) && worth_streaming(out.qt);
  for_each_tile(num_threads, num_blocks, hidden / block, [&](Tile t, Tile later) {
    const RowBlock& b = blocks[t.row];
    const Numbers x = numbers(b, t.col, blocks[later.row], later.col);
    isa.quantize_tile({from, out.q.dtype, rule_of(params), b.count, hidden, x.row,
                       static_cast<const char*>(x.at) + x.skip * size_of(from), x.later,
                       address(out.q, b.first * hidden + t.col * block),
                       address(out.qt, t.col * block * out.qt.shape[1] + b.padded), out.qt.shape[1],
                       out.scale.ptr<float>() + t.col * out.scale.shape[1] + b.first,
                       out.scale_t.ptr<float>() + t.row * hidden + t.col * block, stream});
  });
  zero_rows(out.q, used, rows, num_threads);
  zero_columns(out.scale, used, num_threads);
  zero_columns(out.qt, padded, num_threads);
  zero_rows(out.scale_t, num_blocks, out.scale_t.shape[0], num_threads);
}

}  // namespace

void quantize_1x128(const Tensor& x, const Tensor* offsets, QuantizeParams params, const Tensor& q, const Tensor& scale,
                    int num_threads) {
  const int64_t rows = x.shape[0], used = offsets ? used_rows("quantize_1x128", *offsets, rows) : rows;
  const QuantizeRows a = {x.dtype, q.dtype,            rule_of(params),  x.shape[1],   x.data,
                          q.data,  scale.ptr<float>(), scale.shape[1],   worth_streaming(q)};
  const Kernels& isa = kernels();
  parallel_ranges(num_threads, used, rows_per_task(row_bytes(x)),
                  [&](int64_t begin, int64_t end) { isa.quantize_rows(a, begin, end); });
  zero_rows(q, used, rows, num_threads);
  zero_columns(scale, used, num_threads);
}

void quantize_128x128(const Tensor& w, QuantizeParams params, const Tensor& q, const Tensor& qt, const Tensor& scale,
                      int num_threads) {
  const int64_t num_n = w.shape[1], num_k = w.shape[2], row_blocks = num_n / block;
  const Kernels& isa = kernels();
  const bool stream = worth_streaming(Tensor(q.data, q.dtype, {w.shape[0] * num_n, num_k})) &&
                      worth_streaming(Tensor(qt.data, qt.dtype, {w.shape[0] * num_k, num_n}));
  const auto first = [&](Tile t) { return (t.row * num_k + t.col) * block; };
  for_each_tile(num_threads, w.shape[0] * row_blocks, num_k / block, [&](Tile t, Tile later) {
    const int64_t turned = t.row / row_blocks * num_n * num_k + t.col * block * num_n + t.row % row_blocks * block;
    isa.quantize_tile({w.dtype, q.dtype, rule_of(params), block, num_k, num_k, address(w, first(t)), address(w, first(later)),
                       address(q, first(t)), address(qt, turned), num_n,
                       scale.ptr<float>() + t.row * (num_k / block) + t.col, nullptr, stream});
  });
}

void quantize_rowcol(const Tensor& x, const Tensor& offsets, QuantizeParams params, const Tensor& q,
                     const Tensor& scale, const Tensor& qt, const Tensor& scale_t, int num_threads) {
  const int64_t hidden = x.shape[1];
  const auto numbers = [&](const RowBlock& b, int64_t col) { return address(x, b.first * hidden + col * block); };
  quantize_rowcol_of("quantize_rowcol", x.dtype, offsets, params, {q, scale, qt, scale_t}, num_threads,
                     [&](const RowBlock& b, int64_t col, const RowBlock& later, int64_t later_col) {
                       return Numbers{numbers(b, col), hidden, numbers(later, later_col)};
                     });
}

void permute_quantize_rowcol(const Tensor& x, const Tensor& src, int64_t num_experts_per_tok, const Tensor& offsets,
                             QuantizeParams params, const Tensor& q, const Tensor& scale, const Tensor& qt,
                             const Tensor& scale_t, int num_threads) {
  const char* op = "permute_quantize_rowcol";
  const int64_t hidden = x.shape[1];
  const int32_t* from = src.ptr<int32_t>();
  check_gather(op, {&src, num_experts_per_tok}, used_rows(op, offsets, src.shape[0]), x.shape[0]);
  const int64_t bytes = block * size_of(x.dtype);
  // Tile by tile, not in strips: what is copied stays in L1.
  const auto gather = [&](const RowBlock& b, int64_t col, const RowBlock& later, int64_t later_col) {
    char* tile = reinterpret_cast<char*>(thread_scratch(block * block));
    const auto at = [&](int64_t choice, int64_t c) {
      return address(x, choice / num_experts_per_tok * hidden + c * block);
    };
    for (int64_t i = 0; i < b.count; ++i) {
      const int64_t choice = from[b.first + i];
      if (choice < 0) {
        std::memset(tile + i * bytes, 0, static_cast<size_t>(bytes));
      } else {
        std::memcpy(tile + i * bytes, at(choice, col), static_cast<size_t>(bytes));
      }
      if (i >= later.count || from[later.first + i] < 0) continue;
      const char* soon = at(from[later.first + i], later_col);
      for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(soon + line, 0, 2);
    }
    return Numbers{tile, block, nullptr};
  };
  quantize_rowcol_of(op, x.dtype, offsets, params, {q, scale, qt, scale_t}, num_threads, gather);
}

void swiglu_quantize_rowcol(const Tensor& x, const Tensor& offsets, const SwigluParams& swiglu, QuantizeParams params,
                            const Tensor& q, const Tensor& scale, const Tensor& qt, const Tensor& scale_t,
                            int num_threads) {
  const int64_t hidden = x.shape[1] / 2;
  const Kernels& isa = kernels();
  const auto fill = [&](const RowBlock& b, int64_t col, int64_t width, void* strip) {
    SwigluRows a = swiglu_rows_of(x, swiglu);
    a.width = width;
    a.up = hidden;
    a.x = address(x, b.first * 2 * hidden + col);
    a.out = strip;
    isa.swiglu(a, 0, b.count);
  };
  quantize_rowcol_of("swiglu_quantize_rowcol", x.dtype, offsets, params, {q, scale, qt, scale_t}, num_threads,
                     Strips{fill, hidden});
}

void dequantize(const Tensor& q, const Tensor& scale, const Tensor& out, int num_threads) {
  const bool squares = q.ndim == 3;
  const int64_t hidden = q.shape[q.ndim - 1], rows = squares ? q.shape[0] * q.shape[1] : q.shape[0];
  DequantizeRows a = {q.dtype, out.dtype, hidden, q.data, out.data, scale.ptr<float>(), 1, 1, 0};
  if (squares) {
    a.rows_per_scale = block;
    a.scale_row = hidden / block;
    a.scale_col = 1;
  } else {
    a.scale_col = scale.shape[1];
  }
  const Kernels& isa = kernels();
  parallel_ranges(num_threads, rows, rows_per_task(hidden * size_of(out.dtype)),
                  [&](int64_t begin, int64_t end) { isa.dequantize_rows(a, begin, end); });
}

}  // namespace xt::cpu
