// The row kernel of loss and gradient alone, beside a plain copy of the logits, in one process:
//
//     bench/ring_bench.sh            # builds and runs; needs nvcc and one GPU of sm_90
//     build/ring_bench [rows [masked share [vocab]]]
//
// Variants of the plan (CTAs per row, constants of the sequences from a kernel before or formed
// inside) on the production kernel. In place; the logits are copied anew before every launch,
// outside of the clock, and that copy is the one that the rate is compared to. Medians of nine; one
// CSV line per variant. `difference` is the greatest difference of its gradient from the first
// variant's, as a share of the greatest gradient.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include "cuda/base/launch.h"
#include "cuda/ops.h"
#include "cuda/policy/policy.h"
#include "cuda/rows/sm90/ring.h"

using namespace grpo;
using namespace grpo::cuda;

namespace {

constexpr int kRuns = 9, kWarmUp = 2, kSequences = 8;

__device__ float uniform(uint64_t i) {  // in (0, 1), from a hash
  i = (i ^ (i >> 31)) * 0x9e3779b97f4a7c15ull;
  i = (i ^ (i >> 29)) * 0xbf58476d1ce4e5b9ull;
  return (float((i ^ (i >> 32)) & 0xffffff) + 0.5f) / 16777216.f;
}
__device__ float normal(uint64_t i) {
  return sqrtf(-2 * logf(uniform(2 * i))) * cospif(2 * uniform(2 * i + 1));
}
template <class T>
__global__ void fill(T* out, int64_t n, float spread, float mean) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n;
       i += int64_t(gridDim.x) * blockDim.x)
    out[i] = T(mean + spread * normal(i));
}
__global__ void fill_rows(int64_t* ids, uint8_t* mask, int rows, int vocab, float masked) {
  for (int i = threadIdx.x; i < rows; i += blockDim.x) {
    ids[i] = int64_t(uniform(77 + i) * float(vocab));
    mask[i] = uniform(int64_t(1) << 40 | i) >= masked;
  }
}
// greatest[0] of |a|, greatest[1] of |a - b|; both at least 0, so ordered as integers.
template <class T>
__global__ void compare(const T* a, const T* b, int64_t n, int* greatest) {
  float size = 0, difference = 0;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n;
       i += int64_t(gridDim.x) * blockDim.x) {
    size = fmaxf(size, fabsf(float(a[i])));
    difference = fmaxf(difference, fabsf(float(a[i]) - float(b[i])));
  }
  atomicMax(greatest, __float_as_int(size));
  atomicMax(greatest + 1, __float_as_int(difference));
}
__global__ void spin(int64_t cycles) {  // the host gets ahead of the device
  for (const int64_t begin = clock64(); clock64() - begin < cycles;) {
  }
}

template <class T>
T* allocate(int64_t count) {
  void* p = nullptr;
  GRPO_CUDA_CHECK(cudaMalloc(&p, size_t(count) * sizeof(T)));
  return static_cast<T*>(p);
}

struct Variant {
  const char* name;
  int shares;  // 0: as plan.h divides the row
  bool local_constants, overlaps_previous_kernel;
  bool fresh = false;  // not in place
  int stages = 0;      // 0: as planned
  int hints = -1;      // for L2, without or with; -1: as planned
};

