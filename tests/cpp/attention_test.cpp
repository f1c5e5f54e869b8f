#include "xtuner/ops/attention.h"

#include "helpers.h"

namespace xt::test {
namespace {

constexpr double eps = 6e-8;       // relative error of one operation in fp32
constexpr double exp_error = 5e-7;  // relative, of exp, its argument's units included
constexpr double smallest = 2e-38;  // weights below become zero

struct Document {
  int64_t num_q, num_k;
};

struct Case {
  DType dtype;
  std::vector<Document> docs;
  int64_t kv_heads, group, width, value_width;
  bool causal;
  double scale = 0.3;
  int64_t gap = 0;  // columns of NaN between the heads of q, k and v: they are parts of something wider

  int64_t heads() const { return kv_heads * group; }
  int64_t num_q() const { return cu(true).back(); }
  int64_t num_k() const { return cu(false).back(); }
  std::vector<int32_t> cu(bool queries) const {
    std::vector<int32_t> at = {0};
    for (const Document& d : docs) at.push_back(at.back() + static_cast<int32_t>(queries ? d.num_q : d.num_k));
    return at;
  }
};

// [tokens, heads, width] inside [tokens, heads, width + gap], whose other elements are NaN.
class Rows {
 public:
  Rows(const Case& c, int64_t tokens, int64_t heads, int64_t width, Rng& rng)
      : row_(width + c.gap), heads_(heads), width_(width), wide_(c.dtype, {tokens, heads, row_}) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < wide_.count(); ++i) {
      if (i % row_ < width) wide_.set(i, normal(rng));
    }
  }
  double operator()(int64_t token, int64_t head, int64_t d) const { return wide_[(token * heads_ + head) * row_ + d]; }
  Tensor view() const {
    Tensor t = wide_.view();
    t.shape[2] = width_;
    return t;
  }

 private:
  int64_t row_, heads_, width_;
  Array wide_;
};

struct Inputs {
  Rows q, k, v;
  std::vector<int32_t> cu_q, cu_k;

  Inputs(const Case& c, Rng& rng)
      : q(c, c.num_q(), c.heads(), c.width, rng),
        k(c, c.num_k(), c.kv_heads, c.width, rng),
        v(c, c.num_k(), c.kv_heads, c.value_width, rng),
        cu_q(c.cu(true)),
        cu_k(c.cu(false)) {}
  Tensor bounds(const std::vector<int32_t>& cu) const { return test::view(cu, {static_cast<int64_t>(cu.size())}); }
};

// A number, and by how much fp32 arithmetic may miss it.
struct Value {
  double is = 0, error = 0;
  void add(double term, double term_error, double terms) {
    is += term;
    error += term_error + std::fabs(term) * terms * eps;
  }
};

// Scores of one query with the keys it may look at.
std::vector<Value> scores(const Case& c, const Inputs& in, const Document& d, int64_t q0, int64_t k0, int64_t i,
                          int64_t h) {
  std::vector<Value> s(c.causal ? d.num_k - d.num_q + i + 1 : d.num_k);
  for (size_t j = 0; j < s.size(); ++j) {
    for (int64_t x = 0; x < c.width; ++x) {
      s[j].add(c.scale * in.q(q0 + i, h, x) * in.k(k0 + j, h / c.group, x), 0, static_cast<double>(c.width) + 3);
    }
  }
  return s;
}

using QueryFn = std::function<void(const Document&, int64_t q0, int64_t k0, int64_t i, int64_t h)>;

void for_each_query(const Case& c, const QueryFn& body) {
  int64_t q0 = 0, k0 = 0;
  for (const Document& d : c.docs) {
    for (int64_t i = 0; i < d.num_q; ++i) {
      for (int64_t h = 0; h < c.heads(); ++h) body(d, q0, k0, i, h);
    }
    q0 += d.num_q;
    k0 += d.num_k;
  }
}

struct Result {
  Array out, lse;
  explicit Result(const Case& c)
      : out(c.dtype, {c.num_q(), c.heads(), c.value_width}), lse(DType::f32, {c.heads(), c.num_q()}) {}
};

