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

template <class F>
const void* for_dtype(DType dtype, const F& address) {
  switch (dtype) {
    case DType::kBFloat16:
      return address(__nv_bfloat16());
    case DType::kFloat16:
      return address(__half());
    default:
      return address(float());
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
  const void* kernel = for_dtype(params.rows.dtype, [&](auto element) {
    return ring_kernel_address<decltype(element)>(general);
  });
  const int cluster = plan.division.shares;
  const int shared_bytes = plan.stages * plan.stage_bytes;
  const int threads = ring_threads(plan.groups);
  const int fitting = active_clusters(kernel, cluster, threads, shared_bytes);
  const int clusters = fitting < kMaxReporters ? fitting : kMaxReporters;
  Launch how{unsigned(cluster * (params.row_count < clusters ? params.row_count : clusters)),
             unsigned(threads)};
  how.cluster = cluster;
  how.shared_bytes = shared_bytes;
  how.beside_previous = true;
  launch(kernel, how, stream, params);
}

void launch_stats_ring(const StatsRingParams& params, Stream stream) {
  const auto& t = params.rows.transform;
  const void* kernel = for_dtype(params.rows.dtype, [&](auto element) {
    return stats_ring_kernel_address<decltype(element)>(t.softcap > 0 || t.scale < 0);
  });
  const int shared_bytes = params.stages * params.stage_bytes;
  const int threads = stats_ring_threads(params.groups);
  const int fitting = active_clusters(kernel, 1, threads, shared_bytes);
  Launch how{unsigned(params.row_count < fitting ? params.row_count : fitting), unsigned(threads)};
  how.shared_bytes = shared_bytes;
  launch(kernel, how, stream, params);
}

}  // namespace grpo::cuda
