// The products around a head that cuBLAS serves less well, on sm_90a (mainloop.cuh).
//
// `logits_product`: a logit has the same bits whatever the number of rows, so a call needs no
// blocks of a fixed shape. `head_gradient`: the sum over chunks of rows is rounded where it is
// finished.
#pragma once

#include <cstdint>

#include "common/row_params.h"
#include "cuda/base/device.h"

namespace grpo::cuda {

// Columns of a tile: there are ceil(vocab / kTileColumns) partial sums per row.
constexpr int kTileColumns = 256;
// A tile of a row whose exponentials add up to this much (2^64) is exponentiated again, relative to
// its own greatest logit. Below it, the sum of 2^18 elements times a weight of 2^9 is a finite
// float, and its reciprocal times a coefficient of 2^-30 is a normal one.
constexpr float kGreatestSum = 18446744073709551616.f;
// Stands for -inf in exponents: 2^t = 0 and 0 t = 0, relative to any reference.
constexpr float kLowestExponent = -1e30f;

struct ProductParams {
  DType dtype;
  int32_t rows, vocab, hidden_size;
  const void* hidden;
  int64_t hidden_stride;
  const void* weight;
  int64_t weight_stride;
  const float* bias;
  const float* reference;  // [rows]
  const int32_t* target;   // [rows]
  float slope;
  void* probabilities;  // [rows, vocab] of dtype, 0 at the target; null: not stored
  int64_t stride;       // between its rows, a multiple of 8 elements
  // [tiles, rows, 2]: sums of 2^t and t 2^t, target excluded. A negative first one: the tile is
  // recentred, its t are relative to `recentred`, and the sum is the absolute value.
  float* partials;
  int64_t partials_stride;   // between tiles, in pairs
  float* recentred;          // [tiles, rows] reference of a recentred tile; others are not written
  int64_t recentred_stride;  // between tiles
  float* exponent;           // [rows] t of the target, written by the tile that has it

  GRPO_FIELDS(dtype, rows, vocab, hidden_size, hidden, hidden_stride, weight, weight_stride, bias,
              reference, target, slope, probabilities, stride, partials, partials_stride, recentred,
              recentred_stride, exponent)
};

struct LogitsProductParams {
  DType dtype;  // of the factors: bf16, fp16
  int32_t rows, vocab, hidden_size;
  const void* hidden;     // [rows, hidden_size]
  int64_t hidden_stride;  // a multiple of 8, as hidden_size is
  const void* weight;     // [vocab, hidden_size]
  int64_t weight_stride;  // a multiple of 8
  const float* bias;      // [vocab] or null
  DType out_dtype;        // dtype or fp32
  void* out;              // [rows, vocab]
  int64_t out_stride;     // a multiple of 8

  GRPO_FIELDS(dtype, rows, vocab, hidden_size, hidden, hidden_stride, weight, weight_stride, bias,
              out_dtype, out, out_stride)
};

struct HeadGradientParams {
  DType dtype;  // of factors and result: bf16
  int32_t rows, vocab, hidden_size;
  const void* left;      // [rows, vocab]
  int64_t left_stride;   // a multiple of 8, as hidden_size is
  const void* right;     // [rows, hidden_size]
  int64_t right_stride;  // a multiple of 8
  void *upper, *lower;   // [vocab, hidden_size], dense: the 16-bit halves of an fp32 sum
  bool first, last;      // not both

  GRPO_FIELDS(dtype, rows, vocab, hidden_size, left, left_stride, right, right_stride, upper, lower,
              first, last)
};

// E = 2^(slope (hidden weight^T + bias) - reference), and its sums over each row of each tile.
void probability_product(int device, const ProductParams& params, Stream stream);
// hidden weight^T + bias.
void logits_product(int device, const LogitsProductParams& params, Stream stream);
// The planes' sum (0 at first) + left^T right; at last rounded to dtype into the upper plane.
void head_gradient(int device, const HeadGradientParams& params, Stream stream);

// Defined if the build has the kernels; params.rows > 0.
void launch_product(int multiprocessors, const ProductParams& params, Stream stream);
void launch_product(int multiprocessors, const LogitsProductParams& params, Stream stream);
void launch_product(int multiprocessors, const HeadGradientParams& params, Stream stream);

}  // namespace grpo::cuda
