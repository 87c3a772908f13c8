// Stream rows from global memory. Statistics: one block per row, one read. Gradient: one block per
// 16 KiB of a row.
#pragma once

#include "cuda/rows/row_math.cuh"
#include "cuda/rows/rows.cuh"
#include "cuda/rows/streaming.h"

namespace grpo::cuda {

// Sum a row share by share and fold the records in the order of a cluster's CTAs: same bits as the
// ring kernel.
template <class T, bool kAllFeatures>
__global__ void __launch_bounds__(kGroupThreads, 3)
    stats_kernel(const __grid_constant__ StreamingParams p) {
  __shared__ Record records[kMaxCluster * kGroupWarps];
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  const uint32_t row = blockIdx.x;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  if (is_masked(p.rows, row)) {
    if (thread == 0) {
      p.rows.logps[row] = 0.f;
      if (p.rows.entropy) p.rows.entropy[row] = 0.f;
      if (p.rows.lse) p.rows.lse[row] = 0.f;
    }
    return;
  }
  const int64_t id = p.rows.ids[row];
  const bool valid_target = id >= 0 && id < p.rows.vocab;
  const LogitMap<kAllFeatures> map(p.rows.transform);
  const T* logits = logits_row<T>(p.rows, row);
  for (int s = 0; s < p.shares; ++s) {
    const int64_t first = int64_t(s) * p.share;
    const int length = share_length(p.rows.vocab, s, p.share);
    Part part = with_global_vectors(
        reinterpret_cast<const unsigned char*>(logits + first), 0, int64_t(length) * sizeof(T),
        [&](const auto& load) { return part_of_thread<T>(load, length, map, thread); });
    part = merge_warp(part, map.log2_slope);
    if (lane == 0) {
      Record record = {part.max, part.sum, part.weighted, 0.f};
      if (warp == 0 && id >= first && id < first + length)
        record.w = map.unscaled(to_float(logits[id]));
      records[s * kGroupWarps + warp] = record;
    }
  }
  __syncthreads();
  if (warp != 0) return;
  const float target =
      valid_target ? records[uint32_t(id) / uint32_t(p.share) * kGroupWarps].w : NAN;
  const RowStats stats = fold(records, p.shares * kGroupWarps, target, map.slope, map.log2_slope);
  if (lane == 0) {
    p.rows.logps[row] = stats.logp;
    if (p.rows.entropy) p.rows.entropy[row] = stats.entropy;
    if (p.rows.lse) p.rows.lse[row] = stats.lse;
  }
}

// Blocks [begin, end) of the destination, every kGroupThreads-th: loads first.
template <class T, bool kAllFeatures, class Load>
__device__ __forceinline__ void gradient_tile(const Load& load, const Destination<T>& out,
                                              const LogitMap<kAllFeatures>& map,
                                              const GradientTerms& g, int target, int begin,
                                              int end) {
  const int own = target < 0 ? -1 : (target * int(sizeof(T)) + out.lead_bytes) / 16;
  uint4 raw[kTileVectors];
#pragma unroll
  for (int j = 0; j < kTileVectors; ++j)
    if (begin + j * kGroupThreads < end) raw[j] = load(begin + j * kGroupThreads);
#pragma unroll
  for (int j = 0; j < kTileVectors; ++j) {
    const int q = begin + j * kGroupThreads;
    if (q >= end) continue;
    if (q == own)
      out.store(q, gradient_with_target<T>(raw[j], map, g, target - out.first_element(q)));
    else
      out.store(q, gradient_of<T>(raw[j], map, g));
  }
}

template <class T, bool kAllFeatures>
__global__ void __launch_bounds__(kGroupThreads, 4)
    gradient_kernel(const __grid_constant__ StreamingParams p) {
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  const uint32_t row = blockIdx.x / p.tiles, tile = blockIdx.x % p.tiles;
  constexpr int kTile = kTileVectors * kGroupThreads;
  T* grad = grad_row<T>(p.rows, row);
  // 16-byte blocks of the destination; a misaligned row touches one more.
  const Destination<T> out(grad, int(p.rows.vocab));
  const int begin = tile * kTile + threadIdx.x;
  const int end = min(out.blocks(), int(tile + 1) * kTile);
  const bool masked = is_masked(p.rows, row);
  const float coef = masked ? 0.f : p.rows.coef[row];
  const float entropy_coef = masked || !p.rows.entropy_coef ? 0.f : p.rows.entropy_coef[row];
  if (coef == 0 && entropy_coef == 0) {
    for (int q = begin; q < end; q += kGroupThreads) out.store(q, {0, 0, 0, 0});
    return;
  }
  const int64_t id = p.rows.ids[row];
  const bool valid_target = id >= 0 && id < p.rows.vocab;
  const LogitMap<kAllFeatures> map(p.rows.transform);
  const GradientTerms g = gradient_terms(valid_target ? coef : NAN, entropy_coef, p.rows.logps[row],
                                         p.rows.entropy ? p.rows.entropy[row] : 0.f,
                                         p.rows.lse[row] * kLog2e, map.slope);
  const int target = valid_target ? int(id) : -1;
  // The logits that correspond to the blocks of the destination.
  const unsigned char* logits = reinterpret_cast<const unsigned char*>(logits_row<T>(p.rows, row));
  with_global_vectors(
      logits - out.lead_bytes, out.lead_bytes, p.rows.vocab * int64_t(sizeof(T)),
      [&](const auto& load) { gradient_tile<T>(load, out, map, g, target, begin, end); });
}

template <class T>
const void* stats_kernel_address(bool all_features) {
  return all_features ? reinterpret_cast<const void*>(&stats_kernel<T, true>)
                      : reinterpret_cast<const void*>(&stats_kernel<T, false>);
}
template <class T>
const void* gradient_kernel_address(bool all_features) {
  return all_features ? reinterpret_cast<const void*>(&gradient_kernel<T, true>)
                      : reinterpret_cast<const void*>(&gradient_kernel<T, false>);
}

}  // namespace grpo::cuda
