// The driver encodes the descriptors. Its function is looked up at run time: the extension must
// also load without a driver.
#include <cudaTypedefs.h>

#include "cuda/base/check.h"
#include "cuda/gemm_sm90/tensor_map.h"

namespace grpo::cuda {
namespace {

PFN_cuTensorMapEncodeTiled_v12000 find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  GRPO_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                   cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess)
    throw std::runtime_error(
        "grpo_ext: the driver lacks cuTensorMapEncodeTiled: update the NVIDIA driver");
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

}  // namespace

CUtensorMap tensor_map(const void* matrix, int64_t rows, int64_t columns, int64_t stride,
                       int box_rows) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = find_encoder();
  CUtensorMap map{};
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)};
  const cuuint64_t strides[1] = {cuuint64_t(stride) * 2};
  const cuuint32_t box[2] = {64, cuuint32_t(box_rows)}, element_strides[2] = {1, 1};
  const CUresult status =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(matrix), sizes, strides,
             box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::invalid_argument(
        "grpo_ext: the copy engine rejects a matrix of " + std::to_string(rows) + " x " +
        std::to_string(columns) + " with rows " + std::to_string(stride) +
        " elements apart: the matrix and each row must start at multiples of 16 bytes (CUresult " +
        std::to_string(int(status)) + ")");
  return map;
}

}  // namespace grpo::cuda
