// The CUDA backend's operations. They enqueue work on the given stream of the current device and
// never synchronise; failures to launch throw std::runtime_error.
#pragma once

#include "../common/row_params.h"

struct CUstream_st;

namespace grpo::cuda {

using Stream = CUstream_st*;

// CUDART_VERSION of the build, e.g. 13000.
int compiled_version();

// grad *= *factor, except that a factor of 1 reads and writes nothing.
void scale_rows(const RowParams<float>& rows, const float* factor, Stream stream);

}  // namespace grpo::cuda
