// float8 (e4m3fn or e5m2) with fp32 scales, one per block of values: x ~ q * scale.
//   scale = max(the block's largest |x|, eps) / largest, optionally rounded up to a power of two
//   q = x * (1 / scale), rounded to nearest even
// with largest = 448 (e4m3fn) or 57344 (e5m2): the extremes of a block become the extreme codes. All in fp32, correctly
// rounded. A block with NaN or infinity has a scale that is NaN or infinity, and all its codes are NaN.
// Feature dims (H, N, K) are multiples of 128; token counts (R) are arbitrary.
// Scales of rows are stored block by block, [H/128, ld]: the scale of x[r, 128 b : 128 (b+1)] is scale[b, r]. ld is R
// rounded up to a multiple of 4, which keeps every block's scales 16-byte aligned for the GPU's tensor loads.
#pragma once
#include "xtuner/ops/swiglu.h"
#include "xtuner/stream.h"
#include "xtuner/tensor.h"

namespace xt {

struct QuantizeParams {
  bool power_of_two = false;
  double eps = 1e-12;  // in [1e-30, 1]: the scale and its inverse stay normal fp32 numbers
};

// Columns of a row scale matrix for `rows` rows.
constexpr int64_t row_scale_ld(int64_t rows) { return (rows + 3) / 4 * 4; }

// Columns of quantize_rowcol's qt: every expert's rows fit in, each expert's padded to a multiple of 128.
constexpr int64_t padded_rows(int64_t rows, int64_t num_experts) { return (rows + 127 * num_experts) / 128 * 128; }

// One scale per row and 128 columns.
//   x        f32 | bf16 [R, H]
//   offsets  i64 [E+1] or null    rows >= offsets[E] are never read, their q and scales become zero; null: all R count
//   q        e4m3 | e5m2 [R, H]
//   scale    f32 [H/128, ld]      columns >= R become zero
void quantize_1x128(const Tensor& x, const Tensor* offsets, QuantizeParams params, const Tensor& q, const Tensor& scale,
                    Stream stream);

// One scale per 128 x 128 block of each weight matrix, which serves both orientations.
//   w      f32 | bf16 [E, N, K]
//   q      e4m3 | e5m2 [E, N, K]
//   qt     as q [E, K, N]         q transposed
//   scale  f32 [E, N/128, K/128]
void quantize_128x128(const Tensor& w, QuantizeParams params, const Tensor& q, const Tensor& qt, const Tensor& scale,
                      Stream stream);

// Both operands that training needs of one activation or gradient, from one read of it.
//   x        f32 | bf16 [R, H]
//   offsets  i64 [E+1]            rows >= offsets[E] are never read; their q and scales become zero. Must ascend from 0;
//                                 on a GPU, the experts from the first that does not count as empty
//   q        e4m3 | e5m2 [R, H]   as quantize_1x128
//   scale    f32 [H/128, ld]      as quantize_1x128
//   qt       as q [H, P]          P = padded_rows(R, E). x transposed; expert e's columns start where those of e - 1,
//                                 padded to a multiple of 128, end. One scale per column of x and block of 128 rows (an
//                                 expert's last block may be short); all padding is zero.
//   scale_t  f32 [P/128, H]       the scale of qt[h, 128 b : 128 (b+1)] is scale_t[b, h]
void quantize_rowcol(const Tensor& x, const Tensor& offsets, QuantizeParams params, const Tensor& q,
                     const Tensor& scale, const Tensor& qt, const Tensor& scale_t, Stream stream);

// quantize_rowcol of what permute gives of x, bit for bit, without that copy.
//   x    f32 | bf16 [T, H]
//   src  i32 [R]            the flat choice t*K + k whose token fills a row, or -1: a row of zeros (route_map). On a GPU, one
//                           that is out of range counts as -1
//   K    num_experts_per_tok, at least 1
// offsets and outputs as quantize_rowcol; src of rows >= offsets[E] is not read.
void permute_quantize_rowcol(const Tensor& x, const Tensor& src, int64_t num_experts_per_tok, const Tensor& offsets,
                             QuantizeParams params, const Tensor& q, const Tensor& scale, const Tensor& qt,
                             const Tensor& scale_t, Stream stream);

// quantize_rowcol of what swiglu gives of x, bit for bit, without that copy.
//   x  f32 | bf16 [R, 2H]   gate, then up
// offsets and outputs as quantize_rowcol.
void swiglu_quantize_rowcol(const Tensor& x, const Tensor& offsets, const SwigluParams& swiglu, QuantizeParams params,
                            const Tensor& q, const Tensor& scale, const Tensor& qt, const Tensor& scale_t,
                            Stream stream);

// out = q * scale in fp32, then rounded to out's dtype.
//   q      e4m3 | e5m2  [R, H] with row scales       or [E, N, K] with block scales
//   scale  f32          [H/128, ld], ld >= R         or [E, N/128, K/128]
//   out    f32 | bf16   as q
void dequantize(const Tensor& q, const Tensor& scale, const Tensor& out, Stream stream);

}  // namespace xt
