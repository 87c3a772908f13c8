#include "ring.cuh"

namespace grpo::cuda {
template const void* ring_kernel_address<__nv_bfloat16>(bool);
}
