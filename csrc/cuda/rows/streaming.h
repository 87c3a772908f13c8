// Streaming kernels, for every architecture: statistics, then the gradient from them.
#pragma once

#include "common/row_params.h"
#include "cuda/base/device.h"
#include "cuda/rows/plan.h"

namespace grpo::cuda {

struct StreamingParams {
  RowParams<float> rows;
  int32_t row_count;
  int32_t shares, share;  // division of a row, for the order of the sums
  int32_t tiles;          // gradient: blocks of threads per row
};

// Addresses of the kernels; one instantiation file per dtype.
template <class T>
const void* stats_kernel_address(bool all_features);
template <class T>
const void* gradient_kernel_address(bool all_features);

constexpr int kTileVectors = 4;  // per thread, of the gradient

}  // namespace grpo::cuda
