// Store a warpgroup's fragments as a matrix of 16-bit elements: through shared memory, then by the
// copy engine.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/base/ptx.cuh"
#include "cuda/gemm_sm90/wgmma.cuh"

namespace grpo::cuda {

// Round two numbers to 16 bits each.
__device__ __forceinline__ uint32_t pack_pair(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ __forceinline__ uint32_t pack_pair(float low, float high, __half) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// Shared-memory address of a lane's 16-byte row for column blocks 2 pair and 2 pair + 1, of 8
// columns each, in a block of 64 x 64 elements, 128-byte swizzled.
__device__ __forceinline__ uint32_t swizzled_row(uint32_t block, int thread, int pair) {
  const int row = thread / 32 * 16 + (thread & 15), right = (thread & 31) >> 4;
  return block + row * 128 + ((2 * pair + right) ^ (row & 7)) * 16;
}

// Load a block in the layout of the accumulators: fragment[2 j + i] holds two elements of column
// block j, row half i.
__device__ __forceinline__ void load_block(uint32_t block, int thread, uint32_t (&fragment)[16]) {
#pragma unroll
  for (int j = 0; j < 4; ++j)
    ptx::load_matrices(swizzled_row(block, thread, j), fragment[4 * j], fragment[4 * j + 1],
                       fragment[4 * j + 2], fragment[4 * j + 3]);
}

// Stores blocks of 64 x 64 elements through two buffers in turn. The map's boxes are 64 x 64,
// 128-byte swizzled.
class BlockStore {
 public:
  static constexpr int kRows = 64, kColumns = 64, kBytes = kRows * kColumns * 2;
  using Buffers = unsigned char[2][kBytes];  // aligned to 1024 bytes

  __device__ BlockStore(Buffers& buffers, int barrier, int thread)
      : buffers_(buffers), barrier_(barrier), thread_(thread) {}
  // packed: the thread's elements in the layout of `load_block`.
  __device__ __forceinline__ void store(const CUtensorMap* map, int row, int column,
                                        const uint32_t (&packed)[16]) {
    if (thread_ == 0) ptx::bulk_wait_read_but<1>();  // this buffer's previous store
    ptx::named_barrier(barrier_, 128);
    const uint32_t buffer = ptx::shared_address(buffers_[next_]);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      ptx::store_matrices(swizzled_row(buffer, thread_, j), packed[4 * j], packed[4 * j + 1],
                          packed[4 * j + 2], packed[4 * j + 3]);
    ptx::fence_shared_for_bulk();
    ptx::named_barrier(barrier_, 128);
    if (thread_ == 0) {
      ptx::tensor_store(map, column, row, buffer);
      ptx::bulk_commit();
    }
    next_ ^= 1;
  }
  // Wait until all stores are in global memory.
  __device__ __forceinline__ void end() {
    if (thread_ == 0) ptx::bulk_wait();
  }

 private:
  Buffers& buffers_;
  int barrier_, thread_;
  int next_ = 0;
};

}  // namespace grpo::cuda
