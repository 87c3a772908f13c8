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

// Report all rows (first CTA of the cluster). A group's last report batch is incomplete. The
// ring holds fewer rows than a report batch, so no group is a whole batch ahead of another: the
// warp waits for the same batch number of all groups at once.
__device__ __forceinline__ void report_rows(const RingParams& p, RingShared& sh) {
  const int lane = threadIdx.x & 31, group = lane / kReportBatchRows,
            place = lane % kReportBatchRows;
  constexpr uint32_t kPlaces = (1u << kReportBatchRows) - 1;
  clear_column(sh.report.sums, lane);
  wait_for_constants(p, sh);
  uint32_t ended_groups = 0;  // a bit per group
  for (uint32_t number = 0; ended_groups + 1 < 1u << p.groups; ++number) {
    const uint32_t report_batch = number % kReportBatches, ended_before = ended_groups;
    for (int g = 0; g < p.groups; ++g)
      if (!(ended_before >> g & 1))
        wait_with_backoff(&sh.complete[g][report_batch], number / kReportBatches & 1);
    const bool mine = group < p.groups && !(ended_before >> group & 1);
    const RowToReport& row = sh.report_batches[group][report_batch][place];
    const uint32_t end_bits = __ballot_sync(~0u, mine && row.row == kNoRow);
    // Places after the end hold rows of an earlier report batch.
    const uint32_t group_end = end_bits >> (group * kReportBatchRows) & kPlaces;
    if (mine && (group_end == 0 || place < __ffs(group_end) - 1)) report_row(p, sh, row);
    for (int g = 0; g < p.groups; ++g) {
      if (!(ended_before >> g & 1))
        ptx::mbarrier_arrive(ptx::shared_address(&sh.reported[g][report_batch]));
      if (end_bits >> (g * kReportBatchRows) & kPlaces) ended_groups |= 1u << g;
    }
  }
}

}  // namespace grpo::cuda
