// Device memory in which CTAs accumulate loss and metrics.
#pragma once

#include "common/metrics.h"
#include "cuda/base/device.h"

namespace grpo::cuda {

constexpr int kSumCount = sizeof(BatchSums) / sizeof(double);
constexpr int kMaxReporters = 1024;

struct Report {
  double* sums;  // [kSumCount, kMaxReporters], fields in the order of BatchSums; null: no report
  // Reporters so far: 0 before the first and after the last. Null: the kernel uses number `counter`
  // of its own counters.
  uint32_t* finished;
  int32_t counter;
};

}  // namespace grpo::cuda
