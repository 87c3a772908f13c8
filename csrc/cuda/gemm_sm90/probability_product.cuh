// Epilogue of probability_product: E from the accumulators, and two sums per row and tile.
//
// Four instructions per element. The exponential's rate of 16 per cycle and SM sets the lower
// bound: 1024 cycles for a warpgroup's 64 x 256 elements. The products of the tile take 16,000 at H
// = 1024. If a row's sum is too great, the tile's accumulators are exponentiated a second time.
#pragma once

#include "cuda/gemm_sm90/mainloop.cuh"
#include "cuda/gemm_sm90/products.h"
#include "cuda/gemm_sm90/tensor_store.cuh"

namespace grpo::cuda {

struct ExponentialsParams : ProductParams {
  CUtensorMap stored;  // of `probabilities`, if not null
};

static_assert(kTileColumns == TensorTile::kColumns, "one partial sum a tile");

// A row's sums over the tile have a fixed order: a thread adds its 64 columns in order, then the
// four lanes of the row combine theirs.
template <bool kStore>
class Exponentials {
 public:
  using Element = __nv_bfloat16;  // of the operands and of E
  static constexpr bool kDepthMajor = true;
  using Params = ExponentialsParams;
  static constexpr int kStages = 0;
  static __device__ void load(const Params&, int, int, int, uint32_t, uint32_t) {}
  struct Shared {
    alignas(1024) BlockStore::Buffers buffers[2];
    float column_bias[2][TensorTile::kColumns];
  };

  __device__ Exponentials(const Params& p, Shared& shared, int group, int thread)
      : p_(p),
        column_bias_(shared.column_bias[group]),
        barrier_(1 + group),
        thread_(thread),
        lowest_(kLowestExponent / p.slope),
        store_(shared.buffers[group], barrier_, thread) {}

  __device__ __forceinline__ void begin(int row, int) {
    const int first = row + thread_ / 32 * 16 + (thread_ & 31) / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool inside = first + 8 * i < p_.rows;
      reference_[i] = inside ? __ldg(p_.reference + first + 8 * i) : 0.f;
      target_[i] = inside ? __ldg(p_.target + first + 8 * i) : -1;
    }
  }

  __device__ __forceinline__ void finish(float (&z)[TensorTile::kAccumulators], int row, int tile,
                                         EpilogueStages&) {
    const int first = row + thread_ / 32 * 16 + (thread_ & 31) / 4;
    const int column0 = 2 * (thread_ & 3);  // of the thread's first element in the tile
    if (p_.bias != nullptr || (tile + 1) * TensorTile::kColumns > p_.vocab) {
      add_column_biases(z, tile, column0);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int own = target_[i] - tile * TensorTile::kColumns - column0;
      if (own < 0 || own >= TensorTile::kColumns - column0 || (own & 6) != 0) continue;
      // This thread has the row's target: store its exponent, and exclude it from the sums.
      float logit = 0.f;
#pragma unroll
      for (int k = 0; k < TensorTile::kAccumulators; ++k) {
        if (k / 2 % 2 != i || k / 4 * 8 + k % 2 != own) continue;
        logit = z[k];
        z[k] = lowest_;
      }
      p_.exponent[first + 8 * i] = fmaf(logit, p_.slope, -reference_[i]);
    }
    float sum[2], weighted[2];
    bool recentred[2] = {};
#pragma unroll 1
    for (bool repeat = true; repeat;) {
      exponentiate(z, row, tile, sum, weighted);
      repeat = recentre(z, sum, recentred);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t r = first + 8 * i;
      if ((thread_ & 3) != 0 || r >= p_.rows) continue;
      reinterpret_cast<float2*>(p_.partials)[tile * p_.partials_stride + r] = {
          recentred[i] ? -sum[i] : sum[i], weighted[i]};
      if (recentred[i]) p_.recentred[tile * p_.recentred_stride + r] = reference_[i];
    }
  }

  __device__ __forceinline__ void end() {
    if constexpr (kStore) store_.end();
  }

