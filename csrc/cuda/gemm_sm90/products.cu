// Each product's epilogue, its parameters and its variants.
#include "cuda/gemm_sm90/head_gradient.cuh"
#include "cuda/gemm_sm90/launcher.cuh"
#include "cuda/gemm_sm90/logits.cuh"
#include "cuda/gemm_sm90/probability_product.cuh"

namespace grpo::cuda {
namespace {

template <class Epilogue, class Params>
void launch_forward(int multiprocessors, const Params& p, const typename Epilogue::Params& e,
                    Stream stream) {
  // Rows first: the head is read once, hidden states stay in L2.
  launch_tensor_product<Epilogue>(multiprocessors, {p.rows, p.vocab, p.hidden_size, true},
                                  {p.hidden, p.hidden_stride}, {p.weight, p.weight_stride}, e,
                                  stream);
}

template <class T>
void launch_logits(int multiprocessors, const LogitsProductParams& p, Stream stream) {
  LogitsParams e{};
  e.bias = p.bias;
  e.rows = p.rows;
  e.columns = p.vocab;
  if (p.out_dtype == DType::kFloat32) {
    e.wide = static_cast<float*>(p.out);
    e.wide_stride = p.out_stride;
    launch_forward<Logits<T, false>>(multiprocessors, p, e, stream);
  } else {
    e.rounded = tensor_map(p.out, p.rows, p.vocab, p.out_stride, BlockStore::kRows);
    launch_forward<Logits<T, true>>(multiprocessors, p, e, stream);
  }
}

}  // namespace

void launch_product(int multiprocessors, const LogitsProductParams& p, Stream stream) {
  if (p.dtype == DType::kFloat16)
    launch_logits<__half>(multiprocessors, p, stream);
  else
    launch_logits<__nv_bfloat16>(multiprocessors, p, stream);
}

void launch_product(int multiprocessors, const ProductParams& p, Stream stream) {
  ExponentialsParams e{};
  e.rows = p.rows;
  e.columns = p.vocab;
  e.reference = p.reference;
  e.target = p.target;
  e.bias = p.bias;
  e.slope = p.slope;
  e.partials = reinterpret_cast<float2*>(p.partials);
  e.partials_stride = p.partials_stride;
  e.recentred = p.recentred;
  e.recentred_stride = p.recentred_stride;
  e.exponent = p.exponent;
  if (p.probabilities) {
    e.probabilities = tensor_map(p.probabilities, p.rows, p.vocab, p.stride, BlockStore::kRows);
    launch_forward<Exponentials<true>>(multiprocessors, p, e, stream);
  } else {
    launch_forward<Exponentials<false>>(multiprocessors, p, e, stream);
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
  // Columns first: the chunk's rows of hidden states stay in L2, `left` is read once.
  launcher(multiprocessors, {p.vocab, p.hidden_size, p.rows, false}, {p.left, p.left_stride},
           {p.right, p.right_stride}, e, stream);
}

}  // namespace grpo::cuda
