// Compute the sequences' constants in every CTA while its first rows load.
#pragma once

#include "cuda/rows/sm90/ring.h"
#include "cuda/rows/sm90/ring_parts.cuh"

namespace grpo::cuda {

struct LocalConstants {
  uint64_t counted, computed;  // tokens are counted, constants are computed
  uint32_t tokens[kMaxLocalSequences];
  SequenceConstants<float> constants[kMaxLocalSequences];
};

// Sum the mask bytes (0 or 1, torch.bool) of a 16-byte block that lie within [begin, end).
__device__ __forceinline__ uint32_t count_block(uintptr_t block, uintptr_t begin, uintptr_t end) {
  if (block >= begin && block + 16 <= end) {
    const uint4 x = *reinterpret_cast<const uint4*>(block);
    return __dp4a(x.x, 0x01010101u, __dp4a(x.y, 0x01010101u, 0u)) +
           __dp4a(x.z, 0x01010101u, __dp4a(x.w, 0x01010101u, 0u));
  }
  uint32_t tokens = 0;
#pragma unroll 1
  for (uintptr_t at = max(block, begin); at < min(block + 16, end); ++at)
    tokens += *reinterpret_cast<const uint8_t*>(at);
  return tokens;
}

// Count the tokens in every `warps`-th piece of the masks, from piece `warp` on (one warp).
__device__ __forceinline__ void count_tokens(const PolicyParams<float>& p, LocalConstants& local,
                                             int warp, int warps) {
  constexpr int kBlocks = kMaskPiece / (32 * 16);  // per lane and piece
  const int lane = threadIdx.x & 31;
  const int length = int(p.length);
  const bool aligned = ((reinterpret_cast<uintptr_t>(p.mask) | uintptr_t(length)) & 15) == 0;
  const int pieces = int(mask_pieces(length, aligned)), count = int(p.batch) * pieces;
#pragma unroll 1
  for (int piece = warp; piece < count; piece += warps) {
    const int sequence = piece / pieces;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(p.mask) + uintptr_t(sequence) * length;
    const uintptr_t first = begin / 16 * 16 + (piece % pieces) * kMaskPiece + lane * 16;
    uint32_t tokens = 0;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) tokens += count_block(first + i * 512, begin, begin + length);
    tokens = __reduce_add_sync(~0u, tokens);
    if (lane == 0) atomicAdd(&local.tokens[sequence], tokens);
  }
  if (lane == 0) ptx::mbarrier_arrive(ptx::shared_address(&local.counted));
}

// Compute the constants (one warp); same values as constants_kernel in policy/policy.cu.
__device__ __forceinline__ void compute_constants(const PolicyParams<float>& p,
                                                  LocalConstants& local) {
  const int lane = threadIdx.x & 31, batch = int(p.batch);
  wait(&local.counted, 0);
  uint32_t all = 0;
  for (int b = lane; b < batch; b += 32) all += local.tokens[b];
  all = __reduce_add_sync(~0u, all);
#pragma unroll 1
  for (int b = lane; b < batch; b += 32) {
    SequenceSums sums{};
    sums.tokens = local.tokens[b];
    local.constants[b] = sequence_constants(p, b, sums, double(all));
  }
  ptx::mbarrier_arrive(ptx::shared_address(&local.computed));
}

}  // namespace grpo::cuda
