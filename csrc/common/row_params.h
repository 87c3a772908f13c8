// Parameters of the row kernels: logits in, statistics and gradient out.
#pragma once

#include <cstdint>

#include "common/loss_spec.h"

namespace grpo {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

// Row i stands for batch i / length, position i % length. Strides are in elements; a row itself is
// dense (stride 1 over the vocabulary).
template <class Real>
struct RowParams {
  DType dtype;  // of logits and grad
  int64_t batch, length, vocab;
  const void* logits;
  int64_t logits_stride_batch, logits_stride_position;
  void* grad;  // may be logits itself; null when only statistics are asked for
  int64_t grad_stride_batch, grad_stride_position;
  const int64_t* ids;   // [B,T]
  const uint8_t* mask;  // [B,T]; null: every row counts. Rows with 0 are never read
  LogitTransform<Real> transform;
  // Statistics, [B,T], 0 where masked.
  Real* logps;
  Real* entropy;  // null: not computed
  Real* lse;      // null: not wanted; else what row_gradient needs to rebuild probabilities
  // Upstream gradients for row_gradient, [B,T].
  const Real* coef;          // dLoss/dlogp
  const Real* entropy_coef;  // dLoss/dentropy; null: none

  GRPO_FIELDS(dtype, batch, length, vocab, logits, logits_stride_batch, logits_stride_position,
              grad, grad_stride_batch, grad_stride_position, ids, mask, transform, logps, entropy,
              lse, coef, entropy_coef)
};

}  // namespace grpo
