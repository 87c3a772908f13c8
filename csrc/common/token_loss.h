// The loss of one token and its derivatives: SPEC section 2 (docs/inside/spec.md), written once for
// CPU and CUDA.
//
// A token's loss l depends on its log probability `new` directly (KL, cispo, vespo) and through the
// log ratio w, which at sequence level the whole completion shares. token_loss returns both partial
// derivatives; the caller combines them for its level.
#pragma once

#include <cmath>

#include "common/loss_spec.h"

namespace grpo {

// In the order of LossType in grpo_ext/config.py.
enum class LossType : int32_t { kGrpo, kBnpo, kDrGrpo, kDapo, kLuspo, kCispo, kSapo, kVespo };

template <class Real>
struct TokenInput {
  Real new_logp;
  Real log_ratio;  // w of SPEC: d, or the sequence's mean of d
  Real advantage;
  Real ref_logp;    // read only when beta != 0
  Real importance;  // isw; 1 without weights
  Real phi;         // vespo's detached weight
  bool keep;        // off-policy mask and entropy mask
};

template <class Real>
struct TokenLoss {
  Real loss;
  Real d_new;        // dl/dnew at fixed w
  Real d_log_ratio;  // dl/dw
  Real kl;
  Real ratio;
  bool clipped_low;
  bool clipped_high;
};

// k3 estimator exp(x) - x - 1 with x = ref - new; expm1 keeps it exact near 0.
template <class Real>
GRPO_HOST_DEVICE Real k3(Real x) {
  return std::expm1(x) - x;
}

// -min(min(r, delta) A, clamp(r) A), with the gradient of the smaller branch.
template <class Real>
GRPO_HOST_DEVICE void clipped_objective(const LossSpec<Real>& spec, Real r, Real A,
                                        TokenLoss<Real>* out) {
  const Real bounded = r > spec.delta ? spec.delta : r;
  const Real clamped =
      r < spec.clip_low ? spec.clip_low : (r > spec.clip_high ? spec.clip_high : r);
  const bool clip_wins = clamped * A < bounded * A;
  out->loss = clip_wins ? -clamped * A : -bounded * A;
  const bool flat = clip_wins ? (r < spec.clip_low || r > spec.clip_high) : r > spec.delta;
  out->d_log_ratio = flat ? Real(0) : -A * r;
  out->clipped_low = r < spec.clip_low && A < 0;
  out->clipped_high = r > spec.clip_high && A > 0;
}

template <class Real>
GRPO_HOST_DEVICE void sapo_objective(const LossSpec<Real>& spec, Real r, Real A,
                                     TokenLoss<Real>* out) {
  const Real tau = A > 0 ? spec.sapo_temperature_pos : spec.sapo_temperature_neg;
  const Real gate = 1 / (1 + std::exp(-tau * (r - 1)));
  const Real rest = 1 / (1 + std::exp(tau * (r - 1)));  // 1 - gate without cancellation
  out->loss = -gate * 4 / tau * A;
  out->d_log_ratio = rest == 0 ? Real(0) : -4 * A * gate * rest * r;
}

template <class Real>
GRPO_HOST_DEVICE TokenLoss<Real> token_loss(const LossSpec<Real>& spec,
                                            const TokenInput<Real>& in) {
  TokenLoss<Real> out{};
  const Real r = std::exp(in.log_ratio);
  const Real A = in.advantage;
  out.ratio = r;
  // Skip a zero advantage: 0 times an overflowed ratio is NaN. A NaN ratio still propagates.
  if (A != 0 || in.log_ratio != in.log_ratio) {
    switch (spec.loss_type) {
      case LossType::kCispo: {
        const Real capped = r > spec.clip_high ? spec.clip_high : r;
        out.loss = -capped * A * in.new_logp;
        out.d_new = -capped * A;
        out.clipped_high = r > spec.clip_high && A > 0;
        break;
      }
      case LossType::kSapo:
        sapo_objective(spec, r, A, &out);
        break;
      case LossType::kVespo:
        out.loss = -in.phi * A * in.new_logp;
        out.d_new = -in.phi * A;
        break;
      default:
        clipped_objective(spec, r, A, &out);
    }
  }
  // A factor of 0 removes the term, infinite or not; it never hides a NaN logit.
  const bool silenced = !in.keep || (spec.loss_type != LossType::kVespo && in.importance == 0);
  if (silenced && in.new_logp == in.new_logp) {
    out.loss = out.d_new = out.d_log_ratio = 0;
  } else if (spec.loss_type != LossType::kVespo) {
    out.loss *= in.importance;
    out.d_new *= in.importance;
    out.d_log_ratio *= in.importance;
  }
  if (spec.beta != 0) {  // the three factors above never touch the KL term
    const Real x = in.ref_logp - in.new_logp;
    const Real correction = spec.use_bias_correction_kl ? r : Real(1);
    out.kl = k3(x) * correction;
    out.loss += spec.beta * out.kl;
    out.d_new -= spec.beta * std::expm1(x) * correction;
    if (spec.use_bias_correction_kl) out.d_log_ratio += spec.beta * out.kl;
  }
  return out;
}

}  // namespace grpo
