// Which kernels serve a call, and how a row is divided. Plain C++, no CUDA: CPU tests call it.
#pragma once

#include <cstdint>

#include "../common/row_params.h"

namespace grpo::cuda {

// One CTA's share of a row is summed by 256 threads, whoever runs them. The division into shares
// depends on the vocabulary and the dtype alone, so that every kernel on every architecture adds in
// the same order: a log probability has the same bits from whichever of them it comes.
constexpr int kGroupThreads = 256;
constexpr int kGroupWarps = kGroupThreads / 32;
constexpr int kMaxCluster = 8;  // the portable limit
constexpr int kMaxStages = 8;
// Measured on an H100: shares of 24 KiB lose 8 % to the exchange between CTAs, shares of 32 to 64
// KiB are alike as long as three or more fit into shared memory.
constexpr int64_t kTargetShareBytes = 50 * 1024;
constexpr int kShareAlignment = 64;  // elements: whole 128-byte lines
// A stage keeps its share where the row lies with respect to 128-byte lines (bulk copies across
// them run at 90 %), behind one line that a differently aligned gradient may look into.
constexpr int kStageLine = 128;
constexpr int kStagePadding = 2 * kStageLine + 32;
constexpr int kRingStaticBytes = 28 * 1024;
constexpr int kMaxGroups = 2;  // of consumers

struct Device {
  int architecture;  // 90 for sm_90
  int multiprocessors;
  int64_t shared_bytes;  // per block, opt-in
  bool has_ring;         // this build holds the kernel for it
};

// A row as `shares` pieces of `share` elements, the last one shorter (possibly empty).
struct RowDivision {
  int shares;
  int share;
};

struct RowPlan {
  RowDivision division;
  bool ring;  // one launch with the row on chip; else statistics, policy, gradient
  int stages;
  int stage_bytes;
  int groups;  // rows in work at a time
};

inline int element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

inline RowDivision divide_row(DType dtype, int64_t vocab) {
  int shares = 1;
  while (shares < kMaxCluster && vocab * element_bytes(dtype) > shares * kTargetShareBytes)
    shares *= 2;
  const int64_t even = (vocab + shares - 1) / shares;
  return {shares, int((even + kShareAlignment - 1) / kShareAlignment * kShareAlignment)};
}

// The plan for loss and gradient in one call.
inline RowPlan plan_row_loss(const Device& device, DType dtype, int64_t vocab) {
  RowPlan plan{divide_row(dtype, vocab), false, 0, 0, 0};
  const int64_t bytes = int64_t(plan.division.share) * element_bytes(dtype) + kStagePadding;
  const int64_t stage = (bytes + 127) / 128 * 128;
  const int64_t stages = (device.shared_bytes - kRingStaticBytes) / stage;
  // Two stages at least: one is loaded while the other is worked on.
  if (device.architecture == 90 && device.has_ring && stages >= 2) {
    plan.ring = true;
    plan.stages = int(stages < kMaxStages ? stages : kMaxStages);
    plan.stage_bytes = int(stage);
    plan.groups = kMaxGroups;
  }
  return plan;
}

// Shorter rows are for the streaming kernel: many blocks per multiprocessor hide more latency than
// one CTA with a few stages of so few bytes.
constexpr int64_t kLeastStatsRingBytes = 16 * 1024;

// The plan for statistics alone.
inline RowPlan plan_row_stats(const Device& device, DType dtype, int64_t vocab) {
  RowPlan plan = plan_row_loss(device, dtype, vocab);
  if (vocab * element_bytes(dtype) < kLeastStatsRingBytes) plan.ring = false;
  return plan;
}

}  // namespace grpo::cuda
