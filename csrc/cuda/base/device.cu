#include <mutex>
#include <vector>

#include "cuda/base/check.h"
#include "cuda/base/device.h"

namespace grpo::cuda {

const Device& device_of(int index) {
  static std::mutex mutex;
  static std::vector<Device*> known;  // never freed: references stay valid
  const std::lock_guard<std::mutex> lock(mutex);
  if (index >= int(known.size())) known.resize(index + 1, nullptr);
  if (known[index] == nullptr) {
    const auto attribute = [&](cudaDeviceAttr which) {
      int value = 0;
      GRPO_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, index));
      return value;
    };
    Device device{};
    device.architecture = attribute(cudaDevAttrComputeCapabilityMajor) * 10 +
                          attribute(cudaDevAttrComputeCapabilityMinor);
    device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
    device.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
#if defined(GRPO_CUDA_RING)
    device.has_ring = true;
#endif
    known[index] = new Device(device);
  }
  return *known[index];
}

}  // namespace grpo::cuda
