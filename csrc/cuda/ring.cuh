// Persistent clusters, each CTA with its share of a row in a ring of shared-memory stages.
//
// A loading warp keeps the ring full with bulk copies, a storing warp sends finished stages off the
// same way and clears masked rows. Groups of consumers take rows in turn: while one waits for the
// row's other CTAs, another one computes. Per row a group
//   1. sums its share; each warp pushes a 16-byte record to every CTA of the cluster,
//   2. folds all records in a fixed order, which gives logp, the loss coefficient and the scale,
//   3. turns the stage into the gradient.
// In place this is safe: nobody writes before every CTA has summed what it has loaded of the row,
// and the 16-byte blocks that two rows or shares have in common are written element by element.
#pragma once

#include "ring.h"
#include "row_math.cuh"
#include "rows.cuh"

namespace grpo::cuda {

constexpr uint32_t kZeroBytes = 1024;
constexpr int kMaxRecords = kMaxCluster * kGroupWarps;
constexpr uint32_t kBulkBytes = 16384;
constexpr int kTermsWords = sizeof(SequenceTerms<float>) / 4;

// What a row's coefficient is made of beside its logits.
struct RowInputs {
  float advantage, old_logp, ref_logp, sampling_logp, importance;
  SequenceTerms<float> terms;
};
constexpr int kInputWords = sizeof(RowInputs) / 4;
static_assert(kInputWords == 5 + kTermsWords && kInputWords <= 32, "one lane per number");

struct RingShared {
  alignas(128) uint4 zeros[kZeroBytes / 16];
  uint64_t full[kMaxStages], ready[kMaxStages], empty[kMaxStages];
  uint32_t loading[kMaxStages];                // number of the row that `full` is about
  uint64_t exchanged[kMaxGroups][2];           // two phases per group take turns
  Record records[kMaxGroups][2][kMaxRecords];  // rank-major
  RowInputs inputs[kMaxGroups];
  GradientTerms gradient[kMaxGroups];
};
static_assert(sizeof(RingShared) <= kRingStaticBytes, "plan.h counts on it");

// Until the phase of this parity is over. Warps that wait long do not poll at full speed: they
// would take a fifth of the instruction slots.
__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait(ptx::shared_address(barrier), parity)) {
  }
}
__device__ __forceinline__ void wait_patiently(uint64_t* barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait(ptx::shared_address(barrier), parity)) __nanosleep(64);
}

// The rows of one cluster: every `step`-th, with the masks of 32 of them read ahead.
class RowCursor {
 public:
  __device__ RowCursor(const RingParams& p, uint32_t first, uint32_t step)
      : mask_(p.rows.mask), row_(first), step_(step), count_(p.row_count) {
    ahead_ = peek(first + (threadIdx.x & 31) * step_);
    refill();
  }
  __device__ bool more() const { return row_ < count_; }
  __device__ uint32_t row() const { return row_; }
  __device__ bool live() const { return window_ >> at_ & 1; }
  __device__ void advance() {
    row_ += step_;
    if (++at_ == 32) refill();
  }

 private:
  __device__ bool peek(uint32_t row) const { return row < count_ && (!mask_ || mask_[row]); }
  __device__ void refill() {
    window_ = __ballot_sync(~0u, ahead_);
    at_ = 0;
    ahead_ = peek(row_ + (32 + (threadIdx.x & 31)) * step_);
  }
  const uint8_t* mask_;
  uint32_t row_, step_, count_;
  uint32_t window_;
  int at_;
  bool ahead_;
};

// The place in stage number `stage` of the 16-byte block that `from` lies in.
template <class T>
__device__ __forceinline__ unsigned char* place_in_stage(const RingParams& p, unsigned char* stages,
                                                         int stage, const T* from) {
  const int in_line = int(reinterpret_cast<uintptr_t>(from)) & (kStageLine - 16);
  return stages + stage * p.stage_bytes + kStageLine + in_line;
}

// Whether the gradient of a row lies like its logits with respect to 16-byte blocks.
template <class T>
__device__ __forceinline__ bool same_alignment(const RingParams& p, uint32_t row, int64_t first) {
  return ((reinterpret_cast<uintptr_t>(logits_row<T>(p.rows, row) + first) ^
           reinterpret_cast<uintptr_t>(grad_row<T>(p.rows, row) + first)) &
          15) == 0;
}

