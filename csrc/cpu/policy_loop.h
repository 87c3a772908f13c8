// Loops over sequences around common/policy.h.
#pragma once

#include <vector>

#include "common/policy.h"

namespace grpo::cpu {

// Terms of every sequence that need no logits: reduction weights, the caller's importance weights
// and, on-policy, the shared gradient of the sequence level.
template <class Real>
std::vector<SequenceConstants<Real>> constants_before_logits(const PolicyParams<Real>& policy,
                                                             int threads);

}  // namespace grpo::cpu
