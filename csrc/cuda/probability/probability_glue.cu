// The small kernels around the products. Before the first product: gather the rows and compute
// their references. After it: fold the partial sums, and evaluate the loss if no other row matters.
// After the product that returns to the hidden states, and before the gradient of a trained head:
// apply the row factors. All are memory-bound: up to three vectors of H per row, 8 bytes per tile.
#include "cuda/base/launch.h"
#include "cuda/probability/probability.h"
#include "cuda/rows/elements.cuh"

namespace grpo::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// fold_kernel: rows per block, and threads per row.
constexpr int kFoldRows = 8, kFoldParts = kThreads / kFoldRows;
constexpr int kScaleThreads = 128;
constexpr float kLn2 = 0.693147180559945309f;

// One warp per row: compute z = hidden . weight[id] + bias in fp32; gather the row if asked to.
template <class T>
__global__ void __launch_bounds__(kThreads) target_kernel(const __grid_constant__ TargetParams p) {
  const int row = int(blockIdx.x) * kWarps + threadIdx.x / 32, lane = threadIdx.x & 31;
  if (row >= p.rows.count) return;
  const int64_t token = p.rows.token(row);
  const bool unmasked = p.rows.mask == nullptr || p.rows.mask[token];
  const int64_t id = unmasked ? p.ids[token] : 0;
  const int64_t column = p.shard ? id - p.shard[0] : id;
  const bool here = unmasked && column >= 0 && column < p.vocab;
  const auto* h =
      static_cast<const T*>(p.hidden) + (p.gathered ? token : int64_t(row)) * p.hidden_stride;
  const auto* w = static_cast<const T*>(p.weight) + (here ? column : 0) * p.weight_stride;
  auto* gathered = static_cast<T*>(p.gathered) + int64_t(row) * p.hidden_size;
  constexpr int n = kPerVector<T>;
  float sum = 0.f;
  constexpr int kStep = 32 * n, kBatch = 4;  // loads in flight per lane
  for (int first = lane * n; first < p.hidden_size && (here || p.gathered);
       first += kBatch * kStep) {
    uint4 hidden[kBatch], weight[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int k = first + i * kStep;
      const bool inside = k < p.hidden_size;
      hidden[i] = unmasked && inside ? *reinterpret_cast<const uint4*>(h + k) : uint4{0, 0, 0, 0};
      weight[i] = here && inside ? *reinterpret_cast<const uint4*>(w + k) : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int k = first + i * kStep;
      if (p.gathered && k < p.hidden_size) *reinterpret_cast<uint4*>(gathered + k) = hidden[i];
      float a[n], b[n];
      unpack<T>(hidden[i], a);
      unpack<T>(weight[i], b);
#pragma unroll
      for (int j = 0; j < n; ++j) sum = fmaf(a[j], b[j], sum);
    }
  }
  float reference = 0.f;
  if (here) {
#pragma unroll
    for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
    if (p.bias) sum += p.bias[column];
    reference = sum * p.slope;
    // The target's logit is -inf: every tile with a finite logit is recentred.
    if (reference < kNoExponent) reference = kNoExponent;
  }
  if (unmasked && (id < 0 || id >= (p.shard ? p.shard[1] : p.vocab))) reference = NAN;
  if (lane != 0) return;
  p.reference[row] = reference;
  p.target[row] = here ? int(column) : -1;
  if (!here) p.exponent[row] = 0.f;
}

__device__ __forceinline__ float2 partial(const FoldParams& p, int tile, int row) {
  return reinterpret_cast<const float2*>(p.partials)[tile * p.partials_stride + row];
}
__device__ __forceinline__ float recentred(const FoldParams& p, int tile, int row) {
  return p.recentred[tile * p.recentred_stride + row];
}

// Reference of a row's sums in one tile.
__device__ __forceinline__ float reference_of(const FoldParams& p, int tile, int row) {
  return partial(p, tile, row).x < 0.f ? recentred(p, tile, row) : p.reference[row];
}

// Sum one thread's tiles of a row, relative to `centre`.
__device__ __noinline__ float2 recentred_share(const FoldParams& p, int row, int part,
                                               float centre) {
  float2 s = {0.f, 0.f};
  for (int tile = part; tile < p.tiles; tile += kFoldParts) {
    const float2 more = partial(p, tile, row);
    const float shift = reference_of(p, tile, row) - centre, scale = exp2f(shift);
    s.x += scale * fabsf(more.x);
    s.y += scale * fmaf(shift, fabsf(more.x), more.y);
  }
  return s;
}