double median(std::vector<float> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

template <class T>
void measure(DType dtype, const char* dtype_name, int rows, int vocab, float masked,
             const std::vector<Variant>& variants) {
  const int64_t count = int64_t(rows) * vocab;
  T *source = allocate<T>(count), *logits = allocate<T>(count), *first = allocate<T>(count);
  T* separate = allocate<T>(count);
  float *old_logps = allocate<float>(rows), *advantages = allocate<float>(kSequences);
  float *logps = allocate<float>(rows), *entropy = allocate<float>(rows);
  float *loss = allocate<float>(1), *metrics = allocate<float>(kMetricCount);
  int64_t* ids = allocate<int64_t>(rows);
  uint8_t* mask = allocate<uint8_t>(rows);
  int* greatest = allocate<int>(2);
  char* scratch = allocate<char>(workspace_bytes(kSequences, rows / kSequences));
  fill<<<1024, 256>>>(source, count, 3.f, 0.f);
  fill<<<1, 256>>>(old_logps, rows, 1.f, -logf(float(vocab)) - 4.5f);
  fill<<<1, 32>>>(advantages, kSequences, 1.f, 0.f);
  fill_rows<<<1, 256>>>(ids, mask, rows, vocab, masked);
  std::vector<uint8_t> mask_here(rows);
  GRPO_CUDA_CHECK(cudaMemcpy(mask_here.data(), mask, rows, cudaMemcpyDeviceToHost));
  const int64_t unmasked = std::count(mask_here.begin(), mask_here.end(), 1);

  const Workspace workspace = divide_workspace(scratch, kSequences, rows / kSequences);
  PolicyKernelParams constants{};
  PolicyParams<float>& policy = constants.policy;
  policy.batch = kSequences;
  policy.length = rows / kSequences;
  policy.mask = mask;
  policy.advantages = advantages;
  policy.old_logps = old_logps;
  policy.loss = loss;
  policy.metrics = metrics;
  policy.spec.loss_type = LossType::kDapo;
  policy.spec.clip_low = 0.8f, policy.spec.clip_high = 1.28f, policy.spec.delta = INFINITY;
  policy.spec.grad_scale = 1;
  constants.workspace = workspace;
  constants.chunks = 1;
  RingParams ring{};
  ring.rows = {dtype, kSequences, rows / kSequences, vocab, logits, 0, vocab, logits, 0, vocab,
               ids,   mask,       {1, 0, 1},         logps, entropy};
  ring.rows.logits_stride_batch = ring.rows.grad_stride_batch = rows / kSequences * int64_t(vocab);
  ring.policy = policy;
  ring.row_count = rows;

  cudaEvent_t events[4];
  for (cudaEvent_t& e : events) GRPO_CUDA_CHECK(cudaEventCreate(&e));
  cudaStream_t stream;
  GRPO_CUDA_CHECK(cudaStreamCreate(&stream));
  GRPO_CUDA_CHECK(cudaDeviceSynchronize());
  for (const Variant& v : variants) {
    const Device& device = device_of(0);
    RowPlan plan = v.shares ? plan_ring(device, dtype, divide_evenly(vocab, v.shares))
                            : plan_row_loss(device, dtype, vocab);
    const RowDivision division = plan.division;
    if (v.stages) plan.stages = v.stages;
    if (ring_shared_bytes(plan) > device.shared_bytes - kRingStaticSharedBytes) continue;
    if (!plan.ring) continue;
    ring.share = division.share;
    ring.stages = plan.stages;
    ring.stage_bytes = plan.stage_bytes;
    ring.groups = plan.groups;
    ring.exceeds_cache = v.hints < 0 ? count * int64_t(sizeof(T)) >= kCachedBytes : v.hints > 0;
    ring.constants = v.local_constants ? nullptr : workspace.constants;
    ring.report = {workspace.sums, v.local_constants ? nullptr : workspace.finished,
                   v.local_constants ? take_report_counter(0, stream, false) : -1};
    ring.rows.grad = v.fresh ? separate : logits;
    std::vector<float> times, copies;
    for (int run = 0; run < kWarmUp + kRuns; ++run) {
      GRPO_CUDA_CHECK(cudaMemsetAsync(logps, 0xff, rows * sizeof(float), stream));
      spin<<<1, 1, 0, stream>>>(200'000);
      GRPO_CUDA_CHECK(cudaEventRecord(events[0], stream));
      GRPO_CUDA_CHECK(
          cudaMemcpyAsync(logits, source, count * sizeof(T), cudaMemcpyDeviceToDevice, stream));
      GRPO_CUDA_CHECK(cudaEventRecord(events[1], stream));
      spin<<<1, 1, 0, stream>>>(50'000);
      GRPO_CUDA_CHECK(cudaEventRecord(events[2], stream));
      if (!v.local_constants) launch_sequence_constants(constants, stream);
      launch_ring(ring, plan, v.overlaps_previous_kernel, stream);
      GRPO_CUDA_CHECK(cudaEventRecord(events[3], stream));
      GRPO_CUDA_CHECK(cudaStreamSynchronize(stream));
      float copy = 0, time = 0;
      GRPO_CUDA_CHECK(cudaEventElapsedTime(&copy, events[0], events[1]));
      GRPO_CUDA_CHECK(cudaEventElapsedTime(&time, events[2], events[3]));
      if (run >= kWarmUp) copies.push_back(copy), times.push_back(time);
    }
    if (&v == variants.data())
      GRPO_CUDA_CHECK(
          cudaMemcpy(first, ring.rows.grad, count * sizeof(T), cudaMemcpyDeviceToDevice));
    GRPO_CUDA_CHECK(cudaMemset(greatest, 0, 2 * sizeof(int)));
    compare<<<1024, 256>>>(first, static_cast<T*>(ring.rows.grad), count, greatest);
    float largest[2], result = 0, numbers[kMetricCount];
    GRPO_CUDA_CHECK(cudaMemcpy(largest, greatest, sizeof(largest), cudaMemcpyDeviceToHost));
    GRPO_CUDA_CHECK(cudaMemcpy(&result, loss, sizeof(float), cudaMemcpyDeviceToHost));
    GRPO_CUDA_CHECK(cudaMemcpy(numbers, metrics, sizeof(numbers), cudaMemcpyDeviceToHost));
    const double bytes = double(sizeof(T)) * vocab * double(unmasked + rows);
    const double copied = 2.0 * sizeof(T) * double(count);
    const double rate = bytes / median(times), copy_rate = copied / median(copies);
    std::printf("%d,%s,%d,%lld,%s,%d,%d,%d,%.4f,%.4f,%.3f,%.3f,%.1f,%.2g,%.9g,%.9g\n", vocab,
                dtype_name, rows, static_cast<long long>(unmasked), v.name, division.shares,
                plan.stages, v.fresh, median(times), *std::min_element(times.begin(), times.end()),
                rate / 1e9, copy_rate / 1e9, 100 * rate / copy_rate, largest[1] / largest[0],
                result, numbers[0]);
    std::fflush(stdout);
  }
  GRPO_CUDA_CHECK(cudaStreamDestroy(stream));
  for (void* p : {(void*)source, (void*)separate, (void*)logits, (void*)first, (void*)old_logps,
                  (void*)advantages, (void*)logps, (void*)entropy, (void*)loss, (void*)metrics,
                  (void*)ids, (void*)mask, (void*)greatest, (void*)scratch})
    GRPO_CUDA_CHECK(cudaFree(p));
}

void print_occupancy() {
  const void* kernel = ring_kernel_address<__nv_bfloat16>(false);
  const int bytes = int(device_of(0).shared_bytes) - kRingStaticSharedBytes;
  GRPO_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  GRPO_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  for (int cluster = 1; cluster <= 16; ++cluster) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(cluster));
    config.blockDim = dim3(unsigned(ring_threads(kMaxGroups)));
    config.dynamicSmemBytes = size_t(bytes);
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    const cudaError_t status = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    std::printf("# clusters of %d: %d at a time (%s), %d of %d multiprocessors\n", cluster,
                clusters, cudaGetErrorName(status), clusters * cluster,
                device_of(0).multiprocessors);
    (void)cudaGetLastError();
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int rows = argc > 1 ? std::atoi(argv[1]) : 8192;
  const float masked = argc > 2 ? float(std::atof(argv[2])) : 0.f;
  print_occupancy();
  std::printf(
      "vocab,dtype,rows,unmasked,variant,shares,stages,fresh,ms,ms_min,tbps,copy_"
      "tbps,of_copy,"
      "difference,loss,tokens\n");
  struct Case {
    int vocab;
    DType dtype;
    std::vector<int> stages;
  };
  const std::vector<Case> cases = {
      {32000, DType::kBFloat16, {}},      {49152, DType::kBFloat16, {}},
      {50257, DType::kBFloat16, {}},      {65536, DType::kBFloat16, {4, 5}},
      {128256, DType::kBFloat16, {4, 5}}, {128257, DType::kBFloat16, {4, 5, 6}},
      {151669, DType::kBFloat16, {4, 5}}, {151936, DType::kBFloat16, {4, 5}},
      {262144, DType::kBFloat16, {}},     {262145, DType::kBFloat16, {5, 6}},
      {151936, DType::kFloat32, {4, 5}},
  };
  for (const Case& c : cases) {
    if (argc > 3 && std::atoi(argv[3]) != c.vocab) continue;
    std::vector<Variant> variants = {{"constants_kernel", 0, false, true},
                                     {"alone", 0, true, false}};
    for (int twice = 0; twice < 2; ++twice) {
      variants.push_back({"beside", 0, true, true});
      variants.push_back({"no_hints", 0, true, true, false, 0, 0});
      variants.push_back({"hints", 0, true, true, false, 0, 1});
      variants.push_back({"fresh", 0, true, true, true});
    }
    for (int stages : c.stages) {
      variants.push_back({"stages", 0, true, true, false, stages});
      variants.push_back({"fresh_stages", 0, true, true, true, stages});
    }
    if (c.dtype == DType::kFloat32)
      measure<float>(c.dtype, "fp32", rows, c.vocab, masked, variants);
    else
      measure<__nv_bfloat16>(c.dtype, "bf16", rows, c.vocab, masked, variants);
  }
  return 0;
}
