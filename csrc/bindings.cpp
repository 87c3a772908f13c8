// grpo_ext._C: pointers, sizes and numbers in, kernel calls out. Checks, allocation and dtypes are
// the business of grpo_ext/_ops.py; this file only casts.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/metrics.h"
#include "common/policy.h"
#include "common/row_params.h"
#include "cpu/cpu.h"
#include "cuda/rows/plan.h"
#if defined(GRPO_CUDA)
#include "cuda/gemm_sm90/products.h"
#include "cuda/ops.h"
#include "cuda/probability/probability.h"
#endif

namespace py = pybind11;

namespace grpo {
namespace {

// LossConfig as numbers, in this order; Python builds the list from these names. Optional fields
// arrive as NaN when not set.
const char* const kSpecFields[] = {
    "loss_type",
    "importance_sampling_level",
    "importance_mode",
    "use_bias_correction_kl",
    "epsilon",
    "clip_high",
    "delta",
    "beta",
    "entropy_coef",
    "importance_min",
    "importance_cap",
    "off_policy_mask_threshold",
    "sapo_temperature_pos",
    "sapo_temperature_neg",
    "vespo_k_pos",
    "vespo_lambda_pos",
    "vespo_k_neg",
    "vespo_lambda_neg",
    "max_completion_length",
    "grad_scale",
};

template <class Real>
LossSpec<Real> read_spec(const std::vector<double>& v) {
  if (v.size() != std::size(kSpecFields)) throw std::invalid_argument("loss spec: wrong length");
  size_t k = 0;
  LossSpec<Real> s{};
  s.loss_type = LossType(int(v[k++]));
  s.level = Level(int(v[k++]));
  s.importance_mode = ImportanceMode(int(v[k++]));
  s.use_bias_correction_kl = v[k++] != 0;
  s.clip_low = Real(1 - v[k++]);
  const double high = v[k++];
  s.clip_high = Real(s.loss_type == LossType::kCispo ? high : 1 + high);
  const double delta = v[k++];
  s.delta = std::isnan(delta) ? std::numeric_limits<Real>::infinity() : Real(delta);
  s.beta = Real(v[k++]);
  s.entropy_coef = Real(v[k++]);
  s.importance_min = Real(v[k++]);
  s.importance_cap = Real(v[k++]);
  const double threshold = v[k++];
  s.has_off_policy_threshold = !std::isnan(threshold);
  s.off_policy_threshold = s.has_off_policy_threshold ? Real(threshold) : Real(0);
  s.sapo_temperature_pos = Real(v[k++]);
  s.sapo_temperature_neg = Real(v[k++]);
  s.vespo_k_pos = Real(v[k++]);
  s.vespo_lambda_pos = Real(v[k++]);
  s.vespo_k_neg = Real(v[k++]);
  s.vespo_lambda_neg = Real(v[k++]);
  const double length = v[k++];
  s.max_completion_length = std::isnan(length) ? Real(1) : Real(length);
  s.grad_scale = Real(v[k++]);
  return s;
}

template <class T>
T* pointer(const py::handle& address) {
  return reinterpret_cast<T*>(address.cast<uintptr_t>());
}

// (dtype, batch, length, vocab, logits, stride_b, stride_t, grad, stride_b, stride_t, ids, mask,
//  logps, entropy, lse, coef, entropy_coef), transform = (scale, softcap, temperature).
template <class Real>
RowParams<Real> read_rows(const py::tuple& t, const std::vector<double>& transform) {
  size_t k = 0;
  RowParams<Real> p{};
  p.dtype = DType(t[k++].cast<int>());
  p.batch = t[k++].cast<int64_t>();
  p.length = t[k++].cast<int64_t>();
  p.vocab = t[k++].cast<int64_t>();
  p.logits = pointer<void>(t[k++]);
  p.logits_stride_batch = t[k++].cast<int64_t>();
  p.logits_stride_position = t[k++].cast<int64_t>();
  p.grad = pointer<void>(t[k++]);
  p.grad_stride_batch = t[k++].cast<int64_t>();
  p.grad_stride_position = t[k++].cast<int64_t>();
  p.ids = pointer<const int64_t>(t[k++]);
  p.mask = pointer<const uint8_t>(t[k++]);
  p.logps = pointer<Real>(t[k++]);
  p.entropy = pointer<Real>(t[k++]);
  p.lse = pointer<Real>(t[k++]);
  p.coef = pointer<const Real>(t[k++]);
  p.entropy_coef = pointer<const Real>(t[k++]);
  p.transform = {Real(transform[0]), Real(transform[1]), Real(1 / transform[2])};
  return p;
}

// (batch, length, logps, entropy, mask, advantages, per token?, old, ref, sampling, importance,
//  its shape, num_items, entropy_threshold, loss, coef, entropy_coef, kl, metrics).
template <class Real>
PolicyParams<Real> read_policy(const py::tuple& t, const std::vector<double>& spec) {
  size_t k = 0;
  PolicyParams<Real> p{};
  p.batch = t[k++].cast<int64_t>();
  p.length = t[k++].cast<int64_t>();
  p.logps = pointer<const Real>(t[k++]);
  p.entropy = pointer<const Real>(t[k++]);
  p.mask = pointer<const uint8_t>(t[k++]);
  p.advantages = pointer<const Real>(t[k++]);
  p.advantages_per_token = t[k++].cast<bool>();
  p.old_logps = pointer<const Real>(t[k++]);
  p.ref_logps = pointer<const Real>(t[k++]);
  p.sampling_logps = pointer<const Real>(t[k++]);
  p.importance = pointer<const Real>(t[k++]);
  p.importance_shape = ImportanceShape(t[k++].cast<int>());
  p.num_items = pointer<const Real>(t[k++]);
  p.entropy_threshold = pointer<const Real>(t[k++]);
  p.loss = pointer<Real>(t[k++]);
  p.coef = pointer<Real>(t[k++]);
  p.entropy_coef = pointer<Real>(t[k++]);
  p.kl = pointer<Real>(t[k++]);
  p.metrics = pointer<Real>(t[k++]);
  p.spec = read_spec<Real>(spec);
  return p;
}

bool is_fp64(const py::tuple& rows) { return DType(rows[0].cast<int>()) == DType::kFloat64; }

using Numbers = std::vector<double>;

int64_t cpu_row_stats(const py::tuple& rows, const Numbers& transform, int threads) {
  const auto run = [&](auto real) {
    const auto p = read_rows<decltype(real)>(rows, transform);
    py::gil_scoped_release unlocked;
    return cpu::row_stats(p, threads);
  };
  return is_fp64(rows) ? run(double()) : run(float());
}

void cpu_row_gradient(const py::tuple& rows, const Numbers& transform, int threads) {
  const auto run = [&](auto real) {
    const auto p = read_rows<decltype(real)>(rows, transform);
    py::gil_scoped_release unlocked;
    cpu::row_gradient(p, threads);
  };
  is_fp64(rows) ? run(double()) : run(float());
}

int64_t cpu_row_loss(const py::tuple& rows, const Numbers& transform, const py::tuple& policy,
                     const Numbers& spec, int threads) {
  const auto run = [&](auto real) {
    const auto p = read_rows<decltype(real)>(rows, transform);
    const auto q = read_policy<decltype(real)>(policy, spec);
    py::gil_scoped_release unlocked;
    return cpu::row_loss(p, q, threads);
  };
  return is_fp64(rows) ? run(double()) : run(float());
}

void cpu_policy_loss(bool fp64, const py::tuple& policy, const Numbers& spec, int threads) {
  const auto run = [&](auto real) {
    const auto q = read_policy<decltype(real)>(policy, spec);
    py::gil_scoped_release unlocked;
    cpu::policy_loss(q, threads);
  };
  fp64 ? run(double()) : run(float());
}

void cpu_scale_rows(const py::tuple& rows, double factor, int threads) {
  const auto run = [&](auto real) {
    using Real = decltype(real);
    const auto p = read_rows<Real>(rows, {1, 0, 1});
    py::gil_scoped_release unlocked;
    cpu::scale_rows(p, Real(factor), threads);
  };
  is_fp64(rows) ? run(double()) : run(float());
}

// What plan.h decides for a device that need not be there.
py::dict cuda_plan(int architecture, int64_t shared_bytes, int dtype, int64_t vocab,
                   bool statistics_only) {
  const cuda::Device device{architecture, 0, shared_bytes, true};
  const cuda::RowPlan plan = statistics_only ? cuda::plan_row_stats(device, DType(dtype), vocab)
                                             : cuda::plan_row_loss(device, DType(dtype), vocab);
  py::dict out;
  out["route"] = plan.ring ? "ring" : "streaming";
  out["shares"] = plan.division.shares;
  out["share"] = plan.division.share;
  out["stages"] = plan.stages;
  out["stage_bytes"] = plan.stage_bytes;
  out["groups"] = plan.groups;
  return out;
}

// Whether the row kernel forms the sequences' terms itself, so that a call at token level is one
// launch.
bool cuda_forms_own_terms(const py::tuple& policy, const Numbers& spec) {
  return cuda::forms_own_terms(read_policy<float>(policy, spec));
}

#if defined(GRPO_CUDA)
cuda::Stream stream_of(uintptr_t handle) { return reinterpret_cast<cuda::Stream>(handle); }

void cuda_row_stats(int device, uintptr_t stream, const py::tuple& rows, const Numbers& transform) {
  cuda::row_stats(device, read_rows<float>(rows, transform), stream_of(stream));
}

void cuda_row_gradient(int device, uintptr_t stream, const py::tuple& rows,
                       const Numbers& transform) {
  cuda::row_gradient(device, read_rows<float>(rows, transform), stream_of(stream));
}

void cuda_policy_loss(int device, uintptr_t stream, const py::tuple& policy, const Numbers& spec,
                      uintptr_t workspace) {
  cuda::policy_loss(device, read_policy<float>(policy, spec), reinterpret_cast<void*>(workspace),
                    stream_of(stream));
}

void cuda_policy_terms(int device, uintptr_t stream, const py::tuple& policy, const Numbers& spec,
                       uintptr_t workspace) {
  cuda::policy_terms(device, read_policy<float>(policy, spec), reinterpret_cast<void*>(workspace),
                     stream_of(stream));
}

void cuda_row_loss(int device, uintptr_t stream, const py::tuple& rows, const Numbers& transform,
                   const py::tuple& policy, const Numbers& spec, uintptr_t workspace) {
  cuda::row_loss(device, read_rows<float>(rows, transform), read_policy<float>(policy, spec),
                 reinterpret_cast<void*>(workspace), stream_of(stream));
}

void cuda_scale_rows(int device, uintptr_t stream, const py::tuple& rows, uintptr_t factor) {
  cuda::scale_rows(device, read_rows<float>(rows, {1, 0, 1}), reinterpret_cast<float*>(factor),
                   stream_of(stream));
}

// (count, first, index, mask): ChunkRows.
cuda::ChunkRows read_chunk(const py::tuple& t) {
  return {t[0].cast<int32_t>(), t[1].cast<int64_t>(), pointer<const int64_t>(t[2]),
          pointer<const uint8_t>(t[3])};
}

// TargetParams, ProductParams, FoldParams and ScaleParams, field by field; dtypes come first.
void cuda_target_reference(int device, uintptr_t stream, const py::tuple& chunk,
                           const py::tuple& t) {
  size_t k = 0;
  cuda::TargetParams p{};
  p.dtype = DType(t[k++].cast<int>());
  p.rows = read_chunk(chunk);
  p.hidden_size = t[k++].cast<int32_t>();
  p.vocab = t[k++].cast<int32_t>();
  p.shard = pointer<const int64_t>(t[k++]);
  p.hidden = pointer<const void>(t[k++]);
  p.hidden_stride = t[k++].cast<int64_t>();
  p.gathered = pointer<void>(t[k++]);
  p.weight = pointer<const void>(t[k++]);
  p.weight_stride = t[k++].cast<int64_t>();
  p.bias = pointer<const float>(t[k++]);
  p.ids = pointer<const int64_t>(t[k++]);
  p.slope = t[k++].cast<float>();
  p.reference = pointer<float>(t[k++]);
  p.target = pointer<int32_t>(t[k++]);
  p.exponent = pointer<float>(t[k++]);
  cuda::target_reference(device, p, stream_of(stream));
}

void cuda_probability_product(int device, uintptr_t stream, const py::tuple& t) {
  size_t k = 0;
  cuda::ProductParams p{};
  p.dtype = DType(t[k++].cast<int>());
  p.rows = t[k++].cast<int32_t>();
  p.vocab = t[k++].cast<int32_t>();
  p.hidden_size = t[k++].cast<int32_t>();
  p.hidden = pointer<const void>(t[k++]);
  p.hidden_stride = t[k++].cast<int64_t>();
  p.weight = pointer<const void>(t[k++]);
  p.weight_stride = t[k++].cast<int64_t>();
  p.bias = pointer<const float>(t[k++]);
  p.reference = pointer<const float>(t[k++]);
  p.target = pointer<const int32_t>(t[k++]);
  p.slope = t[k++].cast<float>();
  p.probabilities = pointer<void>(t[k++]);
  p.stride = t[k++].cast<int64_t>();
  p.partials = pointer<float>(t[k++]);
  p.partials_stride = t[k++].cast<int64_t>();
  p.recentred = pointer<float>(t[k++]);
  p.recentred_stride = t[k++].cast<int64_t>();
  p.exponent = pointer<float>(t[k++]);
  cuda::probability_product(device, p, stream_of(stream));
}

void cuda_logits_product(int device, uintptr_t stream, const py::tuple& t) {
  size_t k = 0;
  cuda::LogitsProductParams p{};
  p.dtype = DType(t[k++].cast<int>());
  p.rows = t[k++].cast<int32_t>();
  p.vocab = t[k++].cast<int32_t>();
  p.hidden_size = t[k++].cast<int32_t>();
  p.hidden = pointer<const void>(t[k++]);
  p.hidden_stride = t[k++].cast<int64_t>();
  p.weight = pointer<const void>(t[k++]);
  p.weight_stride = t[k++].cast<int64_t>();
  p.bias = pointer<const float>(t[k++]);
  p.out_dtype = DType(t[k++].cast<int>());
  p.out = pointer<void>(t[k++]);
  p.out_stride = t[k++].cast<int64_t>();
  cuda::logits_product(device, p, stream_of(stream));
}

void cuda_head_gradient(int device, uintptr_t stream, const py::tuple& t) {
  size_t k = 0;
  cuda::HeadGradientParams p{};
  p.dtype = DType(t[k++].cast<int>());
  p.rows = t[k++].cast<int32_t>();
  p.vocab = t[k++].cast<int32_t>();
  p.hidden_size = t[k++].cast<int32_t>();
  p.left = pointer<const void>(t[k++]);
  p.left_stride = t[k++].cast<int64_t>();
  p.right = pointer<const void>(t[k++]);
  p.right_stride = t[k++].cast<int64_t>();
  p.upper = pointer<void>(t[k++]);
  p.lower = pointer<void>(t[k++]);
  p.first = t[k++].cast<bool>();
  p.last = t[k++].cast<bool>();
  cuda::head_gradient(device, p, stream_of(stream));
}

// `policy` is empty, or with `spec` what cuda_policy_terms has left in `workspace`.
void cuda_fold_partials(int device, uintptr_t stream, const py::tuple& chunk, const py::tuple& t,
                        const py::tuple& policy, const Numbers& spec, uintptr_t workspace) {
  size_t k = 0;
  cuda::FoldParams p{};
  p.dtype = DType(t[k++].cast<int>());
  p.rows = read_chunk(chunk);
  p.tiles = t[k++].cast<int32_t>();
  p.partials = pointer<const float>(t[k++]);
  p.partials_stride = t[k++].cast<int64_t>();
  p.recentred = pointer<const float>(t[k++]);
  p.recentred_stride = t[k++].cast<int64_t>();
  p.reference = pointer<const float>(t[k++]);
  p.exponent = pointer<const float>(t[k++]);
  p.target = pointer<const int32_t>(t[k++]);
  p.slope = t[k++].cast<float>();
  p.sums = pointer<float>(t[k++]);
  p.recentred_sums = pointer<float>(t[k++]);
  p.logps = pointer<float>(t[k++]);
  p.entropy = pointer<float>(t[k++]);
  p.factor = pointer<float>(t[k++]);
  p.residual = pointer<float>(t[k++]);
  p.probabilities = pointer<void>(t[k++]);
  p.stride = t[k++].cast<int64_t>();
  p.stored = t[k++].cast<int32_t>();
  p.vocab = t[k++].cast<int32_t>();
  p.rank = t[k++].cast<int32_t>();
  if (!policy.empty()) {
    p.policy = read_policy<float>(policy, spec);
    p.terms = cuda::terms_in(reinterpret_cast<void*>(workspace), p.policy);
  }
  cuda::fold_partials(device, p, stream_of(stream));
}

void cuda_scale_product(int device, uintptr_t stream, const py::tuple& chunk, const py::tuple& t) {
  size_t k = 0;
  cuda::ScaleParams p{};
  p.dtype = DType(t[k++].cast<int>());
  p.out_dtype = DType(t[k++].cast<int>());
  p.rows = read_chunk(chunk);
  p.hidden_size = t[k++].cast<int32_t>();
  p.product = pointer<const float>(t[k++]);
  p.factor = pointer<const float>(t[k++]);
  p.residual = pointer<const float>(t[k++]);
  p.target = pointer<const int32_t>(t[k++]);
  p.weight = pointer<const void>(t[k++]);
  p.weight_stride = t[k++].cast<int64_t>();
  p.out = pointer<void>(t[k++]);
  cuda::scale_product(device, p, stream_of(stream));
}

void cuda_scaled_hidden(int device, uintptr_t stream, const py::tuple& t) {
  size_t k = 0;
  cuda::ScaledHiddenParams p{};
  p.dtype = DType(t[k++].cast<int>());
  p.rows = t[k++].cast<int32_t>();
  p.hidden_size = t[k++].cast<int32_t>();
  p.hidden = pointer<const void>(t[k++]);
  p.hidden_stride = t[k++].cast<int64_t>();
  p.factor = pointer<const float>(t[k++]);
  p.out = pointer<void>(t[k++]);
  cuda::scaled_hidden(device, p, stream_of(stream));
}
#endif

}  // namespace
}  // namespace grpo

