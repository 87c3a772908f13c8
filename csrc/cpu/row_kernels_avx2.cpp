// Compiled with AVX2, FMA and F16C switched on; called only where the CPU has them.
#include "cpu/row_kernels_impl.h"
#include "cpu/vec_avx2.h"

namespace grpo::cpu {

const RowKernels<float>* avx2_row_kernels() {
  static const RowKernels<float> table[] = {row_kernels_for<VecAvx2, float>(),
                                            row_kernels_for<VecAvx2, BFloat16>(),
                                            row_kernels_for<VecAvx2, Float16>()};
  return table;
}

}  // namespace grpo::cpu
