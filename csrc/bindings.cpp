// grpo_ext._C: a dict of addresses, sizes and numbers becomes the struct of a kernel call. Python
// checks arguments and allocates (grpo_ext/_ops/).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
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

// "a, b, c" of GRPO_FIELDS as interned strings. They live as long as the process.
std::vector<py::str> split_names(const std::string& joined) {
  std::vector<py::str> names;
  for (size_t at = 0; at < joined.size();) {
    const size_t comma = std::min(joined.find(',', at), joined.size());
    names.push_back(py::reinterpret_steal<py::str>(
        PyUnicode_InternFromString(joined.substr(at, comma - at).c_str())));
    at = comma + 2;
  }
  return names;
}
template <class Params>
const std::vector<py::str>& field_names() {
  static const auto* names = new std::vector<py::str>(split_names(Params::kFieldNames));
  return *names;
}

template <class T, class = void>
struct HasFields : std::false_type {};
template <class T>
struct HasFields<T, std::void_t<decltype(T::kFieldNames)>> : std::true_type {};

template <class Params>
Params read(py::handle from);

// An address, a number, or a struct in the struct (None: all zero). Sets Python's error indicator
// for anything else.
template <class T>
T read_value(PyObject* from) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(PyLong_AsVoidPtr(from));
  } else if constexpr (HasFields<T>::value) {
    return from == Py_None ? T{} : read<T>(from);
  } else if constexpr (std::is_integral_v<T> && !std::is_same_v<T, bool>) {
    const int64_t value = PyLong_AsLongLong(from);
    if (value != T(value)) PyErr_SetString(PyExc_OverflowError, "too large");
    return T(value);
  } else {
    return T(PyFloat_AsDouble(from));
  }
}

// From a dict with these fields and no others, or a tuple or list of their values in order.
template <class Params>
Params read(py::handle from) {
  const auto& names = field_names<Params>();
  const auto fail = [&](const std::string& why) {
    PyErr_Clear();
    throw std::invalid_argument("grpo_ext: " + why + " (the fields are " + Params::kFieldNames +
                                "); the extension and the package differ, reinstall it");
  };
  const bool by_name = PyDict_Check(from.ptr());
  if (!by_name && !PyList_Check(from.ptr()) && !PyTuple_Check(from.ptr()))
    fail(std::string(py::repr(from)) + " for a struct");
  if (py::len(from) != names.size())
    fail(std::to_string(py::len(from)) + " values for " + std::to_string(names.size()) + " fields");
  size_t k = 0;
  const auto fill = [&](auto& field) {
    PyObject* value = by_name ? PyDict_GetItemWithError(from.ptr(), names[k].ptr())
                              : PySequence_Fast_GET_ITEM(from.ptr(), k);
    if (value == nullptr) fail("no value for " + std::string(names[k]));
    field = read_value<std::decay_t<decltype(field)>>(value);
    if (PyErr_Occurred()) {
      PyErr_Clear();  // repr may run Python code
      fail(std::string(py::repr(value)) + " for " + std::string(names[k]));
    }
    ++k;
  };
  Params params{};
  params.with_fields([&](auto&... field) { (fill(field), ...); });
  return params;
}

template <class Run>
auto with_real(bool fp64, Run run) {
  return fp64 ? run(double()) : run(float());
}

bool is_fp64(const py::dict& rows) { return DType(rows["dtype"].cast<int>()) == DType::kFloat64; }

int64_t cpu_row_stats(const py::dict& rows, int threads) {
  return with_real(is_fp64(rows), [&](auto real) {
    const auto p = read<RowParams<decltype(real)>>(rows);
    py::gil_scoped_release unlocked;
    return cpu::row_stats(p, threads);
  });
}

void cpu_row_gradient(const py::dict& rows, int threads) {
  with_real(is_fp64(rows), [&](auto real) {
    const auto p = read<RowParams<decltype(real)>>(rows);
    py::gil_scoped_release unlocked;
    cpu::row_gradient(p, threads);
  });
}

int64_t cpu_row_loss(const py::dict& rows, const py::dict& policy, int threads) {
  return with_real(is_fp64(rows), [&](auto real) {
    const auto p = read<RowParams<decltype(real)>>(rows);
    const auto q = read<PolicyParams<decltype(real)>>(policy);
    py::gil_scoped_release unlocked;
    return cpu::row_loss(p, q, threads);
  });
}

