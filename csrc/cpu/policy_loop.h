// Loops over sequences around common/policy.h.
#pragma once

#include <vector>

#include "common/policy.h"

namespace grpo::cpu {

// Terms of every sequence from what is known before any logit is read: the reduction weights, the
// weights brought along and, on-policy, the shared gradient of the sequence level.
template <class Real>
std::vector<SequenceTerms<Real>> terms_before_logits(const PolicyParams<Real>& policy, int threads);

}  // namespace grpo::cpu
