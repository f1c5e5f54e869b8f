#include "cpu/attention.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/simd/bf16.h"
#include "cpu/thread_pool.h"

namespace xt::cpu {
namespace {

// Rows (queries times query heads per key head) of a forward task: many, because keys are copied once per task; few, so
// that tasks balance and their sums stay in L2.
constexpr int64_t forward_rows = 384;
// Queries of a backward task. A document of more is cut into at most max_parts, each with sums of dk and dv of its own.
constexpr int64_t backward_queries = 512, max_parts = 8;
constexpr int64_t keys_per_reduction = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Document {
  int64_t q_begin, num_q, k_begin, num_k;
};

std::vector<Document> documents(const char* op, const Tensor& cu_q, const Tensor& cu_k, int64_t num_q, int64_t num_k,
                                bool causal) {
  const auto check_ends = [&](const char* name, const Tensor& cu, int64_t total) {
    const int32_t *at = cu.ptr<int32_t>(), first = at[0], last = at[cu.shape[0] - 1];
    if (first != 0 || last != total) {
      fail(op, ": ", name, " must go from 0 to ", total, ", but goes from ", first, " to ", last);
    }
  };
  check_ends("cu_q", cu_q, num_q);
  check_ends("cu_k", cu_k, num_k);
  const int32_t *q = cu_q.ptr<int32_t>(), *k = cu_k.ptr<int32_t>();
  std::vector<Document> found;
  for (int64_t s = 0; s + 1 < cu_q.shape[0]; ++s) {
    const Document d = {q[s], int64_t{q[s + 1]} - q[s], k[s], int64_t{k[s + 1]} - k[s]};
    if (d.num_q < 0 || d.num_k < 0) {
      fail(op, ": document ", s, " has ", d.num_q, " queries and ", d.num_k, " keys; boundaries must not decrease");
    }
    if (causal && d.num_q > d.num_k) {
      fail(op, ": document ", s, " has ", d.num_q, " queries but ", d.num_k, " keys; causal needs as many");
    }
    found.push_back(d);
  }
  return found;
}

HeadRows head_rows(const Tensor& x) { return {x.data, x.strides[0], x.strides[1]}; }

AttentionProblem problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                         double scale, bool causal) {
  AttentionProblem p = {};
  p.dtype = q.dtype;
  p.group = q.shape[1] / k.shape[1];
  p.width = q.shape[2];
  p.value_width = v.shape[2];
  p.num_q = q.shape[0];
  p.scale = static_cast<float>(scale);
  p.causal = causal;
  p.q = head_rows(q);
  p.k = head_rows(k);
  p.v = head_rows(v);
  p.out = head_rows(out);
  p.lse = lse.ptr<float>();
  return p;
}

// Queries [begin, end) of a document, counted within it.
AttentionTask task_of(const Document& d, int64_t begin, int64_t end, int64_t kv_head) {
  return {d.q_begin + begin, d.q_begin + end, d.k_begin, d.num_k, d.num_k - d.num_q + begin + 1, kv_head, nullptr};
}

using TaskFn = void (*)(const AttentionProblem&, const AttentionTask&, float* scratch);

void run_tasks(const AttentionProblem& p, std::vector<AttentionTask>& tasks, TaskFn fn,
               int64_t (*scratch_size)(const AttentionProblem&, int64_t rows), int num_threads) {
  // Largest first: a big task must not be the last to start.
  const auto work = [&](const AttentionTask& t) {
    return t.num_queries() * (t.visible(t.q_begin, p.causal) + t.max_visible(p.causal));
  };
  if (num_threads > 1) {
    std::stable_sort(tasks.begin(), tasks.end(),
                     [&](const AttentionTask& a, const AttentionTask& b) { return work(a) > work(b); });
  }
  parallel_for(num_threads, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    fn(p, tasks[i], thread_scratch(scratch_size(p, tasks[i].num_queries() * p.group)));
  });
}

void clear_keys(const Tensor& x, const Document& d) {
  const int64_t bytes = x.shape[1] * x.shape[2] * size_of(x.dtype);
  if (bytes > 0 && d.num_k > 0) std::memset(x.ptr<char>() + d.k_begin * bytes, 0, static_cast<size_t>(d.num_k * bytes));
}

