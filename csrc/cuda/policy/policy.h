// Policy kernels: constants per sequence, then loss, coefficients and metrics.
#pragma once

#include "common/metrics.h"
#include "common/policy.h"
#include "cuda/base/device.h"
#include "cuda/policy/report.h"

namespace grpo::cuda {

constexpr int kPolicyThreads = 256;

// Sums of a chunk, i.e. of one block; chunks of a sequence are adjacent.
struct ChunkSums {
  BatchSums sums;
  float ratio;                   // of any token
  uint32_t low, high, negative;  // any token clipped, any with A < 0
};

// The caller's workspace, divided.
struct Workspace {
  uint32_t* finished;                   // [1] blocks that have reported
  double* sums;                         // [kSumCount, kMaxReporters]
  SequenceConstants<float>* constants;  // [B]
  ChunkSums* chunks;                    // [B * chunks per sequence]
  // [B,T] each, for calls that launch statistics and gradient separately.
  float *lse, *coef, *entropy_coef;
};

int64_t chunks_per_sequence(int64_t length);
Workspace divide_workspace(void* memory, int64_t batch, int64_t length);

struct PolicyKernelParams {
  PolicyParams<float> policy;
  Workspace workspace;
  int32_t chunks;   // per sequence
  bool with_logps;  // whether the constants may read policy.logps
};

// Fills workspace.constants and resets workspace.finished.
void launch_sequence_constants(const PolicyKernelParams& params, Stream stream);

// Computes loss, coefficients, kl and metrics. `overlaps_previous_kernel`: see Launch.
void launch_emit(const PolicyKernelParams& params, bool overlaps_previous_kernel, Stream stream);

}  // namespace grpo::cuda
