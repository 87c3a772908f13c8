// Epilogue of head_gradient: add the accumulators to the sum of the earlier chunks of rows.
//
// The fp32 sum is stored in two planes of 16 bits, the upper and the lower halves of its words. The
// last chunk rounds the sum to bf16 into the upper plane, which then is the gradient. Memory is 4
// bytes per element; an fp32 sum plus a separate gradient takes 6. Traffic of two chunks is
// 4 + 4 + 2 bytes; an fp32 sum and another kernel that rounds it take 18.
#pragma once

#include "cuda/gemm_sm90/mainloop.cuh"
#include "cuda/gemm_sm90/products.h"
#include "cuda/gemm_sm90/tensor_store.cuh"

namespace grpo::cuda {

struct PlaneSumParams {
  CUtensorMap upper, lower;                // to store, boxes of 64 x 64
  CUtensorMap upper_before, lower_before;  // the same planes, to load, boxes of 128 rows x 64
};

// kHasSum: the planes hold a sum. kLast: round the result into the upper plane.
template <bool kHasSum, bool kLast>
class PlaneSum {
 public:
  using Element = __nv_bfloat16;
  static constexpr bool kDepthMajor = false;
  using Params = PlaneSumParams;
  struct Shared {
    alignas(1024) BlockStore::Buffers buffers[2];
  };
  // Blocks of 64 columns of the earlier sum arrive through the ring, prefetched like the operands.
  static constexpr int kBlocks = TensorTile::kColumns / BlockStore::kColumns;
  static constexpr int kStages = kHasSum ? kBlocks : 0;
  static __device__ __forceinline__ void load(const Params& p, int row, int tile, int block,
                                              uint32_t to, uint32_t full) {
    const int column = tile * TensorTile::kColumns + block * BlockStore::kColumns;
    ptx::tensor_load(to, &p.upper_before, column, row, full);
    ptx::tensor_load(to + kPlaneBytes, &p.lower_before, column, row, full);
  }

  __device__ PlaneSum(const Params& p, Shared& shared, int group, int thread)
      : p_(p), group_(group), thread_(thread), store_(shared.buffers[group], 1 + group, thread) {}

  __device__ __forceinline__ void begin(int, int) {}

  __device__ __forceinline__ void finish(float (&z)[TensorTile::kAccumulators], int row, int tile,
                                         EpilogueStages& stages) {
#pragma unroll
    for (int c = 0; c < kBlocks; ++c) {
      uint32_t upper[16], lower[16];
      if constexpr (kHasSum) {
        const uint32_t block = stages.wait() + group_ * BlockStore::kBytes;
        load_block(block, thread_, upper);
        load_block(block + kPlaneBytes, thread_, lower);
        ptx::named_barrier(1 + group_, 128);
        stages.release_stage();
      }
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        float even = z[32 * c + 2 * n], odd = z[32 * c + 2 * n + 1];
        if constexpr (kHasSum) {
          even += __uint_as_float(__byte_perm(lower[n], upper[n], 0x5410));
          odd += __uint_as_float(__byte_perm(lower[n], upper[n], 0x7632));
        }
        if constexpr (kLast) {
          upper[n] = pack_pair(even, odd, Element());
        } else {
          upper[n] = __byte_perm(__float_as_uint(even), __float_as_uint(odd), 0x7632);
          lower[n] = __byte_perm(__float_as_uint(even), __float_as_uint(odd), 0x5410);
        }
      }
      const int column = tile * TensorTile::kColumns + c * BlockStore::kColumns;
      store_.store(&p_.upper, row, column, upper);
      if constexpr (!kLast) store_.store(&p_.lower, row, column, lower);
    }
  }

  __device__ __forceinline__ void end() { store_.end(); }

 private:
  static constexpr int kPlaneBytes = 2 * BlockStore::kBytes;  // 128 rows x 64 columns

  const Params& p_;
  int group_, thread_;
  BlockStore store_;
};

}  // namespace grpo::cuda
