// Shared memory of the ring kernel: barriers and the values that its warps exchange.
#pragma once

#include "cuda/policy/report.cuh"
#include "cuda/rows/sm90/ring.h"
#include "cuda/rows/sm90/ring_constants.cuh"
#include "cuda/rows/sm90/ring_parts.cuh"

namespace grpo::cuda {

constexpr uint32_t kZeroBytes = 4096;
static_assert(sizeof(Record) == kRecordBytes, "plan.h uses it");
constexpr int kConstantWords = sizeof(SequenceConstants<float>) / 4;

// Inputs of a row's coefficients other than its logits.
struct RowInputs {
  float advantage, old_logp, ref_logp, sampling_logp, importance;
  SequenceConstants<float> constants;
};
constexpr int kInputWords = sizeof(RowInputs) / 4;
static_assert(kInputWords == 5 + kConstantWords && kInputWords <= 32, "one lane per number");

// Inputs of a row's gradient, from the deciding warp to the consumers.
struct GradientInputs {
  GradientTerms gradient;
  uint32_t row;
  int64_t id;
};

// A row for the reporting warp, which takes kReportBatchRows of every group at a time, one row per
// lane.
constexpr int kReportBatchRows = 32 / kMaxGroups, kReportBatches = 2;
struct RowToReport {
  RowInputs inputs;
  float logp, entropy;
  uint32_t row;
};

// Counters of reporting clusters that are done: the last one of a call folds all sums. See
// take_report_counter.
static __device__ uint32_t report_counters[kReportCounters];

struct RingShared {
  alignas(128) uint4 zeros[kZeroBytes / 16];
  uint64_t full[kMaxStages], ready[kMaxStages], empty[kMaxStages];
  uint32_t rows[kMaxStages];  // row in each full stage; kNoRow: no more rows
  uint64_t records_arrived[kMaxGroups][kRecordSlots];  // all records of a row have arrived
  uint64_t decided[kMaxGroups][kRecordSlots];          // its gradient inputs are published
  GradientInputs gradient_inputs[kMaxGroups][kRecordSlots];
  RowToReport report_batches[kMaxGroups][kReportBatches][kReportBatchRows];
  uint64_t complete[kMaxGroups][kReportBatches], reported[kMaxGroups][kReportBatches];
  LocalConstants local;
  ReportShared report;
};
static_assert(sizeof(RingShared) <= kRingStaticSharedBytes, "plan.h uses it");

// A row's records, rank-major, after the stages.
__device__ __forceinline__ Record* records_of(const RingParams& p, unsigned char* stages, int group,
                                              uint32_t slot, uint32_t ranks) {
  Record* records = reinterpret_cast<Record*>(stages + p.stages * p.stage_bytes);
  return records + (group * kRecordSlots + slot) * ranks * kGroupWarps;
}

// The sequences' constants; valid after wait_for_constants.
__device__ __forceinline__ const SequenceConstants<float>* constants_of(const RingParams& p,
                                                                        const RingShared& sh) {
  return p.constants ? p.constants : sh.local.constants;
}
__device__ __forceinline__ void wait_for_constants(const RingParams& p, RingShared& sh) {
  if (p.constants)
    ptx::wait_for_previous_kernel();
  else
    wait(&sh.local.computed, 0);
}

// Load one element of RowInputs per lane.
__device__ __forceinline__ float load_input(const RingParams& p, uint32_t row, uint32_t sequence,
                                            const SequenceConstants<float>* constants, int lane) {
  const PolicyParams<float>& q = p.policy;
  const float* from = nullptr;
  if (lane == 0) from = q.advantages + (q.advantages_per_token ? row : sequence);
  if (lane == 1 && q.old_logps) from = q.old_logps + row;
  if (lane == 2 && q.ref_logps) from = q.ref_logps + row;
  if (lane == 3 && q.sampling_logps) from = q.sampling_logps + row;
  if (lane == 4 && q.importance_shape == ImportanceShape::kPerToken) from = q.importance + row;
  if (lane >= 5 && lane < kInputWords)
    from = reinterpret_cast<const float*>(constants + sequence) + (lane - 5);
  return from ? *from : 0.f;
}

// The policy parameters of one row: tensors of length one, stored in `in`.
__device__ __forceinline__ PolicyParams<float> policy_of_row(const PolicyParams<float>& policy,
                                                             const RowInputs& in) {
  PolicyParams<float> q = policy;
  q.advantages = &in.advantage;
  q.advantages_per_token = false;
  q.old_logps = policy.old_logps ? &in.old_logp : nullptr;
  q.ref_logps = policy.ref_logps ? &in.ref_logp : nullptr;
  q.sampling_logps = policy.sampling_logps ? &in.sampling_logp : nullptr;
  q.importance = &in.importance;
  return q;
}

}  // namespace grpo::cuda
