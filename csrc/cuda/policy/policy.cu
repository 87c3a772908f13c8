// Policy kernels. Sums fold in fixed trees: threads, warps, blocks in order.
#include "cuda/base/launch.h"
#include "cuda/base/ptx.cuh"
#include "cuda/policy/policy.h"

namespace grpo::cuda {
namespace {

constexpr int kWarps = kPolicyThreads / 32;
constexpr int64_t kAlignment = 16;
constexpr int64_t kSumBytes = int64_t(kSumCount) * kMaxReporters * int64_t(sizeof(double));

__device__ __forceinline__ void merge(double* a, const double& b) { *a += b; }
__device__ __forceinline__ void merge(ChunkSums* a, const ChunkSums& b) {
  if (b.sums.tokens > 0) a->ratio = b.ratio;
  a->low |= b.low;
  a->high |= b.high;
  a->negative |= b.negative;
  grpo::merge(&a->sums, b.sums);
}
using grpo::merge;

template <class S>
__device__ __forceinline__ S shuffle_down(const S& s, int offset) {
  static_assert(sizeof(S) % 4 == 0, "whole words");
  constexpr int kWords = sizeof(S) / 4;
  uint32_t words[kWords];
  memcpy(words, &s, sizeof(S));
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = __shfl_down_sync(~0u, words[i], offset);
  S out;
  memcpy(&out, words, sizeof(S));
  return out;
}

template <int kLanes, class S>
__device__ __forceinline__ S sum_lanes(S s) {
#pragma unroll
  for (int o = kLanes / 2; o; o >>= 1) merge(&s, shuffle_down(s, o));
  return s;
}

// Sum over the block; thread 0 gets it. `shared` is free again after the next barrier.
template <class S>
__device__ S sum_block(S s, S* shared) {
  s = sum_lanes<32>(s);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x < 32) s = sum_lanes<kWarps>(shared[threadIdx.x % kWarps]);
  return s;
}

struct TokenCounts {
  uint32_t sequence, batch;
};
__device__ __forceinline__ void merge(TokenCounts* a, const TokenCounts& b) {
  a->sequence += b.sequence;
  a->batch += b.batch;
}

// Count this thread's part of a mask of n bytes, each 0 or 1 (torch.bool).
__device__ uint32_t count_tokens(const uint8_t* mask, int64_t n) {
  uint32_t tokens = 0;
  int64_t i = threadIdx.x;
  if (reinterpret_cast<uintptr_t>(mask) % 16 == 0) {
    const uint4* vectors = reinterpret_cast<const uint4*>(mask);
#pragma unroll 4
    for (int64_t v = threadIdx.x; v < n / 16; v += kPolicyThreads) {
      const uint4 x = vectors[v];
      tokens += __dp4a(x.x, 0x01010101u, __dp4a(x.y, 0x01010101u, 0u)) +
                __dp4a(x.z, 0x01010101u, __dp4a(x.w, 0x01010101u, 0u));
    }
    i += n / 16 * 16;
  }
#pragma unroll 4
  for (; i < n; i += kPolicyThreads) tokens += mask[i];
  return tokens;
}

// Whether the loss divides by the number of tokens of all sequences.
__device__ bool needs_batch_tokens(const PolicyParams<float>& p) {
  switch (p.spec.loss_type) {
    case LossType::kBnpo:
      return true;
    case LossType::kGrpo:
    case LossType::kSapo:
    case LossType::kDrGrpo:
    case LossType::kLuspo:
      return false;
    default:
      return p.num_items == nullptr;
  }
}

// One block per sequence.
__global__ void __launch_bounds__(kPolicyThreads)
    constants_kernel(const __grid_constant__ PolicyKernelParams k) {
  const PolicyParams<float>& p = k.policy;
  __shared__ TokenCounts shared_counts[kWarps];
  __shared__ SequenceSums shared_sums[kWarps];
  __shared__ double shared_gradient[kWarps];
  __shared__ SequenceConstants<float> constants;
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  const int64_t b = blockIdx.x;
  if (b == 0 && threadIdx.x == 0) *k.workspace.finished = 0;
  if (b >= p.batch) return;  // an empty batch
  const int64_t begin = b * p.length, end = begin + p.length;
  TokenCounts counts{count_tokens(p.mask + begin, p.length), 0};
  if (needs_batch_tokens(p)) counts.batch = count_tokens(p.mask, p.batch * p.length);
  counts = sum_block(counts, shared_counts);
  SequenceSums sums{};
  if (needs_sums(p)) {
    for (int64_t i = begin + threadIdx.x; i < end; i += kPolicyThreads)
      if (p.mask[i]) accumulate(p, i, k.with_logps ? p.logps[i] : 0.f, &sums);
    sums = sum_block(sums, shared_sums);
  } else {
    sums.tokens = counts.sequence;
  }
  if (threadIdx.x == 0) constants = sequence_constants(p, b, sums, double(counts.batch));
  __syncthreads();
  if (p.spec.level == Level::kSequence) {
    double shared = 0;
    for (int64_t i = begin + threadIdx.x; i < end; i += kPolicyThreads) {
      if (!p.mask[i]) continue;
      const float new_logp = k.with_logps ? p.logps[i] : 0.f;
      const float entropy = k.with_logps && p.entropy ? p.entropy[i] : 0.f;
      shared += double(evaluate_token(p, constants, b, i, new_logp, entropy).d_log_ratio);
    }
    shared = sum_block(shared, shared_gradient);
    if (threadIdx.x == 0)
      constants.shared_gradient =
          float(shared * double(constants.weight) * double(constants.inv_tokens));
  }
  if (threadIdx.x == 0) k.workspace.constants[b] = constants;
}

// Add what counts once per sequence: presence, off-policy mask, and the ratio at sequence level.
__device__ void add_sequence(const PolicyParams<float>& p,
                             const SequenceConstants<float>& constants, const ChunkSums* chunks,
                             int count, BatchSums* total) {
  double tokens = 0;
  float ratio = 0;
  uint32_t low = 0, high = 0, negative = 0;
#pragma unroll 4
  for (int c = 0; c < count; ++c) {
    const double here = chunks[c].sums.tokens;
    tokens += here;
    ratio = here > 0 ? chunks[c].ratio : ratio;
    low |= chunks[c].low;
    high |= chunks[c].high;
    negative |= chunks[c].negative;
  }
  if (tokens == 0) return;
  total->sequences += 1;
  total->kept += constants.keep || !negative;
  if (p.spec.level == Level::kSequence) add_ratio(total, ratio, low, high);
}

// Write the outputs of this thread's token and add it to the chunk's sums.
__device__ void emit_token(const PolicyParams<float>& p, const SequenceConstants<float>& constants,
                           int64_t b, int64_t i, ChunkSums* chunk) {
  float coef = 0, entropy_coef = 0, kl = 0;
  if (p.mask[i]) {
    const float new_logp = p.logps[i];
    const float entropy = p.entropy ? p.entropy[i] : 0.f;
    const TokenLoss<float> token = evaluate_token(p, constants, b, i, new_logp, entropy);
    coef = logp_coefficient(p, constants, token);
    entropy_coef = entropy_coefficient(p, constants);
    kl = token.kl;
    add_token(p, constants, i, new_logp, entropy, token, &chunk->sums);
    if (p.spec.level == Level::kToken)
      add_ratio(&chunk->sums, token.ratio, token.clipped_low, token.clipped_high);
    chunk->ratio = token.ratio;
    chunk->low = token.clipped_low;
    chunk->high = token.clipped_high;
    chunk->negative = advantage(p, b, i) < 0;
  }
  if (p.coef) p.coef[i] = coef;
  if (p.entropy_coef) p.entropy_coef[i] = entropy_coef;
  if (p.kl) p.kl[i] = kl;
}

// One block per chunk of a sequence; the last block to finish folds all chunks' sums.
__global__ void __launch_bounds__(kPolicyThreads)
    emit_kernel(const __grid_constant__ PolicyKernelParams k) {
  const PolicyParams<float>& p = k.policy;
  __shared__ ChunkSums shared_chunks[kWarps];
  __shared__ BatchSums shared_sums[kWarps];
  __shared__ bool last;
  ptx::wait_for_previous_kernel();
  const int64_t chunks = p.batch * k.chunks;
  if (blockIdx.x < chunks) {
    const int64_t b = blockIdx.x / k.chunks;
    const int64_t t = int64_t(blockIdx.x % k.chunks) * kPolicyThreads + threadIdx.x;
    ChunkSums chunk{};
    if (t < p.length) emit_token(p, k.workspace.constants[b], b, b * p.length + t, &chunk);
    chunk = sum_block(chunk, shared_chunks);
    if (threadIdx.x == 0) {
      k.workspace.chunks[blockIdx.x] = chunk;
      __threadfence();
    }
  }
  if (threadIdx.x == 0) last = atomicAdd(k.workspace.finished, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  BatchSums total;
  for (int64_t c = threadIdx.x; c < chunks; c += kPolicyThreads)
    merge(&total, k.workspace.chunks[c].sums);
  for (int64_t b = threadIdx.x; b < p.batch; b += kPolicyThreads)
    add_sequence(p, k.workspace.constants[b], k.workspace.chunks + b * k.chunks, k.chunks, &total);
  total = sum_block(total, shared_sums);
  if (threadIdx.x == 0) {
    *p.loss = float(total.loss);
    write_metrics(total, p.metrics);
  }
}

int64_t round_up(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

int64_t chunks_per_sequence(int64_t length) {
  return (length + kPolicyThreads - 1) / kPolicyThreads;
}

Workspace divide_workspace(void* memory, int64_t batch, int64_t length) {
  Workspace w{};
  char* at = static_cast<char*>(memory);
  const auto take = [&](int64_t bytes) {
    char* here = at;
    at += round_up(bytes);
    return static_cast<void*>(here);
  };
  w.finished = static_cast<uint32_t*>(take(sizeof(uint32_t)));
  w.sums = static_cast<double*>(take(kSumBytes));
  w.constants = static_cast<SequenceConstants<float>*>(take(batch * int64_t(sizeof(*w.constants))));
  w.chunks = static_cast<ChunkSums*>(
      take(batch * chunks_per_sequence(length) * int64_t(sizeof(*w.chunks))));
  for (float** out : {&w.lse, &w.coef, &w.entropy_coef})
    *out = static_cast<float*>(take(batch * length * int64_t(sizeof(float))));
  return w;
}

int64_t workspace_bytes(int64_t batch, int64_t length) {
  return round_up(sizeof(uint32_t)) + round_up(kSumBytes) +
         round_up(batch * int64_t(sizeof(SequenceConstants<float>))) +
         round_up(batch * chunks_per_sequence(length) * int64_t(sizeof(ChunkSums))) +
         3 * round_up(batch * length * int64_t(sizeof(float)));
}

void launch_sequence_constants(const PolicyKernelParams& params, Stream stream) {
  const unsigned grid = params.policy.batch > 0 ? unsigned(params.policy.batch) : 1;
  launch(reinterpret_cast<const void*>(&constants_kernel), {grid, kPolicyThreads}, stream, params);
}

void launch_emit(const PolicyKernelParams& params, bool overlaps_previous_kernel, Stream stream) {
  const int64_t chunks = params.policy.batch * params.chunks;
  Launch how{chunks > 0 ? unsigned(chunks) : 1, kPolicyThreads};
  how.overlaps_previous_kernel = overlaps_previous_kernel;
  launch(reinterpret_cast<const void*>(&emit_kernel), how, stream, params);
}

}  // namespace grpo::cuda
