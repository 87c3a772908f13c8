// Softmax statistics and gradient of one row, for any SIMD backend V of vec_*.h.
//
// Statistics read the row from memory once, in blocks that stay in L1: first each block's maximum,
// then its sums. The gradient pass finds the row in L2 (49,152 fp32 logits take 192 KiB).
#pragma once

#include <type_traits>

#include "cpu/row_kernels.h"
#include "cpu/vec.h"

namespace {

using grpo::LogitTransform;
using grpo::cpu::RowGradient;
using grpo::cpu::RowKernels;
using grpo::cpu::RowStatistics;

// Processed logits are x = a u with a > 0, so that the greatest u is the greatest x.
enum class Shape { kPlain, kNegated, kCapped };

template <class V, Shape kShape>
struct Processed {
  using Reg = typename V::Reg;
  using Real = typename V::Real;
  typename V::Scalar slope;  // a
  Real scale, cap, inv_cap;

  explicit Processed(const LogitTransform<Real>& t)
      : slope(typename V::Scalar(t.inv_temperature)), scale(t.scale), cap(t.softcap), inv_cap(0) {
    if (kShape == Shape::kCapped) {
      inv_cap = t.scale / t.softcap;
    } else {
      slope *= t.scale < 0 ? -t.scale : t.scale;
    }
  }

  Reg u(Reg z) const {
    if (kShape == Shape::kCapped) return V::mul(V::set1(cap), V::tanh(V::mul(z, V::set1(inv_cap))));
    return kShape == Shape::kNegated ? V::mul(z, V::set1(Real(-1))) : z;
  }

  // u and dx/dz.
  Reg u(Reg z, Reg* slope_here) const {
    if (kShape == Shape::kCapped) {
      const Reg th = V::tanh(V::mul(z, V::set1(inv_cap)));
      const Reg one_minus_square =
          V::mul(V::sub(V::set1(Real(1)), th), V::add(V::set1(Real(1)), th));
      *slope_here = V::mul(one_minus_square, V::set1(scale * slope));
      return V::mul(V::set1(cap), th);
    }
    *slope_here = V::set1(kShape == Shape::kNegated ? -slope : slope);
    return u(z);
  }

  // The last lanes of a row: what lies beyond the n-th is -inf.
  template <class T>
  Reg u_partial(const T* z, int n) const {
    return V::keep(u(V::load_partial(z, n, Real(0))), n, Real(-INFINITY));
  }
};

constexpr int64_t kBlock = 2048;

// x - m = a (u - top): exactly 0 for the greatest, whatever the temperature. Clamped so that
// exp(x - m) (x - m) never becomes 0 * inf.
template <class V, class P>
static inline typename V::Reg shifted(const P& p, typename V::Reg u, typename V::Reg top) {
  return V::clamp_low(V::mul(V::sub(u, top), V::set1(p.slope)));
}

template <class V, Shape kShape, bool kEntropy, class T>
static RowStatistics<typename V::Real> stats_of(const T* z, int64_t vocab, int64_t target,
                                                const LogitTransform<typename V::Real>& t) {
  using Real = typename V::Real;
  using Reg = typename V::Reg;
  constexpr int W = V::kWidth;
  const Processed<V, kShape> p(t);
  const Reg zero = V::set1(Real(0));
  Real highest = Real(-INFINITY);  // greatest u so far
  Reg sum[2] = {zero, zero}, weighted[2] = {zero, zero};
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t n = vocab - start < kBlock ? vocab - start : kBlock;
    const T* block = z + start;
    const int64_t full = n / (4 * W) * (4 * W);
    Reg peak[4];
    for (int j = 0; j < 4; ++j) peak[j] = V::set1(Real(-INFINITY));
    for (int64_t i = 0; i < full; i += 4 * W)
      for (int j = 0; j < 4; ++j) peak[j] = V::max(peak[j], p.u(V::load(block + i + j * W)));
    for (int64_t i = full; i < n; i += W)
      peak[0] = V::max(peak[0], p.u_partial(block + i, int(n - i)));
    const Real block_peak =
        V::reduce_max(V::max(V::max(peak[0], peak[1]), V::max(peak[2], peak[3])));
    if (block_peak > highest) {
      if (highest > Real(-INFINITY)) {  // (sum, weighted) were taken against the old maximum
        const auto step = (highest - block_peak) * p.slope;
        const Reg factor = V::set1(std::exp(step));
        for (int j = 0; j < 2; ++j) {
          if (kEntropy) weighted[j] = V::mul(factor, V::fma(V::set1(step), sum[j], weighted[j]));
          sum[j] = V::mul(factor, sum[j]);
        }
      }
      highest = block_peak;
    }
    // No finite logit so far: any reference serves, the terms are exp(-inf) or NaN.
    const Reg top = V::set1(highest > Real(-INFINITY) ? highest : Real(0));
    // Sum per block, then over blocks: eight fp32 lanes that accumulate a whole vocabulary
    // sequentially err by more than the exponentials.
    Reg block_sum[2] = {zero, zero}, block_weighted[2] = {zero, zero};
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
      for (int j = 0; j < 2; ++j) {
        const Reg x = shifted<V>(p, p.u(V::load(block + i + j * W)), top);
        const Reg e = V::exp(x);
        block_sum[j] = V::add(block_sum[j], e);
        if (kEntropy) block_weighted[j] = V::fma(x, e, block_weighted[j]);
      }
    }
    for (; i < n; i += W) {
      const Reg x = shifted<V>(p, p.u_partial(block + i, int(n - i)), top);
      const Reg e = V::exp(x);
      block_sum[0] = V::add(block_sum[0], e);
      if (kEntropy) block_weighted[0] = V::fma(x, e, block_weighted[0]);
    }
    for (int j = 0; j < 2; ++j) {
      sum[j] = V::add(sum[j], block_sum[j]);
      if (kEntropy) weighted[j] = V::add(weighted[j], block_weighted[j]);
    }
  }
  RowStatistics<Real> out;
  out.record.max = Real(highest * p.slope);
  out.record.sum = V::reduce_add(V::add(sum[0], sum[1]));
  out.record.weighted = kEntropy ? V::reduce_add(V::add(weighted[0], weighted[1])) : Real(0);
  Real lanes[W];
  V::store(lanes, p.u(V::set1(Real(to_real(z[target])))));
  out.target = (double(lanes[0]) - double(highest)) * double(p.slope);
  return out;
}