void cpu_policy_loss(bool fp64, const py::dict& policy, int threads) {
  with_real(fp64, [&](auto real) {
    const auto q = read<PolicyParams<decltype(real)>>(policy);
    py::gil_scoped_release unlocked;
    cpu::policy_loss(q, threads);
  });
}

void cpu_scale_rows(const py::dict& rows, double factor, int threads) {
  with_real(is_fp64(rows), [&](auto real) {
    const auto p = read<RowParams<decltype(real)>>(rows);
    py::gil_scoped_release unlocked;
    cpu::scale_rows(p, decltype(real)(factor), threads);
  });
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

#if defined(GRPO_CUDA)
cuda::Stream stream_of(uintptr_t handle) { return reinterpret_cast<cuda::Stream>(handle); }

// An operation on one struct: (device, stream, dict) in Python.
template <class Params>
void define(py::module_& m, const char* name, void (*operation)(int, const Params&, cuda::Stream)) {
  m.def(name, [operation](int device, uintptr_t stream, const py::dict& params) {
    operation(device, read<Params>(params), stream_of(stream));
  });
}

void cuda_policy_loss(int device, uintptr_t stream, const py::dict& policy, uintptr_t workspace) {
  cuda::policy_loss(device, read<PolicyParams<float>>(policy), reinterpret_cast<void*>(workspace),
                    stream_of(stream));
}

// Returns where in the workspace the constants are.
uintptr_t cuda_sequence_constants(int device, uintptr_t stream, const py::dict& policy,
                                  uintptr_t workspace) {
  const auto p = read<PolicyParams<float>>(policy);
  cuda::compute_sequence_constants(device, p, reinterpret_cast<void*>(workspace),
                                   stream_of(stream));
  return reinterpret_cast<uintptr_t>(cuda::constants_in(reinterpret_cast<void*>(workspace), p));
}

void cuda_row_loss(int device, uintptr_t stream, const py::dict& rows, const py::dict& policy,
                   uintptr_t workspace) {
  cuda::row_loss(device, read<RowParams<float>>(rows), read<PolicyParams<float>>(policy),
                 reinterpret_cast<void*>(workspace), stream_of(stream));
}

void cuda_scale_rows(int device, uintptr_t stream, const py::dict& rows, uintptr_t factor) {
  cuda::scale_rows(device, read<RowParams<float>>(rows), reinterpret_cast<float*>(factor),
                   stream_of(stream));
}
#endif

}  // namespace
}  // namespace grpo

PYBIND11_MODULE(_C, m) {
  using namespace grpo;
  m.attr("LOSS_SPEC_FIELDS") = py::tuple(py::cast(field_names<LossSpec<float>>()));
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
  m.def("cuda_computes_constants_in_kernel", [](const py::dict& policy) {
    return cuda::computes_constants_in_kernel(read<PolicyParams<float>>(policy));
  });
#if defined(GRPO_CUDA)
  m.attr("CUDA_ARCHITECTURES") = GRPO_CUDA_ARCHITECTURES;
  m.attr("CUDA_VERSION") = cuda::compiled_version();
  m.def("cuda_workspace_bytes", &cuda::workspace_bytes);
  m.def("select_cuda_route", &cuda::select_route);
  define(m, "cuda_row_stats", &cuda::row_stats);
  define(m, "cuda_row_gradient", &cuda::row_gradient);
  m.def("cuda_policy_loss", &cuda_policy_loss);
  m.def("cuda_sequence_constants", &cuda_sequence_constants);
  m.def("cuda_row_loss", &cuda_row_loss);
  m.def("cuda_scale_rows", &cuda_scale_rows);
  define(m, "cuda_target_reference", &cuda::target_reference);
  define(m, "cuda_probability_product", &cuda::probability_product);
  define(m, "cuda_fold_partials", &cuda::fold_partials);
  define(m, "cuda_scale_product", &cuda::scale_product);
  define(m, "cuda_scaled_hidden", &cuda::scaled_hidden);
  define(m, "cuda_logits_product", &cuda::logits_product);
  define(m, "cuda_head_gradient", &cuda::head_gradient);
#else
  m.attr("CUDA_ARCHITECTURES") = "";
  m.attr("CUDA_VERSION") = 0;
#endif
#if defined(GRPO_CUDA_HOPPER)
  m.attr("CUDA_HOPPER_PRODUCTS") = true;
#else
  m.attr("CUDA_HOPPER_PRODUCTS") = false;
#endif
}
