// A gradient that was formed in the forward pass meets its upstream factor: grad *= *factor.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "check.h"
#include "cuda.h"

namespace grpo::cuda {
namespace {

constexpr int kThreads = 256;

__device__ float to_float(float v) { return v; }
__device__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ float to_float(__half v) { return __half2float(v); }
__device__ void from_float(float v, float* out) { *out = v; }
__device__ void from_float(float v, __nv_bfloat16* out) { *out = __float2bfloat16_rn(v); }
__device__ void from_float(float v, __half* out) { *out = __float2half_rn(v); }

// One block walks over whole rows. The factor decides first: 1, the usual one, costs a launch.
template <class T>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(const __grid_constant__ RowParams<float> p, const float* factor) {
  const float f = *factor;
  if (f == 1.0f) return;
  for (int64_t row = blockIdx.x; row < p.batch * p.length; row += gridDim.x) {
    T* g = static_cast<T*>(p.grad) + row / p.length * p.grad_stride_batch +
           row % p.length * p.grad_stride_position;
    for (int64_t j = threadIdx.x; j < p.vocab; j += kThreads) from_float(to_float(g[j]) * f, g + j);
  }
}

}  // namespace

int compiled_version() { return CUDART_VERSION; }

void scale_rows(const RowParams<float>& p, const float* factor, Stream stream) {
  const int64_t rows = p.batch * p.length;
  if (rows == 0 || p.vocab == 0) return;
  const int grid = int(rows < 4096 ? rows : 4096);
  switch (p.dtype) {
    case DType::kFloat32:
      scale_kernel<float><<<grid, kThreads, 0, stream>>>(p, factor);
      break;
    case DType::kBFloat16:
      scale_kernel<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(p, factor);
      break;
    case DType::kFloat16:
      scale_kernel<__half><<<grid, kThreads, 0, stream>>>(p, factor);
      break;
    case DType::kFloat64:
      throw std::invalid_argument("grpo_ext: fp64 logits are served on the CPU only");
  }
  GRPO_CUDA_CHECK(cudaGetLastError());
}

}  // namespace grpo::cuda
