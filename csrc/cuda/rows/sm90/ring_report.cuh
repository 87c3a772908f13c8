// The reporting warp: write logp, entropy and kl of each row and accumulate loss and metrics.
#pragma once

#include "cuda/rows/sm90/ring_state.cuh"

namespace grpo::cuda {

// Write one row's outputs and add it to the lane's sums.
__device__ __forceinline__ void report_row(const RingParams& p, RingShared& sh,
                                           const RowToReport& d) {
  const PolicyParams<float> q = policy_of_row(p.policy, d.inputs);
  const TokenLoss<float> token = evaluate_token(q, d.inputs.constants, 0, 0, d.logp, d.entropy);
  p.rows.logps[d.row] = d.logp;
  p.rows.entropy[d.row] = d.entropy;
  if (p.policy.kl) p.policy.kl[d.row] = token.kl;
  if (!p.report.sums) return;
  BatchSums row;
  add_token(q, d.inputs.constants, 0, d.logp, d.entropy, token, &row);
  add_ratio(&row, token.ratio, token.clipped_low, token.clipped_high);
  add_to_column(sh.report.sums, threadIdx.x & 31, row);
}

// Report all rows (first CTA of the cluster). A group's last report batch is incomplete. No group
// is a whole batch ahead of another, since the ring holds fewer rows: one wait per batch number
// serves all groups.
__device__ __forceinline__ void report_rows(const RingParams& p, RingShared& sh) {
  const int lane = threadIdx.x & 31, group = lane / kReportBatchRows,
            place = lane % kReportBatchRows;
  constexpr uint32_t kPlaces = (1u << kReportBatchRows) - 1;
  clear_column(sh.report.sums, lane);
  wait_for_constants(p, sh);
  uint32_t ended = 0;  // a bit per group
  for (uint32_t number = 0; ended + 1 < 1u << p.groups; ++number) {
    const uint32_t report_batch = number % kReportBatches, before = ended;
    for (int g = 0; g < p.groups; ++g)
      if (!(before >> g & 1))
        wait_with_backoff(&sh.complete[g][report_batch], number / kReportBatches & 1);
    const bool mine = group < p.groups && !(before >> group & 1);
    const RowToReport& row = sh.report_batches[group][report_batch][place];
    const uint32_t ends = __ballot_sync(~0u, mine && row.row == kNoRow);
    // Places after the end hold rows of an earlier report batch.
    const uint32_t end = ends >> (group * kReportBatchRows) & kPlaces;
    if (mine && (end == 0 || place < __ffs(end) - 1)) report_row(p, sh, row);
    for (int g = 0; g < p.groups; ++g) {
      if (!(before >> g & 1))
        ptx::mbarrier_arrive(ptx::shared_address(&sh.reported[g][report_batch]));
      if (ends >> (g * kReportBatchRows) & kPlaces) ended |= 1u << g;
    }
  }
}

}  // namespace grpo::cuda
