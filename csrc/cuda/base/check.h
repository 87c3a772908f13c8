// Turn CUDA return codes into C++ exceptions; pybind11 turns those into Python's.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define GRPO_CUDA_CHECK(call) ::grpo::cuda::check((call), #call, __FILE__, __LINE__)

namespace grpo::cuda {

inline void check(cudaError_t status, const char* call, const char* file, int line) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("grpo_ext: ") + call +
                           " failed: " + cudaGetErrorString(status) + " (" + file + ":" +
                           std::to_string(line) + ")");
}

}  // namespace grpo::cuda