template <class T>
__device__ __forceinline__ void load_rows(const RingParams& p, RingShared& sh,
                                          unsigned char* stages, RowCursor cursor, uint32_t rank) {
  const int length = share_length(p.rows.vocab, rank, p.share);
  const uint32_t bytes = length * sizeof(T);
  int stage = 0;
  uint32_t lap = 0, number = 0;
  for (; cursor.more(); cursor.advance()) {
    if (!cursor.live()) continue;
    if ((threadIdx.x & 31) == 0) {
      const uint32_t full = ptx::shared_address(&sh.full[stage]);
      if (lap > 0) wait_patiently(&sh.empty[stage], (lap - 1) & 1);
      const T* logits = logits_row<T>(p.rows, cursor.row()) + int64_t(rank) * p.share;
      const char* from = reinterpret_cast<const char*>(logits);
      const uint32_t skip = uint32_t(reinterpret_cast<uintptr_t>(from) & 15);
      // Whole 16-byte blocks: up to 15 bytes of the neighbours on either side come along.
      const uint32_t total = length > 0 ? (skip + bytes + 15) / 16 * 16 : 0;
      const uint32_t to = ptx::shared_address(place_in_stage(p, stages, stage, logits));
      atomicExch(&sh.loading[stage], number);
      ptx::mbarrier_arrive_expect(full, total);
      for (uint32_t o = 0; o < total; o += kBulkBytes)
        ptx::bulk_load(to + o, from - skip + o, min(kBulkBytes, total - o), full);
    }
    ++number;
    if (++stage == p.stages) stage = 0, ++lap;
  }
}

// One number of RowInputs per lane, from global memory.
__device__ __forceinline__ float load_input(const RingParams& p, uint32_t row, uint32_t sequence,
                                            int lane) {
  const PolicyParams<float>& q = p.policy;
  const float* from = nullptr;
  if (lane == 0) from = q.advantages + (q.advantages_per_token ? row : sequence);
  if (lane == 1 && q.old_logps) from = q.old_logps + row;
  if (lane == 2 && q.ref_logps) from = q.ref_logps + row;
  if (lane == 3 && q.sampling_logps) from = q.sampling_logps + row;
  if (lane == 4 && q.importance_shape == ImportanceShape::kPerToken) from = q.importance + row;
  if (lane >= 5 && lane < kInputWords)
    from = reinterpret_cast<const float*>(p.terms + sequence) + (lane - 5);
  return from ? *from : 0.f;
}

// The policy's view of one row: the same parameters, with the tensors of length one in `in`.
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

template <bool kGeneral>
__device__ __forceinline__ GradientTerms row_terms(const RingParams& p, const RowInputs& in,
                                                   const RowStats& stats, bool valid_target,
                                                   float slope) {
  const PolicyParams<float> q = policy_of_row(p.policy, in);
  const TokenLoss<float> token = evaluate_token(q, in.terms, 0, 0, stats.logp, stats.entropy);
  float coef = logp_coefficient(q, in.terms, token);
  if (!valid_target) coef = NAN;
  const float entropy_coef = kGeneral ? entropy_coefficient(q, in.terms) : 0.f;
  return gradient_terms(coef, entropy_coef, stats.logp, stats.entropy, stats.log2_norm, slope);
}

// The storing warp's part of a masked row.
template <class T>
__device__ __forceinline__ void clear_share(const Destination<T>& out, const RingShared& sh,
                                            int lane) {
  const int first = out.first_whole(), end = out.end_whole();
  if (first > 0 && lane == 0) out.store(0, {0, 0, 0, 0});
  if (lane == 1 && end < out.blocks() && end >= first) out.store(end, {0, 0, 0, 0});
  if (lane != 0) return;
  for (int q = first; q < end; q += kZeroBytes / 16)
    ptx::bulk_store(out.base + int64_t(q) * 16, ptx::shared_address(sh.zeros),
                    min(kZeroBytes, uint32_t(end - q) * 16));
}

template <class T>
__device__ __forceinline__ void store_rows(const RingParams& p, RingShared& sh,
                                           unsigned char* stages, RowCursor cursor, uint32_t rank) {
  const int lane = threadIdx.x & 31;
  const int64_t first = int64_t(rank) * p.share;
  const int length = share_length(p.rows.vocab, rank, p.share);
  int stage = 0;
  uint32_t lap = 0;
  for (; cursor.more(); cursor.advance()) {
    const uint32_t row = cursor.row();
    const Destination<T> out(grad_row<T>(p.rows, row) + first, length);
    if (!cursor.live()) {
      clear_share(out, sh, lane);
      if (rank == 0 && lane == 0) p.rows.logps[row] = p.rows.entropy[row] = 0.f;
      continue;
    }
    if (lane == 0) {
      wait_patiently(&sh.ready[stage], lap & 1);
      const uint32_t bytes = uint32_t(max(0, out.end_whole() - out.first_whole())) * 16;
      if (bytes > 0 && same_alignment<T>(p, row, first)) {
        const unsigned char* share =
            place_in_stage(p, stages, stage, logits_row<T>(p.rows, row) + first);
        ptx::bulk_store(out.base + out.first_whole() * 16,
                        ptx::shared_address(share + out.first_whole() * 16), bytes);
        ptx::bulk_commit();
        ptx::bulk_wait_read();
      }
      ptx::mbarrier_arrive(ptx::shared_address(&sh.empty[stage]));
    }
    if (++stage == p.stages) stage = 0, ++lap;
    __syncwarp();
  }
  if (lane == 0) {
    ptx::bulk_commit();
    ptx::bulk_wait();
  }
}

