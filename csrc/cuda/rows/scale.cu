// Multiply a gradient from the forward pass by its upstream factor: grad *= *factor.
#include "cuda/base/launch.h"
#include "cuda/rows/elements.cuh"
#include "cuda/rows/rows.cuh"

namespace grpo::cuda {
namespace {

constexpr int kThreads = 256;

// One block walks over whole rows. The factor decides first: 1, the usual one, costs a launch.
template <class T>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(const __grid_constant__ RowParams<float> p, const float* factor) {
  const float f = *factor;
  if (f == 1.0f) return;
  for (uint32_t row = blockIdx.x; row < p.batch * p.length; row += gridDim.x) {
    const Destination<T> out(grad_row<T>(p, row), int(p.vocab));
    for (int q = threadIdx.x; q < out.blocks(); q += kThreads) {
      float v[kPerVector<T>];
      unpack<T>(*reinterpret_cast<const uint4*>(out.base + int64_t(q) * 16), v);
      for (float& x : v) x *= f;
      out.store(q, pack<T>(v));
    }
  }
}

}  // namespace

void scale_rows(int device, const RowParams<float>& p, const float* factor, Stream stream) {
  const DeviceGuard guard(device);
  const int64_t rows = p.batch * p.length;
  if (rows == 0 || p.vocab == 0) return;
  const int most = 4 * device_of(device).multiprocessors;
  const int grid = int(rows < most ? rows : most);
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
      throw std::invalid_argument(
          "grpo_ext: got fp64 logits on a GPU: move them to the CPU or use fp32");
  }
  GRPO_CUDA_CHECK(cudaGetLastError());
}

}  // namespace grpo::cuda