// Rescale a row of E to the reference `centre`; all threads of the block call it.
template <class T>
__device__ __noinline__ void recentre_row(const FoldParams& p, int row, float centre) {
  constexpr int n = kPerVector<T>;
  auto* e = static_cast<T*>(p.probabilities) + row * p.stride;
  for (int k = int(threadIdx.x) * n; k < p.vocab; k += kThreads * n) {
    const int tile = p.rank < 0 ? k / kTileColumns : p.rank;
    const float scale = exp2f(reference_of(p, tile, row) - centre);
    float v[n];
    unpack<T>(*reinterpret_cast<const uint4*>(e + k), v);
#pragma unroll
    for (int j = 0; j < n; ++j) v[j] *= scale;
    *reinterpret_cast<uint4*>(e + k) = pack<T>(v);
  }
}

__device__ __forceinline__ float greatest_of(const float (&centres)[kFoldParts][kFoldRows],
                                             int column) {
  float greatest = -INFINITY;
  for (int k = 0; k < kFoldParts; ++k) greatest = fmaxf(greatest, centres[k][column]);
  return greatest;
}

template <class T>
__global__ void __launch_bounds__(kThreads) fold_kernel(const __grid_constant__ FoldParams p) {
  __shared__ float2 parts[kFoldParts][kFoldRows];
  __shared__ float centres[kFoldParts][kFoldRows];
  const int column = threadIdx.x % kFoldRows, part = threadIdx.x / kFoldRows;
  const int row = int(blockIdx.x) * kFoldRows + column;
  float2 s = {0.f, 0.f};
  float centre = -INFINITY;  // greatest reference of the recentred tiles
  if (row < p.rows.count) {
#pragma unroll 4
    for (int tile = part; tile < p.tiles; tile += kFoldParts) {
      const float2 more = partial(p, tile, row);
      s.x += more.x;
      s.y += more.y;
      if (more.x < 0.f) centre = fmaxf(centre, recentred(p, tile, row));
    }
  }
  parts[part][column] = s;
  if (__syncthreads_or(centre > -INFINITY)) {
    centres[part][column] = centre;
    __syncthreads();
    centre = greatest_of(centres, column);
    if (centre > -INFINITY) parts[part][column] = recentred_share(p, row, part, centre);
    for (int i = 0; i < kFoldRows; ++i) {
      const int other = int(blockIdx.x) * kFoldRows + i;
      const float row_centre = greatest_of(centres, i);
      if (p.probabilities != nullptr && other < p.stored && row_centre > -INFINITY)
        recentre_row<T>(p, other, row_centre);
    }
    __syncthreads();
  }
  if (part != 0 || row >= p.rows.count) return;
  s = parts[0][column];
#pragma unroll
  for (int k = 1; k < kFoldParts; ++k) {
    s.x += parts[k][column].x;
    s.y += parts[k][column].y;
  }
  if (p.sums) {
    const bool is_recentred = centre > -INFINITY;
    reinterpret_cast<float2*>(p.sums)[row] = {is_recentred ? -s.x : s.x, s.y};
    p.recentred_sums[row] = is_recentred ? centre : 0.f;
    return;
  }
  const int64_t token = p.rows.token(row);
  if (p.rows.mask != nullptr && !p.rows.mask[token]) {
    p.logps[token] = p.entropy[token] = p.factor[row] = p.residual[row] = 0.f;
    return;
  }
  const float reference = p.reference[row];
  float t = p.exponent[row];
  if (centre > -INFINITY) t += reference - centre;
  const float target_exp = exp2f(t), target_weighted = target_exp * t;
  if (reference <= kNoExponent) t = -INFINITY;
  // The sum excludes the target, so 1 - p of a confident token is no difference of close numbers.
  const float others = s.x, sum = others + target_exp;
  const float log_sum = logf(sum);
  const float logp =
      others < target_exp ? 0.f - log1pf(others / target_exp) : fmaf(t, kLn2, -log_sum);
  const float entropy = log_sum - kLn2 * ((s.y + target_weighted) / sum);
  p.logps[token] = logp;
  p.entropy[token] = entropy;
  float factor = -p.slope / sum;
  if (p.constants) {
    const int64_t sequence = token / p.policy.length;
    const SequenceConstants<float>& constants = p.constants[sequence];
    factor *= logp_coefficient(p.policy, constants,
                               evaluate_token(p.policy, constants, sequence, token, logp, entropy));
  }
  p.factor[row] = factor;
  const int target = p.target[row];
  p.residual[row] = 0.f;
  if (p.probabilities == nullptr || row >= p.stored || target < 0) return;
  T* element = static_cast<T*>(p.probabilities) + row * p.stride + target;
  from_float(-others, element);
  p.residual[row] = -others - to_float(*element);
}

