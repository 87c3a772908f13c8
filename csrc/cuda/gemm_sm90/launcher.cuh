// Launch any product of this folder: tensor maps, tiles, shared memory and grid.
#pragma once

#include "cuda/base/launch.h"
#include "cuda/gemm_sm90/mainloop.cuh"
#include "cuda/gemm_sm90/tensor_map.h"

namespace grpo::cuda {

// left (rows x depth) times right (depth x columns).
struct ProductShape {
  int64_t rows, columns, depth;
  bool rows_first;  // tiles run down the rows before they move to the next columns
};

// A matrix with rows `stride` elements apart; Epilogue::kDepthMajor gives its layout.
struct Operand {
  const void* data;
  int64_t stride;
};

template <class Epilogue>
void launch_tensor_product(int multiprocessors, const ProductShape& shape, Operand left,
                           Operand right, const typename Epilogue::Params& p, Stream stream) {
  using Tile = TensorTile;
  const auto map = [&](Operand m, int64_t extent, int box_rows) {
    return Epilogue::kDepthMajor ? tensor_map(m.data, extent, shape.depth, m.stride, box_rows)
                                 : tensor_map(m.data, shape.depth, extent, m.stride, Tile::kDepth);
  };
  const auto tiles = [](int64_t extent, int tile) { return int32_t((extent + tile - 1) / tile); };
  const TensorOperands o{
      map(left, shape.rows, Tile::kRows), map(right, shape.columns, Tile::kColumns / 2),
      tiles(shape.rows, 2 * Tile::kRows), tiles(shape.columns, Tile::kColumns),
      tiles(shape.depth, Tile::kDepth),   shape.rows_first};
  constexpr int kSharedBytes = kEpilogueOffset + int(sizeof(typename Epilogue::Shared));
  static_assert(kSharedBytes <= 227 * 1024, "limit of a block on sm_90");
  const void* kernel = reinterpret_cast<const void*>(&tensor_product_kernel<Epilogue>);
  GRPO_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  const int64_t pairs = int64_t(o.row_pairs) * o.column_tiles;
  const int fitting = multiprocessors / 2;
  Launch how{unsigned(2 * (pairs < fitting ? pairs : fitting)), unsigned(Tile::kThreads)};
  how.cluster = 2;
  how.shared_bytes = kSharedBytes;
  launch(kernel, how, stream, o, p);
}

}  // namespace grpo::cuda
