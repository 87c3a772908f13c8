// Turn log probabilities into losses and coefficients: SPEC sections 2 to 4 (docs/inside/spec.md)
// for a batch.
//
// Per sequence: accumulate SequenceSums over its tokens, turn them into SequenceConstants, evaluate
// each token with those. CPU and CUDA differ only in their loops.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/loss_spec.h"
#include "common/token_loss.h"

namespace grpo {

enum class ImportanceShape : int32_t { kNone, kPerSequence, kPerToken };

// All tensors are contiguous, [B,T] unless said otherwise; a null pointer means "not given".
template <class Real>
struct PolicyParams {
  int64_t batch, length;  // B, T
  const Real* logps;      // new
  const Real* entropy;
  const uint8_t* mask;
  const Real* advantages;  // [B] or [B,T]
  bool advantages_per_token;
  const Real* old_logps;
  const Real* ref_logps;
  const Real* sampling_logps;
  const Real* importance;  // [B] or [B,T], importance weights from the caller
  ImportanceShape importance_shape;
  const Real* num_items;          // [1] divisor of dapo, cispo and vespo; null: sum of the mask
  const Real* entropy_threshold;  // [1] keep tokens at or above it; null: keep all
  LossSpec<Real> spec;
  // Outputs.
  Real* loss;          // [1]
  Real* coef;          // dLoss/dlogp, grad_scale included
  Real* entropy_coef;  // dLoss/dentropy, grad_scale included; null without a bonus
  Real* kl;            // null when beta == 0
  Real* metrics;       // [kMetricCount]

