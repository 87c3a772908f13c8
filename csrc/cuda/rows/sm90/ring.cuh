// Compute loss and gradient with one read of the logits: persistent clusters, each CTA with its
// share of a row in a ring of shared-memory stages.
//
// Warps are specialized. A loading warp fills the ring with bulk copies. Consumer groups take rows
// in turn: each warp sums its part of a row, pushes a 16-byte record to every CTA of the cluster,
// and sums the next rows until the deciding warp publishes this row's coefficients. The deciding
// warp of a group folds the records of all CTAs in a fixed order into logp, entropy and the
// coefficients. The consumers then overwrite the stage with the gradient. A storing warp copies the
// stage to global memory and clears masked rows. A reporting warp writes logp, entropy and kl and
// accumulates the metrics, 32 rows at a time.
//
// In-place operation is safe: the gradient of a row is written only after every CTA has summed its
// share, and 16-byte blocks that two rows or shares have in common are written element by element.
#pragma once

#include "cuda/rows/sm90/ring_report.cuh"

namespace grpo::cuda {

// Whether a row's gradient and logits have the same offset within a 16-byte block.
template <class T>
__device__ __forceinline__ bool same_alignment(const RingParams& p, uint32_t row, int64_t first) {
  return ((reinterpret_cast<uintptr_t>(logits_row<T>(p.rows, row) + first) ^
           reinterpret_cast<uintptr_t>(grad_row<T>(p.rows, row) + first)) &
          15) == 0;
}

template <class T>
__device__ __forceinline__ void load_rows(const RingParams& p, RingShared& sh,
                                          unsigned char* stages, RowCursor cursor, uint32_t rank) {
  // L2 evicts gradients first and logits last: 1 to 3 % faster, in place and out of place.
  const uint64_t policy = p.exceeds_cache ? ptx::evict_last() : ptx::evict_normal();
  const int length = share_length(p.rows.vocab, rank, p.share);
  const bool elected = (threadIdx.x & 31) == 0;
  RingPlace place = {0, 0};
  for (; cursor.more(); cursor.advance()) {
    if (!cursor.is_unmasked()) continue;
    if (elected) {
      const int stage = place.stage;
      if (place.lap > 0) wait_with_backoff(&sh.empty[stage], (place.lap - 1) & 1);
      const T* logits = logits_row<T>(p.rows, cursor.row()) + int64_t(rank) * p.share;
      sh.rows[stage] = cursor.row();
      load_share(logits, length, place_in_stage(stages, p.stage_bytes, stage, logits),
                 ptx::shared_address(&sh.full[stage]), policy);
    }
    place.advance(1, p.stages);
  }
  for (int group = 0; group < p.groups && elected; ++group, place.advance(1, p.stages)) {
    if (place.lap > 0) wait_with_backoff(&sh.empty[place.stage], (place.lap - 1) & 1);
    sh.rows[place.stage] = kNoRow;
    ptx::mbarrier_arrive(ptx::shared_address(&sh.full[place.stage]));
  }
}

// Clear a masked row's share (storing warp).
template <class T>
__device__ __forceinline__ void clear_share(const Destination<T>& out, const RingShared& sh,
                                            int lane, uint64_t policy) {
  const int first = out.first_whole(), end = out.end_whole();
  if (first > 0 && lane == 0) out.store(0, {0, 0, 0, 0});
  if (lane == 1 && end < out.blocks() && end >= first) out.store(end, {0, 0, 0, 0});
  if (lane != 0) return;
  for (int q = first; q < end; q += kZeroBytes / 16)
    ptx::bulk_store(out.base + int64_t(q) * 16, ptx::shared_address(sh.zeros),
                    min(kZeroBytes, uint32_t(end - q) * 16), policy);
}

template <class T>
__device__ __forceinline__ void store_rows(const RingParams& p, RingShared& sh,
                                           unsigned char* stages, RowCursor cursor, uint32_t rank) {
  const int lane = threadIdx.x & 31;
  const int64_t first = int64_t(rank) * p.share;
  const int length = share_length(p.rows.vocab, rank, p.share);
  const uint64_t policy = p.exceeds_cache ? ptx::evict_first() : ptx::evict_normal();
  RingPlace place = {0, 0};
  for (; cursor.more(); cursor.advance()) {
    const uint32_t row = cursor.row();
    const Destination<T> out(grad_row<T>(p.rows, row) + first, length);
    if (!cursor.is_unmasked()) {
      clear_share(out, sh, lane, policy);
      if (rank == 0 && lane == 0) {
        p.rows.logps[row] = p.rows.entropy[row] = 0.f;
        if (p.policy.kl) p.policy.kl[row] = 0.f;
      }
      continue;
    }
    if (lane == 0) {
      const int stage = place.stage;
      wait_with_backoff(&sh.ready[stage], place.lap & 1);
      const uint32_t bytes = uint32_t(max(0, out.end_whole() - out.first_whole())) * 16;
      if (bytes > 0 && same_alignment<T>(p, row, first)) {
        const unsigned char* share =
            place_in_stage(stages, p.stage_bytes, stage, logits_row<T>(p.rows, row) + first);
        ptx::bulk_store(out.base + out.first_whole() * 16,
                        ptx::shared_address(share + out.first_whole() * 16), bytes, policy);
        ptx::bulk_commit();
        ptx::bulk_wait_read();
      }
      ptx::mbarrier_arrive(ptx::shared_address(&sh.empty[stage]));
    }
    place.advance(1, p.stages);
    __syncwarp();
  }
  if (lane == 0) {
    ptx::bulk_commit();
    ptx::bulk_wait();
  }
}

// Compute the gradient of a share in 16-byte blocks of the destination; call store(block, value).
template <class T, bool kAllFeatures, class Load, class Store>
__device__ __forceinline__ void gradient_blocks(const Load& logits, const Destination<T>& out,
                                                const LogitMap<kAllFeatures>& map,
                                                const GradientTerms& g, int target, int thread,
                                                const Store& store) {
  constexpr int kBatch = kBatchElements<kAllFeatures> / kPerVector<T>;
  const int blocks = out.blocks(), whole = out.end_whole();
  const int target_block = target < 0 ? -1 : (target * int(sizeof(T)) + out.lead_bytes) / 16;
  int q = out.first_whole() + thread;
  const bool zero = is_zero(g);
  const auto gradient = [&](const uint4& z, int block) -> uint4 {
    if (block == target_block)
      return gradient_with_target<T>(z, map, g, target - out.first_element(block));
    return gradient_of<T>(z, map, g);
  };
  if (zero) {
    for (; q < whole; q += kGroupThreads) store(q, {0, 0, 0, 0});
  }
  for (; q + (kBatch - 1) * kGroupThreads < whole; q += kBatch * kGroupThreads) {
    uint4 z[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) z[b] = logits(q + b * kGroupThreads);
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      store(q + b * kGroupThreads, gradient(z[b], q + b * kGroupThreads));
  }
#pragma unroll 1
  for (; q < whole; q += kGroupThreads) store(q, gradient(logits(q), q));
  // At most two blocks also hold elements of neighbouring rows or shares.
  int edge = -1;
  if (thread == 0 && out.first_whole() > 0) edge = 0;
  if (thread == 32 && whole < blocks && whole >= out.first_whole()) edge = whole;
  if (edge >= 0) out.store(edge, zero ? uint4{0, 0, 0, 0} : gradient(logits(edge), edge));
}

// Write the gradient into the stage, from which the storing warp copies it; directly to global
// memory if gradient and logits are aligned differently.
template <class T, bool kAllFeatures>
__device__ __forceinline__ void write_gradient(unsigned char* share, int lead_bytes,
                                               const Destination<T>& out,
                                               const LogitMap<kAllFeatures>& map,
                                               const GradientTerms& g, int target, int thread) {
  if (lead_bytes == out.lead_bytes) {
    uint4* stage = reinterpret_cast<uint4*>(share);
    gradient_blocks<T>(AlignedShared{stage}, out, map, g, target, thread,
                       [&](int q, const uint4& v) { stage[q] = v; });
    ptx::fence_shared_for_bulk();
  } else {
    gradient_blocks<T>(ShiftedShared(share, lead_bytes - out.lead_bytes), out, map, g, target,
                       thread, [&](int q, const uint4& v) { out.store_whole(q, v); });
  }
}

// Sum one warp's part of a row and push the record to all CTAs of the cluster.
template <class T, bool kAllFeatures>
__device__ __forceinline__ void sum_row(const RingParams& p, RingShared& sh, unsigned char* stages,
                                        int stage, int group, uint32_t slot,
                                        const LogitMap<kAllFeatures>& map, uint32_t rank,
                                        uint32_t ranks) {
  const int thread = threadIdx.x % kGroupThreads, lane = thread & 31, warp = thread >> 5;
  const uint32_t row = sh.rows[stage];
  const int64_t first = int64_t(rank) * p.share;
  const int length = share_length(p.rows.vocab, rank, p.share);
  const int64_t id = warp == 0 ? p.rows.ids[row] : -1;  // loads while the warp sums
  const T* logits = logits_row<T>(p.rows, row) + first;
  const int lead_bytes = int(reinterpret_cast<uintptr_t>(logits) & 15);
  const unsigned char* share = place_in_stage(stages, p.stage_bytes, stage, logits);
  Part part = with_shared_vectors(share, lead_bytes, [&](const auto& vectors) {
    return part_of_thread<T>(vectors, length, map, thread);
  });
  part = merge_warp(part, map.log2_slope);
  float target = 0.f;
  if (lane == 0 && id >= first && id < first + length)
    target = map.unscaled(to_float(reinterpret_cast<const T*>(share + lead_bytes)[id - first]));
  target = __shfl_sync(~0u, target, 0);
  const uint32_t records_arrived = ptx::shared_address(&sh.records_arrived[group][slot]);
  if (lane < ranks) {
    const Record record = {part.max, part.sum, part.weighted, target};
    Record* box = records_of(p, stages, group, slot, ranks) + rank * kGroupWarps + warp;
    if (ranks > 1)
      ptx::store_async(ptx::map_to_rank(ptx::shared_address(box), lane), record,
                       ptx::map_to_rank(records_arrived, lane));
    else
      *box = record;
  }
  // Misaligned: a gradient block overlaps logits that another thread may still read, so every
  // thread arrives. Aligned: a thread overwrites only what it has read itself.
  if (lead_bytes != 0)
    ptx::mbarrier_arrive(records_arrived);
  else if (lane == 0)
    ptx::mbarrier_arrive<32>(records_arrived);
}

// Form one warp's part of a row's gradient.
template <class T, bool kAllFeatures>
__device__ __forceinline__ void finish_row(const RingParams& p, RingShared& sh,
                                           unsigned char* stages, int stage,
                                           const GradientInputs& inputs,
                                           const LogitMap<kAllFeatures>& map, uint32_t rank) {
  const int thread = threadIdx.x % kGroupThreads;
  const int64_t first = int64_t(rank) * p.share, id = inputs.id;
  const int length = share_length(p.rows.vocab, rank, p.share);
  const int target = id >= first && id < first + length ? int(id - first) : -1;
  const uint32_t row = inputs.row;
  const T* logits = logits_row<T>(p.rows, row) + first;
  const int lead_bytes = int(reinterpret_cast<uintptr_t>(logits) & 15);
  const Destination<T> out(grad_row<T>(p.rows, row) + first, length);
  write_gradient<T>(place_in_stage(stages, p.stage_bytes, stage, logits), lead_bytes, out, map,
                    inputs.gradient, target, thread);
  __syncwarp();
  if ((thread & 31) == 0) ptx::mbarrier_arrive(ptx::shared_address(&sh.ready[stage]));
}

template <class T, bool kAllFeatures>
__device__ __forceinline__ void consume_rows(const RingParams& p, RingShared& sh,
                                             unsigned char* stages, uint32_t rank, uint32_t ranks) {
  const int group = threadIdx.x / kGroupThreads;
  const LogitMap<kAllFeatures> map(p.rows.transform);
  RingPlace to_sum = {group, 0};
  int to_finish = group;  // stage of the next gradient
  if (!p.constants) count_tokens(p.policy, sh.local, threadIdx.x / 32, p.groups * kGroupWarps);
  uint32_t summed = 0, finished = 0;
  bool more = true;
  while (more || finished < summed) {
    const bool has_unfinished = finished < summed,
               may_sum = more && summed - finished < uint32_t(kMaxRowsAhead);
    if (has_unfinished) {
      const uint32_t slot = finished % kRecordSlots, parity = finished / kRecordSlots & 1;
      uint64_t* decided = &sh.decided[group][slot];
      if (!may_sum) wait(decided, parity);
      if (!may_sum || phase_is_complete(decided, parity)) {
        finish_row<T, kAllFeatures>(p, sh, stages, to_finish, sh.gradient_inputs[group][slot], map,
                                    rank);
        to_finish += p.groups;
        if (to_finish >= p.stages) to_finish -= p.stages;
        ++finished;
        continue;
      }
    }
    // Phases two apart have the same parity: `full` alone is ambiguous. So `empty` is tested
    // first: once the row before ours has left the stage, the next fill holds our row.
    uint64_t *empty = &sh.empty[to_sum.stage], *full = &sh.full[to_sum.stage];
    const uint32_t lap = to_sum.lap;
    if (has_unfinished) {
      if ((lap > 0 && !phase_is_complete(empty, (lap - 1) & 1)) ||
          !phase_is_complete(full, lap & 1)) {
        __nanosleep(20);
        continue;
      }
    } else {
      if (lap > 0) wait(empty, (lap - 1) & 1);
      wait(full, lap & 1);
    }
    if (sh.rows[to_sum.stage] == kNoRow) {
      more = false;
    } else {
      sum_row<T, kAllFeatures>(p, sh, stages, to_sum.stage, group, summed % kRecordSlots, map, rank,
                               ranks);
      to_sum.advance(p.groups, p.stages);
      ++summed;
    }
  }
}

struct Pending {
  uint32_t row;
  int64_t id;
  float input;  // this lane's element of RowInputs
};
// Iterates over one group's rows and prefetches the next row's RowInputs, one element a lane.
class PendingRows {
 public:
  __device__ PendingRows(const RowCursor& cursor, const SequenceConstants<float>* constants,
                         int group)
      : cursor_(cursor), constants_(constants), rows_to_skip_(group) {}
  __device__ Pending next(const RingParams& p) {
    for (; cursor_.more(); cursor_.advance()) {
      if (!cursor_.is_unmasked() || rows_to_skip_-- > 0) continue;
      rows_to_skip_ = p.groups - 1;
      const uint32_t row = cursor_.row();
      cursor_.advance();
      return {row, p.rows.ids[row],
              load_input(p, row, row / uint32_t(p.rows.length), constants_, threadIdx.x & 31)};
    }
    return {kNoRow, 0, 0.f};
  }

