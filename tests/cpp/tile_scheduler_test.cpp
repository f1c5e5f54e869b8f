// The tile schedule of the CUDA grouped products, against brute force: it is ordinary C++.
#include "cuda/tile_scheduler.h"

#include <map>
#include <set>

#include "cuda/heuristics.h"
#include "helpers.h"

namespace xt::test {
namespace {

using namespace xt::cuda;

struct Layout {
  std::vector<int64_t> offsets;
  int64_t rows, n_blocks, block_m, grid;
  int64_t experts() const { return static_cast<int64_t>(offsets.size()) - 1; }
};

Layout random_layout(Rng& rng) {
  const int64_t experts = pick(rng, {0, 1, 2, 3, 8, 60});
  Layout l;
  l.offsets = offsets_of(experts ? random_rows(rng, experts) : std::vector<int64_t>{});
  l.rows = l.offsets.back() + pick(rng, {0, 0, 1, 127, 128, 129, 700});
  l.n_blocks = pick(rng, {1, 2, 3, 12});
  l.block_m = pick(rng, {16, 64, 128});
  l.grid = pick(rng, {1, 2, 7, 132});
  return l;
}

// Which expert row r belongs to, by definition.
int64_t expert_of(const Layout& l, int64_t r) {
  for (int64_t e = 0; e < l.experts(); ++e) {
    if (r >= l.offsets[e] && r < l.offsets[e + 1]) return e;
  }
  return l.experts();
}

// Every tile that the blocks of threads take, with how often.
std::vector<MTile> all_m_tiles(const Layout& l) {
  std::vector<MTile> tiles;
  for (int64_t block = 0; block < l.grid; ++block) {
    MTiles mine(l.offsets.data(), l.experts(), l.rows, l.block_m, l.n_blocks, block, l.grid);
    for (MTile t; mine.next(t);) tiles.push_back(t);
  }
  return tiles;
}

TEST(TileScheduler, EveryOutputHasOneTileOfItsOwnExpert) {
  Rng rng(1);
  for (int trial = 0; trial < 3000; ++trial) {
    const Layout l = random_layout(rng);
    std::vector<int> covered(static_cast<size_t>(l.rows * l.n_blocks));
    const auto tiles = all_m_tiles(l);
    for (const MTile& t : tiles) {
      ASSERT_LT(t.row, t.rows_end);
      ASSERT_EQ(expert_of(l, t.row), t.expert);
      ASSERT_EQ(expert_of(l, t.rows_end - 1), t.expert);
      ASSERT_TRUE(t.rows_end == l.rows || expert_of(l, t.rows_end) != t.expert);
      for (int64_t r = t.row; r < std::min(t.rows_end, t.row + l.block_m); ++r) ++covered[r * l.n_blocks + t.n_block];
    }
    for (int count : covered) ASSERT_EQ(count, 1);
    ASSERT_LE(static_cast<int64_t>(tiles.size()), most_m_tiles(l.rows, l.experts(), l.block_m, l.n_blocks));
  }
}

TEST(TileScheduler, EveryWeightGradientHasOneTile) {
  Rng rng(2);
  for (int trial = 0; trial < 3000; ++trial) {
    const Layout l = random_layout(rng);
    const int64_t m_blocks = pick(rng, {1, 5, 8, 9, 17});
    std::map<std::tuple<int64_t, int64_t, int64_t>, int> seen;
    for (int64_t block = 0; block < l.grid; ++block) {
      KTiles mine(l.offsets.data(), l.experts(), l.rows, m_blocks, l.n_blocks, block, l.grid);
      for (KTile t; mine.next(t);) {
        ++seen[{t.expert, t.m_block, t.n_block}];
        ASSERT_EQ(t.begin, l.offsets[t.expert]);
        ASSERT_EQ(t.end, l.offsets[t.expert + 1]);
        ASSERT_TRUE(t.m_block >= 0 && t.m_block < m_blocks && t.n_block >= 0 && t.n_block < l.n_blocks);
      }
    }
    ASSERT_EQ(static_cast<int64_t>(seen.size()), l.experts() * m_blocks * l.n_blocks);
    for (const auto& [tile, count] : seen) ASSERT_EQ(count, 1);
  }
}

TEST(TileScheduler, PaddedExpertsBeginWhereTheOnesBeforeEnd) {
  Rng rng(5);
  for (int trial = 0; trial < 3000; ++trial) {
    const Layout l = random_layout(rng);
    int64_t columns = 0;  // that are needed
    std::vector<int64_t> begin;
    for (int64_t e = 0; e < l.experts(); ++e) {
      begin.push_back(columns);
      columns += (l.offsets[e + 1] - l.offsets[e] + 127) / 128 * 128;
    }
    int64_t tiles = 0;
    for (int64_t block = 0; block < l.grid; ++block) {
      PaddedKTiles mine(l.offsets.data(), l.experts(), columns + pick(rng, {0, 128}), 3, l.n_blocks, block, l.grid);
      for (KTile t; mine.next(t); ++tiles) {
        ASSERT_EQ(t.begin, begin[t.expert]);
        ASSERT_EQ(t.end - t.begin, l.offsets[t.expert + 1] - l.offsets[t.expert]);
      }
    }
    ASSERT_EQ(tiles, l.experts() * 3 * l.n_blocks);
  }
}

// Offsets that decrease or leave the rows: still every row once, and nothing outside.
TEST(TileScheduler, BadOffsetsAreCut) {
  Rng rng(3);
  for (int trial = 0; trial < 3000; ++trial) {
    Layout l = random_layout(rng);
    for (int64_t& at : l.offsets) {
      if (rng() % 3 == 0) at += pick(rng, {-1000000, -5, 3, 400, int64_t{1} << 62});
    }
    std::vector<int> covered(static_cast<size_t>(l.rows * l.n_blocks));
    for (const MTile& t : all_m_tiles(l)) {
      for (int64_t r = t.row; r < std::min(t.rows_end, t.row + l.block_m); ++r) {
        ASSERT_TRUE(r >= 0 && r < l.rows);
        ++covered[r * l.n_blocks + t.n_block];
      }
    }
    for (int count : covered) ASSERT_EQ(count, 1);
    KTiles k(l.offsets.data(), l.experts(), l.rows, 2, l.n_blocks, 0, 1);
    for (KTile t; k.next(t);) ASSERT_TRUE(t.begin >= 0 && t.begin <= t.end && t.end <= l.rows);
    const int64_t columns = ceil_div(l.rows, 128) * 128;
    PaddedKTiles padded(l.offsets.data(), l.experts(), columns, 2, l.n_blocks, 0, 1);
    for (KTile t; padded.next(t);) ASSERT_TRUE(t.begin % 128 == 0 && t.begin <= t.end && t.end <= columns);
  }
}

// Tiles that run at the same time need few different blocks of either operand.
TEST(TileScheduler, NeighboursShareOperands) {
  std::set<int64_t> m, n;
  for (int64_t i = 0; i < 128; ++i) {
    const TilePlace at(i, 100, 16);
    m.insert(at.m_block);
    n.insert(at.n_block);
  }
  EXPECT_EQ(m.size(), 8u);
  EXPECT_EQ(n.size(), 16u);
}

TEST(GemmHeuristics, WideTilesUnlessTheyWouldBeEmptyOrTooFew) {
  constexpr int h200 = 132;
  EXPECT_EQ(m_grouped_config(65536, 128, 1536, h200).block_n, 256);  // Qwen3-30B-A3B
  EXPECT_EQ(m_grouped_config(65536, 128, 2048, h200).block_n, 256);
  EXPECT_EQ(k_grouped_config(128, 1536, 2048, h200).block_n, 256);
  EXPECT_EQ(m_grouped_config(65536, 8, 128, h200).block_n, 128);
  EXPECT_EQ(m_grouped_config(65536, 8, 384, h200).block_n, 128);  // 2 x 256 would compute a third for nothing
  EXPECT_EQ(m_grouped_config(512, 1, 4096, h200).block_n, 128);   // 64 wide tiles would leave half of the GPU idle
  Rng rng(4);
  for (int trial = 0; trial < 1000; ++trial) {
    const int64_t rows = 1 + rng() % 100000, experts = rng() % 300, n = 8 * (1 + rng() % 2000);
    for (const GemmConfig& c : {m_grouped_config(rows, experts, n, h200), dswiglu_config(rows, experts, n, h200),
                                k_grouped_config(1 + experts, rows, n, h200)}) {
      ASSERT_TRUE(c.block_n == 128 || c.block_n == 256);
      ASSERT_TRUE(c.blocks >= 1 && c.blocks <= h200);
    }
  }
}

}  // namespace
}  // namespace xt::test
