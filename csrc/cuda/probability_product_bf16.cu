#include "probability_product.cuh"

namespace grpo::cuda {

void probability_product_bf16(int multiprocessors, const ProductParams& p, Stream stream) {
  using T = cutlass::bfloat16_t;
  if (p.tile == 1)
    p.probabilities ? Product<T, true, 64, false>::run(multiprocessors, p, stream)
                    : Product<T, false, 64, false>::run(multiprocessors, p, stream);
  else
    p.probabilities ? Product<T, true, 128, true>::run(multiprocessors, p, stream)
                    : Product<T, false, 128, true>::run(multiprocessors, p, stream);
}

}  // namespace grpo::cuda
