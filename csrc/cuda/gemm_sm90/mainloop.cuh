// Products of bf16 or fp16 matrices on sm_90a: fp32 accumulators, one epilogue class per product.
//
// Persistent pairs of CTAs. A tile is 128 rows (64 for each of two consumer warpgroups) by 256
// columns. The two CTAs of a pair take tiles of adjacent rows, and each loads half of the right
// operand for both. A loading warp fills a ring of four stages, each 64 deep.
//
// The two consumer warpgroups never synchronize with each other. One may be a ring's length ahead,
// so one can multiply while the other runs its epilogue. bench/NOTES.md has measurements of the
// epilogue time that this hides, and of spacing the warpgroups on purpose.
#pragma once

#include <cuda.h>

#include "cuda/base/ptx.cuh"
#include "cuda/gemm_sm90/wgmma.cuh"

namespace grpo::cuda {

struct TensorTile {
  static constexpr int kRows = 128, kColumns = 256, kDepth = 64;  // elements
  static constexpr int kStages = 4;
  static constexpr int kGroupRows = 64;  // per consumer warpgroup
  static constexpr int kLeftBytes = kRows * kDepth * 2, kRightBytes = kColumns * kDepth * 2;
  static constexpr int kBoxBytes = 64 * 64 * 2;
  static constexpr int kThreads = 3 * 128;  // a loading warpgroup and two consumers
  static constexpr int kAccumulators = kGroupRows * kColumns / 128;
};

// left (M x K) times right (K x N). In memory both operands are K-major, [M, K] and [N, K], or both
// are not, [K, M] and [K, N].
struct TensorOperands {
  CUtensorMap left, right;
  int32_t row_pairs, column_tiles, depth_steps;  // of 256 rows, 256 columns, 64 deep
  bool rows_first;                               // see ProductShape
};

struct TensorShared {
  unsigned char left[TensorTile::kStages][TensorTile::kLeftBytes];
  unsigned char right[TensorTile::kStages][TensorTile::kRightBytes];
  uint64_t full[TensorTile::kStages], empty[TensorTile::kStages];
};
// Offset of the epilogue's shared memory; the 128-byte swizzle needs 1024-byte alignment.
constexpr int kEpilogueOffset = (int(sizeof(TensorShared)) + 1023) / 1024 * 1024;

// Iterates over the tiles of one pair of CTAs.
class TileCursor {
 public:
  __device__ TileCursor(const TensorOperands& o, uint32_t rank)
      : o_(o), rank_(rank), at_(blockIdx.x / 2), count_(o.row_pairs * o.column_tiles) {}
  __device__ bool more() const { return at_ < count_; }
  __device__ void advance() { at_ += gridDim.x / 2; }
  __device__ int first_row() const {
    const uint32_t pair =
        o_.rows_first ? at_ % uint32_t(o_.row_pairs) : at_ / uint32_t(o_.column_tiles);
    return int(pair * 2 + rank_) * TensorTile::kRows;
  }
  __device__ int column_tile() const {
    return int(o_.rows_first ? at_ / uint32_t(o_.row_pairs) : at_ % uint32_t(o_.column_tiles));
  }

 private:
  const TensorOperands& o_;
  uint32_t rank_, at_, count_;
};

// A stage of the ring, and the parity of the phase to wait for.
struct StageCursor {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == TensorTile::kStages) stage = 0, parity ^= 1;
  }
};

__device__ __forceinline__ void wait_for(uint64_t* barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait(ptx::shared_address(barrier), parity)) {
  }
}

// Fill the ring with each tile's operands, then with the data that its epilogue reads.
template <class Epilogue>
__device__ __forceinline__ void load_tiles(const TensorOperands& o,
                                           const typename Epilogue::Params& p, TensorShared& sh,
                                           uint32_t rank) {
  using Tile = TensorTile;
  constexpr uint16_t kBoth = 3;
  StageCursor at;
  at.parity = 1;  // on a new barrier, the phase before the first counts as complete
  const auto next_stage = [&](uint32_t bytes) {
    wait_for(&sh.empty[at.stage], at.parity);
    const uint32_t full = ptx::shared_address(&sh.full[at.stage]);
    ptx::mbarrier_arrive_expect(full, bytes);
    return full;
  };
  for (TileCursor tiles(o, rank); tiles.more(); tiles.advance()) {
    const int row = tiles.first_row();
    const int column = tiles.column_tile() * Tile::kColumns + int(rank) * Tile::kColumns / 2;
    for (int step = 0; step < o.depth_steps; ++step, at.advance()) {
      const int depth = step * Tile::kDepth;
      const uint32_t full = next_stage(Tile::kLeftBytes + Tile::kRightBytes);
      const uint32_t left = ptx::shared_address(sh.left[at.stage]);
      const uint32_t right =
          ptx::shared_address(sh.right[at.stage]) + rank * (Tile::kRightBytes / 2);
      if constexpr (Epilogue::kDepthMajor) {
        ptx::tensor_load(left, &o.left, depth, row, full);
        ptx::tensor_load_to_all(right, &o.right, depth, column, full, kBoth);
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          ptx::tensor_load(left + i * Tile::kBoxBytes, &o.left, row + 64 * i, depth, full);
          ptx::tensor_load_to_all(right + i * Tile::kBoxBytes, &o.right, column + 64 * i, depth,
                                  full, kBoth);
        }
      }
    }
    for (int n = 0; n < Epilogue::kStages; ++n, at.advance()) {
      const uint32_t full = next_stage(Tile::kRightBytes);
      Epilogue::load(p, row, tiles.column_tile(), n, ptx::shared_address(sh.right[at.stage]), full);
    }
  }
}