// The gradient of a share, block by block of the destination, into `store(block, value)`.
template <class T, bool kGeneral, class Load, class Store>
__device__ __forceinline__ void gradient_blocks(const Load& logits, const Destination<T>& out,
                                                const LogitMap<kGeneral>& map,
                                                const GradientTerms& g, int target, int thread,
                                                const Store& store) {
  constexpr int kBatch = kBatchElements<kGeneral> / kPerVector<T>;
  const int blocks = out.blocks(), whole = out.end_whole();
  const int own = target < 0 ? -1 : (target * int(sizeof(T)) + out.shift) / 16;
  int q = out.first_whole() + thread;
  const bool zero = is_zero(g);
  const auto gradient = [&](const uint4& z, int block) -> uint4 {
    if (block == own) return gradient_with_target<T>(z, map, g, target - out.first_element(block));
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
  // At most two blocks are shared with the neighbours.
  int edge = -1;
  if (thread == 0 && out.first_whole() > 0) edge = 0;
  if (thread == 32 && whole < blocks && whole >= out.first_whole()) edge = whole;
  if (edge >= 0) out.store(edge, zero ? uint4{0, 0, 0, 0} : gradient(logits(edge), edge));
}

// In the stage, for the storing warp to send off; straight to global memory where the gradient is
// aligned in another way than the logits.
template <class T, bool kGeneral>
__device__ __forceinline__ void write_gradient(unsigned char* share, int skip,
                                               const Destination<T>& out,
                                               const LogitMap<kGeneral>& map,
                                               const GradientTerms& g, int target, int thread) {
  if (skip == out.shift) {
    uint4* stage = reinterpret_cast<uint4*>(share);
    gradient_blocks<T>(AlignedShared{stage}, out, map, g, target, thread,
                       [&](int q, const uint4& v) { stage[q] = v; });
    ptx::fence_shared_for_bulk();
  } else {
    gradient_blocks<T>(ShiftedShared(share, skip - out.shift), out, map, g, target, thread,
                       [&](int q, const uint4& v) { out.store_whole(q, v); });
  }
}

template <class T, bool kGeneral>
__device__ __forceinline__ void consume_rows(const RingParams& p, RingShared& sh,
                                             unsigned char* stages, RowCursor cursor, uint32_t rank,
                                             uint32_t ranks) {
  const int group = threadIdx.x / kGroupThreads, thread = threadIdx.x % kGroupThreads;
  const int lane = thread & 31, warp = thread >> 5;
  const int64_t first = int64_t(rank) * p.share;
  const int length = share_length(p.rows.vocab, rank, p.share);
  const LogitMap<kGeneral> map(p.rows.transform);
  int next_group = 0;
  uint32_t live_rows = 0, turns = 0;  // so far, and those of this group
  bool waited = false;
  int stage = 0;
  uint32_t lap = 0;
  for (; cursor.more(); cursor.advance()) {
    const uint32_t row = cursor.row();
    if (!cursor.live()) continue;
    const int s = stage;
    const uint32_t full_lap = lap, number = live_rows++;
    if (++stage == p.stages) stage = 0, ++lap;
    if (next_group != group) {
      next_group = next_group + 1 == p.groups ? 0 : next_group + 1;
      continue;
    }
    next_group = next_group + 1 == p.groups ? 0 : next_group + 1;

    const int64_t id = p.rows.ids[row];  // used only when the sums are done
    const T* logits = logits_row<T>(p.rows, row) + first;
    const int skip = int(reinterpret_cast<uintptr_t>(logits) & 15);
    unsigned char* share = place_in_stage(p, stages, s, logits);
    const uint32_t sequence = row / uint32_t(p.rows.length);
    float input = 0.f;
    if (warp == 0 && waited) input = load_input(p, row, sequence, lane);

    // A parity alone would let a group pass that is a whole lap ahead of the loads.
    while (atomicOr(&sh.loading[s], 0u) != number) {
    }
    wait(&sh.full[s], full_lap & 1);
    Part part = with_shared_vectors(share, skip, [&](const auto& vectors) {
      return part_of_thread<T>(vectors, length, map, thread);
    });
    part = merge_warp(part, map.log2_slope);
    const bool valid_target = id >= 0 && id < p.rows.vocab;
    const int target = id >= first && id < first + length ? int(id - first) : -1;
    const uint32_t turn = turns++, phase = turn & 1;
    const uint32_t exchanged = ptx::shared_address(&sh.exchanged[group][phase]);
    if (lane < ranks) {
      Record record = {part.max, part.sum, part.weighted, 0.f};
      if (warp == 0 && target >= 0)
        record.w = map.u(to_float(reinterpret_cast<const T*>(share + skip)[target]));
      Record* box = &sh.records[group][phase][rank * kGroupWarps + warp];
      if (ranks > 1) {
        ptx::store_async(ptx::map_to_rank(ptx::shared_address(box), lane), record,
                         ptx::map_to_rank(exchanged, lane));
      } else {
        *box = record;
        ptx::mbarrier_arrive(exchanged);
      }
    }
    if (warp == 0) {
      if (!waited) {  // the first row's sums need nothing of the kernel before
        ptx::wait_for_previous_kernel();
        waited = true;
        input = load_input(p, row, sequence, lane);
      }
      if (lane < kInputWords) reinterpret_cast<float*>(&sh.inputs[group])[lane] = input;
      __syncwarp();
      wait(&sh.exchanged[group][phase], (turn >> 1) & 1);
      const RowStats stats = fold(sh.records[group][phase], int(ranks) * kGroupWarps, map.slope,
                                  map.log2_slope, valid_target);
      const GradientTerms g =
          row_terms<kGeneral>(p, sh.inputs[group], stats, valid_target, map.slope);
      if (lane == 0) {
        sh.gradient[group] = g;
        // For the next row but one of this group; its records may already be on their way.
        if (ranks > 1) ptx::mbarrier_arrive_expect(exchanged, ranks * kGroupWarps * sizeof(Record));
        if (rank == 0) {
          p.rows.logps[row] = stats.logp;
          p.rows.entropy[row] = stats.entropy;
        }
      }
    }
    ptx::named_barrier(group + 1, kGroupThreads);
    const GradientTerms g = sh.gradient[group];
    const Destination<T> out(grad_row<T>(p.rows, row) + first, length);
    write_gradient<T>(share, skip, out, map, g, target, thread);
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(ptx::shared_address(&sh.ready[s]));
  }
  ptx::wait_for_previous_kernel();  // also without a row: the next kernel counts on both
}

template <class T, bool kGeneral>
__global__ void __launch_bounds__(ring_threads(kMaxGroups), 1)
    ring_kernel(const __grid_constant__ RingParams p) {
  extern __shared__ __align__(128) unsigned char stages[];
  __shared__ RingShared sh;
  const uint32_t rank = ptx::cluster_rank(), ranks = ptx::cluster_size();
  if (threadIdx.x == 0) {
    for (int s = 0; s < p.stages; ++s) {
      ptx::mbarrier_init(ptx::shared_address(&sh.full[s]), 1);
      ptx::mbarrier_init(ptx::shared_address(&sh.ready[s]), kGroupWarps);
      ptx::mbarrier_init(ptx::shared_address(&sh.empty[s]), 1);
      sh.loading[s] = ~0u;
    }
    // A lone CTA's warps arrive themselves; in a cluster the bytes of all records are counted.
    for (int g = 0; g < p.groups; ++g)
      for (int phase = 0; phase < 2; ++phase)
        ptx::mbarrier_init(ptx::shared_address(&sh.exchanged[g][phase]),
                           ranks > 1 ? 1 : kGroupWarps);
    ptx::fence_mbarrier_init();
    for (int g = 0; g < p.groups && ranks > 1; ++g)
      for (int phase = 0; phase < 2; ++phase)
        ptx::mbarrier_arrive_expect(ptx::shared_address(&sh.exchanged[g][phase]),
                                    ranks * kGroupWarps * sizeof(Record));
  }
  if (threadIdx.x < kZeroBytes / 16) sh.zeros[threadIdx.x] = {0, 0, 0, 0};
  ptx::fence_shared_for_bulk();
  __syncthreads();
  ptx::cluster_arrive();
  ptx::cluster_wait();
  ptx::let_next_kernel_start();
  const RowCursor cursor(p, blockIdx.x / ranks, gridDim.x / ranks);
  const int helper = int(threadIdx.x / 32) - p.groups * kGroupWarps;
  if (helper == 0)
    load_rows<T>(p, sh, stages, cursor, rank);
  else if (helper == 1)
    store_rows<T>(p, sh, stages, cursor, rank);
  else
    consume_rows<T, kGeneral>(p, sh, stages, cursor, rank, ranks);
  __syncwarp();
  ptx::cluster_arrive();
  ptx::cluster_wait();  // nobody leaves while records for it may be under way
}

template <class T>
const void* ring_kernel_address(bool general) {
  return general ? reinterpret_cast<const void*>(&ring_kernel<T, true>)
                 : reinterpret_cast<const void*>(&ring_kernel<T, false>);
}

}  // namespace grpo::cuda