Result run_forward(const Case& c, const Inputs& in, int threads) {
  Result r(c);
  attention(in.q.view(), in.k.view(), in.v.view(), in.bounds(in.cu_q), in.bounds(in.cu_k), c.scale, c.causal,
            r.out.view(), r.lse.view(), {nullptr, threads});
  return r;
}

void check_forward(const Case& c, const Inputs& in) {
  const Result r = run_forward(c, in, 1);
  for_each_query(c, [&](const Document& d, int64_t q0, int64_t k0, int64_t i, int64_t h) {
    const std::vector<Value> s = scores(c, in, d, q0, k0, i, h);
    double top = -INFINITY, sum = 0, score_error = 0;
    for (const Value& x : s) {
      top = std::max(top, x.is);
      score_error = std::max(score_error, x.error);
    }
    for (const Value& x : s) sum += std::exp(x.is - top);
    const double weight_error = 2 * score_error + 2 * exp_error + 2 * static_cast<double>(s.size()) * eps;
    const double lse = r.lse[h * c.num_q() + q0 + i];
    if (s.empty()) {
      EXPECT_EQ(lse, -INFINITY);
    } else {
      ASSERT_NEAR(lse, top + std::log(sum), weight_error + 4 * eps * std::fabs(top)) << "query " << i << " head " << h;
    }
    for (int64_t x = 0; x < c.value_width; ++x) {
      Value o;
      for (size_t j = 0; j < s.size(); ++j) {
        const double weight = std::exp(s[j].is - top) / sum, v = in.v(k0 + j, h / c.group, x);
        o.add(weight * v, (weight * weight_error + smallest) * std::fabs(v), static_cast<double>(s.size()));
      }
      const double got = r.out[((q0 + i) * c.heads() + h) * c.value_width + x];
      ASSERT_NEAR(got, o.is, o.error + r.out.rounding(o.is)) << "query " << i << " head " << h << " column " << x;
    }
  });
  for (int threads : {2, 3, 8}) {
    const Result again = run_forward(c, in, threads);
    EXPECT_EQ(r.out.bytes(), again.out.bytes()) << threads << " threads";
    EXPECT_EQ(r.lse.bytes(), again.lse.bytes()) << threads << " threads";
  }
}

struct Gradients {
  Array dq, dk, dv;
  explicit Gradients(const Case& c)
      : dq(c.dtype, {c.num_q(), c.heads(), c.width}),
        dk(c.dtype, {c.num_k(), c.kv_heads, c.width}),
        dv(c.dtype, {c.num_k(), c.kv_heads, c.value_width}) {}
};

Gradients run_backward(const Case& c, const Inputs& in, const Array& dout, const Result& saved, int threads) {
  Gradients g(c);
  attention_bwd(dout.view(), in.q.view(), in.k.view(), in.v.view(), saved.out.view(), saved.lse.view(),
                in.bounds(in.cu_q), in.bounds(in.cu_k), c.scale, c.causal, g.dq.view(), g.dk.view(), g.dv.view(),
                {nullptr, threads});
  return g;
}

void expect_values(const Array& got, const std::vector<Value>& wanted, const char* name) {
  for (int64_t i = 0; i < got.count(); ++i) {
    ASSERT_NEAR(got[i], wanted[i].is, wanted[i].error + got.rounding(wanted[i].is)) << name << " element " << i;
  }
}

