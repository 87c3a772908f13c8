// The running softmax of a row: (max, sum, weighted sum), mergeable in any tree.
#pragma once

#include <cmath>

#include "common/loss_spec.h"

namespace grpo {

// Over processed logits x of a row (or of a part of it), with m the greatest of them:
template <class Real>
struct SoftmaxRecord {
  Real max;       // m
  Real sum;       // sum exp(x - m)
  Real weighted;  // sum (x - m) exp(x - m), for the entropy
};

template <class Real>
GRPO_HOST_DEVICE Real log_prob(const SoftmaxRecord<Real>& record, Real x) {
  return (x - record.max) - std::log(record.sum);
}

// logsumexp(x) - sum p x.
template <class Real>
GRPO_HOST_DEVICE Real entropy(const SoftmaxRecord<Real>& record) {
  return std::log(record.sum) - record.weighted / record.sum;
}

}  // namespace grpo
