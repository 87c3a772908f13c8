// The one-launch kernel of sm_90: loss coefficients and gradient with one read and one write.
#pragma once

#include "../common/policy.h"
#include "../common/row_params.h"
#include "cuda.h"
#include "plan.h"

namespace grpo::cuda {

// Groups of consumers, a loading and a storing warp.
constexpr int ring_threads(int groups) { return groups * kGroupThreads + 64; }

struct RingParams {
  RowParams<float> rows;  // grad is set; may be the logits
  PolicyParams<float> policy;
  const SequenceTerms<float>* terms;  // [B], from the kernel launched before
  int32_t row_count;
  int32_t share;        // elements of a row per CTA
  int32_t stages;       // shares in shared memory
  int32_t stage_bytes;  // each, multiple of 128
  int32_t groups;       // of consumers, at most kMaxGroups
};

// Rows of rows.dtype under the given plan.
void launch_ring(const RingParams& params, const RowPlan& plan, Stream stream);

// One instantiation file per dtype. Returns the kernel's address.
template <class T>
const void* ring_kernel_address(bool general);

}  // namespace grpo::cuda
