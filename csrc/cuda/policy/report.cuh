// Accumulate a call's loss and metrics: each lane of a warp sums its rows; at the end all warps
// fold, one field of BatchSums at a time.
#pragma once

#include <cstddef>

#include "common/metrics.h"
#include "cuda/base/ptx.cuh"
#include "cuda/policy/report.h"

namespace grpo::cuda {

// A warp's 32 BatchSums in shared memory: a row per field, a column per lane.
__device__ __forceinline__ void clear_column(double (*sums)[32], int lane) {
  const BatchSums none;
  const double* numbers = reinterpret_cast<const double*>(&none);
#pragma unroll
  for (int k = 0; k < kSumCount; ++k) sums[k][lane] = numbers[k];
}
__device__ __forceinline__ void add_to_column(double (*sums)[32], int lane, const BatchSums& row) {
  BatchSums total;
  double* numbers = reinterpret_cast<double*>(&total);
#pragma unroll
  for (int k = 0; k < kSumCount; ++k) numbers[k] = sums[k][lane];
  merge(&total, row);
#pragma unroll
  for (int k = 0; k < kSumCount; ++k) sums[k][lane] = numbers[k];
}

// Combine field k of two partial sums. Short and shared by all k: a cold instruction fetch costs
// more than the additions.
__device__ __forceinline__ double join(int k, double a, double b) {
  const auto is = [k](size_t offset) { return k == int(offset / sizeof(double)); };
  if (is(offsetof(BatchSums, importance_min))) return b < a ? b : a;
  const bool greatest = is(offsetof(BatchSums, ratio_max)) ||
                        is(offsetof(BatchSums, importance_max)) ||
                        is(offsetof(BatchSums, difference_max));
  return greatest ? greater(a, b) : a + b;
}
__device__ __forceinline__ double join_lanes(int k, double v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v = join(k, v, __shfl_xor_sync(~0u, v, o));
  return v;
}

// Count the sequences with an unmasked token (one warp).
__device__ __forceinline__ int count_sequences(const PolicyParams<float>& p,
                                               const SequenceConstants<float>* constants) {
  int sequences = 0;
  for (int64_t b = threadIdx.x & 31; b < p.batch; b += 32) sequences += constants[b].tokens > 0;
  return __reduce_add_sync(~0u, sequences);
}

// Shared memory of finish_report.
struct ReportShared {
  double sums[kSumCount][32];  // a column per lane of the reporting warp
  double totals[kSumCount];
  uint32_t last;  // whether this reporter is the last one
};

// Fold the report with `workers` warps, which take the fields of BatchSums in turn. First they fold
// this reporter's sums. In the last reporter to arrive they then fold those of all reporters, in a
// fixed order. Token level without an off-policy mask: every sequence with a token counts as kept.
__device__ __forceinline__ void finish_report(const Report& report, uint32_t* finished,
                                              const PolicyParams<float>& p,
                                              const SequenceConstants<float>* constants,
                                              ReportShared& sh, int worker, int workers,
                                              uint32_t reporter, uint32_t reporters) {
  constexpr int kBarrier = 1, kLoads = 5;  // in flight per lane
  const int lane = threadIdx.x & 31;
  ptx::named_barrier(kBarrier, workers * 32);  // the reporting warp has written its sums
  for (int k = worker; k < kSumCount; k += workers) {
    const double sum = join_lanes(k, sh.sums[k][lane]);
    if (lane == 0) {
      __stcg(report.sums + k * kMaxReporters + reporter, sum);
      __threadfence();
    }
  }
  ptx::named_barrier(kBarrier, workers * 32);
  // The last reporter resets the counter to 0 for the next call.
  if (worker == 0 && lane == 0) sh.last = atomicInc(finished, reporters - 1) == reporters - 1;
  ptx::named_barrier(kBarrier, workers * 32);
  if (!sh.last) return;
  __threadfence();
  for (int k = worker; k < kSumCount; k += workers) {
    const double* sums = report.sums + k * kMaxReporters;
    const double none =
        k == int(offsetof(BatchSums, importance_min) / sizeof(double)) ? INFINITY : 0;
    double total = none;
    for (uint32_t r = lane; r < reporters; r += 32 * kLoads) {
      double parts[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i)
        parts[i] = r + 32 * i < reporters ? __ldcg(sums + r + 32 * i) : none;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) total = join(k, total, parts[i]);
    }
    total = join_lanes(k, total);
    if (lane == 0) sh.totals[k] = total;
  }
  const bool writes = worker == workers - 1;  // the reporting warp
  const int sequences = writes ? count_sequences(p, constants) : 0;
  ptx::named_barrier(kBarrier, workers * 32);
  if (!writes) return;
  BatchSums sums;
  double* numbers = reinterpret_cast<double*>(&sums);
#pragma unroll
  for (int k = 0; k < kSumCount; ++k) numbers[k] = sh.totals[k];
  sums.sequences = sums.kept = sequences;
  if (lane == 0) *p.loss = float(sums.loss);
  const Metrics metrics(sums);
  double numerator = 0, denominator = 1;
#pragma unroll
  for (int k = 0; k < kMetricCount; ++k) {
    numerator = lane == k ? metrics.numerators[k] : numerator;
    denominator = lane == k ? metrics.denominators[k] : denominator;
  }
  if (lane < kMetricCount) p.metrics[lane] = float(numerator / denominator);
}

}  // namespace grpo::cuda
