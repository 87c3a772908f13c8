// Epilogue of logits_product: add the bias, and round to the operands' dtype or keep fp32.
#pragma once

#include "cuda/gemm_sm90/mainloop.cuh"
#include "cuda/gemm_sm90/products.h"
#include "cuda/gemm_sm90/tensor_store.cuh"

namespace grpo::cuda {

struct LogitsParams : LogitsProductParams {
  CUtensorMap rounded;  // of `out`, if it has the operands' dtype
};

// T: dtype of the operands. kRounded: the result has that dtype, else fp32.
template <class T, bool kRounded>
class Logits {
 public:
  using Element = T;
  static constexpr bool kDepthMajor = true;
  using Params = LogitsParams;
  static constexpr int kStages = 0;
  static __device__ void load(const Params&, int, int, int, uint32_t, uint32_t) {}
  struct Shared {
    alignas(1024) BlockStore::Buffers buffers[2];
  };

  __device__ Logits(const Params& p, Shared& shared, int group, int thread)
      : p_(p), thread_(thread), store_(shared.buffers[group], 1 + group, thread) {}

  __device__ __forceinline__ void begin(int, int) {}

  __device__ __forceinline__ void finish(float (&z)[TensorTile::kAccumulators], int row, int tile,
                                         EpilogueStages&) {
    const int first = row + thread_ / 32 * 16 + (thread_ & 31) / 4;
    const int column0 = tile * TensorTile::kColumns + 2 * (thread_ & 3);
    if (p_.bias) {
#pragma unroll
      for (int k = 0; k < TensorTile::kAccumulators; ++k) {
        const int column = column0 + k / 4 * 8 + k % 2;
        if (column < p_.vocab) z[k] += __ldg(p_.bias + column);
      }
    }
#pragma unroll
    for (int c = 0; c < TensorTile::kColumns / BlockStore::kColumns; ++c) {
      if constexpr (kRounded) {
        uint32_t packed[16];
#pragma unroll
        for (int n = 0; n < 16; ++n)
          packed[n] = pack_pair(z[32 * c + 2 * n], z[32 * c + 2 * n + 1], T());
        store_.store(&p_.rounded, row, tile * TensorTile::kColumns + c * BlockStore::kColumns,
                     packed);
      } else {
        store_wide(z + 32 * c, first, column0 + c * BlockStore::kColumns);
      }
    }
  }

  __device__ __forceinline__ void end() {
    if constexpr (kRounded) store_.end();
  }

 private:
  // Store a block of 64 columns: pair n of z is at row first + 8 (n % 2), column + 8 (n / 2).
  __device__ __forceinline__ void store_wide(const float* z, int first, int column) const {
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      const int r = first + n % 2 * 8, c = column + n / 2 * 8;
      if (r >= p_.rows) continue;
      float* to = static_cast<float*>(p_.out) + r * p_.out_stride + c;
      if (c + 1 < p_.vocab)
        *reinterpret_cast<float2*>(to) = {z[2 * n], z[2 * n + 1]};
      else if (c < p_.vocab)
        *to = z[2 * n];
    }
  }

  const Params& p_;
  int thread_;
  BlockStore store_;
};

}  // namespace grpo::cuda
