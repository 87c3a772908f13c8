// 8 floats a register. Needs AVX2, FMA and F16C (Haswell, Zen and later).
#pragma once

#include <immintrin.h>

#include "cpu/vec.h"

namespace {

struct VecAvx2 {
  using Real = float;
  using Scalar = float;
  using Reg = __m256;
  static constexpr int kWidth = 8;

  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static Reg load(const BFloat16* p) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
  }
  static Reg load(const Float16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  template <class T>
  static Reg load_partial(const T* p, int n, float fill) {
    float lanes[8];
    for (int i = 0; i < 8; ++i) lanes[i] = i < n ? to_real(p[i]) : fill;
    return _mm256_loadu_ps(lanes);
  }
  static void store(float* p, Reg v) { _mm256_storeu_ps(p, v); }
  static void store(BFloat16* p, Reg v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v));
  }
  static void store(Float16* p, Reg v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  template <class T>
  static void store_partial(T* p, int n, Reg v) {
    float lanes[8];
    _mm256_storeu_ps(lanes, v);
    for (int i = 0; i < n && i < 8; ++i) from_real(lanes[i], p + i);
  }
  static Reg keep(Reg v, int n, float fill) {
    float lanes[8];
    _mm256_storeu_ps(lanes, v);
    for (int i = n; i < 8; ++i) lanes[i] = fill;
    return _mm256_loadu_ps(lanes);
  }
  static Reg set1(float v) { return _mm256_set1_ps(v); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }  // NaN in either: b
  static Reg clamp_low(Reg t) { return max(set1(-150.f), t); }
  static Reg exp(Reg t) {
    const Reg n =
        _mm256_round_ps(mul(t, set1(poly::kLog2e)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    Reg r = fma(n, set1(-poly::kLn2High), t);
    r = fma(n, set1(-poly::kLn2Low), r);
    Reg q = set1(poly::kExp[0]);
    for (int i = 1; i < 6; ++i) q = fma(q, r, set1(poly::kExp[i]));
    q = add(fma(q, mul(r, r), r), set1(1.f));
    const __m256i exponent =
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    const Reg result = mul(q, _mm256_castsi256_ps(exponent));
    // Below the normal range the exponent field is junk: exactly 0 there, NaN kept.
    return _mm256_and_ps(result, _mm256_cmp_ps(t, set1(poly::kExpLowest), _CMP_NLT_UQ));
  }
  static Reg tanh(Reg u) {
    const Reg sign = _mm256_and_ps(u, set1(-0.f));
    const Reg magnitude = _mm256_andnot_ps(set1(-0.f), u);
    const Reg square = mul(u, u);
    Reg q = set1(poly::kTanh[0]);
    for (int i = 1; i < 5; ++i) q = fma(q, square, set1(poly::kTanh[i]));
    const Reg small = fma(mul(q, square), u, u);
    const Reg bounded = _mm256_min_ps(set1(20.f), magnitude);
    const Reg e = exp(add(bounded, bounded));
    Reg large = sub(set1(1.f), _mm256_div_ps(set1(2.f), add(e, set1(1.f))));
    large = _mm256_or_ps(large, sign);
    return _mm256_blendv_ps(large, small,
                            _mm256_cmp_ps(magnitude, set1(poly::kTanhSmall), _CMP_LT_OQ));
  }
  static float reduce_add(Reg v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  static float reduce_max(Reg v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
  }

 private:
  static __m128i narrow(Reg v) {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    r = _mm256_srli_epi32(r, 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  }
};

}  // namespace
