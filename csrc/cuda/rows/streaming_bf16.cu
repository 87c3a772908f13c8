#include "cuda/rows/streaming.cuh"

namespace grpo::cuda {
template const void* stats_kernel_address<__nv_bfloat16>(bool);
template const void* gradient_kernel_address<__nv_bfloat16>(bool);
}  // namespace grpo::cuda
