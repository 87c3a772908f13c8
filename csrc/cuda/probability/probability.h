// The probability route: the product stores E = exp(z - reference) instead of logits z.
//
// Three operations per chunk of rows. `target_reference` gathers the rows and computes each row's
// softmax reference, the logit of its target. `probability_product` (gemm_sm90/products.h)
// multiplies, and exponentiates in the epilogue. `fold_partials` turns the partial sums into log
// probabilities and row factors. docs/inside/probabilities.md derives the accuracy. Exponents are
// to base 2: t = (z - reference) / ln 2.
#pragma once

#include <cstdint>

#include "common/policy.h"
#include "common/row_params.h"
#include "cuda/base/device.h"
#include "cuda/gemm_sm90/products.h"

namespace grpo::cuda {

// Reference of a row whose target has a logit of -inf, or one below this.
constexpr float kNoExponent = -1e29f;

// Maps a row of the chunk to its token: index[row], or first + row without an index.
struct ChunkRows {
  int32_t count;
  int64_t first;
  const int64_t* index;  // [count] or null
  const uint8_t* mask;   // per token; null: none masked. A masked row has reference 0, no target

  GRPO_FIELDS(count, first, index, mask)
  GRPO_HOST_DEVICE int64_t token(int32_t row) const { return index ? index[row] : first + row; }
};

struct TargetParams {
  DType dtype;  // of hidden and weight: bf16
  ChunkRows rows;
  int32_t hidden_size;    // a multiple of 8
  int32_t vocab;          // of this rank
  const int64_t* shard;   // [2] first id of this rank, vocabulary of all ranks; null: one rank
  const void* hidden;     // [count, hidden_size]; if `gathered` is set, [tokens, hidden_size]
  int64_t hidden_stride;  // a multiple of 8
  void* gathered;         // output [count, hidden_size]: the rows, 0 if masked; null: not needed
  const void* weight;     // [vocab, hidden_size]
  int64_t weight_stride;  // a multiple of 8
  const float* bias;      // [vocab] or null
  const int64_t* ids;     // per token; an id outside the vocabulary of all ranks gives NaN
  float slope;            // scale / (temperature ln 2): processed logits to base 2
  float* reference;       // output [count], base 2; 0 if another rank has the target
  int32_t* target;        // output [count]: column of the target on this rank, -1: none
  float* exponent;        // output [count]: 0 for rows without a target on this rank

  GRPO_FIELDS(dtype, rows, hidden_size, vocab, shard, hidden, hidden_stride, gathered, weight,
              weight_stride, bias, ids, slope, reference, target, exponent)
};

struct FoldParams {
  DType dtype;
  ChunkRows rows;
  int32_t tiles;
  const float* partials;  // as in ProductParams, or each rank's `sums`
  int64_t partials_stride;
  const float* recentred;
  int64_t recentred_stride;
  const float* reference;
  const float* exponent;
  const int32_t* target;
  float slope;            // scale / temperature: logits to processed logits
  float* sums;            // [count, 2]: only fold the partials, as into one tile; null: finish
  float* recentred_sums;  // [count] references of the rows that are recentred in `sums`
  float* logps;           // per token
  float* entropy;         // per token
  float* factor;          // [count] -slope / S: d logp / d logits = factor E
  float* residual;        // [count] what rounding the target's element loses; 0 without a target
  // E, updated in place: recentred rows get one reference, and the target's element becomes
  // -(S - E_target). Null: E is not stored.
  void* probabilities;
  int64_t stride;
  int32_t stored;  // rows of E
  int32_t vocab;   // columns of E
  int32_t rank;    // entry of `partials` that holds for all columns; -1: one entry per tile
  // [B] from compute_sequence_constants: multiply each row's coefficient into `factor`. Requires
  // that a coefficient depends on no other row's logits. Null: `factor` has no coefficient.
  const SequenceConstants<float>* constants;
  PolicyParams<float> policy;

  GRPO_FIELDS(dtype, rows, tiles, partials, partials_stride, recentred, recentred_stride, reference,
              exponent, target, slope, sums, recentred_sums, logps, entropy, factor, residual,
              probabilities, stride, stored, vocab, rank, constants, policy)
};

// out[token] = factor (product + residual weight[target]), rounded once.
struct ScaleParams {
  DType dtype;  // of weight
  DType out_dtype;
  ChunkRows rows;
  int32_t hidden_size;
  const float* product;   // [count, hidden_size]
  const float* factor;    // [count]
  const float* residual;  // [count]; null: none
  const int32_t* target;  // [count]
  const void* weight;
  int64_t weight_stride;
  void* out;  // [tokens, hidden_size]

  GRPO_FIELDS(dtype, out_dtype, rows, hidden_size, product, factor, residual, target, weight,
              weight_stride, out)
};

// out = factor hidden, rounded: the right operand of head_gradient.
struct ScaledHiddenParams {
  DType dtype;  // of hidden and out: bf16
  int32_t rows, hidden_size;
  const void* hidden;     // [rows, hidden_size]
  int64_t hidden_stride;  // a multiple of 8
  const float* factor;    // [rows]
  void* out;              // [rows, hidden_size], dense

  GRPO_FIELDS(dtype, rows, hidden_size, hidden, hidden_stride, factor, out)
};

void target_reference(int device, const TargetParams& params, Stream stream);
void fold_partials(int device, const FoldParams& params, Stream stream);
void scale_product(int device, const ScaleParams& params, Stream stream);
void scaled_hidden(int device, const ScaledHiddenParams& params, Stream stream);

}  // namespace grpo::cuda
