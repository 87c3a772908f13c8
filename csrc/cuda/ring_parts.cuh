// What the persistent kernels have in common: waiting, walking over rows, filling stages.
#pragma once

#include "row_math.cuh"
#include "rows.cuh"

namespace grpo::cuda {

constexpr uint32_t kBulkBytes = 16384;
constexpr uint32_t kNoRow = ~0u;

// Until the phase of this parity is over. Warps that wait long do not poll at full speed: they
// would take a fifth of the instruction slots.
__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait(ptx::shared_address(barrier), parity)) {
  }
}
__device__ __forceinline__ void wait_patiently(uint64_t* barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait(ptx::shared_address(barrier), parity)) __nanosleep(64);
}
// Whether it is over, the same answer for the whole warp.
__device__ __forceinline__ bool is_over(uint64_t* barrier, uint32_t parity) {
  return __all_sync(~0u, ptx::mbarrier_test_wait(ptx::shared_address(barrier), parity));
}

// The rows of one cluster or CTA: every `step`-th, with the masks of 32 of them read ahead.
class RowCursor {
 public:
  __device__ RowCursor(const uint8_t* mask, uint32_t count, uint32_t first, uint32_t step)
      : mask_(mask), row_(first), step_(step), count_(count) {
    ahead_ = peek(first + (threadIdx.x & 31) * step_);
    refill();
  }
  __device__ bool more() const { return row_ < count_; }
  __device__ uint32_t row() const { return row_; }
  __device__ bool live() const { return window_ >> at_ & 1; }
  __device__ void advance() {
    row_ += step_;
    if (++at_ == 32) refill();
  }

 private:
  __device__ bool peek(uint32_t row) const { return row < count_ && (!mask_ || mask_[row]); }
  __device__ void refill() {
    window_ = __ballot_sync(~0u, ahead_);
    at_ = 0;
    ahead_ = peek(row_ + (32 + (threadIdx.x & 31)) * step_);
  }
  const uint8_t* mask_;
  uint32_t row_, step_, count_;
  uint32_t window_;
  int at_;
  bool ahead_;
};

// A place in the ring, moved on row by row.
struct RingPlace {
  int stage;
  uint32_t lap;
  __device__ __forceinline__ void advance(int rows, int stages) {
    stage += rows;
    if (stage >= stages) stage -= stages, ++lap;
  }
};

// The place in stage number `stage` of the 16-byte block that `from` lies in.
template <class T>
__device__ __forceinline__ unsigned char* place_in_stage(unsigned char* stages, int stage_bytes,
                                                         int stage, const T* from) {
  const int in_line = int(reinterpret_cast<uintptr_t>(from)) & (kStageLine - 16);
  return stages + stage * stage_bytes + kStageLine + in_line;
}

// Whole 16-byte blocks: up to 15 bytes of the neighbours on either side come along. `policy`: none,
// or one for the L2 cache.
template <class T, class... Policy>
__device__ __forceinline__ void load_share(const T* logits, int length, unsigned char* in_stage,
                                           uint32_t full, Policy... policy) {
  const char* from = reinterpret_cast<const char*>(logits);
  const uint32_t skip = uint32_t(reinterpret_cast<uintptr_t>(from) & 15);
  const uint32_t total = length > 0 ? (skip + length * uint32_t(sizeof(T)) + 15) / 16 * 16 : 0;
  const uint32_t to = ptx::shared_address(in_stage);
  ptx::mbarrier_arrive_expect(full, total);
  for (uint32_t o = 0; o < total; o += kBulkBytes)
    ptx::bulk_load(to + o, from - skip + o, min(kBulkBytes, total - o), full, policy...);
}

}  // namespace grpo::cuda
