// Descriptors of matrices for the copy engine of sm_90.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace grpo::cuda {

// Describe boxes of 64 elements by `box_rows` rows, 128-byte swizzled, of a bf16 or fp16 matrix
// with rows `stride` elements apart. The matrix and each of its rows must start at multiples of 16
// bytes.
CUtensorMap tensor_map(const void* matrix, int64_t rows, int64_t columns, int64_t stride,
                       int box_rows);

}  // namespace grpo::cuda