 private:
  RowCursor cursor_;
  const SequenceConstants<float>* constants_;
  int rows_to_skip_;  // unmasked rows of other groups before the next of this group
};

// Publish the coefficients of a group's rows (deciding warp).
template <bool kAllFeatures>
__device__ __forceinline__ void decide_rows(const RingParams& p, RingShared& sh,
                                            unsigned char* stages, const RowCursor& cursor,
                                            int group, uint32_t rank, uint32_t ranks) {
  const int lane = threadIdx.x & 31;
  const LogitMap<kAllFeatures> map(p.rows.transform);
  PendingRows rows(cursor, constants_of(p, sh), group);
  if (!p.constants && group == 0) compute_constants(p.policy, sh.local);
  wait_for_constants(p, sh);
  uint32_t turn = 0;
  for (Pending next = rows.next(p);; ++turn) {
    const Pending now = next;
    const uint32_t report_batch = turn / kReportBatchRows % kReportBatches,
                   lap = turn / (kReportBatchRows * kReportBatches);
    if (turn % kReportBatchRows == 0 && rank == 0 && lap > 0)
      wait(&sh.reported[group][report_batch], (lap - 1) & 1);
    RowToReport& d = sh.report_batches[group][report_batch][turn % kReportBatchRows];
    if (now.row == kNoRow) {
      if (lane == 0) d.row = kNoRow;
      if (rank == 0) ptx::mbarrier_arrive(ptx::shared_address(&sh.complete[group][report_batch]));
      return;
    }
    next = rows.next(p);
    if (lane < kInputWords) reinterpret_cast<float*>(&d.inputs)[lane] = now.input;
    __syncwarp();
    const uint32_t slot = turn % kRecordSlots;
    uint64_t* records_arrived = &sh.records_arrived[group][slot];
    const Record* records = records_of(p, stages, group, slot, ranks);
    wait(records_arrived, turn / kRecordSlots & 1);
    // Expect the records of turn + kRecordSlots now: they may already be in flight.
    if (ranks > 1 && lane == 0)
      ptx::mbarrier_arrive_expect(ptx::shared_address(records_arrived),
                                  ranks * kGroupWarps * sizeof(Record));
    const bool valid_target = now.id >= 0 && now.id < p.rows.vocab;
    const float target =
        valid_target ? records[uint32_t(now.id) / uint32_t(p.share) * kGroupWarps].w : NAN;
    const RowStats stats =
        fold(records, int(ranks) * kGroupWarps, target, map.slope, map.log2_slope);
    const PolicyParams<float> q = policy_of_row(p.policy, d.inputs);
    const TokenLoss<float> token =
        evaluate_token(q, d.inputs.constants, 0, 0, stats.logp, stats.entropy);
    const float coef = valid_target ? logp_coefficient(q, d.inputs.constants, token) : NAN;
    const float entropy_coef = kAllFeatures ? entropy_coefficient(q, d.inputs.constants) : 0.f;
    if (lane == 0) {
      sh.gradient_inputs[group][slot] = {
          gradient_terms(coef, entropy_coef, stats.logp, stats.entropy, stats.log2_norm, map.slope),
          now.row, now.id};
      ptx::mbarrier_arrive(ptx::shared_address(&sh.decided[group][slot]));
      d.logp = stats.logp;
      d.entropy = stats.entropy;
      d.row = now.row;
    }
    if (rank == 0 && turn % kReportBatchRows == kReportBatchRows - 1)
      ptx::mbarrier_arrive(ptx::shared_address(&sh.complete[group][report_batch]));
  }
}

template <class T, bool kAllFeatures>
__global__ void __launch_bounds__(kRingLaunchBound, 1)
    ring_kernel(const __grid_constant__ RingParams p) {
  extern __shared__ __align__(128) unsigned char stages[];
  __shared__ RingShared sh;
  const uint32_t rank = ptx::cluster_rank(), ranks = ptx::cluster_size();
  const uint32_t cluster = blockIdx.x / ranks, clusters = gridDim.x / ranks;
  // With p.constants, only the warps that read the constants wait for the kernel that computes
  // them.
  if (!p.constants) ptx::wait_for_previous_kernel();
  const RowCursor cursor(p.rows.mask, p.row_count, cluster, clusters);
  if (threadIdx.x == 0) {
    for (int s = 0; s < p.stages; ++s) {
      ptx::mbarrier_init(ptx::shared_address(&sh.full[s]), 1);
      ptx::mbarrier_init(ptx::shared_address(&sh.ready[s]), kGroupWarps);
      ptx::mbarrier_init(ptx::shared_address(&sh.empty[s]), 1);
    }
    for (int i = 0; i < p.groups * int(kRecordSlots); ++i) {
      const uint32_t records_arrived = ptx::shared_address(&sh.records_arrived[0][i]);
      // Arrivals: this CTA's threads; in a cluster also the one that expects the records.
      ptx::mbarrier_init(records_arrived, kGroupThreads + (ranks > 1));
      ptx::mbarrier_init(ptx::shared_address(&sh.decided[0][i]), 1);
    }
    for (int i = 0; i < p.groups * kReportBatches; ++i) {
      ptx::mbarrier_init(ptx::shared_address(&sh.complete[0][i]), 32);
      ptx::mbarrier_init(ptx::shared_address(&sh.reported[0][i]), 32);
    }
    ptx::mbarrier_init(ptx::shared_address(&sh.local.counted), p.groups * kGroupWarps);
    ptx::mbarrier_init(ptx::shared_address(&sh.local.computed), 32);
    ptx::fence_mbarrier_init();
    for (int i = 0; i < p.groups * int(kRecordSlots) && ranks > 1; ++i)
      ptx::mbarrier_arrive_expect(ptx::shared_address(&sh.records_arrived[0][i]),
                                  ranks * kGroupWarps * sizeof(Record));
  }
  if (threadIdx.x < kZeroBytes / 16) sh.zeros[threadIdx.x] = {0, 0, 0, 0};
  if (threadIdx.x < kMaxLocalSequences) sh.local.tokens[threadIdx.x] = 0;
  ptx::fence_shared_for_bulk();
  __syncthreads();
  ptx::cluster_arrive();
  const int role = int(threadIdx.x / 32) - p.groups * kGroupWarps;
  // The loading warp touches only this CTA's memory and need not wait for the cluster.
  if (role != 0) ptx::cluster_wait();
  ptx::let_next_kernel_start();
  if (role == 0) {
    load_rows<T>(p, sh, stages, cursor, rank);
    __syncwarp();
    ptx::cluster_wait();
  } else if (role == 1) {
    store_rows<T>(p, sh, stages, cursor, rank);
  } else if (role == 2 && rank == 0) {
    report_rows(p, sh);
  } else if (role >= 3) {
    decide_rows<kAllFeatures>(p, sh, stages, cursor, role - 3, rank, ranks);
  } else if (role < 0) {
    consume_rows<T, kAllFeatures>(p, sh, stages, rank, ranks);
  }
  __syncwarp();
  const int consumers = p.groups * kGroupWarps;
  if (rank == 0 && p.report.sums && (role < 0 || role == 2))
    finish_report(p.report,
                  p.report.finished ? p.report.finished : &report_counters[p.report.counter],
                  p.policy, constants_of(p, sh), sh.report, role < 0 ? role + consumers : consumers,
                  consumers + 1, cluster, clusters);
  ptx::cluster_arrive();
  ptx::cluster_wait();  // a CTA must not exit while records may still be sent to it
}

template <class T>
const void* ring_kernel_address(bool all_features) {
  return all_features ? reinterpret_cast<const void*>(&ring_kernel<T, true>)
                      : reinterpret_cast<const void*>(&ring_kernel<T, false>);
}

}  // namespace grpo::cuda
