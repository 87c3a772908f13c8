// The epilogue that exponentiates and sums: accumulators -> E, and two sums per row and tile.
//
// Five instructions per element. Their floor is the exponential's rate, 16 per cycle and SM: 1024
// cycles for a warpgroup's 64 x 256 elements, where the products of the tile take 16,000 at H =
// 1024.
#pragma once

#include "cuda/gemm_sm90/mainloop.cuh"
#include "cuda/gemm_sm90/tensor_store.cuh"
#include "cuda/probability/probability.h"

namespace grpo::cuda {

struct ExponentialsParams {
  CUtensorMap probabilities;  // where they are stored
  int32_t rows, columns;
  const float* reference;
  const int32_t* target;
  const float* bias;
  float slope;
  float2* partials;  // [tiles, rows]
  int64_t partials_stride;
  float* exponent;
};

// Sums over the tile's columns are formed in an order that depends on nothing but the tile: a
// thread adds its 64 columns in order, four lanes share a row.
template <bool kStore>
class Exponentials {
 public:
  using Element = __nv_bfloat16;  // of the operands and of E
  using Params = ExponentialsParams;
  static constexpr int kStages = 0;
  static __device__ void load(const Params&, int, int, int, uint32_t, uint32_t) {}
  struct Shared {
    alignas(1024) BlockStore::Buffers buffers[2];
    float column_term[2][TensorTile::kColumns];
  };

  __device__ Exponentials(const Params& p, Shared& shared, int group, int thread)
      : p_(p),
        column_term_(shared.column_term[group]),
        barrier_(1 + group),
        thread_(thread),
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
#pragma unroll
    for (int k = 0; k < TensorTile::kAccumulators; ++k)
      z[k] = fmaf(z[k], p_.slope, -reference_[k / 2 % 2]);
    if (p_.bias != nullptr || (tile + 1) * TensorTile::kColumns > p_.columns) {
      add_column_terms(z, tile, column0);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int own = target_[i] - tile * TensorTile::kColumns - column0;
      if (own < 0 || own >= TensorTile::kColumns - column0 || (own & 6) != 0) continue;
      // This thread has the row's target: its exponent goes to memory and leaves the sums.
      float exponent = 0.f;
#pragma unroll
      for (int k = 0; k < TensorTile::kAccumulators; ++k) {
        if (k / 2 % 2 != i || k / 4 * 8 + k % 2 != own) continue;
        exponent = z[k];
        z[k] = kLowestExponent;
      }
      p_.exponent[first + 8 * i] = exponent;
    }
    float sum[2] = {0.f, 0.f}, weighted[2] = {0.f, 0.f};
#pragma unroll
    for (int c = 0; c < TensorTile::kColumns / BlockStore::kColumns; ++c) {
      uint32_t packed[16];
#pragma unroll
      for (int pair = 0; pair < 16; ++pair) {
        const int i = pair % 2;
        float e[2];
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const float t = ptx::min_nan(z[32 * c + 2 * pair + side], kGreatestExponent);
          e[side] = ptx::exp2(t);
          sum[i] += e[side];
          weighted[i] = fmaf(e[side], t, weighted[i]);
        }
        packed[pair] = pack_pair(e[0], e[1], Element());
      }
      if constexpr (kStore) {
        store_.store(&p_.probabilities, row, tile * TensorTile::kColumns + c * BlockStore::kColumns,
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
      if ((thread_ & 3) == 0 && first + 8 * i < p_.rows)
        p_.partials[tile * p_.partials_stride + first + 8 * i] = {sum[i], weighted[i]};
    }
  }

  __device__ __forceinline__ void end() {
    if constexpr (kStore) store_.end();
  }

 private:
  // A bias, and -inf for columns beyond the vocabulary.
  __device__ __forceinline__ void load_column_terms(int tile) {
    const int64_t first = int64_t(tile) * TensorTile::kColumns;
    ptx::named_barrier(barrier_, 128);  // the last tile's have been read
    for (int c = thread_; c < TensorTile::kColumns; c += 128) {
      float term = kLowestExponent;
      if (first + c < p_.columns)
        term = p_.bias ? fmaxf(p_.bias[first + c] * p_.slope, kLowestExponent) : 0.f;
      column_term_[c] = term;
    }
    ptx::named_barrier(barrier_, 128);
  }
  __device__ __forceinline__ void add_column_terms(float (&z)[TensorTile::kAccumulators], int tile,
                                                   int column0) {
    load_column_terms(tile);
#pragma unroll
    for (int k = 0; k < TensorTile::kAccumulators; ++k)
      z[k] += column_term_[column0 + k / 4 * 8 + k % 2];
  }

  const Params& p_;
  float* column_term_;
  int barrier_, thread_;
  BlockStore store_;
  float reference_[2];
  int target_[2];
};

}  // namespace grpo::cuda
