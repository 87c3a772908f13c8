// Logits and gradients in 16-byte vectors: unpacking, packing, and rows that start anywhere.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/base/ptx.cuh"

namespace grpo::cuda {

template <class T>
constexpr int kPerVector = 16 / int(sizeof(T));

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ void from_float(float v, float* out) { *out = v; }
__device__ __forceinline__ void from_float(float v, __nv_bfloat16* out) {
  *out = __float2bfloat16_rn(v);
}
__device__ __forceinline__ void from_float(float v, __half* out) { *out = __float2half_rn(v); }

__device__ __forceinline__ void unpack_word(uint32_t w, float* f, __nv_bfloat16) {
  f[0] = __uint_as_float(w << 16);
  f[1] = __uint_as_float(w & 0xffff0000u);
}
__device__ __forceinline__ void unpack_word(uint32_t w, float* f, __half) {
  const float2 v = __half22float2(*reinterpret_cast<const __half2*>(&w));
  f[0] = v.x;
  f[1] = v.y;
}
__device__ __forceinline__ void unpack_word(uint32_t w, float* f, float) {
  f[0] = __uint_as_float(w);
}
__device__ __forceinline__ uint32_t pack_word(const float* f, __nv_bfloat16) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(f[0], f[1]);
  return *reinterpret_cast<const uint32_t*>(&v);
}
__device__ __forceinline__ uint32_t pack_word(const float* f, __half) {
  const __half2 v = __floats2half2_rn(f[0], f[1]);
  return *reinterpret_cast<const uint32_t*>(&v);
}
__device__ __forceinline__ uint32_t pack_word(const float* f, float) {
  return __float_as_uint(f[0]);
}

template <class T>
__device__ __forceinline__ void unpack(const uint4& v, float* f) {
  constexpr int n = kPerVector<T> / 4;
  unpack_word(v.x, f, T());
  unpack_word(v.y, f + n, T());
  unpack_word(v.z, f + 2 * n, T());
  unpack_word(v.w, f + 3 * n, T());
}

template <class T>
__device__ __forceinline__ uint4 pack(const float* f) {
  constexpr int n = kPerVector<T> / 4;
  return {pack_word(f, T()), pack_word(f + n, T()), pack_word(f + 2 * n, T()),
          pack_word(f + 3 * n, T())};
}

// Element-wise maximum of two words; a number wins against NaN.
__device__ __forceinline__ uint32_t max_word(uint32_t a, uint32_t b, __nv_bfloat16) {
  const __nv_bfloat162 v = __hmax2(*reinterpret_cast<const __nv_bfloat162*>(&a),
                                   *reinterpret_cast<const __nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&v);
}
__device__ __forceinline__ uint32_t max_word(uint32_t a, uint32_t b, __half) {
  const __half2 v =
      __hmax2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&v);
}
__device__ __forceinline__ uint32_t max_word(uint32_t a, uint32_t b, float) {
  return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
}

// A word with -inf in every element.
__device__ __forceinline__ uint32_t lowest_word(__nv_bfloat16) { return 0xff80ff80u; }
__device__ __forceinline__ uint32_t lowest_word(__half) { return 0xfc00fc00u; }
__device__ __forceinline__ uint32_t lowest_word(float) { return 0xff800000u; }

// Keep the first `count` elements of a vector and set the others to -inf.
template <class T>
__device__ __forceinline__ uint4 keep_first(const uint4& v, int count) {
  uint32_t w[4] = {v.x, v.y, v.z, v.w};
  const uint32_t lowest = lowest_word(T());
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      if (i >= count) w[i] = lowest;
    } else {
      if (2 * i >= count)
        w[i] = lowest;
      else if (2 * i + 1 == count)
        w[i] = (w[i] & 0xffffu) | (lowest & 0xffff0000u);
    }
  }
  return {w[0], w[1], w[2], w[3]};
}

// Extract the 16 bytes that start `shift` bytes into low|high.
__device__ __forceinline__ uint4 extract(const uint4& low, const uint4& high, int shift) {
  uint32_t w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  if (shift & 8) {
#pragma unroll
    for (int i = 0; i < 6; ++i) w[i] = w[i + 2];
  }
  if (shift & 4) {
#pragma unroll
    for (int i = 0; i < 5; ++i) w[i] = w[i + 1];
  }
  const int bits = (shift & 3) * 8;
  return {__funnelshift_r(w[0], w[1], bits), __funnelshift_r(w[1], w[2], bits),
          __funnelshift_r(w[2], w[3], bits), __funnelshift_r(w[3], w[4], bits)};
}