PYBIND11_MODULE(_C, m) {
  using namespace grpo;
  m.attr("LOSS_SPEC_FIELDS") =
      py::tuple(py::cast(std::vector<std::string>(std::begin(kSpecFields), std::end(kSpecFields))));
  m.attr("METRIC_NAMES") = py::tuple(
      py::cast(std::vector<std::string>(std::begin(kMetricNames), std::end(kMetricNames))));
  m.attr("VERSION") = GRPO_VERSION;
  m.def("cpu_isa", &cpu::active_isa);
  m.def("select_cpu_isa", &cpu::select_isa);
  m.def("cpu_row_stats", &cpu_row_stats);
  m.def("cpu_row_gradient", &cpu_row_gradient);
  m.def("cpu_row_loss", &cpu_row_loss);
  m.def("cpu_policy_loss", &cpu_policy_loss);
  m.def("cpu_scale_rows", &cpu_scale_rows);
  m.def("cuda_plan", &cuda_plan, py::arg("architecture"), py::arg("shared_bytes"), py::arg("dtype"),
        py::arg("vocab"), py::arg("statistics_only") = false);
  m.def("cuda_forms_own_terms", &cuda_forms_own_terms);
#if defined(GRPO_CUDA)
  m.attr("CUDA_ARCHITECTURES") = GRPO_CUDA_ARCHITECTURES;
  m.attr("CUDA_VERSION") = cuda::compiled_version();
  m.def("cuda_workspace_bytes", &cuda::workspace_bytes);
  m.def("select_cuda_route", &cuda::select_route);
  m.def("cuda_row_stats", &cuda_row_stats);
  m.def("cuda_row_gradient", &cuda_row_gradient);
  m.def("cuda_policy_loss", &cuda_policy_loss);
  m.def("cuda_policy_terms", &cuda_policy_terms);
  m.def("cuda_row_loss", &cuda_row_loss);
  m.def("cuda_scale_rows", &cuda_scale_rows);
  m.def("cuda_target_reference", &cuda_target_reference);
  m.def("cuda_probability_product", &cuda_probability_product);
  m.def("cuda_logits_product", &cuda_logits_product);
  m.def("cuda_head_gradient", &cuda_head_gradient);
  m.def("cuda_fold_partials", &cuda_fold_partials);
  m.def("cuda_scale_product", &cuda_scale_product);
  m.def("cuda_scaled_hidden", &cuda_scaled_hidden);
#if defined(GRPO_CUDA_HOPPER)
  m.attr("CUDA_HOPPER_PRODUCTS") = true;
#else
  m.attr("CUDA_HOPPER_PRODUCTS") = false;
#endif
#else
  m.attr("CUDA_ARCHITECTURES") = "";
  m.attr("CUDA_VERSION") = 0;
  m.attr("CUDA_HOPPER_PRODUCTS") = false;
#endif
}
