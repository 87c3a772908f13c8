// The operations: plan, fill parameters, launch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <atomic>
#include <cstring>
#include <string>

#include "cuda/base/launch.h"
#include "cuda/policy/policy.h"
#include "cuda/rows/sm90/ring.h"
#include "cuda/rows/streaming.h"

namespace grpo::cuda {
namespace {

std::atomic<bool> use_ring{true}, use_constants_in_kernel{true};

int32_t count_rows(const RowParams<float>& p) {
  const int64_t rows = p.batch * p.length;
  if (p.dtype == DType::kFloat64)
    throw std::invalid_argument(
        "grpo_ext: got fp64 logits on a GPU: move them to the CPU or use fp32");
  if (rows >= int64_t(1) << 31 || p.vocab >= int64_t(1) << 28)
    throw std::invalid_argument(
        "grpo_ext: " + std::to_string(rows) + " rows of " + std::to_string(p.vocab) +
        " logits; the limits are 2^31 - 1 rows of 2^28 - 1 logits: split the call");
  return int32_t(rows);
}

StreamingParams streaming_params(const RowParams<float>& rows) {
  StreamingParams p{};
  p.rows = rows;
  p.row_count = count_rows(rows);
  const RowDivision division = divide_row(rows.dtype, rows.vocab);
  p.shares = division.shares;
  p.share = division.share;
  const int64_t tile = int64_t(kTileVectors) * kGroupThreads * 16;
  // A row that starts off a 16-byte boundary touches one block more.
  p.tiles = int32_t((rows.vocab * element_bytes(rows.dtype) + 15 + tile - 1) / tile);
  return p;
}

template <class F>
auto for_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kBFloat16:
      return f(__nv_bfloat16());
    case DType::kFloat16:
      return f(__half());
    default:
      return f(float());
  }
}

bool needs_all_features(const RowParams<float>& p) {
  return p.transform.softcap > 0 || p.transform.scale < 0;
}

void launch_stats(const Device& device, const RowParams<float>& rows, Stream stream) {
  const StreamingParams p = streaming_params(rows);
  if (p.row_count == 0) return;
#if defined(GRPO_CUDA_RING)
  const RowPlan plan = plan_row_stats(device, rows.dtype, rows.vocab);
  if (plan.ring && use_ring) {
    launch_stats_ring(
        {rows, p.row_count, p.shares, p.share, plan.stages, plan.stage_bytes, plan.groups}, stream);
    return;
  }
#endif
  const void* kernel = for_dtype(rows.dtype, [&](auto element) {
    return stats_kernel_address<decltype(element)>(needs_all_features(rows));
  });
  launch(kernel, {unsigned(p.row_count), unsigned(kGroupThreads)}, stream, p);
}

void launch_gradient(const RowParams<float>& rows, Stream stream) {
  const StreamingParams p = streaming_params(rows);
  if (p.row_count == 0) return;
  const void* kernel = for_dtype(rows.dtype, [&](auto element) {
    return gradient_kernel_address<decltype(element)>(needs_all_features(rows) ||
                                                      rows.entropy_coef != nullptr);
  });
  const int64_t blocks = int64_t(p.row_count) * p.tiles;
  if (blocks >= int64_t(1) << 31)
    throw std::invalid_argument("grpo_ext: more than 32 TiB of logits in one call");
  launch(kernel, {unsigned(blocks), unsigned(kGroupThreads)}, stream, p);
}

PolicyKernelParams policy_params(const PolicyParams<float>& policy, void* workspace,
                                 bool with_logps) {
  PolicyKernelParams p{};
  p.policy = policy;
  p.workspace = divide_workspace(workspace, policy.batch, policy.length);
  p.chunks = int32_t(chunks_per_sequence(policy.length));
  p.with_logps = with_logps;
  return p;
}

}  // namespace

int compiled_version() { return CUDART_VERSION; }

bool select_route(const char* name) {
  const bool streaming = !std::strcmp(name, "streaming"),
             constants = !std::strcmp(name, "constants_kernel");
  if (!streaming && !constants && std::strcmp(name, "auto") != 0) return false;
  use_ring = !streaming;
  use_constants_in_kernel = !constants;
  return true;
}

