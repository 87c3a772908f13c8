#include "ring.cuh"

namespace grpo::cuda {
template const void* ring_kernel_address<float>(bool);
}