// The gradient as a function of its arguments, `out` and `lse` among them: their own errors are no errors here.
void check_backward(const Case& c, const Inputs& in, Rng& rng) {
  const Result saved = run_forward(c, in, 1);
  const Array dout = Array(c.dtype, {c.num_q(), c.heads(), c.value_width}).randomise(rng);
  const Gradients g = run_backward(c, in, dout, saved, 1);
  std::vector<Value> dq(g.dq.count()), dk(g.dk.count()), dv(g.dv.count());
  for_each_query(c, [&](const Document& d, int64_t q0, int64_t k0, int64_t i, int64_t h) {
    const std::vector<Value> s = scores(c, in, d, q0, k0, i, h);
    const int64_t row = (q0 + i) * c.heads() + h, w = c.width, wv = c.value_width;
    const double lse = saved.lse[h * c.num_q() + q0 + i];
    const double terms_q = static_cast<double>(s.size()), terms_k = static_cast<double>(d.num_q * c.group);
    Value delta;
    for (int64_t x = 0; x < wv; ++x) {
      delta.add(dout[row * wv + x] * saved.out[row * wv + x], 0, static_cast<double>(wv));
    }
    for (size_t j = 0; j < s.size(); ++j) {
      const int64_t key = (k0 + static_cast<int64_t>(j)) * c.kv_heads + h / c.group;
      const double p = std::exp(s[j].is - lse);
      const double p_error =
          p * (s[j].error + exp_error + 4 * eps * (std::fabs(lse) + std::fabs(s[j].is))) + smallest;
      Value dp;
      for (int64_t x = 0; x < wv; ++x) {
        dp.add(dout[row * wv + x] * in.v(k0 + j, h / c.group, x), 0, static_cast<double>(wv));
        dv[key * wv + x].add(p * dout[row * wv + x], p_error * std::fabs(dout[row * wv + x]), terms_k);
      }
      const double ds = p * (dp.is - delta.is);
      const double ds_error =
          p_error * std::fabs(dp.is - delta.is) + p * (dp.error + delta.error) + 3 * eps * std::fabs(ds);
      for (int64_t x = 0; x < w; ++x) {
        const double k = c.scale * in.k(k0 + j, h / c.group, x), q = c.scale * in.q(q0 + i, h, x);
        dq[row * w + x].add(ds * k, ds_error * std::fabs(k), terms_q + 3);
        dk[key * w + x].add(ds * q, ds_error * std::fabs(q), terms_k + 3);
      }
    }
  });
  expect_values(g.dq, dq, "dq");
  expect_values(g.dk, dk, "dk");
  expect_values(g.dv, dv, "dv");
  for (int threads : {2, 3, 8}) {
    const Gradients again = run_backward(c, in, dout, saved, threads);
    EXPECT_EQ(g.dq.bytes(), again.dq.bytes()) << threads << " threads";
    EXPECT_EQ(g.dk.bytes(), again.dk.bytes()) << threads << " threads";
    EXPECT_EQ(g.dv.bytes(), again.dv.bytes()) << threads << " threads";
  }
}

void check(const Case& c, Rng& rng) {
  SCOPED_TRACE(std::string(c.dtype == DType::f32 ? "f32" : "bf16") + (c.causal ? " causal" : "") + " heads " +
               std::to_string(c.kv_heads) + "x" + std::to_string(c.group) + " D" + std::to_string(c.width) + " Dv" +
               std::to_string(c.value_width) + " gap " + std::to_string(c.gap));
  const Inputs in(c, rng);
  check_forward(c, in);
  check_backward(c, in, rng);
}

std::vector<Document> random_documents(Rng& rng, bool causal) {
  std::vector<Document> docs;
  for (int64_t n = rng() % 5; n >= 0; --n) {
    const int64_t k = pick(rng, {0, 1, 2, 7, 15, 16, 17, 33, 64});
    switch (rng() % 4) {
      case 0: docs.push_back({std::min<int64_t>(k, 1), k}); break;  // generation
      case 1: docs.push_back({k / 2, k}); break;
      case 2: docs.push_back({causal ? k : pick(rng, {0, 3, 20}), k}); break;
      default: docs.push_back({k, k});
    }
  }
  return docs;
}

TEST(Attention, MatchesReference) {
  Rng rng(1);
  for_each_isa([&] {
    for (DType dtype : {DType::f32, DType::bf16}) {
      for (int64_t width : {1, 2, 7, 8, 15, 16, 17, 33, 64, 129, 256}) {
        for (bool causal : {true, false}) {
          const int64_t narrower = rng() % 2 ? width : 1 + static_cast<int64_t>(rng() % width);
          const int64_t group = pick(rng, {1, 2, 3, 8}), gap = pick(rng, {0, 5});
          check({dtype, random_documents(rng, causal), pick(rng, {1, 2}), group, width, narrower, causal, 0.3, gap}, rng);
        }
      }
    }
  });
}

