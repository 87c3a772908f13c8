// The products' interface in every build: check the device and the build, then launch.
#include "cuda/base/launch.h"
#include "cuda/gemm_sm90/products.h"

namespace grpo::cuda {
namespace {

template <class Params>
void run(const char* operation, int device, const Params& p, Stream stream) {
  const std::string name = std::string("grpo_ext: ") + operation;
  const DeviceGuard guard(device);
  const Device& d = device_of(device);
  if (d.architecture != 90)
    throw std::invalid_argument(name + " runs on sm_90, this device is sm_" +
                                std::to_string(d.architecture));
  if (p.rows == 0) return;
#if defined(GRPO_CUDA_HOPPER)
  launch_product(d.multiprocessors, p, stream);
#else
  throw std::invalid_argument(name + " is not in this build: rebuild for architecture 90");
#endif
}

}  // namespace

void probability_product(int device, const ProductParams& p, Stream stream) {
  run("probability_product", device, p, stream);
}

void logits_product(int device, const LogitsProductParams& p, Stream stream) {
  run("logits_product", device, p, stream);
}

void head_gradient(int device, const HeadGradientParams& p, Stream stream) {
  if (p.first && p.last)
    throw std::invalid_argument(
        "grpo_ext: head_gradient got first and last for one chunk: use torch.mm for a single "
        "product");
  run("head_gradient", device, p, stream);
}

}  // namespace grpo::cuda
