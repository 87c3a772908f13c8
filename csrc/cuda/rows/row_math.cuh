// The arithmetic of one row, shared by all row kernels: softmax statistics and gradient.
//
// Sums use explicit roundings in an order that depends on the row's division alone (plan.h), never
// on the row's address, its neighbours or the kernel.
#pragma once

#include <cmath>

#include "common/loss_spec.h"
#include "cuda/rows/elements.cuh"
#include "cuda/rows/plan.h"

namespace grpo::cuda {

constexpr float kLn2 = 0.693147180559945309f;
constexpr float kLog2e = 1.442695040888963407f;
// Elements per thread and step; fewer with kAllFeatures, for registers.
template <bool kAllFeatures>
constexpr int kBatchElements = kAllFeatures ? 8 : 16;
constexpr float kLowest = -1e30f;  // 2^kLowest = 0 and 0 * kLowest = 0, where -inf would give NaN

// Processed logits are x = slope * u with slope > 0: the greatest u is the greatest x.
// kAllFeatures: negative scale or softcap (and, in the gradient, an entropy bonus); otherwise u is
// the logit itself.
template <bool kAllFeatures>
struct LogitMap {
  float slope;
  float log2_slope;  // slope / ln 2
  float sign, cap, inv_cap, scale;

  __device__ explicit LogitMap(const LogitTransform<float>& t) {
    sign = 1.f;
    cap = inv_cap = scale = 0.f;
    const float inv_temperature = float(t.inv_temperature);
    slope = t.scale * inv_temperature;
    if (kAllFeatures) {
      cap = t.softcap;
      scale = t.scale;
      if (cap > 0) {
        slope = inv_temperature;
        inv_cap = t.scale / t.softcap;
      } else if (t.scale < 0) {
        slope = -slope;
        sign = -1.f;
      }
    }
    log2_slope = __fmul_rn(slope, kLog2e);
  }
  __device__ __forceinline__ float unscaled(float z) const {
    if (!kAllFeatures) return z;
    return cap > 0 ? __fmul_rn(cap, tanhf(__fmul_rn(z, inv_cap))) : __fmul_rn(z, sign);
  }
  // Returns u and stores du/dz.
  __device__ __forceinline__ float unscaled(float z, float* derivative) const {
    *derivative = 1.f;
    if (!kAllFeatures) return z;
    *derivative = sign;
    if (!(cap > 0)) return __fmul_rn(z, sign);
    const float th = tanhf(__fmul_rn(z, inv_cap));
    *derivative = scale * ((1.f - th) * (1.f + th));
    return __fmul_rn(cap, th);
  }
};

// Sums over a part of a row: maximum u, sum of 2^t and of t 2^t with t = log2_slope u - R and
// R = reference(). R is a rounded product and t one fused operation: t is accurate for any u.
struct Part {
  float max, sum, weighted;
};

__device__ __forceinline__ float reference(float max, float log2_slope) {
  return max > -INFINITY ? __fmul_rn(max, log2_slope) : 0.f;
}

// Rescale the part's sums to a greater maximum.
__device__ __forceinline__ void lift(Part* part, float max, float log2_slope) {
  const float before = __fmul_rn(part->max, log2_slope);
  const float step = fmaxf(__fsub_rn(before, reference(max, log2_slope)), kLowest);
  const float factor = ptx::exp2(step);
  part->weighted = __fmul_rn(factor, __fmaf_rn(step, part->sum, part->weighted));
  part->sum = __fmul_rn(factor, part->sum);
  part->max = max;
}

// Add kCount values of u with maximum `peak` to the part. Without kInfinite, a u of -inf makes
// `weighted` NaN.
template <int kCount, bool kInfinite>
__device__ __forceinline__ void add(Part* part, const float (&u)[kCount], float peak,
                                    float log2_slope) {
  if (peak > part->max) lift(part, peak, log2_slope);
  const float minus_r = -reference(part->max, log2_slope);
  float e[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const float t = __fmaf_rn(u[j], log2_slope, minus_r);
    e[j] = ptx::exp2(t);
    part->weighted = __fmaf_rn(kInfinite ? fmaxf(t, kLowest) : t, e[j], part->weighted);
  }
#pragma unroll
  for (int j = 0; j < kCount; j += 4)
    part->sum =
        __fadd_rn(part->sum, __fadd_rn(__fadd_rn(e[j], e[j + 1]), __fadd_rn(e[j + 2], e[j + 3])));
}

template <class T>
__device__ __forceinline__ float peak_of(const uint4* raw, int vectors) {
  uint32_t top = raw[0].x;
#pragma unroll
  for (int b = 0; b < vectors; ++b) {
    top = max_word(max_word(top, raw[b].x, T()), max_word(raw[b].y, raw[b].z, T()), T());
    top = max_word(top, raw[b].w, T());
  }
  float f[2] = {0.f, -INFINITY};
  unpack_word(top, f, T());
  return fmaxf(f[0], f[1]);
}

// Load kBatch vectors, kGroupThreads apart; with kGuarded some may lie beyond the share.
template <class T, int kBatch, bool kGuarded, class Load>
__device__ __forceinline__ void load_batch(uint4 (&raw)[kBatch], const Load& load, int v,
                                           int length) {
  constexpr int n = kPerVector<T>;
#pragma unroll
  for (int b = 0; b < kBatch; ++b) {
    const int at = v + b * kGroupThreads;
    if (!kGuarded || at * n < length) raw[b] = load(at);
    if (kGuarded && (at + 1) * n > length) raw[b] = keep_first<T>(raw[b], length - at * n);
  }
}

template <class T, int kBatch, bool kGuarded, bool kInfinite, bool kAllFeatures>
__device__ __forceinline__ void add_batch(Part* part, const uint4 (&raw)[kBatch], int v, int length,
                                          const LogitMap<kAllFeatures>& map) {
  constexpr int n = kPerVector<T>;
  float u[kBatch * n];
  float peak = kAllFeatures ? -INFINITY : peak_of<T>(raw, kBatch);
#pragma unroll
  for (int b = 0; b < kBatch; ++b) {
    unpack<T>(raw[b], u + b * n);
    if constexpr (kAllFeatures) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const bool inside = !kGuarded || (v + b * kGroupThreads) * n + j < length;
        float& here = u[b * n + j];
        here = inside ? map.unscaled(here) : -INFINITY;
        peak = fmaxf(peak, here);
      }
    }
  }
  add<kBatch * n, kInfinite || kGuarded>(part, u, peak, map.log2_slope);
}

