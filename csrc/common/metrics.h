// Loss and metrics of a call: sums over unmasked tokens, folded in a fixed order.
#pragma once

#include "common/policy.h"

namespace grpo {

constexpr int kMetricCount = 15;
inline const char* const kMetricNames[kMetricCount] = {
    "tokens",
    "entropy",
    "kl",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "ratio/mean",
    "ratio/max",
    "importance_weight/mean",
    "importance_weight/min",
    "importance_weight/max",
    "sampling_logp_difference/mean",
    "sampling_logp_difference/max",
    "off_policy_kept",
    "nonfinite_tokens",
};

struct BatchSums {
  double loss = 0;
  double tokens = 0, sequences = 0, kept = 0, nonfinite = 0;
  double entropy = 0, kl = 0;
  double ratios = 0, clipped_low = 0, clipped_high = 0, ratio_sum = 0, ratio_max = 0;
  double importance_sum = 0, importance_min = INFINITY, importance_max = 0;
  double difference_sum = 0, difference_max = 0;
};

GRPO_HOST_DEVICE double greater(double a, double b) { return b > a ? b : a; }

GRPO_HOST_DEVICE void merge(BatchSums* a, const BatchSums& b) {
  a->loss += b.loss;
  a->tokens += b.tokens;
  a->sequences += b.sequences;
  a->kept += b.kept;
  a->nonfinite += b.nonfinite;
  a->entropy += b.entropy;
  a->kl += b.kl;
  a->ratios += b.ratios;
  a->clipped_low += b.clipped_low;
  a->clipped_high += b.clipped_high;
  a->ratio_sum += b.ratio_sum;
  a->ratio_max = greater(a->ratio_max, b.ratio_max);
  a->importance_sum += b.importance_sum;
  a->importance_min = b.importance_min < a->importance_min ? b.importance_min : a->importance_min;
  a->importance_max = greater(a->importance_max, b.importance_max);
  a->difference_sum += b.difference_sum;
  a->difference_max = greater(a->difference_max, b.difference_max);
}

// Add one ratio: of a token at token level, of a sequence at sequence level.
template <class Real>
GRPO_HOST_DEVICE void add_ratio(BatchSums* sums, Real ratio, bool low, bool high) {
  sums->ratios += 1;
  sums->clipped_low += low;
  sums->clipped_high += high;
  sums->ratio_sum += double(ratio);
  sums->ratio_max = greater(sums->ratio_max, double(ratio));
}

template <class Real>
GRPO_HOST_DEVICE void add_token(const PolicyParams<Real>& p,
                                const SequenceConstants<Real>& constants, int64_t i, Real new_logp,
                                Real entropy, const TokenLoss<Real>& token, BatchSums* sums) {
  sums->loss += double(constants.weight) * double(token.loss);
  sums->tokens += 1;
  sums->entropy += double(entropy);
  sums->kl += double(token.kl);
  sums->nonfinite += !(token.loss - token.loss == 0);
  const double isw = double(importance(p, i, new_logp, constants.importance));
  sums->importance_sum += isw;
  sums->importance_min = isw < sums->importance_min ? isw : sums->importance_min;
  sums->importance_max = greater(sums->importance_max, isw);
  if (p.sampling_logps) {
    const double difference = std::fabs(double(sampling_gap(p, i, new_logp)));
    sums->difference_sum += difference;
    sums->difference_max = greater(sums->difference_max, difference);
  }
}

// Every metric as a quotient, in the order of kMetricNames.
struct Metrics {
  double numerators[kMetricCount], denominators[kMetricCount];

  GRPO_HOST_DEVICE explicit Metrics(const BatchSums& sums) {
    const double tokens = greater(sums.tokens, 1.0);
    const double ratios = greater(sums.ratios, 1.0);
    int k = 0;
    const auto add = [&](double numerator, double denominator) {
      numerators[k] = numerator;
      denominators[k++] = denominator;
    };
    add(sums.tokens, 1);
    add(sums.entropy, tokens);
    add(sums.kl, tokens);
    add(sums.clipped_low, ratios);
    add(sums.clipped_high, ratios);
    add(sums.clipped_low + sums.clipped_high, ratios);
    add(sums.ratio_sum, ratios);
    add(sums.ratio_max, 1);
    add(sums.importance_sum, tokens);
    add(sums.tokens > 0 ? sums.importance_min : 0.0, 1);
    add(sums.importance_max, 1);
    add(sums.difference_sum, tokens);
    add(sums.difference_max, 1);
    add(sums.kept, greater(sums.sequences, 1.0));
    add(sums.nonfinite, 1);
  }
};

template <class Real>
GRPO_HOST_DEVICE void write_metrics(const BatchSums& sums, Real* out) {
  const Metrics metrics(sums);
  for (int k = 0; k < kMetricCount; ++k)
    out[k] = Real(metrics.numerators[k] / metrics.denominators[k]);
}

}  // namespace grpo
