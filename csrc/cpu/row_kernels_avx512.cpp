// Compiled with AVX-512 switched on; called only where the CPU has it.
#include "cpu/row_kernels_impl.h"
#include "cpu/vec_avx512.h"

namespace grpo::cpu {

const RowKernels<float>* avx512_row_kernels() {
  static const RowKernels<float> table[] = {row_kernels_for<VecAvx512, float>(),
                                            row_kernels_for<VecAvx512, BFloat16>(),
                                            row_kernels_for<VecAvx512, Float16>()};
  return table;
}

}  // namespace grpo::cpu
