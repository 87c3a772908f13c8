#include "cuda/gemm_sm90/head_gradient.cuh"
#include "cuda/gemm_sm90/logits.cuh"

namespace grpo::cuda {
namespace {

constexpr int divide_up(int64_t a, int64_t b) { return int((a + b - 1) / b); }

TensorOperands operands(int64_t rows, int64_t columns, int64_t depth, bool rows_first) {
  TensorOperands o{};
  o.row_pairs = divide_up(rows, 2 * TensorTile::kRows);
  o.column_tiles = divide_up(columns, TensorTile::kColumns);
  o.depth_steps = divide_up(depth, TensorTile::kDepth);
  o.rows_first = rows_first;
  return o;
}

template <class T>
void launch_logits(int multiprocessors, const LogitsProductParams& p, Stream stream) {
  using Tile = TensorTile;
  TensorOperands o = operands(p.rows, p.vocab, p.hidden_size, true);
  o.left = tensor_map(p.hidden, p.rows, p.hidden_size, p.hidden_stride, Tile::kRows);
  o.right = tensor_map(p.weight, p.vocab, p.hidden_size, p.weight_stride, Tile::kColumns / 2);
  LogitsParams a{};
  a.bias = p.bias;
  a.rows = p.rows;
  a.columns = p.vocab;
  if (p.out_dtype == DType::kFloat32) {
    a.wide = static_cast<float*>(p.out);
    a.wide_stride = p.out_stride;
    launch_tensor_product<true, Logits<T, false>>(multiprocessors, o, a, stream);
  } else {
    a.rounded = tensor_map(p.out, p.rows, p.vocab, p.out_stride, BlockStore::kRows);
    launch_tensor_product<true, Logits<T, true>>(multiprocessors, o, a, stream);
  }
}

}  // namespace

void launch_logits_product(int multiprocessors, const LogitsProductParams& p, Stream stream) {
  if (p.dtype == DType::kFloat16)
    launch_logits<__half>(multiprocessors, p, stream);
  else
    launch_logits<__nv_bfloat16>(multiprocessors, p, stream);
}

void launch_head_gradient(int multiprocessors, const HeadGradientParams& p, Stream stream) {
  // Columns first: the chunk's rows of hidden states stay in L2, `left` is read once.
  TensorOperands o = operands(p.vocab, p.hidden_size, p.rows, false);
  o.left = tensor_map(p.left, p.rows, p.vocab, p.left_stride, TensorTile::kDepth);
  o.right = tensor_map(p.right, p.rows, p.hidden_size, p.right_stride, TensorTile::kDepth);
  PlaneSumParams s{};
  s.upper = tensor_map(p.upper, p.vocab, p.hidden_size, p.hidden_size, BlockStore::kRows);
  s.lower = tensor_map(p.lower, p.vocab, p.hidden_size, p.hidden_size, BlockStore::kRows);
  s.upper_before = tensor_map(p.upper, p.vocab, p.hidden_size, p.hidden_size, TensorTile::kRows);
  s.lower_before = tensor_map(p.lower, p.vocab, p.hidden_size, p.hidden_size, TensorTile::kRows);
  if (p.first)
    launch_tensor_product<false, PlaneSum<false, false>>(multiprocessors, o, s, stream);
  else if (p.last)
    launch_tensor_product<false, PlaneSum<true, true>>(multiprocessors, o, s, stream);
  else
    launch_tensor_product<false, PlaneSum<true, false>>(multiprocessors, o, s, stream);
}

}  // namespace grpo::cuda
