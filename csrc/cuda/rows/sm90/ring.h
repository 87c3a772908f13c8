// Interface of the persistent kernels of sm_90: loss and gradient in one pass; statistics alone.
#pragma once

#include "common/policy.h"
#include "common/row_params.h"
#include "cuda/base/device.h"
#include "cuda/policy/report.h"
#include "cuda/rows/plan.h"

namespace grpo::cuda {

// Threads of a CTA: consumer groups with a deciding warp each; loading, storing, reporting warp.
constexpr int ring_threads(int groups) { return groups * (kGroupThreads + 32) + 96; }
// Launch bound above the real thread count: it limits registers, so that a block of a small kernel
// fits on the multiprocessor as well.
constexpr int kRingLaunchBound = 800;

struct RingParams {
  RowParams<float> rows;  // grad set; may alias the logits
  PolicyParams<float> policy;
  // [B], from the previous kernel; null: every CTA computes them (computes_constants_in_kernel,
  // plan.h).
  const SequenceConstants<float>* constants;
  Report report;  // loss and metrics; empty: a later kernel computes them
  int32_t row_count;
  int32_t share;        // elements of a row per CTA
  int32_t stages;       // shares in shared memory
  int32_t stage_bytes;  // each, multiple of 128
  int32_t groups;       // of consumers, at most kMaxGroups
  bool exceeds_cache;   // the logits take kCachedBytes or more
};

// Counters in device memory that start at 0 and that every call resets to 0. Calls that may run
// concurrently need different ones: each stream has one, and each captured call keeps one for the
// life of the process.
constexpr int kReportCounters = 2048;
// -1: all are taken.
int take_report_counter(int device, Stream stream, bool capturing);

// Clusters of the plan's size that the current device runs at a time. 0: not even one fits, as can
// happen with 16 CTAs; use the streaming kernels.
int ring_clusters(const RingParams& params, const RowPlan& plan);

// `overlaps_previous_kernel`: see Launch.
void launch_ring(const RingParams& params, const RowPlan& plan, bool overlaps_previous_kernel,
                 Stream stream);

// Threads of a CTA: consumer groups, a loading and a deciding warp.
constexpr int stats_ring_threads(int groups) { return groups * kGroupThreads + 64; }

struct StatsRingParams {
  RowParams<float> rows;
  int32_t row_count;
  int32_t shares, share;  // division of a row
  int32_t stages, stage_bytes, groups;
};

void launch_stats_ring(const StatsRingParams& params, Stream stream);

// Addresses of the kernels; one instantiation file per dtype. all_features: softcap, negative scale
// or entropy bonus.
template <class T>
const void* ring_kernel_address(bool all_features);
template <class T>
const void* stats_ring_kernel_address(bool all_features);

}  // namespace grpo::cuda
