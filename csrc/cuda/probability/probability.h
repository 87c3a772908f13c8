// The product that hands over probabilities: E = exp(z - reference) instead of logits z.
//
// Three operations per chunk of rows. `target_reference` collects the rows and finds each one's
// softmax reference, the logit of its own token; `probability_product` multiplies and exponentiates
// in the epilogue (sm_90a only); `fold_partials` turns its partial sums into log probabilities and
// factors, of a loss too where a token's coefficient depends on no other row's logits. Why
// this is exact is written in docs/inside/probabilities.md. Exponents are to base 2:
// t = (z - reference) / ln 2.
#pragma once

#include <cstdint>

#include "common/policy.h"
#include "common/row_params.h"
#include "cuda/base/device.h"
#include "cuda/gemm_sm90/products.h"

namespace grpo::cuda {

// The reference of a token whose own logit is -inf, or below this; above kLowestExponent.
constexpr float kNoExponent = -1e29f;

// Which token a row of the chunk is: index[row], or first + row where there is no index.
struct ChunkRows {
  int32_t count;
  int64_t first;
  const int64_t* index;  // [count] or null
  const uint8_t* mask;   // per token, null: all count. A masked row has reference 0 and no target

  GRPO_FIELDS(count, first, index, mask)
  GRPO_HOST_DEVICE int64_t token(int32_t row) const { return index ? index[row] : first + row; }
};

struct TargetParams {
  DType dtype;  // of hidden and weight: bf16
  ChunkRows rows;
  int32_t hidden_size;    // a multiple of 8
  int32_t vocab;          // of this rank
  const int64_t* shard;   // [2] id of this rank's first token, tokens of all ranks; null: one rank
  const void* hidden;     // [count, hidden_size], rows hidden_stride elements apart; all tokens' if
                          // there is a `gathered`
  int64_t hidden_stride;  // a multiple of 8
  void* gathered;         // [count, hidden_size], made: the rows, 0 where masked; null: not needed
  const void* weight;     // [vocab, hidden_size]
  int64_t weight_stride;  // a multiple of 8
  const float* bias;      // [vocab] or null
  const int64_t* ids;     // per token; one outside the whole vocabulary gives NaN
  float slope;            // scale / (temperature ln 2): processed logits to base 2
  float* reference;       // [count], base 2, kNoExponent for a token switched off; 0 where
                          // another rank has the target
  int32_t* target;        // [count] column of the target on this rank, -1: none
  float* exponent;        // [count], made 0 for those without a target here

  GRPO_FIELDS(dtype, rows, hidden_size, vocab, shard, hidden, hidden_stride, gathered, weight,
              weight_stride, bias, ids, slope, reference, target, exponent)
};

struct FoldParams {
  DType dtype;
  ChunkRows rows;
  int32_t tiles;
  const float* partials;  // as ProductParams has them, or one of `sums` from each rank
  int64_t partials_stride;
  const float* recentred;
  int64_t recentred_stride;
  const float* reference;
  const float* exponent;
  const int32_t* target;
  float slope;            // scale / temperature: logits to processed logits
  float* sums;            // [count, 2]: only add the partials up, as if to one tile; null: finish
  float* recentred_sums;  // [count] reference of its recentred rows
  float* logps;           // per token
  float* entropy;         // per token
  float* factor;          // [count] -slope / S, the row's factor in d logp / d logits = factor E
  float* residual;  // [count] what rounding that element to dtype left over; 0 without a target
  // Recentred rows become relative to one reference; the target's own element -(S - E_target).
  // Null: none stored.
  void* probabilities;
  int64_t stride;
  int32_t stored;  // rows of it
  int32_t vocab;   // columns of it
  int32_t rank;    // whose of `partials` all of E belongs to; -1: each tile has its own
  // Where a row's coefficient depends on no other row's logits: it is multiplied into `factor`.
  const SequenceTerms<float>* terms;  // [B] from policy_terms; null: not so
  PolicyParams<float> policy;

  GRPO_FIELDS(dtype, rows, tiles, partials, partials_stride, recentred, recentred_stride, reference,
              exponent, target, slope, sums, recentred_sums, logps, entropy, factor, residual,
              probabilities, stride, stored, vocab, rank, terms, policy)
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

// out = factor hidden, rounded: the right factor of the head's gradient.
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
