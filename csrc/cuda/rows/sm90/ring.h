// The persistent kernels of sm_90: loss and gradient with one read and one write; statistics alone.
#pragma once

#include "common/policy.h"
#include "common/row_params.h"
#include "cuda/base/device.h"
#include "cuda/policy/report.h"
#include "cuda/rows/plan.h"

namespace grpo::cuda {

// Groups of consumers, each with a deciding warp; a loading, a storing and a reporting warp.
constexpr int ring_threads(int groups) { return groups * (kGroupThreads + 32) + 96; }
// For the compiler: so few registers that blocks of small kernels fit beside.
constexpr int kRingThreadsWithRoom = 800;

struct RingParams {
  RowParams<float> rows;  // grad is set; may be the logits
  PolicyParams<float> policy;
  // [B], from the kernel launched before; null: every CTA forms them, see forms_own_terms in
  // plan.h.
  const SequenceTerms<float>* terms;
  Report report;  // loss and metrics, where no kernel after this one forms them
  int32_t row_count;
  int32_t share;        // elements of a row per CTA
  int32_t stages;       // shares in shared memory
  int32_t stage_bytes;  // each, multiple of 128
  int32_t groups;       // of consumers, at most kMaxGroups
  bool exceeds_cache;   // the logits, by far: see kCachedBytes
};

// Counters in device memory that are 0 from the start and that every call leaves at 0 again. Calls
// that may run at the same time need different ones: a stream has its own, and so has a call that
// becomes part of a graph, for as long as the process lives.
constexpr int kReportCounters = 2048;
// -1: all are taken.
int take_report_counter(int device, Stream stream, bool capturing);

// Clusters of the plan's size that fit on the current device at a time; 0: it has no place for one,
// as may be with 16 CTAs, and the rows are to be streamed.
int ring_clusters(const RingParams& params, const RowPlan& plan);

// Rows of rows.dtype under the given plan. `beside_previous`: see Launch.
void launch_ring(const RingParams& params, const RowPlan& plan, bool beside_previous,
                 Stream stream);

// Groups of consumers, a loading and a deciding warp.
constexpr int stats_ring_threads(int groups) { return groups * kGroupThreads + 64; }

struct StatsRingParams {
  RowParams<float> rows;
  int32_t row_count;
  int32_t shares, share;  // division of a row
  int32_t stages, stage_bytes, groups;
};

void launch_stats_ring(const StatsRingParams& params, Stream stream);

// One instantiation file per dtype. Return the kernel's address.
template <class T>
const void* ring_kernel_address(bool general);
template <class T>
const void* stats_ring_kernel_address(bool general);

}  // namespace grpo::cuda