template <class T, bool kInfinite, bool kAllFeatures, class Load>
__device__ __forceinline__ Part sum_vectors(const Load& load, int length,
                                            const LogitMap<kAllFeatures>& map, int thread) {
  constexpr int n = kPerVector<T>;
  constexpr int kBatch = kBatchElements<kAllFeatures> / n;
  constexpr int kStep = kBatch * kGroupThreads;  // vectors of the whole group
  Part part = {-INFINITY, 0.f, 0.f};
  uint4 raw[kBatch];
  int done = 0;
  for (; (done + kStep) * n <= length; done += kStep) {
    load_batch<T, kBatch, false>(raw, load, done + thread, length);
    add_batch<T, kBatch, false, kInfinite>(&part, raw, done + thread, length, map);
  }
  if (done * n < length) {
    load_batch<T, kBatch, true>(raw, load, done + thread, length);
    add_batch<T, kBatch, true, kInfinite>(&part, raw, done + thread, length, map);
  }
  return part;
}

// Sum one thread's part of a share of `length` elements; load(v) returns the v-th vector of eight
// (fp32: four) elements.
template <class T, bool kAllFeatures, class Load>
__device__ __forceinline__ Part part_of_thread(const Load& load, int length,
                                               const LogitMap<kAllFeatures>& map, int thread) {
  Part part = sum_vectors<T, kAllFeatures>(load, length, map, thread);
  // Logits of -inf are rare: a second pass handles them, which saves an instruction per logit.
  if (!kAllFeatures && part.weighted != part.weighted)
    part = sum_vectors<T, true>(load, length, map, thread);
  return part;
}

// Maximum over a warp, without NaN: compares as integers of the same order.
__device__ __forceinline__ float max_of_warp(float x) {
  const int bits = __float_as_int(x);
  const int top = __reduce_max_sync(~0u, bits < 0 ? bits ^ 0x7fffffff : bits);
  return __int_as_float(top < 0 ? top ^ 0x7fffffff : top);
}

// All lanes get the sum over the warp.
__device__ __forceinline__ Part merge_warp(Part part, float log2_slope) {
  lift(&part, max_of_warp(part.max), log2_slope);
#pragma unroll
  for (int o = 16; o; o >>= 1) {
    part.sum = __fadd_rn(part.sum, __shfl_xor_sync(~0u, part.sum, o));
    part.weighted = __fadd_rn(part.weighted, __shfl_xor_sync(~0u, part.weighted, o));
  }
  return part;
}

// A warp's sums: (max, sum, weighted, u of the target if the warp owns it).
using Record = float4;

struct RowStats {
  float log2_norm;  // probabilities are 2^(log2_slope u - log2_norm)
  float logp, entropy, lse;
};