template <class V, Shape kShape, bool kEntropy, class T>
static void gradient_of(const T* z, T* g, int64_t vocab, const LogitTransform<typename V::Real>& t,
                        const RowGradient<typename V::Real>& row) {
  using Real = typename V::Real;
  using Reg = typename V::Reg;
  constexpr int W = V::kWidth;
  const Processed<V, kShape> p(t);
  // Read before it is overwritten in place.
  Reg target_slope;
  (void)p.u(V::set1(Real(to_real(z[row.target]))), &target_slope);
  // g_j = p_j (-coef - entropy_coef (logp_j + H)) dx/dz with p_j = exp(x_j - m) / sum.
  const Real inv_sum = std::exp(-row.log_sum);
  const Real k1 = -row.entropy_coef * inv_sum;
  const Real k0 = -row.coef * inv_sum + (kEntropy ? k1 * (row.entropy - row.log_sum) : Real(0));
  const Reg minus_max = V::set1(-row.max), c0 = V::set1(k0), c1 = V::set1(k1);
  const Reg a = V::set1(p.slope);
  const auto of = [&](Reg z_here) {
    Reg slope;
    const Reg x = V::clamp_low(V::fma(p.u(z_here, &slope), a, minus_max));
    const Reg factor = kEntropy ? V::fma(c1, x, c0) : c0;
    return V::mul(V::exp(x), V::mul(factor, slope));
  };
  int64_t i = 0;
  for (; i + 2 * W <= vocab; i += 2 * W) {
    const Reg first = V::load(z + i), second = V::load(z + i + W);
    V::store(g + i, of(first));
    V::store(g + i + W, of(second));
  }
  for (; i < vocab; i += W)
    V::store_partial(g + i, int(vocab - i), of(V::load_partial(z + i, int(vocab - i), Real(0))));
  // The target's own element, rounded once: coef (1 - p) + entropy term.
  Real lanes[W];
  V::store(lanes, target_slope);
  Real own = row.coef * -std::expm1(row.logp);
  if (kEntropy) {
    const Real probability = std::exp(row.logp);
    if (probability > 0) own -= row.entropy_coef * probability * (row.logp + row.entropy);
  }
  from_real(own * lanes[0], g + row.target);
}

template <class V>
static Shape shape_of(const LogitTransform<typename V::Real>& t) {
  if (t.softcap > 0) return Shape::kCapped;
  return t.scale < 0 ? Shape::kNegated : Shape::kPlain;
}

template <class V, class T>
static RowStatistics<typename V::Real> row_stats(const void* z, int64_t vocab, int64_t target,
                                                 const LogitTransform<typename V::Real>& t,
                                                 bool with_entropy) {
  const T* row = static_cast<const T*>(z);
  const auto pick = [&](auto entropy) {
    constexpr bool E = decltype(entropy)::value;
    switch (shape_of<V>(t)) {
      case Shape::kCapped:
        return stats_of<V, Shape::kCapped, E>(row, vocab, target, t);
      case Shape::kNegated:
        return stats_of<V, Shape::kNegated, E>(row, vocab, target, t);
      default:
        return stats_of<V, Shape::kPlain, E>(row, vocab, target, t);
    }
  };
  return with_entropy ? pick(std::true_type{}) : pick(std::false_type{});
}

template <class V, class T>
static void row_gradient(const void* z, void* g, int64_t vocab,
                         const LogitTransform<typename V::Real>& t,
                         const RowGradient<typename V::Real>& row) {
  const T* in = static_cast<const T*>(z);
  T* out = static_cast<T*>(g);
  const auto pick = [&](auto entropy) {
    constexpr bool E = decltype(entropy)::value;
    switch (shape_of<V>(t)) {
      case Shape::kCapped:
        return gradient_of<V, Shape::kCapped, E>(in, out, vocab, t, row);
      case Shape::kNegated:
        return gradient_of<V, Shape::kNegated, E>(in, out, vocab, t, row);
      default:
        return gradient_of<V, Shape::kPlain, E>(in, out, vocab, t, row);
    }
  };
  return row.entropy_coef != 0 ? pick(std::true_type{}) : pick(std::false_type{});
}

template <class V, class T>
constexpr RowKernels<typename V::Real> row_kernels_for() {
  return {row_stats<V, T>, row_gradient<V, T>};
}

}  // namespace
