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

// hidden weight^T + bias.
void logits_product(int device, const LogitsProductParams& params, Stream stream);
// The planes' sum (0 at first) + left^T right; at last rounded to dtype into the upper plane.
void head_gradient(int device, const HeadGradientParams& params, Stream stream);

// Where the build has the kernels and the device can run them.
void launch_logits_product(int multiprocessors, const LogitsProductParams& params, Stream stream);
void launch_head_gradient(int multiprocessors, const HeadGradientParams& params, Stream stream);

}  // namespace grpo::cuda
