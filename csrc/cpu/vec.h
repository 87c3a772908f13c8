// Shared by the SIMD backends: element types and scalar conversions. Everything is static, since
// the header is compiled once per instruction set: the linker must not pick a definition built with
// AVX-512 for the portable path.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

static inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
static inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

static inline float to_real(float v) { return v; }
static inline double to_real(double v) { return v; }
static inline float to_real(BFloat16 v) { return bits_to_float(uint32_t(v.bits) << 16); }
static inline float to_real(Float16 v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16;
  const uint32_t rest = uint32_t(v.bits & 0x7fff) << 13;
  if ((v.bits & 0x7c00) == 0x7c00) return bits_to_float(sign | rest | 0x7f800000u);
  // Rebiasing by a multiplication handles normal and subnormal halves alike.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest) * 0x1p112f));
}

static inline void from_real(float v, float* out) { *out = v; }
static inline void from_real(double v, double* out) { *out = v; }
static inline void from_real(float v, BFloat16* out) {
  const uint32_t u = float_to_bits(v);
  out->bits = v != v ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
// Round to nearest even; overflow gives inf, as in IEEE arithmetic.
static inline void from_real(float v, Float16* out) {
  const uint32_t u = float_to_bits(v);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000);
  const uint32_t magnitude = u & 0x7fffffff;
  uint16_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: let the adder round at the half's last bit
    half = uint16_t(float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000);
  } else {
    const uint32_t odd = (magnitude >> 13) & 1;
    half = uint16_t((magnitude - 0x38000000 + 0xfff + odd) >> 13);
  }
  out->bits = uint16_t(sign | half);
}

// Cephes' single-precision exp and tanh (Moshier): coefficients for the SIMD backends.
namespace poly {
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2High = 0.693359375f;
constexpr float kLn2Low = -2.12194440e-4f;
constexpr float kExp[6] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                           4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
constexpr float kTanhSmall = 0.625f;  // below: polynomial, above: 1 - 2 / (exp(2u) + 1)
constexpr float kTanh[5] = {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f,
                            1.33314422036e-1f, -3.33332819422e-1f};
// exp underflows to exactly 0 below this; the arguments here never exceed 0 by much.
constexpr float kExpLowest = -87.33654f;
}  // namespace poly

}  // namespace
