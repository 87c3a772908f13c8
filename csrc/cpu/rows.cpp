// Loops over rows around the kernels of one instruction set.
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/cpu.h"
#include "cpu/policy_loop.h"
#include "cpu/row_kernels.h"
#include "cpu/vec.h"

namespace grpo::cpu {
namespace {

struct Isa {
  const char* name;
  const RowKernels<float>* kernels;
};

Isa supported(const char* wanted) {
  const auto allows = [&](const char* name) { return !wanted || !std::strcmp(wanted, name); };
#if defined(GRPO_X86)
  if (allows("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return {"avx512", avx512_row_kernels()};
  if (allows("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return {"avx2", avx2_row_kernels()};
#endif
  if (allows("portable")) return {"portable", portable_row_kernels()};
  return {nullptr, nullptr};
}

Isa& active() {
  static Isa isa = supported(nullptr);
  return isa;
}

const RowKernels<float>& kernels_for(DType dtype, float) {
  return active().kernels[static_cast<int>(dtype)];
}
const RowKernels<double>& kernels_for(DType, double) { return portable_row_kernels_fp64()[0]; }

int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

template <class Real>
const char* logits_row(const RowParams<Real>& p, int64_t i) {
  const int64_t offset =
      i / p.length * p.logits_stride_batch + i % p.length * p.logits_stride_position;
  return static_cast<const char*>(p.logits) + offset * element_size(p.dtype);
}
template <class Real>
char* grad_row(const RowParams<Real>& p, int64_t i) {
  const int64_t offset = i / p.length * p.grad_stride_batch + i % p.length * p.grad_stride_position;
  return static_cast<char*>(p.grad) + offset * element_size(p.dtype);
}

template <class Real>
bool masked(const RowParams<Real>& p, int64_t i) {
  return p.mask && !p.mask[i];
}

// Call f(i) for every row; threads take rows of short vocabularies in bundles.
template <class F>
void for_rows(int64_t rows, int64_t vocab, int threads, const F& f) {
  const int chunk = int(1 + 16384 / (vocab + 1));
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads) if (rows > 1)
  for (int64_t i = 0; i < rows; ++i) f(i);
}

// Ask for large pages: a fresh gradient buffer faults page by page at first touch.
template <class Real>
void prefer_large_pages(const RowParams<Real>& p) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (!p.grad || p.grad == p.logits || p.batch * p.length == 0) return;
  constexpr uintptr_t kLargePage = uintptr_t(1) << 21;
  const uintptr_t first =
      (reinterpret_cast<uintptr_t>(grad_row(p, 0)) + kLargePage - 1) & ~(kLargePage - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(grad_row(p, p.batch * p.length - 1)) +
                          p.vocab * element_size(p.dtype)) &
                         ~(kLargePage - 1);
  if (last > first) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Write the statistics of row i; false if its id is out of range.
template <class Real>
bool stats_of_row(const RowParams<Real>& p, const RowKernels<Real>& kernels, int64_t i,
                  RowGradient<Real>* row) {
  const int64_t target = p.ids[i];
  if (target < 0 || target >= p.vocab) return false;
  const auto stats =
      kernels.stats(logits_row(p, i), p.vocab, target, p.transform, p.entropy != nullptr);
  row->target = target;
  row->max = stats.record.max;
  row->log_sum = std::log(stats.record.sum);
  row->logp = Real(stats.target - std::log(double(stats.record.sum)));
  row->entropy = p.entropy ? entropy(stats.record) : Real(0);
  p.logps[i] = row->logp;
  if (p.entropy) p.entropy[i] = row->entropy;
  if (p.lse) p.lse[i] = row->max + row->log_sum;
  return true;
}

template <class Real>
void clear_stats(const RowParams<Real>& p, int64_t i) {
  p.logps[i] = 0;
  if (p.entropy) p.entropy[i] = 0;
  if (p.lse) p.lse[i] = 0;
}

template <class Real>
void write_gradient(const RowParams<Real>& p, const RowKernels<Real>& kernels, int64_t i,
                    const RowGradient<Real>& row) {
  if (row.coef == 0 && row.entropy_coef == 0)
    std::memset(grad_row(p, i), 0, p.vocab * element_size(p.dtype));
  else
    kernels.gradient(logits_row(p, i), grad_row(p, i), p.vocab, p.transform, row);
}

void note_bad_row(std::atomic<int64_t>* first, int64_t i) {
  int64_t seen = first->load();
  while (i < seen && !first->compare_exchange_weak(seen, i)) {
  }
}
constexpr int64_t kNoRow = std::numeric_limits<int64_t>::max();

}  // namespace

const char* active_isa() { return active().name; }

bool select_isa(const char* name) {
  const Isa isa = supported(name);
  if (isa.kernels) active() = isa;
  return isa.kernels != nullptr;
}

template <class Real>
int64_t row_stats(const RowParams<Real>& p, int threads) {
  const auto& kernels = kernels_for(p.dtype, Real());
  std::atomic<int64_t> bad{kNoRow};
  for_rows(p.batch * p.length, p.vocab, threads, [&](int64_t i) {
    RowGradient<Real> row{};
    if (masked(p, i))
      clear_stats(p, i);
    else if (!stats_of_row(p, kernels, i, &row))
      note_bad_row(&bad, i);
  });
  return bad.load() == kNoRow ? -1 : bad.load();
}

template <class Real>
void row_gradient(const RowParams<Real>& p, int threads) {
  const auto& kernels = kernels_for(p.dtype, Real());
  prefer_large_pages(p);
  for_rows(p.batch * p.length, p.vocab, threads, [&](int64_t i) {
    RowGradient<Real> row{};
    if (!masked(p, i)) {
      row.target = p.ids[i];
      row.coef = p.coef[i];
      row.entropy_coef = p.entropy_coef ? p.entropy_coef[i] : Real(0);
      row.logp = p.logps[i];
      row.entropy = p.entropy ? p.entropy[i] : Real(0);
      row.max = p.lse[i];  // p_j = exp(x_j - lse)
      row.log_sum = 0;
    }
    write_gradient(p, kernels, i, row);
  });
}

template <class Real>
int64_t row_loss(const RowParams<Real>& p, const PolicyParams<Real>& policy, int threads) {
  const auto& kernels = kernels_for(p.dtype, Real());
  std::atomic<int64_t> bad{kNoRow};
  const auto constants = constants_before_logits(policy, threads);
  if (p.grad) prefer_large_pages(p);
  for_rows(p.batch * p.length, p.vocab, threads, [&](int64_t i) {
    RowGradient<Real> row{};
    if (masked(p, i)) {
      clear_stats(p, i);
    } else if (!stats_of_row(p, kernels, i, &row)) {
      note_bad_row(&bad, i);
      return;
    } else if (p.grad) {
      const int64_t b = i / p.length;
      const auto token = evaluate_token(policy, constants[b], b, i, row.logp, row.entropy);
      row.coef = logp_coefficient(policy, constants[b], token);
      row.entropy_coef = entropy_coefficient(policy, constants[b]);
    }
    if (p.grad) write_gradient(p, kernels, i, row);
  });
  if (bad.load() != kNoRow) return bad.load();
  policy_loss(policy, threads);
  return -1;
}

namespace {
template <class T, class Real>
void scale_row(T* g, int64_t n, Real factor) {
  for (int64_t j = 0; j < n; ++j) from_real(Real(to_real(g[j])) * factor, g + j);
}
}  // namespace

template <class Real>
void scale_rows(const RowParams<Real>& p, Real factor, int threads) {
  for_rows(p.batch * p.length, p.vocab, threads, [&](int64_t i) {
    void* row = grad_row(p, i);
    switch (p.dtype) {
      case DType::kBFloat16:
        return scale_row(static_cast<BFloat16*>(row), p.vocab, float(factor));
      case DType::kFloat16:
        return scale_row(static_cast<Float16*>(row), p.vocab, float(factor));
      case DType::kFloat32:
        return scale_row(static_cast<float*>(row), p.vocab, float(factor));
      case DType::kFloat64:
        return scale_row(static_cast<double*>(row), p.vocab, double(factor));
    }
  });
}

#define GRPO_INSTANTIATE(Real)                                                             \
  template int64_t row_stats<Real>(const RowParams<Real>&, int);                           \
  template void row_gradient<Real>(const RowParams<Real>&, int);                           \
  template int64_t row_loss<Real>(const RowParams<Real>&, const PolicyParams<Real>&, int); \
  template void scale_rows<Real>(const RowParams<Real>&, Real, int);
GRPO_INSTANTIATE(float)
GRPO_INSTANTIATE(double)
#undef GRPO_INSTANTIATE

}  // namespace grpo::cpu
