// The reporting warp: write logp, entropy and kl of each row and accumulate loss and metrics.
#pragma once

#include "cuda/rows/sm90/ring_state.cuh"

namespace grpo::cuda {

// Write one row's outputs and add it to the lane's sums.
__device__ __forceinline__ void report_row(const RingParams& p, RingShared& sh, const Decided& d) {
  const PolicyParams<float> q = policy_of_row(p.policy, d.inputs);
  const TokenLoss<float> token = evaluate_token(q, d.inputs.terms, 0, 0, d.logp, d.entropy);
  p.rows.logps[d.row] = d.logp;
  p.rows.entropy[d.row] = d.entropy;
  if (p.policy.kl) p.policy.kl[d.row] = token.kl;
  if (!p.report.sums) return;
  BatchSums row;
  add_token(q, d.inputs.terms, 0, d.logp, d.entropy, token, &row);
  add_ratio(&row, token.ratio, token.clipped_low, token.clipped_high);
  add_to_column(sh.report.sums, threadIdx.x & 31, row);
}

// Report all rows (first CTA of the cluster). Each group ends with an incomplete batch. No group is
// a whole batch ahead of another, since the ring holds fewer rows.
__device__ __forceinline__ void report_rows(const RingParams& p, RingShared& sh) {
  const int lane = threadIdx.x & 31, group = lane / kBatchRows, place = lane % kBatchRows;
  constexpr uint32_t kPlaces = (1u << kBatchRows) - 1;
  clear_column(sh.report.sums, lane);
  wait_for_terms(p, sh);
  uint32_t ended = 0;  // a bit per group
  for (uint32_t number = 0; ended + 1 < 1u << p.groups; ++number) {
    const uint32_t batch = number % kBatches, before = ended;
    for (int g = 0; g < p.groups; ++g)
      if (!(before >> g & 1)) wait_with_backoff(&sh.complete[g][batch], number / kBatches & 1);
    const bool mine = group < p.groups && !(before >> group & 1);
    const Decided& row = sh.batches[group][batch][place];
    const uint32_t ends = __ballot_sync(~0u, mine && row.row == kNoRow);
    // Places after the end hold rows of an earlier batch.
    const uint32_t end = ends >> (group * kBatchRows) & kPlaces;
    if (mine && (end == 0 || place < __ffs(end) - 1)) report_row(p, sh, row);
    for (int g = 0; g < p.groups; ++g) {
      if (!(before >> g & 1)) ptx::mbarrier_arrive(ptx::shared_address(&sh.reported[g][batch]));
      if (ends >> (g * kBatchRows) & kPlaces) ended |= 1u << g;
    }
  }
}

}  // namespace grpo::cuda
