// Launch kernels with the attributes that this package uses.
#pragma once

#include <cuda_runtime.h>

#include "cuda/base/check.h"
#include "cuda/base/device.h"

namespace grpo::cuda {

// Makes `index` the current device within a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int index) {
    GRPO_CUDA_CHECK(cudaGetDevice(&before_));
    if (before_ != index) GRPO_CUDA_CHECK(cudaSetDevice(index));
    changed_ = before_ != index;
  }
  ~DeviceGuard() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Whether the stream is capturing a CUDA graph.
inline bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status;
  GRPO_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

struct Launch {
  unsigned grid, block;
  int cluster = 0;  // 0: not launched as clusters
  int shared_bytes = 0;
  // Start before the previous kernel of the stream ends (programmatic dependent launch, sm_90 and
  // later); the kernel waits for its results with ptx::wait_for_previous_kernel.
  bool overlaps_previous_kernel = false;
};

template <class... Params>
void launch(const void* kernel, const Launch& how, Stream stream, const Params&... params) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(how.grid);
  config.blockDim = dim3(how.block);
  config.dynamicSmemBytes = size_t(how.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  if (how.cluster > 0) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = unsigned(how.cluster);
    a.val.clusterDim.y = a.val.clusterDim.z = 1;
  }
  if (how.overlaps_previous_kernel) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    a.val.programmaticStreamSerializationAllowed = 1;
  }
  void* arguments[] = {const_cast<Params*>(&params)...};
  GRPO_CUDA_CHECK(cudaLaunchKernelExC(&config, kernel, arguments));
}

}  // namespace grpo::cuda
