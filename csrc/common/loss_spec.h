// The constants of a loss call: LossConfig as plain numbers for CPU and CUDA code.
#pragma once

#include <cstdint>

#include "common/fields.h"

#if defined(__CUDACC__)
#define GRPO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GRPO_HOST_DEVICE inline
#endif

namespace grpo {

enum class LossType : int32_t;  // members: token_loss.h
enum class Level : int32_t { kToken, kSequence };
enum class ImportanceMode : int32_t {
  kOff,
  kTokenTruncate,
  kTokenMask,
  kSequenceTruncate,
  kSequenceMask
};

// Real is float, or double for fp64 logits. An optional number has a flag of its own.
template <class Real>
struct LossSpec {
  LossType loss_type;
  Level level;
  ImportanceMode importance_mode;  // kOff also when the caller passes weights
  bool use_bias_correction_kl;
  bool has_off_policy_threshold;
  Real clip_low;   // 1 - epsilon
  Real clip_high;  // 1 + epsilon_high; for cispo epsilon_high itself
  Real delta;      // +inf when not set
  Real beta;
  Real entropy_coef;
  Real importance_min;
  Real importance_cap;
  Real off_policy_threshold;
  Real sapo_temperature_pos, sapo_temperature_neg;
  Real vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg;
  Real max_completion_length;
  Real grad_scale;  // on the gradient only

  GRPO_FIELDS(loss_type, level, importance_mode, use_bias_correction_kl, has_off_policy_threshold,
              clip_low, clip_high, delta, beta, entropy_coef, importance_min, importance_cap,
              off_policy_threshold, sapo_temperature_pos, sapo_temperature_neg, vespo_k_pos,
              vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg, max_completion_length, grad_scale)
};

// x = softcap(scale * z) / temperature.
template <class Real>
struct LogitTransform {
  Real scale;
  Real softcap;  // 0 = no cap
  double inv_temperature;

  GRPO_FIELDS(scale, softcap, inv_temperature)
};

}  // namespace grpo
