// Loss and metrics summed by many CTAs: where they meet.
#pragma once

#include "../common/metrics.h"
#include "cuda.h"

namespace grpo::cuda {

// In the order of BatchSums.
constexpr int kSumCount = sizeof(BatchSums) / sizeof(double);
constexpr int kMaxReporters = 1024;

struct Report {
  double* sums;        // [kMaxReporters, kSumCount] or null: nothing is reported
  uint32_t* finished;  // [1] reporters so far
};

}  // namespace grpo::cuda
