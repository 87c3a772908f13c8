// The CPU backend's operations. Rows run in parallel, every row on one thread, so results depend on
// neither the thread count nor the other rows.
#pragma once

#include <cstdint>

#include "common/policy.h"
#include "common/row_params.h"

namespace grpo::cpu {

// Instruction set of the row kernels: "avx512", "avx2" or "portable".
const char* active_isa();
// Select a set (tests compare them on one machine); returns false if this CPU lacks `name`.
bool select_isa(const char* name);

// logits -> logps, entropy, lse. Returns the first unmasked row whose id lies outside [0, vocab),
// or -1; with a bad row the outputs are undefined.
template <class Real>
int64_t row_stats(const RowParams<Real>& rows, int threads);

// logits, lse, entropy, coefficients -> grad.
template <class Real>
void row_gradient(const RowParams<Real>& rows, int threads);

// logps -> loss, coefficients, kl, metrics.
template <class Real>
void policy_loss(const PolicyParams<Real>& policy, int threads);

// Do all of the above with one read of each logit. Requires that a row's coefficient depends on no
// other row (fits_one_pass in grpo_ext/losses.py). Writes rows.logps and rows.entropy, which the
// policy reads, and rows.grad unless it is null.
template <class Real>
int64_t row_loss(const RowParams<Real>& rows, const PolicyParams<Real>& policy, int threads);

// data[batch, length, vocab] *= factor.
template <class Real>
void scale_rows(const RowParams<Real>& rows, Real factor, int threads);

}  // namespace grpo::cpu
