// 16 floats a register. Needs AVX-512 F, BW, VL and DQ (Skylake-SP, Zen 4 and later).
#pragma once

#include <immintrin.h>

#include "cpu/vec.h"

namespace {

struct VecAvx512 {
  using Real = float;
  using Scalar = float;
  using Reg = __m512;
  static constexpr int kWidth = 16;

  static __mmask16 tail(int n) { return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1); }

  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static Reg load(const BFloat16* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Reg load(const Float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Reg load_partial(const float* p, int n, float fill) {
    return _mm512_mask_loadu_ps(set1(fill), tail(n), p);
  }
  static Reg load_partial(const BFloat16* p, int n, float fill) {
    return _mm512_mask_mov_ps(set1(fill), tail(n), widen(_mm256_maskz_loadu_epi16(tail(n), p)));
  }
  static Reg load_partial(const Float16* p, int n, float fill) {
    return _mm512_mask_mov_ps(set1(fill), tail(n),
                              _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(tail(n), p)));
  }
  static void store(float* p, Reg v) { _mm512_storeu_ps(p, v); }
  static void store(BFloat16* p, Reg v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v));
  }
  static void store(Float16* p, Reg v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static void store_partial(float* p, int n, Reg v) { _mm512_mask_storeu_ps(p, tail(n), v); }
  static void store_partial(BFloat16* p, int n, Reg v) {
    _mm256_mask_storeu_epi16(p, tail(n), narrow(v));
  }
  static void store_partial(Float16* p, int n, Reg v) {
    _mm256_mask_storeu_epi16(p, tail(n),
                             _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static Reg keep(Reg v, int n, float fill) { return _mm512_mask_mov_ps(set1(fill), tail(n), v); }
  static Reg set1(float v) { return _mm512_set1_ps(v); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }  // NaN in either: b
  static Reg clamp_low(Reg t) { return max(set1(-150.f), t); }
  static Reg exp(Reg t) {
    const Reg n = _mm512_roundscale_ps(mul(t, set1(poly::kLog2e)),
                                       _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    Reg r = fma(n, set1(-poly::kLn2High), t);
    r = fma(n, set1(-poly::kLn2Low), r);
    Reg q = set1(poly::kExp[0]);
    for (int i = 1; i < 6; ++i) q = fma(q, r, set1(poly::kExp[i]));
    q = add(fma(q, mul(r, r), r), set1(1.f));
    return _mm512_scalef_ps(q, n);
  }
  static Reg tanh(Reg u) {
    const Reg magnitude = _mm512_abs_ps(u);
    const Reg square = mul(u, u);
    Reg q = set1(poly::kTanh[0]);
    for (int i = 1; i < 5; ++i) q = fma(q, square, set1(poly::kTanh[i]));
    const Reg small = fma(mul(q, square), u, u);
    // NaN must survive, so the bound comes first: max and min return their second operand then.
    const Reg bounded = _mm512_min_ps(set1(20.f), magnitude);
    const Reg e = exp(add(bounded, bounded));
    Reg large = sub(set1(1.f), _mm512_div_ps(set1(2.f), add(e, set1(1.f))));
    const Reg sign = _mm512_and_ps(u, set1(-0.f));
    large = _mm512_or_ps(large, sign);
    const __mmask16 is_small = _mm512_cmp_ps_mask(magnitude, set1(poly::kTanhSmall), _CMP_LT_OQ);
    return _mm512_mask_mov_ps(large, is_small, small);
  }
  static float reduce_add(Reg v) { return _mm512_reduce_add_ps(v); }
  static float reduce_max(Reg v) { return _mm512_reduce_max_ps(v); }

 private:
  static Reg widen(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  // Round to nearest even; NaN becomes the canonical quiet NaN.
  static __m256i narrow(Reg v) {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    r = _mm512_srli_epi32(r, 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc0)));
  }
};

}  // namespace
