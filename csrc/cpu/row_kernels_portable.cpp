// Any CPU, and fp64 on every CPU.
#include "cpu/row_kernels_impl.h"
#include "cpu/vec_scalar.h"

namespace grpo::cpu {

const RowKernels<float>* portable_row_kernels() {
  static const RowKernels<float> table[] = {row_kernels_for<VecScalar<float>, float>(),
                                            row_kernels_for<VecScalar<float>, BFloat16>(),
                                            row_kernels_for<VecScalar<float>, Float16>()};
  return table;
}

const RowKernels<double>* portable_row_kernels_fp64() {
  static const RowKernels<double> table[] = {row_kernels_for<VecScalar<double>, double>()};
  return table;
}

}  // namespace grpo::cpu
