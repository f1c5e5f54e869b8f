// Rows that begin more than 2^31 elements into a tensor. Such a tensor need not be held in memory: all of it except its
// end is one 16 MiB window of a file in memory, mapped again and again. A limit on the data segment holds the rest of
// the process to 512 MiB, so that a run takes less than 1 GiB whatever the kernels do. The windows hold NaN.
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "helpers.h"
#include "xtuner/ops/gemm_k_grouped.h"
#include "xtuner/ops/gemm_m_grouped.h"
#include "xtuner/ops/permute.h"
#include "xtuner/ops/swiglu.h"
#include "xtuner/ops/unpermute.h"

namespace xt::test {
namespace {

constexpr int64_t window = int64_t{16} << 20;
constexpr int64_t width = 16384;
constexpr int64_t many = (int64_t{1} << 31) / width + 8;  // rows of `width`; the last eight begin past 2^31 elements
constexpr int64_t first_far = many - 8;
const Stream two_threads = {nullptr, 2};

// Memory for bf16 tensors of up to many * width elements, which share their end.
class Huge {
 public:
  Huge() {
    const int64_t windows = many * width * 2 / window + 2;  // rounded up, and one that only the end uses
    const int file = memfd_create("int64_test", 0);
    if (file < 0 || ftruncate(file, 2 * window)) throw std::runtime_error("no memory file");
    size_ = windows * window;
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (int64_t w = 0; w < windows; ++w) {
      const int64_t at = w + 1 < windows ? 0 : window;
      if (mmap(base_ + w * window, window, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, at) == MAP_FAILED) {
        throw std::runtime_error("no room to map");
      }
    }
    close(file);
  }
  ~Huge() { munmap(base_, size_); }
  Huge(const Huge&) = delete;

  void poison() {
    std::memset(base_, 0xff, window);
    std::memset(base_ + size_ - window, 0xff, window);
  }
  Tensor view(std::initializer_list<int64_t> shape) const {
    Tensor t(nullptr, DType::bf16, shape);
    t.data = base_ + size_ - t.numel() * 2;
    return t;
  }
  bf16_t* row(int64_t r) { return view({many - r, width}).ptr<bf16_t>(); }  // of [many, width]
  void set_row(int64_t r, float v) { std::fill(row(r), row(r) + width, narrow(v)); }
  bool row_is(int64_t r, float v) { return std::count(row(r), row(r) + width, narrow(v)) == width; }

 private:
  int64_t size_;
  char* base_;
};

class Int64 : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_EQ(getrlimit(RLIMIT_DATA, &before_), 0);
    const rlimit limit = {rlim_t{512} << 20, before_.rlim_max};
    ASSERT_EQ(setrlimit(RLIMIT_DATA, &limit), 0);
  }
  void TearDown() override { setrlimit(RLIMIT_DATA, &before_); }

  // Mapped once, for most of the time here goes into that.
  static Huge& huge(int i) {
    static Huge all[2];
    all[i].poison();
    return all[i];
  }

 private:
  rlimit before_;
};

// One choice per token; of `many` tokens or rows only the far ones take part, with the small side's rows in turn.
struct Maps {
  std::vector<int32_t> far = std::vector<int32_t>(many, -1), near = std::vector<int32_t>(8, -1);
  Maps() {
    for (int32_t i = 0; i < 7; ++i) {  // one row of either side has no partner
      far[first_far + i] = i;
      near[i] = static_cast<int32_t>(first_far + i);
    }
  }
};

std::vector<float> numbers() { return {1, 2, 3, 4, 5, 6, 7, 8}; }

struct Near {  // [8, width], row i filled with i + 1
  std::vector<bf16_t> data = std::vector<bf16_t>(8 * width);
  explicit Near(bool filled) {
    for (int64_t i = 0; i < 8 * width; ++i) data[i] = narrow(filled ? static_cast<float>(i / width + 1) : NAN);
  }
  Tensor view() const { return Tensor(data.data(), DType::bf16, {8, width}); }
  bool row_is(int64_t r, float v) const {
    return std::count(data.begin() + r * width, data.begin() + (r + 1) * width, narrow(v)) == width;
  }
};

