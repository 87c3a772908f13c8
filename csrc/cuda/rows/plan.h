// Choose the kernels of a call and the division of a row. Plain C++ without CUDA: CPU tests call
// it.
#pragma once

#include <cstdint>

#include "common/policy.h"
#include "common/row_params.h"
#include "cuda/base/device.h"

namespace grpo::cuda {

// 256 threads sum a share of a row, in every kernel. The division into shares depends on vocabulary
// and dtype alone, so all kernels on all architectures add in the same order: a log probability has
// the same bits from each of them.
constexpr int kGroupThreads = 256;
constexpr int kGroupWarps = kGroupThreads / 32;
constexpr int kMaxCluster = 16;
constexpr int kPortableCluster = 8;
constexpr int kMaxStages = 8;
// When the logits exceed L2, too many rows in flight evict each other. Measured optimum, stages per
// CTA: with 2 CTAs a row, as many as fit; with 4 CTAs, 4 stages; with 8 and 16 CTAs, 5 stages of
// 32 KiB or 4 of 37 KiB (1 to 4 % faster than one stage more). Rows that start off 16-byte
// boundaries take longer and need 5.
constexpr int64_t kMostRingBytes = 168 * 1024;
constexpr int kFewStages = 4, kEnoughStages = 5;
// Below this size, L2 still holds some logits of the product that wrote them, and will hold
// gradients for the product that reads them.
constexpr int64_t kCachedBytes = int64_t(256) << 20;
// Measured on an H100: shares of 24 KiB lose 8 % to the exchange between CTAs; shares of 32 to 64
// KiB are equally fast while at least three fit into shared memory.
constexpr int64_t kTargetShareBytes = 50 * 1024;
constexpr int kShareAlignment = 64;  // elements: whole 128-byte lines
// A stage holds its share at the row's offset within a 128-byte line: bulk copies at another offset
// run at 90 % of the speed. One line of padding comes first; a gradient of another alignment reads
// into it.
constexpr int kStageLine = 128;
constexpr int kStagePadding = 2 * kStageLine + 32;
constexpr int kRingStaticSharedBytes = 17152;  // upper bound; the kernels assert it
constexpr int kMaxGroups = 2;                  // consumer groups of a CTA
// A warp sums at most kMaxRowsAhead rows before it forms the gradient of the first. Record slots: a
// CTA sends its records of its t-th row after its gradient of row t - kMaxRowsAhead, which needed
// the other CTAs' records of that row, which they sent after their gradients of row t - 2
// kMaxRowsAhead. So 2 kMaxRowsAhead slots never overwrite an unread record.
constexpr int kMaxRowsAhead = 2;
constexpr int kRecordSlots = 2 * kMaxRowsAhead;
constexpr int kRecordBytes = 16;

// A row as `shares` pieces of `share` elements, the last one shorter (possibly empty).
struct RowDivision {
  int shares;
  int share;
};

struct RowPlan {
  RowDivision division;
  bool ring;  // one launch, row in shared memory; else three: statistics, policy, gradient
  int stages;
  int stage_bytes;
  int groups;  // rows processed at a time
};

// Dynamic shared memory of the ring kernel: the stages, then for each row whose records may be in
// flight a record per warp of the cluster.
inline int ring_shared_bytes(const RowPlan& plan) {
  return plan.stages * plan.stage_bytes +
         plan.groups * kRecordSlots * plan.division.shares * kGroupWarps * kRecordBytes;
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

// Plan a ring of as many stages as fit for rows of the given division.
inline RowPlan plan_ring(const Device& device, DType dtype, const RowDivision& division) {
  RowPlan plan{division, false, 0, 0, kMaxGroups};
  const int64_t bytes = int64_t(division.share) * element_bytes(dtype) + kStagePadding;
  const int64_t stage = (bytes + 127) / 128 * 128;
  const int64_t stages =
      (device.shared_bytes - kRingStaticSharedBytes - ring_shared_bytes(plan)) / stage;
  // At least two stages: one loads while the other is processed.
  if (device.architecture == 90 && device.has_ring && stages >= 2) {
    plan.ring = true;
    plan.stages = int(stages < kMaxStages ? stages : kMaxStages);
    plan.stage_bytes = int(stage);
  }
  return plan;
}

// Plan loss and gradient in one call. exceeds_cache: the logits take kCachedBytes or more.
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

// Shorter rows take the streaming kernel: many blocks per multiprocessor hide more latency than one
// CTA with a few small stages.
constexpr int64_t kLeastStatsRingBytes = 16 * 1024;

// Plan statistics alone: a CTA processes whole rows, one share per stage.
inline RowPlan plan_row_stats(const Device& device, DType dtype, int64_t vocab) {
  RowPlan plan = plan_ring(device, dtype, divide_row(dtype, vocab));
  if (vocab * element_bytes(dtype) < kLeastStatsRingBytes) plan.ring = false;
  return plan;
}

// At token level every CTA of the ring kernel computes the sequences' constants itself while its
// first rows load. A warp counts the mask in pieces of half a microsecond. If there are more pieces
// than kMaxMaskPieces, or more sequences than fit in shared memory, a separate kernel (3 to 5
// microseconds) computes the constants first.
constexpr int kMaxLocalSequences = 64;
constexpr int kMaskPiece = 1024;  // tokens
constexpr int64_t kMaxMaskPieces = 128;

// Pieces of a sequence's mask. aligned: each sequence's mask starts at a 16-byte boundary.
GRPO_HOST_DEVICE int64_t mask_pieces(int64_t length, bool aligned) {
  return (length + (aligned ? 0 : 15) + kMaskPiece - 1) / kMaskPiece;
}

inline bool computes_constants_in_kernel(const PolicyParams<float>& p) {
  return !needs_sums(p) && p.batch <= kMaxLocalSequences &&
         p.batch * mask_pieces(p.length, false) <= kMaxMaskPieces;
}

}  // namespace grpo::cuda
