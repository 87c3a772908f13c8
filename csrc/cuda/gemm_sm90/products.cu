// Choose each product's epilogue and launch it.
#include "cuda/gemm_sm90/head_gradient.cuh"
#include "cuda/gemm_sm90/launcher.cuh"
#include "cuda/gemm_sm90/logits.cuh"
#include "cuda/gemm_sm90/probability_product.cuh"

namespace grpo::cuda {
namespace {

template <class Epilogue>
void launch_forward(int multiprocessors, const typename Epilogue::Params& p, Stream stream) {
  // Rows first: the hidden states stay in L2, and the head is read once.
  launch_tensor_product<Epilogue>(multiprocessors, {p.rows, p.vocab, p.hidden_size, true},
                                  {p.hidden, p.hidden_stride}, {p.weight, p.weight_stride}, p,
                                  stream);
}

}  // namespace

void launch_product(int multiprocessors, const LogitsProductParams& product, Stream stream) {
  LogitsParams p{product};
  const bool half = p.dtype == DType::kFloat16;
  if (p.out_dtype == DType::kFloat32) {
    (half ? launch_forward<Logits<__half, false>>
          : launch_forward<Logits<__nv_bfloat16, false>>)(multiprocessors, p, stream);
  } else {
    p.rounded = tensor_map(p.out, p.rows, p.vocab, p.out_stride, BlockStore::kRows);
    (half ? launch_forward<Logits<__half, true>>
          : launch_forward<Logits<__nv_bfloat16, true>>)(multiprocessors, p, stream);
  }
}

void launch_product(int multiprocessors, const ProductParams& product, Stream stream) {
  ExponentialsParams p{product};
  if (p.probabilities) {
    p.stored = tensor_map(p.probabilities, p.rows, p.vocab, p.stride, BlockStore::kRows);
    launch_forward<Exponentials<true>>(multiprocessors, p, stream);
  } else {
    launch_forward<Exponentials<false>>(multiprocessors, p, stream);
  }
}

void launch_product(int multiprocessors, const HeadGradientParams& p, Stream stream) {
  const auto plane = [&](void* data, int box_rows) {
    return tensor_map(data, p.vocab, p.hidden_size, p.hidden_size, box_rows);
  };
  const PlaneSumParams e{plane(p.upper, BlockStore::kRows), plane(p.lower, BlockStore::kRows),
                         plane(p.upper, TensorTile::kRows), plane(p.lower, TensorTile::kRows)};
  const auto launcher = p.first  ? launch_tensor_product<PlaneSum<false, false>>
                        : p.last ? launch_tensor_product<PlaneSum<true, true>>
                                 : launch_tensor_product<PlaneSum<true, false>>;
  // Columns first: the chunk's hidden states stay in L2, and `left` is read once.
  launcher(multiprocessors, {p.vocab, p.hidden_size, p.rows, false}, {p.left, p.left_stride},
           {p.right, p.right_stride}, e, stream);
}

}  // namespace grpo::cuda