// Fold the records of all warps of all shares (one warp). `target`: u of the row's token.
__device__ __forceinline__ RowStats fold(const Record* records, int count, float target,
                                         float slope, float log2_slope) {
  const int lane = threadIdx.x & 31;
  const auto part_of = [&](int i) -> Part {
    if (i >= count) return {-INFINITY, 0.f, 0.f};
    const Record r = records[i];
    return {r.x, r.y, r.z};
  };
  Part part = part_of(lane);
#pragma unroll 1
  for (int i = 32; i < count; i += 32) {
    Part other = part_of(lane + i);
    const float max = fmaxf(part.max, other.max);
    lift(&part, max, log2_slope);
    lift(&other, max, log2_slope);
    part.sum = __fadd_rn(part.sum, other.sum);
    part.weighted = __fadd_rn(part.weighted, other.weighted);
  }
  part = merge_warp(part, log2_slope);
  // Relative to the maximum u itself, whose t is not quite 0: a row of one token gets exactly 0.
  const float r = reference(part.max, log2_slope);
  const float residue = __fmaf_rn(part.max, log2_slope, -r);
  const float log_sum = logf(__fdiv_rn(part.sum, ptx::exp2(residue)));
  const float mean = __fsub_rn(__fdividef(part.weighted, part.sum), residue);
  RowStats row;
  row.logp = __fsub_rn(__fmul_rn(__fsub_rn(target, part.max), slope), log_sum);
  row.entropy = __fsub_rn(log_sum, __fmul_rn(kLn2, mean));
  row.lse = __fadd_rn(__fmul_rn(part.max, slope), log_sum);
  row.log2_norm = __fadd_rn(r, __fadd_rn(residue, __fmul_rn(log_sum, kLog2e)));
  return row;
}

// dz_j = p_j (k0 + k1 t_j) du/dz with p_j = 2^t_j and t_j = log2_slope u_j - log2_norm.
struct GradientTerms {
  float log2_norm;
  float k0, k1;
  float coef, entropy_coef, logp, entropy;  // for the target's element
};

// From dLoss/dlogp and dLoss/dentropy.
__device__ __forceinline__ GradientTerms gradient_terms(float coef, float entropy_coef, float logp,
                                                        float entropy, float log2_norm,
                                                        float slope) {
  return {log2_norm,
          -slope * (coef + entropy_coef * entropy),
          -slope * entropy_coef * kLn2,
          coef,
          entropy_coef,
          logp,
          entropy};
}

__device__ __forceinline__ bool is_zero(const GradientTerms& g) {
  return g.coef == 0 && g.entropy_coef == 0;
}

// dLoss/dx of the target: coef (1 - p) without cancellation, rounded once.
__device__ __forceinline__ float target_gradient(const GradientTerms& g) {
  float own = g.coef * -expm1f(g.logp);
  const float probability = expf(g.logp);
  if (g.entropy_coef != 0 && probability > 0)
    own -= g.entropy_coef * probability * (g.logp + g.entropy);
  return own;
}

// The gradient of one vector of logits.
template <class T, bool kAllFeatures>
__device__ __forceinline__ uint4 gradient_of(const uint4& logits, const LogitMap<kAllFeatures>& map,
                                             const GradientTerms& g) {
  constexpr int n = kPerVector<T>;
  float f[n];
  unpack<T>(logits, f);
#pragma unroll
  for (int j = 0; j < n; ++j) {
    float derivative;
    const float u = map.unscaled(f[j], &derivative);
    const float t = fmaf(u, map.log2_slope, -g.log2_norm);
    if (kAllFeatures)
      f[j] = ptx::exp2(t) * fmaf(g.k1, fmaxf(t, kLowest), g.k0) * derivative;
    else
      f[j] = ptx::exp2(t) * g.k0;
  }
  return pack<T>(f);
}

// The same for the vector whose element `target` is the row's token.
template <class T, bool kAllFeatures>
__device__ __forceinline__ uint4 gradient_with_target(const uint4& logits,
                                                      const LogitMap<kAllFeatures>& map,
                                                      const GradientTerms& g, int target) {
  constexpr int n = kPerVector<T>;
  float z[n], f[n];
  unpack<T>(logits, z);
  const uint4 others = gradient_of<T>(logits, map, g);
  unpack<T>(others, f);  // exact: repacking does not round again
  const float own = map.slope * target_gradient(g);
#pragma unroll
  for (int j = 0; j < n; ++j) {
    float derivative;
    if (j != target) continue;
    (void)map.unscaled(z[j], &derivative);
    f[j] = own * derivative;
  }
  return pack<T>(f);
}

}  // namespace grpo::cuda
