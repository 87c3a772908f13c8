// Select and launch the ring kernels; occupancy is queried once per device and plan.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <map>
#include <mutex>
#include <tuple>

#include "cuda/base/launch.h"
#include "cuda/rows/sm90/ring.h"

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

// Clusters that the device runs at a time. The first call for a plan also raises the kernel's
// limits.
int active_clusters(const void* kernel, int cluster, int threads, int shared_bytes) {
  using Key = std::tuple<int, const void*, int, int, int>;
  static std::mutex mutex;
  static std::map<Key, int> known;
  int device = 0;
  GRPO_CUDA_CHECK(cudaGetDevice(&device));
  const Key key(device, kernel, cluster, threads, shared_bytes);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  // Always the maximum: a later plan must not lower the limit of an earlier one.
  GRPO_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           int(device_of(device).shared_bytes) - kRingStaticSharedBytes));
  if (cluster > kPortableCluster)
    GRPO_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
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
  int clusters = 0;
  GRPO_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
  return known[key] = clusters;
}

const void* ring_kernel_of(const RingParams& params) {
  const auto& t = params.rows.transform;
  const bool all_features = t.softcap > 0 || t.scale < 0 || params.policy.spec.entropy_coef != 0;
  return for_dtype(params.rows.dtype, [&](auto element) {
    return ring_kernel_address<decltype(element)>(all_features);
  });
}

}  // namespace

int take_report_counter(int device, Stream stream, bool capturing) {
  static std::mutex mutex;
  static std::map<std::pair<int, unsigned long long>, int> of_stream;  // by stream id
  static std::map<int, int> taken;                                     // by device
  // The driver reuses stream handles, but not stream ids.
  unsigned long long number = 0;
  if (!capturing) GRPO_CUDA_CHECK(cudaStreamGetId(stream, &number));
  const std::lock_guard<std::mutex> lock(mutex);
  if (!capturing) {
    const auto known = of_stream.find({device, number});
    if (known != of_stream.end()) return known->second;
  }
  int& count = taken[device];
  if (count == kReportCounters) return -1;
  if (!capturing) of_stream[{device, number}] = count;
  return count++;
}

int ring_clusters(const RingParams& params, const RowPlan& plan) {
  const int clusters = active_clusters(ring_kernel_of(params), plan.division.shares,
                                       ring_threads(plan.groups), ring_shared_bytes(plan));
  return clusters < kMaxReporters ? clusters : kMaxReporters;
}

void launch_ring(const RingParams& params, const RowPlan& plan, bool overlaps_previous_kernel,
                 Stream stream) {
  int clusters = ring_clusters(params, plan);
  if (clusters < 1) throw std::runtime_error("grpo_ext: no room for one cluster of the row kernel");
  if (params.row_count < clusters) clusters = params.row_count;
  const int cluster = plan.division.shares;
  Launch how{unsigned(cluster * clusters), unsigned(ring_threads(plan.groups))};
  how.cluster = cluster;
  how.shared_bytes = ring_shared_bytes(plan);
  how.overlaps_previous_kernel = overlaps_previous_kernel;
  launch(ring_kernel_of(params), how, stream, params);
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
