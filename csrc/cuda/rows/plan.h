// Which kernels serve a call, and how a row is divided. Plain C++, no CUDA: CPU tests call it.
#pragma once

#include <cstdint>

#include "common/policy.h"
#include "common/row_params.h"
#include "cuda/base/device.h"

namespace grpo::cuda {

// One CTA's share of a row is summed by 256 threads, whoever runs them. The division into shares
// depends on the vocabulary and the dtype alone, so that every kernel on every architecture adds in
// the same order: a log probability has the same bits from whichever of them it comes.
constexpr int kGroupThreads = 256;
constexpr int kGroupWarps = kGroupThreads / 32;
constexpr int kMaxCluster = 16;
constexpr int kPortableCluster = 8;
constexpr int kMaxStages = 8;
// Rows on their way through L2 displace each other when there are too many of them, in calls on
// more than L2 holds. Measured: with 2 CTAs per row every stage helps, with 8 and 16 five of 32 KiB
// or four of 37 KiB are 1 to 4 % faster than one more, with 4 it is four; and rows that start
// between two 16-byte blocks take longer and want five.
constexpr int64_t kMostRingBytes = 168 * 1024;
constexpr int kFewStages = 4, kEnoughStages = 5;
// Calls on fewer logits than this find some of them in L2, as somebody has just written them there,
// and leave gradients for the next to find.
constexpr int64_t kCachedBytes = int64_t(256) << 20;
// Measured on an H100: shares of 24 KiB lose 8 % to the exchange between CTAs, shares of 32 to 64
// KiB are alike as long as three or more fit into shared memory.
constexpr int64_t kTargetShareBytes = 50 * 1024;
constexpr int kShareAlignment = 64;  // elements: whole 128-byte lines
// A stage keeps its share where the row lies with respect to 128-byte lines (bulk copies across
// them run at 90 %), behind one line that a differently aligned gradient may look into.
constexpr int kStageLine = 128;
constexpr int kStagePadding = 2 * kStageLine + 32;
constexpr int kRingStaticBytes = 17152;
constexpr int kMaxGroups = 2;  // of consumers
// A warp sums at most kAhead rows of its group whose gradient it has not formed. A CTA's records of
// turn t come after its gradients of turn t - kAhead, so after the other CTAs' records of that
// turn, so after their gradients of t - 2 kAhead: with that many slots no record is overwritten
// unread.
constexpr int kAhead = 2;
constexpr int kSlots = 2 * kAhead;
constexpr int kRecordBytes = 16;

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

// What the row kernel asks for beside its static shared memory: stages, then a record per warp of
// the cluster, for every row whose records may be on their way.
inline int ring_shared_bytes(const RowPlan& plan) {
  return plan.stages * plan.stage_bytes +
         plan.groups * kSlots * plan.division.shares * kGroupWarps * kRecordBytes;
}

inline int element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

inline RowDivision divide_evenly(int64_t vocab, int shares) {
  const int64_t even = (vocab + shares - 1) / shares;
  return {shares, int((even + kShareAlignment - 1) / kShareAlignment * kShareAlignment)};
}

inline RowDivision divide_row(DType dtype, int64_t vocab) {
  int shares = 1;
  while (shares < kMaxCluster && vocab * element_bytes(dtype) > shares * kTargetShareBytes)
    shares *= 2;
  return divide_evenly(vocab, shares);
}

// Rows in shared memory, divided in the given way, in as many stages as fit.
inline RowPlan plan_ring(const Device& device, DType dtype, const RowDivision& division) {
  RowPlan plan{division, false, 0, 0, kMaxGroups};
  const int64_t bytes = int64_t(division.share) * element_bytes(dtype) + kStagePadding;
  const int64_t stage = (bytes + 127) / 128 * 128;
  const int64_t stages = (device.shared_bytes - kRingStaticBytes - ring_shared_bytes(plan)) / stage;
  // Two stages at least: one is loaded while the other is worked on.
  if (device.architecture == 90 && device.has_ring && stages >= 2) {
    plan.ring = true;
    plan.stages = int(stages < kMaxStages ? stages : kMaxStages);
    plan.stage_bytes = int(stage);
  }
  return plan;
}

// The plan for loss and gradient in one call. exceeds_cache: its logits are kCachedBytes or more.
inline RowPlan plan_row_loss(const Device& device, DType dtype, int64_t vocab,
                             bool exceeds_cache = true) {
  RowPlan plan = plan_ring(device, dtype, divide_row(dtype, vocab));
  if (plan.division.shares <= 2 || !exceeds_cache) return plan;
  const bool aligned = vocab * element_bytes(dtype) % 16 == 0;
  const auto too_many = [&](int stages) {
    if (stages > kEnoughStages) return true;
    return aligned && stages > kFewStages &&
           (plan.division.shares <= 4 || stages * plan.stage_bytes > kMostRingBytes);
  };
  while (too_many(plan.stages)) --plan.stages;
  return plan;
}

// Shorter rows are for the streaming kernel: many blocks per multiprocessor hide more latency than
// one CTA with a few stages of so few bytes.
constexpr int64_t kLeastStatsRingBytes = 16 * 1024;

// The plan for statistics alone: a CTA works on whole rows, a share per stage.
inline RowPlan plan_row_stats(const Device& device, DType dtype, int64_t vocab) {
  RowPlan plan = plan_ring(device, dtype, divide_row(dtype, vocab));
  if (vocab * element_bytes(dtype) < kLeastStatsRingBytes) plan.ring = false;
  return plan;
}

// Token level: the row kernel forms the terms of the sequences itself, every CTA for itself, while
// its first rows are on their way. A warp counts the mask a piece at a time, in half a microsecond;
// with more pieces, or more sequences than shared memory has room for, a kernel of its own (3 to 5
// microseconds) forms them before.
constexpr int kMaxOwnSequences = 64;
constexpr int kTermPiece = 1024;  // tokens
constexpr int64_t kMaxTermPieces = 128;

// Pieces of a sequence; `aligned`: all sequences start at 16-byte blocks of the mask.
GRPO_HOST_DEVICE int64_t term_pieces(int64_t length, bool aligned) {
  return (length + (aligned ? 0 : 15) + kTermPiece - 1) / kTermPiece;
}

inline bool forms_own_terms(const PolicyParams<float>& p) {
  return !needs_sums(p) && p.batch <= kMaxOwnSequences &&
         p.batch * term_pieces(p.length, false) <= kMaxTermPieces;
}

}  // namespace grpo::cuda
