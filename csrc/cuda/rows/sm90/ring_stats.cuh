// Compute statistics alone: a persistent CTA streams its rows, share by share, through a ring.
//
// A loading warp fills the stages. Consumer groups take shares in turn and write a record per warp.
// The deciding warp folds a row's records in the order of shares, as a cluster would.
#pragma once

#include "cuda/rows/sm90/ring.h"
#include "cuda/rows/sm90/ring_parts.cuh"

namespace grpo::cuda {

constexpr uint32_t kRowSlots = 8;  // rows with records in flight

struct StatsShared {
  uint64_t full[kMaxStages], empty[kMaxStages];
  uint32_t rows[kMaxStages];  // row in each full stage; kNoRow: no more rows
  uint64_t summed[kRowSlots], folded[kRowSlots];
  Record records[kRowSlots][kMaxCluster * kGroupWarps];  // share-major
};
static_assert(sizeof(StatsShared) <= kRingStaticSharedBytes, "plan.h uses it");

template <class T>
__device__ __forceinline__ void load_shares(const StatsRingParams& p, StatsShared& sh,
                                            unsigned char* stages, RowCursor cursor) {
  const bool elected = (threadIdx.x & 31) == 0;
  RingPlace place = {0, 0};
  for (; cursor.more(); cursor.advance()) {
    if (!cursor.is_unmasked()) continue;
    for (int s = 0; s < p.shares && elected; ++s, place.advance(1, p.stages)) {
      const int stage = place.stage;
      if (place.lap > 0) wait_with_backoff(&sh.empty[stage], (place.lap - 1) & 1);
      const T* logits = logits_row<T>(p.rows, cursor.row()) + int64_t(s) * p.share;
      sh.rows[stage] = cursor.row();
      load_share(logits, share_length(p.rows.vocab, s, p.share),
                 place_in_stage(stages, p.stage_bytes, stage, logits),
                 ptx::shared_address(&sh.full[stage]));
    }
  }
  for (int group = 0; group < p.groups && elected; ++group, place.advance(1, p.stages)) {
    if (place.lap > 0) wait_with_backoff(&sh.empty[place.stage], (place.lap - 1) & 1);
    sh.rows[place.stage] = kNoRow;
    ptx::mbarrier_arrive(ptx::shared_address(&sh.full[place.stage]));
  }
}

template <class T, bool kAllFeatures>
__device__ __forceinline__ void sum_shares(const StatsRingParams& p, StatsShared& sh,
                                           unsigned char* stages) {
  const int group = threadIdx.x / kGroupThreads, thread = threadIdx.x % kGroupThreads;
  const int lane = thread & 31, warp = thread >> 5;
  const LogitMap<kAllFeatures> map(p.rows.transform);
  RingPlace place = {group, 0};
  // `turn` counts this CTA's rows; share_number is the share within the row.
  int share_number = group;
  for (uint32_t turn = 0;; share_number += p.groups, place.advance(p.groups, p.stages)) {
    for (; share_number >= p.shares; share_number -= p.shares) ++turn;
    const int stage = place.stage;
    // As in ring.cuh: once the share before ours has left the stage, the next fill is ours.
    if (place.lap > 0) wait(&sh.empty[stage], (place.lap - 1) & 1);
    wait(&sh.full[stage], place.lap & 1);
    const uint32_t row = sh.rows[stage];
    if (row == kNoRow) return;
    const int64_t first = int64_t(share_number) * p.share;
    const int length = share_length(p.rows.vocab, share_number, p.share);
    const int64_t id = warp == 0 ? p.rows.ids[row] : -1;  // loads while the warp sums
    const T* logits = logits_row<T>(p.rows, row) + first;
    const int lead_bytes = int(reinterpret_cast<uintptr_t>(logits) & 15);
    const unsigned char* share = place_in_stage(stages, p.stage_bytes, stage, logits);
    Part part = with_shared_vectors(share, lead_bytes, [&](const auto& vectors) {
      return part_of_thread<T>(vectors, length, map, thread);
    });
    part = merge_warp(part, map.log2_slope);
    __syncwarp();  // all lanes have read the stage
    if (lane == 0) {
      Record record = {part.max, part.sum, part.weighted, 0.f};
      if (id >= first && id < first + length)
        record.w =
            map.unscaled(to_float(reinterpret_cast<const T*>(share + lead_bytes)[id - first]));
      ptx::mbarrier_arrive(ptx::shared_address(&sh.empty[stage]));
      const uint32_t slot = turn % kRowSlots;
      if (turn >= kRowSlots) wait(&sh.folded[slot], (turn / kRowSlots - 1) & 1);
      sh.records[slot][share_number * kGroupWarps + warp] = record;
      ptx::mbarrier_arrive(ptx::shared_address(&sh.summed[slot]));
    }
    __syncwarp();
  }
}

template <bool kAllFeatures>
__device__ __forceinline__ void fold_rows(const StatsRingParams& p, StatsShared& sh,
                                          RowCursor cursor) {
  const int lane = threadIdx.x & 31;
  const LogitMap<kAllFeatures> map(p.rows.transform);
  for (uint32_t turn = 0; cursor.more(); cursor.advance()) {
    const uint32_t row = cursor.row();
    RowStats stats = {};
    if (cursor.is_unmasked()) {
      const int64_t id = p.rows.ids[row];
      const bool valid_target = id >= 0 && id < p.rows.vocab;
      const uint32_t slot = turn % kRowSlots;
      const Record* records = sh.records[slot];
      wait(&sh.summed[slot], turn / kRowSlots & 1);
      const float target =
          valid_target ? records[uint32_t(id) / uint32_t(p.share) * kGroupWarps].w : NAN;
      stats = fold(records, p.shares * kGroupWarps, target, map.slope, map.log2_slope);
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(ptx::shared_address(&sh.folded[slot]));
      ++turn;
    }
    if (lane == 0) p.rows.logps[row] = stats.logp;
    if (lane == 1 && p.rows.entropy) p.rows.entropy[row] = stats.entropy;
    if (lane == 2 && p.rows.lse) p.rows.lse[row] = stats.lse;
  }
}

template <class T, bool kAllFeatures>
__global__ void __launch_bounds__(stats_ring_threads(kMaxGroups), 1)
    stats_ring_kernel(const __grid_constant__ StatsRingParams p) {
  extern __shared__ __align__(128) unsigned char stages[];
  __shared__ StatsShared sh;
  if (threadIdx.x == 0) {
    for (int s = 0; s < p.stages; ++s) {
      ptx::mbarrier_init(ptx::shared_address(&sh.full[s]), 1);
      ptx::mbarrier_init(ptx::shared_address(&sh.empty[s]), kGroupWarps);
    }
    for (uint32_t r = 0; r < kRowSlots; ++r) {
      ptx::mbarrier_init(ptx::shared_address(&sh.summed[r]), uint32_t(p.shares * kGroupWarps));
      ptx::mbarrier_init(ptx::shared_address(&sh.folded[r]), 1);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  const RowCursor cursor(p.rows.mask, p.row_count, blockIdx.x, gridDim.x);
  const int helper = int(threadIdx.x / 32) - p.groups * kGroupWarps;
  if (helper == 0)
    load_shares<T>(p, sh, stages, cursor);
  else if (helper == 1)
    fold_rows<kAllFeatures>(p, sh, cursor);
  else
    sum_shares<T, kAllFeatures>(p, sh, stages);
}

template <class T>
const void* stats_ring_kernel_address(bool all_features) {
  return all_features ? reinterpret_cast<const void*>(&stats_ring_kernel<T, true>)
                      : reinterpret_cast<const void*>(&stats_ring_kernel<T, false>);
}

}  // namespace grpo::cuda
