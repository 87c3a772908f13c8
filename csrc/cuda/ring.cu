// Which ring kernel, with how many clusters; both asked for once per device and plan.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <map>
#include <mutex>
#include <tuple>

#include "launch.h"
#include "ring.h"

namespace grpo::cuda {
namespace {

const void* kernel_for(DType dtype, bool general) {
  switch (dtype) {
    case DType::kBFloat16:
      return ring_kernel_address<__nv_bfloat16>(general);
    case DType::kFloat16:
      return ring_kernel_address<__half>(general);
    default:
      return ring_kernel_address<float>(general);
  }
}

// Clusters that fit on the device at a time. The first call for a plan also raises the kernel's
// shared-memory limit.
int active_clusters(const void* kernel, int cluster, int threads, int shared_bytes) {
  using Key = std::tuple<int, const void*, int, int, int>;
  static std::mutex mutex;
  static std::map<Key, int> known;
  int device = 0;
  GRPO_CUDA_CHECK(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  int& clusters = known[Key(device, kernel, cluster, threads, shared_bytes)];
  if (clusters > 0) return clusters;
  // To the maximum, so that it never shrinks under a plan that was prepared before.
  GRPO_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       int(device_of(device).shared_bytes) - kRingStaticBytes));
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute[1];
  attribute[0].id = cudaLaunchAttributeClusterDimension;
  attribute[0].val.clusterDim.x = unsigned(cluster);
  attribute[0].val.clusterDim.y = attribute[0].val.clusterDim.z = 1;
  config.gridDim = dim3(unsigned(cluster));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.attrs = attribute;
  config.numAttrs = 1;
  GRPO_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
  if (clusters < 1) throw std::runtime_error("grpo_ext: no room for one cluster of the row kernel");
  return clusters;
}

}  // namespace

void launch_ring(const RingParams& params, const RowPlan& plan, Stream stream) {
  const auto& t = params.rows.transform;
  const bool general = t.softcap > 0 || t.scale < 0 || params.policy.spec.entropy_coef != 0;
  const void* kernel = kernel_for(params.rows.dtype, general);
  const int cluster = plan.division.shares;
  const int shared_bytes = plan.stages * plan.stage_bytes;
  const int threads = ring_threads(plan.groups);
  const int clusters = active_clusters(kernel, cluster, threads, shared_bytes);
  Launch how{unsigned(cluster * (params.row_count < clusters ? params.row_count : clusters)),
             unsigned(threads)};
  how.cluster = cluster;
  how.shared_bytes = shared_bytes;
  how.beside_previous = true;
  launch(kernel, how, stream, params);
}

}  // namespace grpo::cuda