TEST_F(Int64, PermuteFromAndTo) {
  const Maps m;
  Huge& far = huge(0);
  for (int i = 0; i < 8; ++i) far.set_row(first_far + i, i + 1.0f);
  Near out(false);
  permute(far.view({many, width}), view(m.far, {many, 1}), view(m.near, {8}), out.view(), two_threads);
  for (int i = 0; i < 8; ++i) EXPECT_TRUE(out.row_is(i, i < 7 ? i + 1.0f : 0.0f)) << i;

  const Near x(true);
  permute(x.view(), view(m.near, {8, 1}), view(m.far, {many}), far.view({many, width}), two_threads);
  for (int i = 0; i < 8; ++i) EXPECT_TRUE(far.row_is(first_far + i, i < 7 ? i + 1.0f : 0.0f)) << i;
  EXPECT_TRUE(far.row_is(0, 0) && far.row_is(many / 2, 0));
}

TEST_F(Int64, UnpermuteFromAndTo) {
  const Maps m;
  Huge& far = huge(0);
  for (int i = 0; i < 8; ++i) far.set_row(first_far + i, i + 1.0f);
  Near out(false);
  unpermute(far.view({many, width}), view(m.near, {8, 1}), nullptr, out.view(), two_threads);
  for (int i = 0; i < 8; ++i) EXPECT_TRUE(out.row_is(i, i < 7 ? i + 1.0f : 0.0f)) << i;

  const Near y(true);
  unpermute(y.view(), view(m.far, {many, 1}), nullptr, far.view({many, width}), two_threads);
  for (int i = 0; i < 8; ++i) EXPECT_TRUE(far.row_is(first_far + i, i < 7 ? i + 1.0f : 0.0f)) << i;
  EXPECT_TRUE(far.row_is(0, 0) && far.row_is(many / 2, 0));
}

TEST_F(Int64, UnpermuteBackwardFromAndTo) {
  const Maps m;
  Huge &far = huge(0), &far_y = huge(1);
  const Near near(true);
  std::vector<float> near_probs = numbers(), far_probs(many, NAN), near_dprobs(8), far_dprobs(many, NAN);
  for (int i = 0; i < 8; ++i) {
    far.set_row(first_far + i, i + 1.0f);
    far_y.set_row(first_far + i, 2.0f);
    far_probs[first_far + i] = 0.5f;
  }
  Near dy(false);
  const Tensor y = near.view(), p = view(far_probs, {many, 1}), dp = view(far_dprobs, {many, 1});
  unpermute_bwd(far.view({many, width}), &y, view(m.near, {8}), view(m.far, {many, 1}), &p, dy.view(), &dp,
                two_threads);
  for (int i = 0; i < 8; ++i) {
    EXPECT_TRUE(dy.row_is(i, i < 7 ? (i + 1) * 0.5f : 0.0f)) << i;
    EXPECT_EQ(far_dprobs[first_far + i], i < 7 ? static_cast<float>((i + 1) * (i + 1) * width) : 0.0f) << i;
  }

  const Tensor yf = far_y.view({many, width}), pn = view(near_probs, {8, 1}), dpn = view(near_dprobs, {8, 1});
  unpermute_bwd(near.view(), &yf, view(m.far, {many}), view(m.near, {8, 1}), &pn, far.view({many, width}), &dpn,
                two_threads);
  for (int i = 0; i < 8; ++i) {
    EXPECT_TRUE(far.row_is(first_far + i, i < 7 ? (i + 1) * (i + 1) : 0)) << i;
    EXPECT_EQ(near_dprobs[i], i < 7 ? static_cast<float>(2 * (i + 1) * width) : 0.0f) << i;
  }
  EXPECT_TRUE(far.row_is(0, 0) && far.row_is(many / 2, 0));
}

