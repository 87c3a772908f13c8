#include "cuda/rows/streaming.cuh"

namespace grpo::cuda {
template const void* stats_kernel_address<float>(bool);
template const void* gradient_kernel_address<float>(bool);
}  // namespace grpo::cuda