 private:
  // Compute E, store it, and sum each row over the tile.
  __device__ __forceinline__ void exponentiate(const float (&z)[TensorTile::kAccumulators], int row,
                                               int tile, float (&sum)[2], float (&weighted)[2]) {
    sum[0] = sum[1] = weighted[0] = weighted[1] = 0.f;
#pragma unroll
    for (int c = 0; c < TensorTile::kColumns / BlockStore::kColumns; ++c) {
      uint32_t packed[16];
#pragma unroll
      for (int pair = 0; pair < 16; ++pair) {
        const int i = pair % 2;
        float e[2];
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const float t = fmaf(z[32 * c + 2 * pair + side], p_.slope, -reference_[i]);
          e[side] = ptx::exp2(t);
          sum[i] += e[side];
          weighted[i] = fmaf(e[side], t, weighted[i]);
        }
        packed[pair] = pack_pair(e[0], e[1], Element());
      }
      if constexpr (kStore) {
        store_.store(&p_.stored, row, tile * TensorTile::kColumns + c * BlockStore::kColumns,
                     packed);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int o = 1; o < 4; o *= 2) {
        sum[i] += __shfl_xor_sync(~0u, sum[i], o);
        weighted[i] += __shfl_xor_sync(~0u, weighted[i], o);
      }
    }
  }
  // Choose a new reference for rows with too great a sum; returns whether to exponentiate again.
  // The reference is the row's greatest exponent in the tile, rounded to a whole number. A later
  // change of E to a common reference then multiplies by a power of two, which is exact.
  __device__ __forceinline__ bool recentre(const float (&z)[TensorTile::kAccumulators],
                                           const float (&sum)[2], bool (&recentred)[2]) {
    const bool exceeds[2] = {sum[0] >= kGreatestSum && !recentred[0],
                             sum[1] >= kGreatestSum && !recentred[1]};
    // Threads that store together repeat together.
    if (!(kStore ? ptx::named_barrier_any(barrier_, 128, exceeds[0] || exceeds[1])
                 : __any_sync(~0u, exceeds[0] || exceeds[1])))
      return false;
    float slope = p_.slope;
    // Keep the compiler from hoisting the search for the maximum out of the loop.
    asm volatile("" : "+f"(slope));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float greatest = -INFINITY;
#pragma unroll
      for (int k = 2 * i; k < TensorTile::kAccumulators; k += 4)
        greatest = fmaxf(greatest, fmaxf(z[k] * slope, z[k + 1] * slope));
#pragma unroll
      for (int o = 1; o < 4; o *= 2) greatest = fmaxf(greatest, __shfl_xor_sync(~0u, greatest, o));
      if (exceeds[i]) reference_[i] = rintf(greatest);
      recentred[i] |= exceeds[i];
    }
    end();  // the first stores of E must not arrive after the second
    return true;
  }

  // The bias of each column; beyond the vocabulary, the logit that stands for -inf.
  __device__ __forceinline__ void load_column_biases(int tile) {
    const int64_t first = int64_t(tile) * TensorTile::kColumns;
    ptx::named_barrier(barrier_, 128);  // the previous tile's biases have been read
    for (int c = thread_; c < TensorTile::kColumns; c += 128) {
      float value = lowest_;
      if (first + c < p_.vocab) {
        const float bias = p_.bias ? p_.bias[first + c] : 0.f;
        if (!(bias * p_.slope < kLowestExponent)) value = bias;  // keeps NaN
      }
      column_bias_[c] = value;
    }
    ptx::named_barrier(barrier_, 128);
  }
  __device__ __forceinline__ void add_column_biases(float (&z)[TensorTile::kAccumulators], int tile,
                                                    int column0) {
    load_column_biases(tile);
#pragma unroll
    for (int k = 0; k < TensorTile::kAccumulators; ++k)
      z[k] += column_bias_[column0 + k / 4 * 8 + k % 2];
  }

  const Params& p_;
  float* column_bias_;
  int barrier_, thread_;
  float lowest_;  // logit that stands for -inf
  BlockStore store_;
  float reference_[2];
  int target_[2];
};

}  // namespace grpo::cuda
