// Loss and metrics summed by many CTAs: where they meet.
#pragma once

#include "common/metrics.h"
#include "cuda/base/device.h"

namespace grpo::cuda {

// In the order of BatchSums.
constexpr int kSumCount = sizeof(BatchSums) / sizeof(double);
constexpr int kMaxReporters = 1024;

struct Report {
  double* sums;  // [kSumCount, kMaxReporters] or null: nothing is reported
  // Reporters so far: 0 before the first, and again behind the last. Null: counter number `counter`
  // of the kernel's own.
  uint32_t* finished;
  int32_t counter;
};

}  // namespace grpo::cuda
