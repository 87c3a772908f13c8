// The functions on one row that each instruction set provides.
#pragma once

#include <cstdint>

#include "common/row_params.h"
#include "common/softmax_record.h"

namespace grpo::cpu {

// Results of one read of a row.
template <class Real>
struct RowStatistics {
  SoftmaxRecord<Real> record;  // `weighted` stays 0 unless the entropy was asked for
  double target;               // x[target] - record.max, not rounded: log probabilities are, once
};

// Inputs of one row's gradient, dz = coef dlogp/dz + entropy_coef dH/dz.
template <class Real>
struct RowGradient {
  int64_t target;
  Real coef;          // dLoss/dlogp
  Real entropy_coef;  // dLoss/dentropy
  Real logp;
  Real entropy;
  Real max;      // any m, with
  Real log_sum;  // log sum exp(x - m)
};

template <class Real>
struct RowKernels {
  RowStatistics<Real> (*stats)(const void* z, int64_t vocab, int64_t target,
                               const LogitTransform<Real>& transform, bool with_entropy);
  void (*gradient)(const void* z, void* g, int64_t vocab, const LogitTransform<Real>& transform,
                   const RowGradient<Real>& row);  // g may be z
};

// Tables for fp32, bf16, fp16 in the order of DType; fp64 has one of its own.
const RowKernels<float>* portable_row_kernels();
const RowKernels<double>* portable_row_kernels_fp64();
#if defined(GRPO_X86)
const RowKernels<float>* avx2_row_kernels();
const RowKernels<float>* avx512_row_kernels();
#endif

}  // namespace grpo::cpu