// More keys than a block, more rows than a task, more queries than one part of the backward.
TEST(Attention, MatchesReferenceBeyondOneBlock) {
  Rng rng(2);
  for_each_isa([&] {
    check({DType::f32, {{3, 700}, {130, 130}, {1, 129}}, 1, 2, 8, 8, true}, rng);
    check({DType::f32, {{600, 601}}, 1, 1, 8, 5, true}, rng);
    check({DType::bf16, {{601, 300}, {5, 5}}, 1, 1, 4, 4, false, 1.0, 3}, rng);
  });
}

TEST(Attention, LargeScoresNeitherOverflowNorVanish) {
  Rng rng(3);
  for_each_isa([&] {
    check({DType::f32, {{40, 40}}, 1, 2, 16, 16, true, 40.0}, rng);
    check({DType::f32, {{40, 300}}, 1, 1, 16, 16, true, -7.0}, rng);
    check({DType::f32, {{9, 9}}, 1, 1, 16, 16, true, 0.0}, rng);
  });
}

TEST(Attention, NothingToDo) {
  Rng rng(4);
  check({DType::f32, {}, 2, 2, 8, 8, true}, rng);
  check({DType::f32, {{0, 0}, {0, 0}}, 2, 2, 8, 8, true}, rng);
  check({DType::f32, {{4, 4}}, 2, 0, 8, 8, true}, rng);
}

TEST(Attention, NamesBadArguments) {
  Rng rng(5);
  const Case c = {DType::f32, {{3, 3}, {5, 5}}, 2, 2, 8, 8, true};
  Inputs in(c, rng);
  const auto forward = [&](const Tensor& q, const Tensor& k, const Tensor& v, std::vector<int32_t> cu_q = {0, 3, 8},
                           std::vector<int32_t> cu_k = {0, 3, 8}) {
    const Result r(c);
    attention(q, k, v, in.bounds(cu_q), in.bounds(cu_k), 1, true, r.out.view(), r.lse.view(), {});
  };
  const Tensor q = in.q.view(), k = in.k.view(), v = in.v.view();
  Tensor bad = k;
  bad.shape[2] = 6;
  expect_error([&] { forward(q, bad, v); }, "attention: k must be float32 [Tk, Hkv, D=8], got float32 [8, 2, 6] on cpu");
  bad = q;
  bad.strides[2] = 2;
  expect_error([&] { forward(bad, k, v); }, "attention: q must be contiguous in its last dim, got float32 [8, 4, 8]");
  bad = q;
  bad.shape[1] = 3;
  expect_error([&] { forward(bad, k, v); }, "attention: q has 3 heads, which is no multiple of k's 2");
  bad = q;
  bad.shape[2] = 4;
  Tensor narrow_k = k;
  narrow_k.shape[2] = 4;
  expect_error([&] { forward(bad, narrow_k, v); }, "attention: v must not be wider than q and k, got Dv=8 and D=4");
  expect_error([&] { forward(q, k, v, {0, 3, 7}); }, "attention: cu_q must go from 0 to 8, but goes from 0 to 7");
  expect_error([&] { forward(q, k, v, {}); }, "attention: cu_q must have at least one element");
  expect_error([&] { forward(q, k, v, {0, 3, 8}, {0, 9, 8}); },
               "attention: document 1 has 5 queries and -1 keys; boundaries must not decrease");
  expect_error([&] { forward(q, k, v, {0, 5, 8}); }, "attention: document 0 has 5 queries but 3 keys; causal needs as many");
  expect_error([&] { forward(q, k, v, {0, 8}); }, "attention: cu_k must be int32 [S+1=2], got int32 [3]");
  const Result saved(c);
  const Gradients g(c);
  expect_error(
      [&] {
        attention_bwd(saved.out.view(), q, k, v, saved.out.view(), saved.out.view(), in.bounds(in.cu_q),
                      in.bounds(in.cu_k), 1, true, g.dq.view(), g.dk.view(), g.dv.view(), {});
      },
      "attention_bwd: lse must be float32 [Hq=4, Tq=8], got float32 [8, 4, 8]");
}

}  // namespace
}  // namespace xt::test
