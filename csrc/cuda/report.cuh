// What a call reports, summed by warps: each lane over rows of its own, then by number of
// BatchSums.
#pragma once

#include <cstddef>

#include "../common/metrics.h"
#include "report.h"

namespace grpo::cuda {

static_assert(kSumCount <= 32, "one lane per number");

// A warp's 32 BatchSums in shared memory, the numbers of one lane in a column.
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

// One number of BatchSums per lane. Without branches, so that the loads of many can be under way.
class LaneSum {
 public:
  __device__ explicit LaneSum(int lane) {
    const auto holds = [&](size_t offset) { return lane == int(offset / sizeof(double)); };
    is_max_ = holds(offsetof(BatchSums, ratio_max)) || holds(offsetof(BatchSums, importance_max)) ||
              holds(offsetof(BatchSums, difference_max));
    is_min_ = holds(offsetof(BatchSums, importance_min));
    value_ = is_min_ ? INFINITY : 0.0;
  }
  __device__ __forceinline__ void add(double v) {
    const double sum = value_ + v;
    const bool replaces = is_max_ ? v > value_ : v < value_;
    value_ = is_max_ || is_min_ ? (replaces ? v : value_) : sum;
  }
  // The lane's number of a warp's 32 BatchSums. This runs once, so it is short: instructions that
  // nobody has fetched before take longer than the additions.
  __device__ __forceinline__ void add_row(const double (*sums)[32], int lane) {
    if (lane >= kSumCount) return;
#pragma unroll 8
    for (int i = 0; i < 32; ++i) add(sums[lane][(i + lane) % 32]);
  }
  __device__ double value() const { return value_; }
  // All lanes' numbers, in every lane.
  __device__ BatchSums gather() const {
    BatchSums sums;
    double* numbers = reinterpret_cast<double*>(&sums);
#pragma unroll
    for (int k = 0; k < kSumCount; ++k) numbers[k] = __shfl_sync(~0u, value_, k);
    return sums;
  }

 private:
  bool is_max_, is_min_;
  double value_;
};

// Sequences with an unmasked token, counted by a warp.
__device__ __forceinline__ int count_sequences(const PolicyParams<float>& p,
                                               const SequenceTerms<float>* terms) {
  int sequences = 0;
  for (int64_t b = threadIdx.x & 31; b < p.batch; b += 32) sequences += terms[b].tokens > 0;
  return __reduce_add_sync(~0u, sequences);
}

// Called by one warp of each reporter, with its sums; the last one folds all, always in one order.
// Token level without an off-policy mask: every sequence with a token counts as kept.
__device__ __forceinline__ void finish_report(const Report& report, const PolicyParams<float>& p,
                                              int sequences, double (*sums_of_lanes)[32],
                                              uint32_t reporter, uint32_t reporters) {
  const int lane = threadIdx.x & 31;
  __syncwarp();        // all lanes' sums are there
  LaneSum mine(lane);  // empty
  mine.add_row(sums_of_lanes, lane);
  if (lane < kSumCount) __stcg(report.sums + reporter * kSumCount + lane, mine.value());
  __threadfence();
  __syncwarp();
  uint32_t before = 0;
  if (lane == 0) before = atomicAdd(report.finished, 1u);
  if (__shfl_sync(~0u, before, 0) != reporters - 1) return;
  __threadfence();
  clear_column(sums_of_lanes, lane);
  for (uint32_t r = lane; r < reporters; r += 32) {
    BatchSums other;
    double* numbers = reinterpret_cast<double*>(&other);
#pragma unroll
    for (int k = 0; k < kSumCount; ++k) numbers[k] = __ldcg(report.sums + r * kSumCount + k);
    add_to_column(sums_of_lanes, lane, other);
  }
  __syncwarp();
  LaneSum total(lane);
  total.add_row(sums_of_lanes, lane);
  BatchSums sums = total.gather();
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
