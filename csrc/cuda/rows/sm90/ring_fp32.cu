#include "cuda/rows/sm90/ring.cuh"
#include "cuda/rows/sm90/ring_stats.cuh"

namespace grpo::cuda {
template const void* ring_kernel_address<float>(bool);
template const void* stats_ring_kernel_address<float>(bool);
}  // namespace grpo::cuda
