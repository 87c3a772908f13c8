#include "cuda/rows/sm90/ring.cuh"
#include "cuda/rows/sm90/ring_stats.cuh"

namespace grpo::cuda {
template const void* ring_kernel_address<__nv_bfloat16>(bool);
template const void* stats_ring_kernel_address<__nv_bfloat16>(bool);
}  // namespace grpo::cuda
