// One lane: fp32 on CPUs without AVX2, fp64 on every CPU.
#pragma once

#include "cpu/vec.h"

namespace {

template <class R>
struct VecScalar {
  using Real = R;
  // Sums and 1 / temperature are fp64: one chain of fp32 additions over a row errs by more than
  // twice torch's sum.
  using Scalar = double;
  using Reg = Scalar;
  static constexpr int kWidth = 1;

  template <class T>
  static Reg load(const T* p) {
    return to_real(*p);
  }
  template <class T>
  static Reg load_partial(const T* p, int n, R fill) {
    return n > 0 ? to_real(*p) : fill;
  }
  template <class T>
  static void store(T* p, Reg v) {
    from_real(R(v), p);
  }
  template <class T>
  static void store_partial(T* p, int n, Reg v) {
    if (n > 0) from_real(R(v), p);
  }
  static Reg keep(Reg v, int n, R fill) { return n > 0 ? v : fill; }
  static Reg set1(Scalar v) { return v; }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg sub(Reg a, Reg b) { return a - b; }
  // Rounded as the row's maximum is, so that the greatest logit minus it is exactly 0.
  static Reg mul(Reg a, Reg b) { return R(a * b); }
  // Not std::fma, a slow library call on CPUs without the instruction.
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg max(Reg a, Reg b) { return a > b ? a : b; }  // NaN in either: b
  // exp for t <= 0; the argument is clamped first, so that exp(-inf) * t is 0 and not NaN.
  static Reg clamp_low(Reg t) { return max(-1e30, t); }
  static Reg exp(Reg t) { return std::exp(R(t)); }
  static Reg tanh(Reg u) { return std::tanh(R(u)); }
  static R reduce_add(Reg v) { return R(v); }
  static R reduce_max(Reg v) { return R(v); }
};

}  // namespace
