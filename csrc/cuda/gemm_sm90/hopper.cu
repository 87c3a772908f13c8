// The doors to the kernels of sm_90a: whether this build has them and this device can run them.
#include "cuda/base/launch.h"
#include "cuda/gemm_sm90/products.h"
#include "cuda/probability/probability.h"

namespace grpo::cuda {

#if !defined(GRPO_CUDA_HOPPER)
namespace {
[[noreturn]] void missing(const char* operation) {
  throw std::invalid_argument(std::string("grpo_ext: ") + operation +
                              " is not in this build: rebuild for architecture 90");
}
}  // namespace
void launch_probability_product(int, const ProductParams&, Stream) {
  missing("probability_product");
}
void launch_logits_product(int, const LogitsProductParams&, Stream) { missing("logits_product"); }
void launch_head_gradient(int, const HeadGradientParams&, Stream) { missing("head_gradient"); }
#endif

namespace {

int hopper_multiprocessors(const char* operation, int device) {
  const Device& what = device_of(device);
  if (what.architecture != 90)
    throw std::invalid_argument(std::string("grpo_ext: ") + operation +
                                " runs on sm_90, this device is sm_" +
                                std::to_string(what.architecture));
  return what.multiprocessors;
}

}  // namespace

void probability_product(int device, const ProductParams& p, Stream stream) {
  const DeviceGuard guard(device);
  const int multiprocessors = hopper_multiprocessors("probability_product", device);
  if (p.rows > 0) launch_probability_product(multiprocessors, p, stream);
}

void logits_product(int device, const LogitsProductParams& p, Stream stream) {
  const DeviceGuard guard(device);
  const int multiprocessors = hopper_multiprocessors("logits_product", device);
  if (p.rows > 0) launch_logits_product(multiprocessors, p, stream);
}

void head_gradient(int device, const HeadGradientParams& p, Stream stream) {
  const DeviceGuard guard(device);
  const int multiprocessors = hopper_multiprocessors("head_gradient", device);
  if (p.first && p.last)
    throw std::invalid_argument("grpo_ext: head_gradient adds up several products, not one");
  if (p.rows > 0) launch_head_gradient(multiprocessors, p, stream);
}

}  // namespace grpo::cuda
