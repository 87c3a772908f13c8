// One lane: the fp64 path of every backend, and the tail of the arithmetic elsewhere.
#pragma once

#include "cpu/vec.h"

namespace {

template <class R>
struct VecScalar {
  using Real = R;
  using Reg = R;
  static constexpr int kWidth = 1;

  template <class T>
  static Reg load(const T* p) {
    return R(to_real(*p));
  }
  template <class T>
  static Reg load_partial(const T* p, int n, R fill) {
    return n > 0 ? R(to_real(*p)) : fill;
  }
  template <class T>
  static void store(T* p, Reg v) {
    from_real(v, p);
  }
  template <class T>
  static void store_partial(T* p, int n, Reg v) {
    if (n > 0) from_real(v, p);
  }
  static Reg keep(Reg v, int n, R fill) { return n > 0 ? v : fill; }
  static Reg set1(R v) { return v; }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg sub(Reg a, Reg b) { return a - b; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  static Reg fma(Reg a, Reg b, Reg c) { return std::fma(a, b, c); }
  static Reg max(Reg a, Reg b) { return a > b ? a : b; }  // NaN in either: b
  // exp for t <= 0; the argument is clamped first, so that exp(-inf) * t is 0 and not NaN.
  static Reg clamp_low(Reg t) { return max(R(-1e30), t); }
  static Reg exp(Reg t) { return std::exp(t); }
  static Reg tanh(Reg u) { return std::tanh(u); }
  static R reduce_add(Reg v) { return v; }
  static R reduce_max(Reg v) { return v; }
};

}  // namespace