// One block per row, eight elements per thread and step.
template <class T, class Out>
__global__ void __launch_bounds__(kScaleThreads)
    scale_kernel(const __grid_constant__ ScaleParams p) {
  const int row = int(blockIdx.x);
  const int target = p.residual ? p.target[row] : -1;
  const float factor = p.factor[row], residual = target >= 0 ? p.residual[row] : 0.f;
  const auto* product = p.product + int64_t(row) * p.hidden_size;
  const auto* target_weight =
      static_cast<const T*>(p.weight) + (target >= 0 ? target : 0) * p.weight_stride;
  auto* out = static_cast<Out*>(p.out) + p.rows.token(row) * p.hidden_size;
  for (int k = threadIdx.x * 8; k < p.hidden_size; k += kScaleThreads * 8) {
    float v[8], w[8] = {};
    unpack<float>(*reinterpret_cast<const uint4*>(product + k), v);
    unpack<float>(*reinterpret_cast<const uint4*>(product + k + 4), v + 4);
    if (target >= 0) unpack<T>(*reinterpret_cast<const uint4*>(target_weight + k), w);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = factor * fmaf(residual, w[j], v[j]);
    constexpr int n = kPerVector<Out>;
#pragma unroll
    for (int j = 0; j < 8; j += n) *reinterpret_cast<uint4*>(out + k + j) = pack<Out>(v + j);
  }
}

// One block per row, eight elements per thread and step.
template <class T>
__global__ void __launch_bounds__(kScaleThreads)
    scaled_hidden_kernel(const __grid_constant__ ScaledHiddenParams p) {
  const int64_t row = blockIdx.x;
  const float factor = p.factor[row];
  const auto* hidden = static_cast<const T*>(p.hidden) + row * p.hidden_stride;
  auto* out = static_cast<T*>(p.out) + row * p.hidden_size;
  for (int k = threadIdx.x * 8; k < p.hidden_size; k += kScaleThreads * 8) {
    float v[8];
    unpack<T>(*reinterpret_cast<const uint4*>(hidden + k), v);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] *= factor;
    *reinterpret_cast<uint4*>(out + k) = pack<T>(v);
  }
}

void check_rows(const char* operation, const ChunkRows& rows, DType dtype) {
  if (rows.count < 0 || dtype != DType::kBFloat16)
    throw std::invalid_argument(std::string("grpo_ext: ") + operation + " got " +
                                std::to_string(rows.count) + " rows of dtype " +
                                std::to_string(int(dtype)) + ": pass bf16 hidden states");
}

}  // namespace

void target_reference(int device, const TargetParams& p, Stream stream) {
  const DeviceGuard guard(device);
  check_rows("target_reference", p.rows, p.dtype);
  if (p.rows.count == 0) return;
  const unsigned blocks = unsigned(p.rows.count + kWarps - 1) / kWarps;
  target_kernel<__nv_bfloat16><<<blocks, kThreads, 0, stream>>>(p);
  GRPO_CUDA_CHECK(cudaGetLastError());
}

void fold_partials(int device, const FoldParams& p, Stream stream) {
  const DeviceGuard guard(device);
  check_rows("fold_partials", p.rows, p.dtype);
  if (p.rows.count == 0) return;
  const unsigned blocks = unsigned(p.rows.count + kFoldRows - 1) / kFoldRows;
  fold_kernel<__nv_bfloat16><<<blocks, kThreads, 0, stream>>>(p);
  GRPO_CUDA_CHECK(cudaGetLastError());
}

void scale_product(int device, const ScaleParams& p, Stream stream) {
  const DeviceGuard guard(device);
  check_rows("scale_product", p.rows, p.dtype);
  if (p.rows.count == 0) return;
  if (p.out_dtype != p.dtype && p.out_dtype != DType::kFloat32)
    throw std::invalid_argument(
        "grpo_ext: scale_product got another dtype for out: use the head's or fp32");
  const bool wide = p.out_dtype == DType::kFloat32;
  const unsigned blocks = unsigned(p.rows.count);
  const auto kernel =
      wide ? scale_kernel<__nv_bfloat16, float> : scale_kernel<__nv_bfloat16, __nv_bfloat16>;
  kernel<<<blocks, kScaleThreads, 0, stream>>>(p);
  GRPO_CUDA_CHECK(cudaGetLastError());
}

void scaled_hidden(int device, const ScaledHiddenParams& p, Stream stream) {
  const DeviceGuard guard(device);
  if (p.rows == 0) return;
  if (p.dtype != DType::kBFloat16)
    throw std::invalid_argument(
        "grpo_ext: scaled_hidden got another dtype: pass bf16 hidden states");
  scaled_hidden_kernel<__nv_bfloat16><<<unsigned(p.rows), kScaleThreads, 0, stream>>>(p);
  GRPO_CUDA_CHECK(cudaGetLastError());
}

}  // namespace grpo::cuda
