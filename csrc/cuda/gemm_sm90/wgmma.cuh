// PTX of sm_90a for matrix products, one instruction per function: tensor copies and warpgroup
// products.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace grpo::cuda::ptx {

// Lower or raise the registers of each thread of a warpgroup; all four warps call it.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Copy the box at (column, row) of a matrix to shared memory; completes on the mbarrier. Elements
// outside the matrix arrive as zeros.
__device__ __forceinline__ void tensor_load(uint32_t to, const void* map, int column, int row,
                                            uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
// Copy a box to every CTA of the cluster whose bit is set in `ctas`: to the same shared-memory
// offset in each, completing on the mbarrier at the same offset.
__device__ __forceinline__ void tensor_load_to_all(uint32_t to, const void* map, int column,
                                                   int row, uint32_t barrier, uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(ctas)
      : "memory");
}
// Copy shared memory to a box of a matrix, omitting elements outside of the matrix. Joins the
// thread's open group of bulk stores.
__device__ __forceinline__ void tensor_store(const void* map, int column, int row, uint32_t from) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
      "r"(column), "r"(row), "r"(from)
      : "memory");
}
// Wait until all groups but the last `kOpen` have read their source.
template <int kOpen>
__device__ __forceinline__ void bulk_wait_read_but() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kOpen) : "memory");
}

// Arrive on an mbarrier of a CTA of the cluster (address from map_to_rank). Use it only to signal
// that reads are complete: reads by the tensor cores, or by threads that have met at a named
// barrier. A release at cluster scope would be a memory barrier of the whole GPU, 500 cycles per
// stage.
__device__ __forceinline__ void mbarrier_arrive_remote(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Store four 8 x 8 matrices of 16-bit elements from the products' fragment layout to 16-byte rows:
// lane l passes the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(uint32_t row, uint32_t a, uint32_t b, uint32_t c,
                                               uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// Load four matrices: the inverse of store_matrices.
__device__ __forceinline__ void load_matrices(uint32_t row, uint32_t& a, uint32_t& b, uint32_t& c,
                                              uint32_t& d) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
               : "r"(row)
               : "memory");
}

// Make earlier writes to registers and shared memory visible to the warpgroup's next product.
__device__ __forceinline__ void product_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void product_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Wait until all groups of products but the last `kOpen` are complete.
template <int kOpen>
__device__ __forceinline__ void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kOpen) : "memory");
}

// Descriptor of an operand in shared memory: 128-byte swizzled blocks of 8 x 64 16-bit elements.
// K-major: `stride` bytes between blocks of 8 rows. MN-major: `stride` between blocks of 8 along K,
// `leading` between blocks of 64 along M or N.
__device__ __forceinline__ uint64_t operand(uint32_t address, uint32_t leading, uint32_t stride) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 |
         uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
}

#define GRPO_ACCUMULATORS(i)                                                                  \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7]), "+f"(d[i + 8]), "+f"(d[i + 9]), "+f"(d[i + 10]),        \
      "+f"(d[i + 11]), "+f"(d[i + 12]), "+f"(d[i + 13]), "+f"(d[i + 14]), "+f"(d[i + 15])

// d (64 x 256, fp32) = A (64 x 16) B (16 x 256) + (accumulate ? d : 0). kMajorA and kMajorB: 0 for
// K-major operands, 1 for M- or N-major ones. Element d[4 j + 2 i + c] of a thread is row
// 16 warp + 8 i + lane / 4, column 8 j + 2 (lane % 4) + c.
#define GRPO_PRODUCT_64X256X16(type)                                                               \
  asm volatile(                                                                                    \
      "{\n.reg .pred p;\n"                                                                         \
      "setp.ne.b32 p, %130, 0;\n"                                                                  \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                 \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                   \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "           \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "           \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "           \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "           \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "           \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "     \
      "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "       \
      "%125, %126, %127}, %128, %129, p, 1, 1, %131, %132;\n}"                                     \
      : GRPO_ACCUMULATORS(0), GRPO_ACCUMULATORS(16), GRPO_ACCUMULATORS(32), GRPO_ACCUMULATORS(48), \
        GRPO_ACCUMULATORS(64), GRPO_ACCUMULATORS(80), GRPO_ACCUMULATORS(96),                       \
        GRPO_ACCUMULATORS(112)                                                                     \
      : "l"(a), "l"(b), "r"(int(accumulate)), "n"(kMajorA), "n"(kMajorB))

template <int kMajorA, int kMajorB>
__device__ __forceinline__ void product_64x256x16(float (&d)[128], uint64_t a, uint64_t b,
                                                  bool accumulate, __nv_bfloat16) {
  GRPO_PRODUCT_64X256X16("bf16");
}
template <int kMajorA, int kMajorB>
__device__ __forceinline__ void product_64x256x16(float (&d)[128], uint64_t a, uint64_t b,
                                                  bool accumulate, __half) {
  GRPO_PRODUCT_64X256X16("f16");
}
#undef GRPO_PRODUCT_64X256X16
#undef GRPO_ACCUMULATORS

}  // namespace grpo::cuda::ptx
