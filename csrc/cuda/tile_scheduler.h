// Which block of threads computes which tile of a grouped product, decided on the GPU from the experts' offsets: the
// host knows an upper bound on the rows only. Ordinary C++, so that tests can run it on the host.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define XT_BOTH __host__ __device__
#else
#define XT_BOTH
#endif

namespace xt::cuda {

XT_BOTH constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The experts' ranges of rows, one after the other, then the unused rows as if they were those of one more expert.
// Offsets that decrease or exceed the rows are cut, so that the ranges always share out [0, num_rows).
class RowRanges {
 public:
  XT_BOTH RowRanges(const int64_t* offsets, int64_t num_experts, int64_t num_rows)
      : offsets_(offsets), num_experts_(num_experts), num_rows_(num_rows) {
    end_ = end_of(0);
  }

  XT_BOTH int64_t expert() const { return expert_; }  // num_experts: the unused rows
  XT_BOTH int64_t begin() const { return begin_; }
  XT_BOTH int64_t end() const { return end_; }
  XT_BOTH int64_t rows() const { return end_ - begin_; }

  XT_BOTH void advance() {
    begin_ = end_;
    end_ = end_of(++expert_);
  }

 private:
  XT_BOTH int64_t end_of(int64_t expert) const {
    if (expert >= num_experts_) return num_rows_;
    const int64_t end = offsets_[expert + 1];
    return end < begin_ ? begin_ : end > num_rows_ ? num_rows_ : end;
  }

  const int64_t* offsets_;
  int64_t num_experts_, num_rows_;
  int64_t expert_ = 0, begin_ = 0, end_ = 0;
};

// Columns of float8 operands that lie along the experts' rows: each expert's range begins at the next multiple of `align`
// behind the one before it. Offsets that decrease, or whose rows do not fit into the columns, are cut.
class PaddedRanges {
 public:
  static constexpr int64_t align = 128;

  // num_columns: a multiple of align.
  XT_BOTH PaddedRanges(const int64_t* offsets, int64_t num_experts, int64_t num_columns)
      : offsets_(offsets), num_experts_(num_experts), num_columns_(num_columns) {
    rows_end_ = rows_end_of(0);
  }

  XT_BOTH int64_t expert() const { return expert_; }
  XT_BOTH int64_t begin() const { return begin_; }
  XT_BOTH int64_t end() const { return begin_ + (rows_end_ - row_); }
  XT_BOTH int64_t rows_end() const { return rows_end_; }  // of the expert, before padding

  XT_BOTH void advance() {
    begin_ += ceil_div(rows_end_ - row_, align) * align;
    row_ = rows_end_;
    rows_end_ = rows_end_of(++expert_);
  }

 private:
  XT_BOTH int64_t rows_end_of(int64_t expert) const {
    if (expert >= num_experts_) return row_;
    const int64_t end = offsets_[expert + 1], most = row_ + (num_columns_ - begin_);
    return end < row_ ? row_ : end > most ? most : end;
  }

  const int64_t* offsets_;
  int64_t num_experts_, num_columns_;
  int64_t expert_ = 0, begin_ = 0, row_ = 0, rows_end_ = 0;
};

// Place of a tile among m_blocks x n_blocks tiles: bands of at most 8 blocks of rows, within a band column by column, so
// that tiles computed at the same time share both operands in cache.
struct TilePlace {
  int64_t m_block, n_block;

  static constexpr int64_t band = 8;
  XT_BOTH TilePlace(int64_t index, int64_t m_blocks, int64_t n_blocks) {
    const int64_t first = index / (band * n_blocks) * band, within = index - first * n_blocks;
    const int64_t height = m_blocks - first < band ? m_blocks - first : band;
    n_block = within / height;
    m_block = first + within - n_block * height;
  }
};

// Tile of out[R, N], where rows belong to experts. No tile holds rows of two experts.
struct MTile {
  int64_t expert;          // num_experts: unused rows, which become zero
  int64_t row, rows_end;   // first row, and where the expert's rows end: perhaps further than the tile
  int64_t n_block;
};

// Tiles first, first + step, ...: with step blocks of threads, each takes its own.
class MTiles {
 public:
  XT_BOTH MTiles(const int64_t* offsets, int64_t num_experts, int64_t num_rows, int64_t block_m, int64_t n_blocks,
                 int64_t first, int64_t step)
      : ranges_(offsets, num_experts, num_rows),
        num_experts_(num_experts),
        block_m_(block_m),
        n_blocks_(n_blocks),
        index_(first),
        step_(step) {}

  XT_BOTH bool next(MTile& tile) {
    for (;;) {
      const int64_t m_blocks = ceil_div(ranges_.rows(), block_m_), here = m_blocks * n_blocks_;
      if (index_ < here) {
        const TilePlace at(index_, m_blocks, n_blocks_);
        tile = {ranges_.expert(), ranges_.begin() + at.m_block * block_m_, ranges_.end(), at.n_block};
        index_ += step_;
        return true;
      }
      if (ranges_.expert() == num_experts_) return false;
      index_ -= here;
      ranges_.advance();
    }
  }

 private:
  RowRanges ranges_;
  int64_t num_experts_, block_m_, n_blocks_;
  int64_t index_;  // among the tiles from this expert on
  int64_t step_;
};

// Tile of out[e, M, N], a sum over the rows (or columns) [begin, end) of expert e.
struct KTile {
  int64_t expert, begin, end;
  int64_t m_block, n_block;
};

template <class Ranges>
class KTilesOf {
 public:
  XT_BOTH KTilesOf(const int64_t* offsets, int64_t num_experts, int64_t num_rows, int64_t m_blocks, int64_t n_blocks,
                   int64_t first, int64_t step)
      : ranges_(offsets, num_experts, num_rows),
        num_experts_(num_experts),
        m_blocks_(m_blocks),
        n_blocks_(n_blocks),
        index_(first),
        step_(step) {}

  XT_BOTH bool next(KTile& tile) {
    const int64_t here = m_blocks_ * n_blocks_;
    while (ranges_.expert() < num_experts_ && index_ >= here) {
      index_ -= here;
      ranges_.advance();
    }
    if (ranges_.expert() == num_experts_) return false;
    const TilePlace at(index_, m_blocks_, n_blocks_);
    tile = {ranges_.expert(), ranges_.begin(), ranges_.end(), at.m_block, at.n_block};
    index_ += step_;
    return true;
  }

 private:
  Ranges ranges_;
  int64_t num_experts_, m_blocks_, n_blocks_;
  int64_t index_;
  int64_t step_;
};
using KTiles = KTilesOf<RowRanges>;
using PaddedKTiles = KTilesOf<PaddedRanges>;

}  // namespace xt::cuda