// Multiply one stage into one warpgroup's accumulators: 64 x 256 x 64.
template <class T, bool kDepthMajor>
__device__ __forceinline__ void multiply(float (&sum)[TensorTile::kAccumulators], TensorShared& sh,
                                         int stage, int group, bool accumulate) {
  constexpr uint32_t kLeading = TensorTile::kBoxBytes, kStride = 1024;
  constexpr uint64_t kStep = (kDepthMajor ? 32 : 2048) >> 4;  // 16 deep
  uint64_t left = ptx::operand(ptx::shared_address(sh.left[stage]) + group * TensorTile::kBoxBytes,
                               kLeading, kStride);
  uint64_t right = ptx::operand(ptx::shared_address(sh.right[stage]), kLeading, kStride);
  ptx::product_fence();
#pragma unroll
  for (int k = 0; k < TensorTile::kDepth / 16; ++k) {
    ptx::product_64x256x16<!kDepthMajor, !kDepthMajor>(sum, left + k * kStep, right + k * kStep,
                                                       accumulate || k > 0, T());
  }
  ptx::product_commit();
}

// Signal that the warpgroup has read a stage: both CTAs write to it.
__device__ __forceinline__ void release(TensorShared& sh, int stage, int thread) {
  if ((thread & 31) == 0 && thread < 64)
    ptx::mbarrier_arrive_remote(
        ptx::map_to_rank(ptx::shared_address(&sh.empty[stage]), uint32_t(thread) / 32));
}

// The ring stages that follow a tile's operands, for its epilogue.
class EpilogueStages {
 public:
  __device__ EpilogueStages(TensorShared& sh, StageCursor& at, int thread)
      : sh_(sh), at_(at), thread_(thread) {}
  // Wait for the next stage and return its shared-memory address.
  __device__ __forceinline__ uint32_t wait() {
    wait_for(&sh_.full[at_.stage], at_.parity);
    return ptx::shared_address(sh_.right[at_.stage]);
  }
  // Call from all threads of the warpgroup, after all have read the stage.
  __device__ __forceinline__ void release_stage() {
    release(sh_, at_.stage, thread_);
    at_.advance();
  }

 private:
  TensorShared& sh_;
  StageCursor& at_;
  int thread_;
};

// Multiply all tiles of a consumer warpgroup. The members of an Epilogue:
// - Element: dtype of the operands; kDepthMajor: both are K-major in memory.
// - Params (kernel argument), Shared (shared memory), and a constructor, called once per thread.
// - begin(row, tile) before a tile's products, finish(sum, row, tile, stages) after them, end()
//   after the last tile. `row` is the warpgroup's first row.
// - kStages: ring stages that follow the operands; load(params, row, tile, n, to, full) fills the
//   n-th with kRightBytes for the tile's 128 rows from `row` on.
// Named barrier 1 + group is reserved for the epilogue.
template <class Epilogue>
__device__ __forceinline__ void multiply_tiles(const TensorOperands& o, TensorShared& sh,
                                               uint32_t rank, int group, int thread,
                                               Epilogue& epilogue) {
  float sum[TensorTile::kAccumulators];
  StageCursor at;
  for (TileCursor tiles(o, rank); tiles.more(); tiles.advance()) {
    const int row = tiles.first_row() + group * TensorTile::kGroupRows;
    const int tile = tiles.column_tile();
    epilogue.begin(row, tile);
    int before = 0;
    for (int step = 0; step < o.depth_steps; ++step, at.advance()) {
      wait_for(&sh.full[at.stage], at.parity);
      multiply<typename Epilogue::Element, Epilogue::kDepthMajor>(sum, sh, at.stage, group,
                                                                  step > 0);
      if (step > 0) {
        ptx::product_wait<1>();
        release(sh, before, thread);
      }
      before = at.stage;
    }
    ptx::product_wait<0>();
    release(sh, before, thread);
    EpilogueStages stages(sh, at, thread);
    epilogue.finish(sum, row, tile, stages);
  }
  epilogue.end();
}

template <class Epilogue>
__global__ void __launch_bounds__(TensorTile::kThreads, 1)
    tensor_product_kernel(const __grid_constant__ TensorOperands o,
                          const __grid_constant__ typename Epilogue::Params p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  TensorShared& sh = *reinterpret_cast<TensorShared*>(memory);
  auto& own = *reinterpret_cast<typename Epilogue::Shared*>(memory + kEpilogueOffset);
  const uint32_t rank = ptx::cluster_rank();
  if (threadIdx.x == 0) {
    for (int s = 0; s < TensorTile::kStages; ++s) {
      ptx::mbarrier_init(ptx::shared_address(&sh.full[s]), 1);
      ptx::mbarrier_init(ptx::shared_address(&sh.empty[s]), 4);  // two warpgroups of two CTAs
    }
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (threadIdx.x < 128) {
    ptx::give_registers<40>();
    if (threadIdx.x == 0) load_tiles<Epilogue>(o, p, sh, rank);
    __syncwarp();
  } else {
    ptx::take_registers<232>();
    const int group = threadIdx.x / 128 - 1, thread = threadIdx.x % 128;
    Epilogue epilogue(p, own, group, thread);
    multiply_tiles(o, sh, rank, group, thread, epilogue);
  }
  // A CTA must not exit while the other one may still signal it.
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

}  // namespace grpo::cuda
