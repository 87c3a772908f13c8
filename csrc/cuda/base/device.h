// A CUDA device as the kernels' plans see it, and the stream that work goes to. No CUDA header.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace grpo::cuda {

using Stream = CUstream_st*;

struct Device {
  int architecture;  // 90 for sm_90
  int multiprocessors;
  int64_t shared_bytes;  // per block, opt-in
  bool has_ring;         // this build contains the ring kernel for the device
};

// Asks the driver once per device.
const Device& device_of(int index);

}  // namespace grpo::cuda
