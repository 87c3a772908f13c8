#include "cuda/gemm_sm90/probability_product.cuh"

namespace grpo::cuda {

void launch_probability_product(int multiprocessors, const ProductParams& p, Stream stream) {
  using Tile = TensorTile;
  TensorOperands operands{};
  operands.left = tensor_map(p.hidden, p.rows, p.hidden_size, p.hidden_stride, Tile::kRows);
  operands.right =
      tensor_map(p.weight, p.vocab, p.hidden_size, p.weight_stride, Tile::kColumns / 2);
  operands.row_pairs = (p.rows + 2 * Tile::kRows - 1) / (2 * Tile::kRows);
  operands.column_tiles = (p.vocab + Tile::kColumns - 1) / Tile::kColumns;
  operands.depth_steps = (p.hidden_size + Tile::kDepth - 1) / Tile::kDepth;
  operands.rows_first = true;  // the head is read once, hidden states stay in L2
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
    launch_tensor_product<true, Exponentials<true>>(multiprocessors, operands, e, stream);
  } else {
    launch_tensor_product<true, Exponentials<false>>(multiprocessors, operands, e, stream);
  }
}

}  // namespace grpo::cuda
