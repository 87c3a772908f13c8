// Shared by the persistent kernels: waiting, iterating over rows, filling stages.
#pragma once

#include "cuda/rows/row_math.cuh"
#include "cuda/rows/rows.cuh"

namespace grpo::cuda {

constexpr uint32_t kBulkBytes = 16384;
constexpr uint32_t kNoRow = ~0u;

// Wait until the phase of this parity is complete. Warps with long waits back off: polling at full
// speed takes a fifth of the instruction slots.
__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait(ptx::shared_address(barrier), parity)) {
  }
}
__device__ __forceinline__ void wait_with_backoff(uint64_t* barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait(ptx::shared_address(barrier), parity)) __nanosleep(64);
}
// Test a phase without waiting; all lanes of the warp get the same answer.
__device__ __forceinline__ bool phase_is_complete(uint64_t* barrier, uint32_t parity) {
  return __all_sync(~0u, ptx::mbarrier_test_wait(ptx::shared_address(barrier), parity));
}

// Iterates over the rows of one cluster or CTA, number `first` of `step`, in ascending order. Each
// gets every `step`-th unmasked row, which balances the work. Each also gets every `step`-th masked
// row; the last cluster gets the first of them. A warp reads the mask in windows of 32 rows and
// prefetches the next 128 rows.
class RowCursor {
 public:
  __device__ RowCursor(const uint8_t* mask, uint32_t count, uint32_t first, uint32_t step)
      : mask_(mask),
        count_(count),
        step_(step),
        row_(first),
        next_unmasked_(first),
        next_masked_(step - 1 - first) {
    if (!mask_) return;
    for (uint32_t i = 0; i < 32; i += step) every_step_ |= 1u << i;
    prefetch(0);
    move_to_next_row();
  }
  __device__ bool more() const { return row_ < count_; }
  __device__ uint32_t row() const { return row_; }
  __device__ bool is_unmasked() const { return unmasked_ >> (row_ & 31) & 1; }
  __device__ void advance() {
    if (!mask_) {
      row_ += step_;
    } else {
      unvisited_ &= unvisited_ - 1;
      move_to_next_row();
    }
  }

 private:
  static constexpr int kPrefetchedWindows = 4;

  // Move to this cluster's next row, in this window or a later one.
  __device__ void move_to_next_row() {
    while (unvisited_ == 0) {
      window_ += 32;
      if (window_ >= count_) {
        row_ = count_;
        return;
      }
      open_window();
    }
    row_ = window_ + __ffs(unvisited_) - 1;
  }
  __device__ void open_window() {
    const uint32_t lane = threadIdx.x & 31, index = window_ / 32 % kPrefetchedWindows;
    if (index == 0) {
      masks_ = 0;
#pragma unroll
      for (int i = 0; i < kPrefetchedWindows; ++i) masks_ |= uint32_t(prefetched_[i] != 0) << i;
      prefetch(window_ + 32 * kPrefetchedWindows);
    }
    const bool unmasked = masks_ >> index & 1;
    unmasked_ = __ballot_sync(~0u, unmasked);
    const uint32_t below = __popc(unmasked_ & ((1u << lane) - 1)),
                   unmasked_count = __popc(unmasked_);
    const uint32_t rows_after_next =
        unmasked ? below - next_unmasked_ : lane - below - next_masked_;
    unvisited_ = __ballot_sync(~0u, window_ + lane < count_ && rows_after_next < 32 &&
                                        every_step_ >> (rows_after_next & 31) & 1);
    next_unmasked_ += step_ * __popc(unvisited_ & unmasked_) - unmasked_count;
    next_masked_ += step_ * __popc(unvisited_ & ~unmasked_) - (32 - unmasked_count);
  }
  __device__ void prefetch(uint32_t from) {
#pragma unroll
    for (int i = 0; i < kPrefetchedWindows; ++i) {
      const uint32_t row = from + 32 * i + (threadIdx.x & 31);
      prefetched_[i] = row < count_ ? mask_[row] : 0;
    }
  }
  const uint8_t* mask_;
  uint32_t count_, step_, row_;
  uint32_t window_ = 0u - 32;             // first row of the window
  uint32_t unvisited_ = 0;                // bits: this cluster's rows of the window still to visit
  uint32_t unmasked_ = ~0u;               // bits: unmasked rows of the window
  uint32_t next_unmasked_, next_masked_;  // rows of each kind to skip from the next window on
  uint32_t every_step_ = 0;               // bits 0, step, 2 step, ...
  uint32_t masks_ = 0;                    // this lane's mask, a bit for each prefetched window
  uint8_t prefetched_[kPrefetchedWindows];
};

// A stage of the ring, and the number of completed laps around it.
struct RingPlace {
  int stage;
  uint32_t lap;
  __device__ __forceinline__ void advance(int rows, int stages) {
    stage += rows;
    if (stage >= stages) stage -= stages, ++lap;
  }
};

// Address, within a stage, of the 16-byte block that contains `from`.
template <class T>
__device__ __forceinline__ unsigned char* place_in_stage(unsigned char* stages, int stage_bytes,
                                                         int stage, const T* from) {
  const int in_line = int(reinterpret_cast<uintptr_t>(from)) & (kStageLine - 16);
  return stages + stage * stage_bytes + kStageLine + in_line;
}

// Copy a share into a stage in whole 16-byte blocks, with up to 15 bytes of the neighbours on
// either side. `policy`: optional L2 cache policy.
template <class T, class... Policy>
__device__ __forceinline__ void load_share(const T* logits, int length, unsigned char* in_stage,
                                           uint32_t full, Policy... policy) {
  const char* from = reinterpret_cast<const char*>(logits);
  const uint32_t lead_bytes = uint32_t(reinterpret_cast<uintptr_t>(from) & 15);
  const uint32_t total =
      length > 0 ? (lead_bytes + length * uint32_t(sizeof(T)) + 15) / 16 * 16 : 0;
  const uint32_t to = ptx::shared_address(in_stage);
  ptx::mbarrier_arrive_expect(full, total);
  for (uint32_t o = 0; o < total; o += kBulkBytes)
    ptx::bulk_load(to + o, from - lead_bytes + o, min(kBulkBytes, total - o), full, policy...);
}

}  // namespace grpo::cuda