  GRPO_FIELDS(batch, length, logps, entropy, mask, advantages, advantages_per_token, old_logps,
              ref_logps, sampling_logps, importance, importance_shape, num_items, entropy_threshold,
              spec, loss, coef, entropy_coef, kl, metrics)
};

// Sums over the unmasked tokens of one sequence, in fp64: each of its tokens depends on them.
struct SequenceSums {
  double tokens;
  double log_ratio;          // d
  double clamped_log_ratio;  // clamp(d, -20, 20)
  double log_importance;     // clamp(log isw, log 1e-8, 20), weights per token
  double sampling_gap;       // old - sampling, NaN -> 0
  double behaviour_gap;      // (sampling or old or new) - new
};

GRPO_HOST_DEVICE void merge(SequenceSums* a, const SequenceSums& b) {
  a->tokens += b.tokens;
  a->log_ratio += b.log_ratio;
  a->clamped_log_ratio += b.clamped_log_ratio;
  a->log_importance += b.log_importance;
  a->sampling_gap += b.sampling_gap;
  a->behaviour_gap += b.behaviour_gap;
}

// Values of a sequence on which each of its tokens' losses depends.
template <class Real>
struct SequenceConstants {
  Real weight;           // the reduction's factor on each token of this sequence
  Real log_ratio;        // mean of d, for the sequence level
  Real importance;       // isw, when there is one per sequence
  Real vespo_weight;     // lw of SPEC section 2.3
  Real tokens;           // unmasked ones
  Real inv_tokens;       // 1 / max(tokens, 1)
  Real shared_gradient;  // sequence level: sum_t weight dl_t/dw / tokens, equal for all tokens
  bool keep;             // off-policy mask
};

constexpr double kLogTiny = -18.420680743952367;  // log 1e-8
constexpr double kLogHuge = 20.0;

template <class Real>
GRPO_HOST_DEVICE Real clamp(Real v, Real lo, Real hi) {
  return v < lo ? lo : (v > hi ? hi : v);
}

GRPO_HOST_DEVICE bool per_sequence(ImportanceMode mode) {
  return mode == ImportanceMode::kSequenceTruncate || mode == ImportanceMode::kSequenceMask;
}

template <class Real>
GRPO_HOST_DEVICE bool forms_importance(const PolicyParams<Real>& p) {
  return p.spec.importance_mode != ImportanceMode::kOff &&
         p.importance_shape == ImportanceShape::kNone && p.sampling_logps != nullptr;
}

// Whether the constants of a sequence need more than its number of tokens.
template <class Real>
GRPO_HOST_DEVICE bool needs_sums(const PolicyParams<Real>& p) {
  return p.spec.level == Level::kSequence || p.spec.loss_type == LossType::kVespo ||
         p.spec.has_off_policy_threshold ||
         (forms_importance(p) && per_sequence(p.spec.importance_mode));
}

// Truncate to [min, cap], or set to 0 outside it (mask modes).
template <class Real>
GRPO_HOST_DEVICE Real bound_importance(const LossSpec<Real>& spec, Real weight) {
  const bool truncate = spec.importance_mode == ImportanceMode::kTokenTruncate ||
                        spec.importance_mode == ImportanceMode::kSequenceTruncate;
  if (truncate) return clamp(weight, spec.importance_min, spec.importance_cap);
  return weight >= spec.importance_min && weight <= spec.importance_cap ? weight : Real(0);
}

template <class Real>
GRPO_HOST_DEVICE Real advantage(const PolicyParams<Real>& p, int64_t b, int64_t i) {
  return p.advantages[p.advantages_per_token ? i : b];
}

// d = new - old. On-policy exactly 0, also at -inf; a NaN stays one.
template <class Real>
GRPO_HOST_DEVICE Real log_ratio(const PolicyParams<Real>& p, int64_t i, Real new_logp) {
  if (p.old_logps) return new_logp - p.old_logps[i];
  return new_logp == new_logp ? Real(0) : new_logp;
}

// delta of SPEC section 4: old - sampling.
template <class Real>
GRPO_HOST_DEVICE Real sampling_gap(const PolicyParams<Real>& p, int64_t i, Real new_logp) {
  const Real behaviour = p.old_logps ? p.old_logps[i] : new_logp;
  const Real gap = behaviour - p.sampling_logps[i];
  return gap == gap ? gap : Real(0);
}

// isw of token i; `of_sequence` if weights are per sequence.
template <class Real>
GRPO_HOST_DEVICE Real importance(const PolicyParams<Real>& p, int64_t i, Real new_logp,
                                 Real of_sequence) {
  if (p.importance_shape == ImportanceShape::kPerToken) return p.importance[i];
  if (forms_importance(p) && !per_sequence(p.spec.importance_mode))
    return bound_importance(p.spec, std::exp(sampling_gap(p, i, new_logp)));
  return of_sequence;
}

template <class Real>
GRPO_HOST_DEVICE void accumulate(const PolicyParams<Real>& p, int64_t i, Real new_logp,
                                 SequenceSums* sums) {
  const Real d = log_ratio(p, i, new_logp);
  sums->tokens += 1;
  sums->log_ratio += d;
  if (p.spec.loss_type == LossType::kVespo) {
    sums->clamped_log_ratio += clamp(d, Real(-20), Real(20));
    const bool per_token = p.importance_shape == ImportanceShape::kPerToken ||
                           (forms_importance(p) && !per_sequence(p.spec.importance_mode));
    if (per_token) {
      const Real isw = importance(p, i, new_logp, Real(1));
      sums->log_importance += clamp(std::log(isw), Real(kLogTiny), Real(kLogHuge));
    }
  }
  if (forms_importance(p) && per_sequence(p.spec.importance_mode))
    sums->sampling_gap += sampling_gap(p, i, new_logp);
  if (p.spec.has_off_policy_threshold) {
    const Real* behaviour = p.sampling_logps ? p.sampling_logps : p.old_logps;
    if (behaviour) sums->behaviour_gap += behaviour[i] - new_logp;
  }
}

// SPEC section 3. `batch_tokens` is the sum of the whole local mask.
template <class Real>
GRPO_HOST_DEVICE Real reduction_weight(const PolicyParams<Real>& p, double tokens,
                                       double batch_tokens) {
  const double sequences = p.batch > 0 ? double(p.batch) : 1.0;
  const double local = batch_tokens > 1 ? batch_tokens : 1.0;
  switch (p.spec.loss_type) {
    case LossType::kGrpo:
    case LossType::kSapo:
      return Real(1.0 / (sequences * (tokens > 1 ? tokens : 1.0)));
    case LossType::kBnpo:
      return Real(1.0 / local);
    case LossType::kDrGrpo:
      return Real(1.0 / (sequences * p.spec.max_completion_length));
    case LossType::kLuspo:
      return Real(1.0 / sequences);
    default: {
      if (p.num_items == nullptr) return Real(1.0 / local);
      const double items = double(*p.num_items);
      return Real(items > 0 ? 1.0 / items : 1.0);
    }
  }
}

// phi of vespo: a gamma weight of the sequence, k and lambda by the sign of A. No gradient.
template <class Real>
GRPO_HOST_DEVICE Real vespo_phi(const LossSpec<Real>& spec, Real lw, Real A) {
  const Real k = A >= 0 ? spec.vespo_k_pos : spec.vespo_k_neg;
  const Real lambda = A >= 0 ? spec.vespo_lambda_pos : spec.vespo_lambda_neg;
  const Real phi = std::exp(lambda + k * lw - lambda * std::exp(lw));
  return phi - phi == 0 ? phi : Real(0);  // inf and NaN -> 0
}

// All constants except shared_gradient, which needs a second pass over the tokens.
template <class Real>
GRPO_HOST_DEVICE SequenceConstants<Real> sequence_constants(const PolicyParams<Real>& p, int64_t b,
                                                            const SequenceSums& sums,
                                                            double batch_tokens) {
  SequenceConstants<Real> constants{};
  const double tokens = sums.tokens > 1 ? sums.tokens : 1.0;
  constants.weight = reduction_weight(p, sums.tokens, batch_tokens);
  constants.tokens = Real(sums.tokens);
  constants.inv_tokens = Real(1.0 / tokens);
  constants.log_ratio = Real(sums.log_ratio / tokens);
  constants.importance = Real(1);
  double log_importance = sums.log_importance;
  const bool formed = forms_importance(p) && per_sequence(p.spec.importance_mode);
  if (formed) {
    // NaN is +inf and -inf together: a ratio of 0 to 0 counts as 1, as in sampling_gap.
    const double gap = sums.sampling_gap == sums.sampling_gap ? sums.sampling_gap : 0;
    constants.importance = bound_importance(p.spec, std::exp(Real(gap)));
  }
  if (p.importance_shape == ImportanceShape::kPerSequence) constants.importance = p.importance[b];
  if (formed || p.importance_shape == ImportanceShape::kPerSequence)
    log_importance = double(clamp(std::log(constants.importance), Real(kLogTiny), Real(kLogHuge)));
  constants.vespo_weight = Real(clamp(sums.clamped_log_ratio + log_importance, kLogTiny, kLogHuge));
  const Real gap = Real(sums.behaviour_gap / tokens);
  constants.keep = !p.spec.has_off_policy_threshold || gap <= p.spec.off_policy_threshold;
  return constants;
}

// One unmasked token of sequence b at flat position i.
template <class Real>
GRPO_HOST_DEVICE TokenLoss<Real> evaluate_token(const PolicyParams<Real>& p,
                                                const SequenceConstants<Real>& constants, int64_t b,
                                                int64_t i, Real new_logp, Real entropy) {
  TokenInput<Real> in;
  in.new_logp = new_logp;
  in.log_ratio = p.spec.level == Level::kSequence ? constants.log_ratio : log_ratio(p, i, new_logp);
  in.advantage = advantage(p, b, i);
  in.ref_logp = p.spec.beta != 0 ? p.ref_logps[i] : Real(0);
  in.importance = importance(p, i, new_logp, constants.importance);
  in.phi = p.spec.loss_type == LossType::kVespo
               ? vespo_phi(p.spec, constants.vespo_weight, in.advantage)
               : Real(0);
  in.keep = (constants.keep || in.advantage >= 0) &&
            (p.entropy_threshold == nullptr || entropy >= *p.entropy_threshold);
  TokenLoss<Real> out = token_loss(p.spec, in);
  out.loss -= p.spec.entropy_coef != 0 ? p.spec.entropy_coef * entropy : Real(0);
  return out;
}

// dLoss/dlogp of an unmasked token, grad_scale included.
template <class Real>
GRPO_HOST_DEVICE Real logp_coefficient(const PolicyParams<Real>& p,
                                       const SequenceConstants<Real>& constants,
                                       const TokenLoss<Real>& token) {
  const Real through_ratio = p.spec.level == Level::kSequence
                                 ? constants.shared_gradient
                                 : constants.weight * token.d_log_ratio;
  return p.spec.grad_scale * (constants.weight * token.d_new + through_ratio);
}

// dLoss/dentropy of an unmasked token, grad_scale included.
template <class Real>
GRPO_HOST_DEVICE Real entropy_coefficient(const PolicyParams<Real>& p,
                                          const SequenceConstants<Real>& constants) {
  return -p.spec.grad_scale * constants.weight * p.spec.entropy_coef;
}

}  // namespace grpo
