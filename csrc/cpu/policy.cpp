// The policy loss on the CPU: a few passes over [B,T] numbers, one sequence per task.
#include "common/metrics.h"
#include "cpu/cpu.h"
#include "cpu/policy_loop.h"

namespace grpo::cpu {
namespace {

// Calls f(i, new, entropy) for the unmasked tokens of sequence b. Without logps, `new` is 0.
template <class Real, class F>
void for_tokens(const PolicyParams<Real>& p, bool with_logps, int64_t b, const F& f) {
  for (int64_t i = b * p.length; i < (b + 1) * p.length; ++i)
    if (p.mask[i]) f(i, with_logps ? p.logps[i] : Real(0), p.entropy ? p.entropy[i] : Real(0));
}

template <class Real>
double count_tokens(const PolicyParams<Real>& p) {
  int64_t tokens = 0;
  for (int64_t i = 0; i < p.batch * p.length; ++i) tokens += p.mask[i] != 0;
  return double(tokens);
}

template <class Real>
SequenceConstants<Real> constants_of(const PolicyParams<Real>& p, bool with_logps, int64_t b,
                                     double batch_tokens) {
  SequenceSums sums{};
  for_tokens(p, with_logps, b,
             [&](int64_t i, Real new_logp, Real) { accumulate(p, i, new_logp, &sums); });
  SequenceConstants<Real> constants = sequence_constants(p, b, sums, batch_tokens);
  if (p.spec.level == Level::kSequence) {
    double shared = 0;
    for_tokens(p, with_logps, b, [&](int64_t i, Real new_logp, Real entropy) {
      shared += double(evaluate_token(p, constants, b, i, new_logp, entropy).d_log_ratio);
    });
    constants.shared_gradient =
        Real(shared * double(constants.weight) * double(constants.inv_tokens));
  }
  return constants;
}

// Write the outputs of sequence b; return its part of the batch sums.
template <class Real>
BatchSums emit(const PolicyParams<Real>& p, const SequenceConstants<Real>& constants, int64_t b) {
  BatchSums sums;
  Real ratio = 0;
  bool low = false, high = false, negative = false;
  for (int64_t i = b * p.length; i < (b + 1) * p.length; ++i) {
    if (p.coef) p.coef[i] = 0;
    if (p.entropy_coef) p.entropy_coef[i] = 0;
    if (p.kl) p.kl[i] = 0;
  }
  for_tokens(p, true, b, [&](int64_t i, Real new_logp, Real entropy) {
    const TokenLoss<Real> token = evaluate_token(p, constants, b, i, new_logp, entropy);
    if (p.coef) p.coef[i] = logp_coefficient(p, constants, token);
    if (p.entropy_coef) p.entropy_coef[i] = entropy_coefficient(p, constants);
    if (p.kl) p.kl[i] = token.kl;
    add_token(p, constants, i, new_logp, entropy, token, &sums);
    ratio = token.ratio;
    low |= token.clipped_low;
    high |= token.clipped_high;
    negative |= advantage(p, b, i) < 0;
    if (p.spec.level == Level::kToken)
      add_ratio(&sums, token.ratio, token.clipped_low, token.clipped_high);
  });
  if (sums.tokens > 0) {
    sums.sequences = 1;
    sums.kept = constants.keep || !negative;
    if (p.spec.level == Level::kSequence) add_ratio(&sums, ratio, low, high);
  }
  return sums;
}

}  // namespace

template <class Real>
std::vector<SequenceConstants<Real>> constants_before_logits(const PolicyParams<Real>& p,
                                                             int threads) {
  std::vector<SequenceConstants<Real>> constants(p.batch);
  const double batch_tokens = count_tokens(p);
#pragma omp parallel for schedule(static) num_threads(threads) if (p.batch * p.length > 4096)
  for (int64_t b = 0; b < p.batch; ++b) constants[b] = constants_of(p, false, b, batch_tokens);
  return constants;
}

template <class Real>
void policy_loss(const PolicyParams<Real>& p, int threads) {
  const double batch_tokens = count_tokens(p);
  std::vector<BatchSums> parts(p.batch);
#pragma omp parallel for schedule(static) num_threads(threads) if (p.batch * p.length > 4096)
  for (int64_t b = 0; b < p.batch; ++b)
    parts[b] = emit(p, constants_of(p, true, b, batch_tokens), b);
  BatchSums total;
  for (const BatchSums& part : parts) merge(&total, part);
  *p.loss = Real(total.loss);
  write_metrics(total, p.metrics);
}

#define GRPO_INSTANTIATE(Real)                                                                     \
  template std::vector<SequenceConstants<Real>> constants_before_logits(const PolicyParams<Real>&, \
                                                                        int);                      \
  template void policy_loss<Real>(const PolicyParams<Real>&, int);
GRPO_INSTANTIATE(float)
GRPO_INSTANTIATE(double)
#undef GRPO_INSTANTIATE

}  // namespace grpo::cpu
