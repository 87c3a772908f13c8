// Addresses of rows.
#pragma once

#include "common/row_params.h"

namespace grpo::cuda {

// Row numbers stay below 2^31 (checked at launch), offsets do not.
template <class T>
__device__ __forceinline__ const T* logits_row(const RowParams<float>& p, uint32_t row) {
  const uint32_t length = uint32_t(p.length);
  const int64_t offset = int64_t(row / length) * p.logits_stride_batch +
                         int64_t(row % length) * p.logits_stride_position;
  return static_cast<const T*>(p.logits) + offset;
}

template <class T>
__device__ __forceinline__ T* grad_row(const RowParams<float>& p, uint32_t row) {
  const uint32_t length = uint32_t(p.length);
  const int64_t offset =
      int64_t(row / length) * p.grad_stride_batch + int64_t(row % length) * p.grad_stride_position;
  return static_cast<T*>(p.grad) + offset;
}

// Elements of share number `share` of a row.
__device__ __forceinline__ int share_length(int64_t vocab, int share, int share_size) {
  const int64_t rest = vocab - int64_t(share) * share_size;
  return rest < 0 ? 0 : rest < share_size ? int(rest) : share_size;
}

__device__ __forceinline__ bool is_masked(const RowParams<float>& p, uint32_t row) {
  return p.mask && !p.mask[row];
}

}  // namespace grpo::cuda