// Sums of [dk | dv] rows of one document and key head, one buffer for each part of its queries.
struct Partials {
  int64_t k_begin, num_keys, kv_head;
  std::vector<std::pair<int64_t, int64_t>> parts;  // keys it covers, place in memory; in order of the queries
};

void store(const Tensor& to, int64_t at, float value) {
  if (to.dtype == DType::f32) {
    to.ptr<float>()[at] = value;
  } else {
    to.ptr<bf16_t>()[at] = narrow(value);
  }
}

void add_partials(const Partials& sums, const float* memory, int64_t key, const Tensor& dk, const Tensor& dv) {
  const int64_t width = dk.shape[2], row = width + dv.shape[2];
  const int64_t at = (sums.k_begin + key) * dk.shape[1] + sums.kv_head;
  std::vector<float> total(static_cast<size_t>(row), 0.0f);
  for (const auto& [num_keys, place] : sums.parts) {
    if (key >= num_keys) continue;
    const float* from = memory + place + key * row;
    for (int64_t j = 0; j < row; ++j) total[j] += from[j];
  }
  for (int64_t j = 0; j < width; ++j) store(dk, at * width + j, total[j]);
  for (int64_t j = width; j < row; ++j) store(dv, at * (row - width) + j - width, total[j]);
}

}  // namespace

void attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q, const Tensor& cu_k, double scale,
               bool causal, const Tensor& out, const Tensor& lse, int num_threads) {
  const AttentionProblem p = problem(q, k, v, out, lse, scale, causal);
  std::vector<AttentionTask> tasks;
  for (const Document& d : documents("attention", cu_q, cu_k, q.shape[0], k.shape[0], causal)) {
    if (!d.num_q || !p.group) continue;
    const int64_t parts = ceil_div(d.num_q * p.group, forward_rows), length = ceil_div(d.num_q, parts);
    for (int64_t head = 0; head < k.shape[1]; ++head) {
      for (int64_t i = 0; i < d.num_q; i += length) {
        tasks.push_back(task_of(d, i, std::min(d.num_q, i + length), head));
      }
    }
  }
  const Kernels& isa = kernels();
  run_tasks(p, tasks, isa.attention, isa.attention_scratch, num_threads);
}

void attention_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                   const Tensor& lse, const Tensor& cu_q, const Tensor& cu_k, double scale, bool causal,
                   const Tensor& dq, const Tensor& dk, const Tensor& dv, int num_threads) {
  AttentionProblem p = problem(q, k, v, out, lse, scale, causal);
  p.dout = head_rows(dout);
  p.dq = head_rows(dq);
  p.dk = head_rows(dk);
  p.dv = head_rows(dv);
  const int64_t row = p.width + p.value_width;
  std::vector<AttentionTask> tasks;
  std::vector<Partials> partials;
  std::vector<std::pair<size_t, int64_t>> places;  // task, where its sums go
  int64_t floats = 0;
  for (const Document& d : documents("attention_bwd", cu_q, cu_k, q.shape[0], k.shape[0], causal)) {
    if (!d.num_q || !p.group) {
      clear_keys(dk, d);
      clear_keys(dv, d);
      continue;
    }
    const int64_t length = std::max(backward_queries, ceil_div(d.num_q, max_parts));
    for (int64_t head = 0; head < k.shape[1]; ++head) {
      if (d.num_q > length) partials.push_back({d.k_begin, d.num_k, head, {}});
      for (int64_t i = 0; i < d.num_q; i += length) {
        tasks.push_back(task_of(d, i, std::min(d.num_q, i + length), head));
        if (d.num_q <= length) continue;
        const int64_t num_keys = tasks.back().max_visible(causal);
        partials.back().parts.emplace_back(num_keys, floats);
        places.emplace_back(tasks.size() - 1, floats);
        floats += num_keys * row;
      }
    }
  }
  const std::unique_ptr<float[]> memory(new float[static_cast<size_t>(floats)]);
  for (const auto& [task, place] : places) tasks[task].partial = memory.get() + place;
  const Kernels& isa = kernels();
  run_tasks(p, tasks, isa.attention_bwd, isa.attention_bwd_scratch, num_threads);
  for (const Partials& sums : partials) {
    parallel_ranges(num_threads, sums.num_keys, keys_per_reduction, [&](int64_t begin, int64_t end) {
      for (int64_t key = begin; key < end; ++key) add_partials(sums, memory.get(), key, dk, dv);
    });
  }
}

}  // namespace xt::cpu
