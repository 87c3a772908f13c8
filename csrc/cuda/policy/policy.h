// The policy stage on the device: terms per sequence, then loss, coefficients and metrics.
#pragma once

#include "common/metrics.h"
#include "common/policy.h"
#include "cuda/base/device.h"
#include "cuda/policy/report.h"

namespace grpo::cuda {

constexpr int kPolicyThreads = 256;

// Pieces of one block each; chunks of a sequence follow each other.
struct ChunkSums {
  BatchSums sums;
  float ratio;                   // of any token
  uint32_t low, high, negative;  // any token clipped, any with A < 0
};

// The caller's scratch memory, cut up.
struct Workspace {
  uint32_t* finished;           // [1] blocks that have reported
  double* sums;                 // [kSumCount, kMaxReporters]
  SequenceTerms<float>* terms;  // [B]
  ChunkSums* chunks;            // [B * chunks per sequence]
  // Where statistics and gradient are separate launches, [B,T] each.
  float *lse, *coef, *entropy_coef;
};

int64_t chunks_per_sequence(int64_t length);
Workspace divide_workspace(void* memory, int64_t batch, int64_t length);

struct PolicyKernelParams {
  PolicyParams<float> policy;
  Workspace workspace;
  int32_t chunks;   // per sequence
  bool with_logps;  // the terms look at policy.logps; else only at what is known before
};

// Fills workspace.terms and resets workspace.finished.
void launch_terms(const PolicyKernelParams& params, Stream stream);

// Everything else. `beside_previous`: see Launch.
void launch_emit(const PolicyKernelParams& params, bool beside_previous, Stream stream);

}  // namespace grpo::cuda
