#include "cuda/rows/streaming.cuh"

namespace grpo::cuda {
template const void* stats_kernel_address<__half>(bool);
template const void* gradient_kernel_address<__half>(bool);
}  // namespace grpo::cuda