// The last expert's matrix begins past 2^31 elements; no other expert has rows.
TEST_F(Int64, GemmWeightsAndTheirGradient) {
  Huge& w = huge(0);
  std::vector<int64_t> at(many + 1, 0);
  at[many] = 5;
  std::vector<bf16_t> a(8 * 128, narrow(1.0f)), out(8 * 128, narrow(NAN));
  std::fill(w.row(many - 1), w.row(many - 1) + width, narrow(0.5f));
  for (bool trans_b : {true, false}) {
    gemm_m_grouped(Tensor(a.data(), DType::bf16, {8, 128}), w.view({many, 128, 128}), view(at, {many + 1}), trans_b,
                   Tensor(out.data(), DType::bf16, {8, 128}), two_threads);
    for (int i = 0; i < 8 * 128; ++i) ASSERT_EQ(widen(out[i]), i < 5 * 128 ? 64.0f : 0.0f) << i;
  }
  const Tensor x(a.data(), DType::bf16, {8, 128});
  for (double beta : {1.0, 0.0}) {
    gemm_k_grouped(x, x, view(at, {many + 1}), beta, w.view({many, 128, 128}), two_threads);
    EXPECT_TRUE(w.row_is(many - 1, beta ? 5.5f : 5.0f));
  }
  EXPECT_TRUE(w.row_is(0, 0) && w.row_is(many / 2, 0) && w.row_is(first_far, 0));
}

// Rows of the one expert reach past 2^31 elements of a, or of out.
TEST_F(Int64, GemmRows) {
  Huge& far = huge(0);
  const std::vector<int64_t> all = {0, many}, few = {0, 5};
  std::vector<bf16_t> b(width, narrow(0.5f)), thin(many, narrow(2.0f));
  const Tensor column(thin.data(), DType::bf16, {many, 1});
  gemm_m_grouped(column, Tensor(b.data(), DType::bf16, {1, width, 1}), view(all, {2}), true, far.view({many, width}),
                 two_threads);
  for (int64_t r : {int64_t{0}, many / 2, first_far, many - 1}) EXPECT_TRUE(far.row_is(r, 1.0f)) << r;
  far.set_row(many - 1, 3.0f);
  gemm_m_grouped(far.view({many, width}), Tensor(b.data(), DType::bf16, {1, 1, width}), view(all, {2}), true, column,
                 two_threads);
  EXPECT_EQ(widen(thin[0]), 0.5f * width);
  EXPECT_EQ(widen(thin[many - 2]), 0.5f * width);
  EXPECT_EQ(widen(thin[many - 1]), 1.5f * width);
  gemm_m_grouped(column, Tensor(b.data(), DType::bf16, {1, width, 1}), view(few, {2}), true, far.view({many, width}),
                 two_threads);
  for (int64_t r : {int64_t{5}, many / 2, first_far, many - 1}) EXPECT_TRUE(far.row_is(r, 0.0f)) << r;
}

TEST_F(Int64, SwigluRows) {
  Huge& x = huge(0);
  Huge& out = huge(1);
  for (int i = 0; i < 8; ++i) x.set_row(first_far + i, 1.0f);
  const std::vector<bf16_t> ones(2, narrow(1.0f));
  std::vector<bf16_t> one(1), slopes(2);
  swiglu(Tensor(ones.data(), DType::bf16, {1, 2}), nullptr, {}, Tensor(one.data(), DType::bf16, {1, 1}), {});
  swiglu_bwd(Tensor(ones.data(), DType::bf16, {1, 1}), Tensor(ones.data(), DType::bf16, {1, 2}), nullptr, {},
             Tensor(slopes.data(), DType::bf16, {1, 2}), {});
  swiglu(x.view({many, width}), nullptr, {}, out.view({many, width / 2}), two_threads);
  for (int i = 4; i < 8; ++i) EXPECT_TRUE(out.row_is(first_far + i, widen(one[0]))) << i;

  const Tensor dout = x.view({many, width / 2});  // shares the end of x, where all is one
  swiglu_bwd(dout, x.view({many, width}), nullptr, {}, out.view({many, width}), two_threads);
  for (int i = 0; i < 8; ++i) {
    const bf16_t* row = out.row(first_far + i);
    EXPECT_EQ(std::count(row, row + width / 2, slopes[0]), width / 2) << i;
    EXPECT_EQ(std::count(row + width / 2, row + width, slopes[1]), width / 2) << i;
  }

  const std::vector<int64_t> few = {0, 1};  // the other rows of x are not even there
  const std::vector<bf16_t> row(2 * width, narrow(1.0f));
  const Tensor at = xt::test::view(few, {2});
  swiglu(Tensor(row.data(), DType::bf16, {many, 2 * width}), &at, {}, out.view({many, width}), two_threads);
  EXPECT_TRUE(out.row_is(0, 0) && out.row_is(many / 2, 0) && out.row_is(first_far, 0) && out.row_is(many - 1, 0));
}

}  // namespace
}  // namespace xt::test
