// The CUDA backend's operations. They enqueue work on the given stream of the given device and
// never synchronize; a failed launch throws std::runtime_error.
//
// The host never reads ids, so a wrong one cannot raise: an unmasked row whose id lies outside
// [0, vocab) gets NaN as its log probability, loss and gradient, and counts in nonfinite_tokens.
#pragma once

#include "common/policy.h"
#include "common/row_params.h"
#include "cuda/base/device.h"

namespace grpo::cuda {

// CUDART_VERSION of the build, e.g. 13000.
int compiled_version();

// Bytes of device workspace that row_loss and policy_loss need.
int64_t workspace_bytes(int64_t batch, int64_t length);

// Force a kernel variant in tests: "auto", "streaming" (never the ring kernel), or
// "constants_kernel" (always a separate kernel for the sequences' constants). Returns false for
// another name.
bool select_route(const char* name);

// logits -> logps, entropy, lse.
void row_stats(int device, const RowParams<float>& rows, Stream stream);

// logits, logps, lse, entropy, coefficients -> grad.
void row_gradient(int device, const RowParams<float>& rows, Stream stream);

// logps -> loss, coefficients, kl, metrics.
void policy_loss(int device, const PolicyParams<float>& policy, void* workspace, Stream stream);

// Compute the sequences' constants into the workspace, at constants_in, for losses whose
// coefficients depend on no other row's logits. `policy` has neither logps nor outputs.
void compute_sequence_constants(int device, const PolicyParams<float>& policy, void* workspace,
                                Stream stream);
const SequenceConstants<float>* constants_in(void* workspace, const PolicyParams<float>& policy);

// Do all of the above with one read of each logit. Requires that a row's coefficient depends on no
// other row (fits_one_pass in grpo_ext/losses.py). rows.grad may be null.
void row_loss(int device, const RowParams<float>& rows, const PolicyParams<float>& policy,
              void* workspace, Stream stream);

// grad *= *factor; a factor of 1 reads and writes nothing.
void scale_rows(int device, const RowParams<float>& rows, const float* factor, Stream stream);

}  // namespace grpo::cuda