void row_stats(int device, const RowParams<float>& rows, Stream stream) {
  const DeviceGuard guard(device);
  launch_stats(device_of(device), rows, stream);
}

void row_gradient(int device, const RowParams<float>& rows, Stream stream) {
  const DeviceGuard guard(device);
  launch_gradient(rows, stream);
}

void policy_loss(int device, const PolicyParams<float>& policy, void* workspace, Stream stream) {
  const DeviceGuard guard(device);
  const PolicyKernelParams p = policy_params(policy, workspace, true);
  launch_sequence_constants(p, stream);
  launch_emit(p, device_of(device).architecture >= 90, stream);
}

void compute_sequence_constants(int device, const PolicyParams<float>& policy, void* workspace,
                                Stream stream) {
  const DeviceGuard guard(device);
  launch_sequence_constants(policy_params(policy, workspace, false), stream);
}

const SequenceConstants<float>* constants_in(void* workspace, const PolicyParams<float>& policy) {
  return divide_workspace(workspace, policy.batch, policy.length).constants;
}

#if defined(GRPO_CUDA_RING)
namespace {

// Launch the ring kernel. Returns false if device or call does not allow it.
bool row_loss_on_chip(int device, const RowParams<float>& rows, PolicyKernelParams p,
                      Stream stream) {
  RingParams ring{};
  ring.rows = rows;
  ring.policy = p.policy;
  ring.row_count = count_rows(rows);
  ring.exceeds_cache =
      int64_t(ring.row_count) * rows.vocab * element_bytes(rows.dtype) >= kCachedBytes;
  const RowPlan plan = plan_row_loss(device_of(device), rows.dtype, rows.vocab, ring.exceeds_cache);
  ring.share = plan.division.share;
  ring.stages = plan.stages;
  ring.stage_bytes = plan.stage_bytes;
  ring.groups = plan.groups;
  if (!plan.ring || !use_ring || ring.row_count == 0 || ring_clusters(ring, plan) == 0)
    return false;
  // At sequence level the metrics need all log probabilities of a sequence: NaN in one shows in
  // all.
  const bool reports = p.policy.spec.level == Level::kToken;
  const bool capturing = is_capturing(stream);
  int counter = -1;
  if (reports && use_constants_in_kernel && computes_constants_in_kernel(p.policy))
    counter = take_report_counter(device, stream, capturing);
  if (counter >= 0) {
    ring.report = {p.workspace.sums, nullptr, counter};
    // In a graph, the previous node is not always a kernel.
    launch_ring(ring, plan, !capturing, stream);
    return true;
  }
  ring.constants = p.workspace.constants;
  if (reports) ring.report = {p.workspace.sums, p.workspace.finished, -1};
  launch_sequence_constants(p, stream);
  launch_ring(ring, plan, true, stream);
  if (reports) return true;
  p.with_logps = true;
  launch_sequence_constants(p, stream);
  launch_emit(p, true, stream);
  return true;
}

}  // namespace
#endif

void row_loss(int device, const RowParams<float>& rows, const PolicyParams<float>& policy,
              void* workspace, Stream stream) {
  const DeviceGuard guard(device);
  PolicyKernelParams p = policy_params(policy, workspace, false);
  if (!rows.grad) {
    p.with_logps = true;
    launch_stats(device_of(device), rows, stream);
    launch_sequence_constants(p, stream);
    launch_emit(p, device_of(device).architecture >= 90, stream);
    return;
  }
#if defined(GRPO_CUDA_RING)
  if (row_loss_on_chip(device, rows, p, stream)) return;
#endif
  RowParams<float> with_lse = rows;
  with_lse.lse = p.workspace.lse;
  launch_stats(device_of(device), with_lse, stream);
  p.with_logps = true;
  launch_sequence_constants(p, stream);
  p.policy.coef = p.workspace.coef;
  p.policy.entropy_coef = policy.spec.entropy_coef != 0 ? p.workspace.entropy_coef : nullptr;
  launch_emit(p, false, stream);
  with_lse.coef = p.policy.coef;
  with_lse.entropy_coef = p.policy.entropy_coef;
  launch_gradient(with_lse, stream);
}

}  // namespace grpo::cuda