// Vectors in shared memory that start on a 16-byte boundary.
struct AlignedShared {
  const uint4* base;
  __device__ __forceinline__ uint4 operator()(int v) const { return base[v]; }
};
// Vectors in shared memory that start `offset` bytes after `share`, off 16-byte boundaries: those
// of a misaligned row, or of a destination with another alignment.
struct ShiftedShared {
  const uint4* base;
  int shift;  // 1..15
  __device__ ShiftedShared(const unsigned char* share, int offset)
      : base(reinterpret_cast<const uint4*>(share + (offset & ~15))), shift(offset & 15) {}
  __device__ __forceinline__ uint4 operator()(int v) const {
    return extract(base[v], base[v + 1], shift);
  }
};

// Call f(vectors), where vectors(v) returns the 16 bytes at share + offset + 16 v.
template <class F>
__device__ __forceinline__ auto with_shared_vectors(const unsigned char* share, int offset, F f) {
  if ((offset & 15) == 0) return f(AlignedShared{reinterpret_cast<const uint4*>(share + offset)});
  return f(ShiftedShared(share, offset));
}

// Vectors in global memory that start on a 16-byte boundary.
struct AlignedGlobal {
  const unsigned char* base;
  __device__ __forceinline__ uint4 operator()(int64_t v) const {
    return ptx::load_once(base + v * 16);
  }
};
// Vectors in global memory that start off 16-byte boundaries. An aligned 16-byte block that holds a
// byte of the row lies within its allocation and is read whole; other blocks are not read.
struct ShiftedGlobal {
  const unsigned char* base;  // 16-byte aligned
  int shift;
  int64_t begin, end;  // the row's bytes, from base

  __device__ __forceinline__ uint4 block(int64_t at) const {
    if (at + 16 <= begin || at >= end) return {0, 0, 0, 0};
    return *reinterpret_cast<const uint4*>(base + at);
  }
  __device__ __forceinline__ uint4 operator()(int64_t v) const {
    return extract(block(v * 16), block(v * 16 + 16), shift);
  }
};

// Call f(vectors), where vectors(v) returns the 16 bytes at from + 16 v. The row has `length` bytes
// and starts `lead` bytes after `from`.
template <class F>
__device__ __forceinline__ auto with_global_vectors(const unsigned char* from, int lead,
                                                    int64_t length, F f) {
  const int shift = int(reinterpret_cast<uintptr_t>(from) & 15);
  if (shift == 0) return f(AlignedGlobal{from});
  return f(ShiftedGlobal{from - shift, shift, shift + lead, shift + lead + length});
}

// The destination of a share of the gradient, in 16-byte blocks.
template <class T>
struct Destination {
  unsigned char* base;  // 16-byte aligned
  int lead_bytes;       // bytes from base to the first element
  int length;           // elements

  __device__ Destination(T* first, int count)
      : base(reinterpret_cast<unsigned char*>(first) - (reinterpret_cast<uintptr_t>(first) & 15)),
        lead_bytes(int(reinterpret_cast<uintptr_t>(first) & 15)),
        length(count) {}
  __device__ __forceinline__ int blocks() const {
    return length > 0 ? int((lead_bytes + length * int(sizeof(T)) + 15) / 16) : 0;
  }
  // The element at the start of block q; negative in the first block of a misaligned share.
  __device__ __forceinline__ int first_element(int q) const {
    return (q * 16 - lead_bytes) / int(sizeof(T));
  }
  // Blocks [first_whole, end_whole) hold only elements of the share.
  __device__ __forceinline__ int first_whole() const { return lead_bytes > 0 ? 1 : 0; }
  __device__ __forceinline__ int end_whole() const {
    return (lead_bytes + length * int(sizeof(T))) / 16;
  }
  __device__ __forceinline__ void store_whole(int q, const uint4& v) const {
    *reinterpret_cast<uint4*>(base + int64_t(q) * 16) = v;
  }
  // Store any block. A block at an end of the share also holds its neighbour's elements: store only
  // the share's.
  __device__ __forceinline__ void store(int q, const uint4& v) const {
    const int first = first_element(q);
    unsigned char* at = base + int64_t(q) * 16;
    if (first >= 0 && first + kPerVector<T> <= length) {
      *reinterpret_cast<uint4*>(at) = v;
    } else {
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < kPerVector<T>; ++j) {
        if (first + j < 0 || first + j >= length) continue;
        if constexpr (sizeof(T) == 4)
          reinterpret_cast<uint32_t*>(at)[j] = words[j];
        else
          reinterpret_cast<uint16_t*>(at)[j] = uint16_t(words[j / 2] >> (j % 2 * 16));
      }
    }
  }
};

}  // namespace grpo::cuda
