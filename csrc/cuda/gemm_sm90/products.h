// Products with the LM head on sm_90a (mainloop.cuh), each for what cuBLAS does not offer.
//
// `probability_product` exponentiates in the epilogue. `logits_product` computes a logit with the
// same bits for any number of rows, so that a call needs no blocks of a fixed shape.
// `head_gradient` accumulates over chunks of rows and rounds in the last chunk.
#pragma once

#include <cstdint>

#include "common/row_params.h"
#include "cuda/base/device.h"

namespace grpo::cuda {

// Columns of a tile; a row has ceil(vocab / kTileColumns) partial sums.
constexpr int kTileColumns = 256;
// If a row's exponentials in a tile sum to 2^64 or more, the row is recentred in that tile:
// exponentiated again, relative to its greatest logit there. Below this sum, 2^18 elements times a
// weight of 2^9 add up to a finite float, and its reciprocal times a coefficient of 2^-30 is a
// normal one.
constexpr float kGreatestSum = 18446744073709551616.f;
// Replaces an exponent of -inf: 2^t = 0 and t 2^t = 0, relative to any reference.
constexpr float kLowestExponent = -1e30f;

struct ProductParams {
  DType dtype;  // of hidden, weight and probabilities: bf16
  int32_t rows, vocab, hidden_size;
  const void* hidden;      // [rows, hidden_size]
  int64_t hidden_stride;   // a multiple of 8, as hidden_size is
  const void* weight;      // [vocab, hidden_size]
  int64_t weight_stride;   // a multiple of 8
  const float* bias;       // [vocab] or null
  const float* reference;  // [rows], base 2
  const int32_t* target;   // [rows] column, -1: none on this rank
  float slope;             // scale / (temperature ln 2): logits to base 2
  void* probabilities;     // [rows, vocab] of dtype, 0 at the target; null: not stored
  int64_t stride;          // between its rows, a multiple of 8 elements
  // [tiles, rows, 2]: sums of 2^t and of t 2^t without the target. A negative first sum marks a
  // recentred row: its sum is the absolute value, and t is relative to `recentred`.
  float* partials;
  int64_t partials_stride;   // between tiles, in pairs
  float* recentred;          // [tiles, rows] references, written for recentred rows only
  int64_t recentred_stride;  // between tiles
  float* exponent;           // [rows] t of the target, written by the tile that contains it

  GRPO_FIELDS(dtype, rows, vocab, hidden_size, hidden, hidden_stride, weight, weight_stride, bias,
              reference, target, slope, probabilities, stride, partials, partials_stride, recentred,
              recentred_stride, exponent)
};

struct LogitsProductParams {
  DType dtype;  // of hidden and weight: bf16, fp16
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
  DType dtype;  // of left, right and the gradient: bf16
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

// E = 2^t with t = slope (hidden weight^T + bias) - reference, and its sums per row and tile.
void probability_product(int device, const ProductParams& params, Stream stream);
// hidden weight^T + bias.
void logits_product(int device, const LogitsProductParams& params, Stream stream);
// Add left^T right to the sum in the planes. `first`: the planes hold no sum yet. `last`: round the
// sum to dtype into the upper plane.
void head_gradient(int device, const HeadGradientParams& params, Stream stream);

// Defined only in builds for sm_90; rows > 0.
void launch_product(int multiprocessors, const ProductParams& params, Stream stream);
void launch_product(int multiprocessors, const LogitsProductParams& params, Stream stream);
void launch_product(int multiprocessors, const HeadGradientParams& params, Stream stream);

}  // namespace grpo::cuda
