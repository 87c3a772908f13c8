// The Hopper product whose epilogue exponentiates and sums; sm_90a, CUTLASS 3.x collectives.
//
// The epilogue is one visitor of ours, `Exponentials`: five instructions per element beside the
// exponential itself, whose rate (16 per cycle and SM) is the floor: 2048 cycles of a 128 x 256
// tile that takes 16,000 at H = 1024.
#pragma once

#include <cute/tensor.hpp>
#include <stdexcept>
#include <string>

#include "check.h"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "probability.h"
#include "ptx.cuh"

namespace grpo::cuda {

namespace fusion = cutlass::epilogue::fusion;

// Accumulators -> E in Element. Sums over the tile's columns, in an order that depends on nothing
// but the tile: a thread adds its columns in order, four lanes share a row.
template <class CtaTile, class Element>
struct Exponentials {
  static constexpr int kColumns = cute::size<1>(CtaTile{});

  struct SharedStorage {
    alignas(16) float column_term[kColumns];
  };
  struct Arguments {
    const float* reference;
    const int32_t* target;
    const float* bias;
    float slope;
    float2* partials;  // [tiles, rows]
    int64_t partials_stride;
    float* exponent;
  };
  using Params = Arguments;
  using ElementAux = Element;  // what the epilogue would store, also where it does not

  template <class Shape>
  static constexpr Params to_underlying_arguments(Shape const&, Arguments const& a, void*) {
    return a;
  }
  template <class Shape>
  static bool can_implement(Shape const&, Arguments const&) {
    return true;
  }
  template <class Shape>
  static size_t get_workspace_size(Shape const&, Arguments const&) {
    return 0;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(Shape const&, Arguments const&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE Exponentials() {}
  CUTLASS_HOST_DEVICE Exponentials(Params const& p, SharedStorage const& shared)
      : params(&p), column_term(const_cast<float*>(shared.column_term)) {}

  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }
  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(
      fusion::detail::ProducerLoadArgs<Args...> const&) {
    return fusion::detail::EmptyProducerLoadCallbacks{};
  }

  // Coordinates: `coords(element)` is (row, column) relative to the thread's first element, known
  // at compile time; `row0`, `column0` are that element's within the matrix and within the tile.
  // Rowwise tensors have a slot per row that the thread touches: their columns have stride 0.
  template <class Coords, class Slots, class Sums>
  struct Callbacks : fusion::detail::EmptyConsumerStoreCallbacks {
    Params const& params;
    float* column_term;
    Coords coords;
    Slots slot_rows;  // row of each slot, relative to the thread's first
    Sums reference, sum, weighted, target;
    int rows, columns;  // of the matrix
    int row0, column0, tile, thread;
    bool add_term;    // a bias, or columns beyond the vocabulary
    bool has_target;  // one of the thread's rows has its target in this tile

    CUTLASS_DEVICE Callbacks(Params const& p, float* term, Coords c, Slots s, Sums sums, int m,
                             int n, int first_row, int first_column, int tile_n, int thread_idx)
        : params(p),
          column_term(term),
          coords(c),
          slot_rows(s),
          reference(sums),
          sum(sums),
          weighted(sums),
          target(sums),
          rows(m),
          columns(n),
          row0(first_row),
          column0(first_column),
          tile(tile_n),
          thread(thread_idx),
          add_term(p.bias != nullptr || (tile_n + 1) * kColumns > n),
          has_target(false) {}

    CUTLASS_DEVICE bool begin_sync_needed() const { return add_term; }

    CUTLASS_DEVICE void begin() {
      cute::fill(sum, 0.f);
      cute::fill(weighted, 0.f);
      cute::Tensor own_reference = cute::filter_zeros(reference);
      cute::Tensor own_target = cute::filter_zeros(target);
      CUTLASS_PRAGMA_UNROLL
      for (int s = 0; s < cute::size(slot_rows); ++s) {
        const int row = row0 + cute::get<0>(slot_rows(s));
        float r = 0.f;
        int t = -1;
        if (row < rows) {
          r = __ldg(params.reference + row);
          t = __ldg(params.target + row) - tile * kColumns;
        }
        own_reference(s) = r;
        own_target(s) = __int_as_float(t);
        has_target |= t >= 0 && t < kColumns;
      }
      if (!add_term) return;
      const int64_t first = int64_t(tile) * kColumns;
      for (int c = thread; c < kColumns; c += kThreads) {
        float term = kLowestExponent;
        if (first + c < columns)
          term = params.bias ? fmaxf(params.bias[first + c] * params.slope, kLowestExponent) : 0.f;
        column_term[c] = term;
      }
    }

    template <class Accumulator, int kCount>
    CUTLASS_DEVICE auto visit(cutlass::Array<Accumulator, kCount> const& z, int v, int m, int n) {
      auto at = coords(cute::_, cute::_, cute::_, m, n);
      auto ref = reference(cute::_, cute::_, cute::_, m, n);
      float t[kCount];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kCount; ++i) t[i] = fmaf(z[i], params.slope, -ref(v * kCount + i));
      if (add_term) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kCount; ++i)
          t[i] += column_term[column0 + cute::get<1>(at(v * kCount + i))];
      }
      if (has_target) {
        auto own = target(cute::_, cute::_, cute::_, m, n);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kCount; ++i) {
          const auto place = at(v * kCount + i);
          if (column0 + cute::get<1>(place) == __float_as_int(own(v * kCount + i))) {
            params.exponent[row0 + cute::get<0>(place)] = t[i];
            t[i] = kLowestExponent;
          }
        }
      }
      auto s = sum(cute::_, cute::_, cute::_, m, n);
      auto w = weighted(cute::_, cute::_, cute::_, m, n);
      cutlass::Array<float, kCount> e;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kCount; ++i) {
        t[i] = ptx::min_nan(t[i], kGreatestExponent);
        e[i] = ptx::exp2(t[i]);
        s(v * kCount + i) += e[i];
        w(v * kCount + i) = fmaf(e[i], t[i], w(v * kCount + i));
      }
      return cutlass::NumericArrayConverter<Element, float, kCount>{}(e);
    }

    CUTLASS_DEVICE void end() {
      cute::Tensor own_sum = cute::filter_zeros(sum);
      cute::Tensor own_weighted = cute::filter_zeros(weighted);
      CUTLASS_PRAGMA_UNROLL
      for (int s = 0; s < cute::size(slot_rows); ++s) {
        float2 both = {own_sum(s), own_weighted(s)};
        CUTLASS_PRAGMA_UNROLL
        for (int o = 1; o < 4; o *= 2) {
          both.x += __shfl_xor_sync(~0u, both.x, o);
          both.y += __shfl_xor_sync(~0u, both.y, o);
        }
        const int row = row0 + cute::get<0>(slot_rows(s));
        if ((thread & 3) == 0 && row < rows)
          params.partials[int64_t(tile) * params.partials_stride + row] = both;
      }
    }
  };

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      fusion::detail::ConsumerStoreArgs<Args...> const& args) {
    using namespace cute;
    auto [M, N, K, L] = args.problem_shape_mnkl;
    auto [m, n, k, l] = args.tile_coord_mnkl;
    // A tile whose columns all lie on one another: partitioned like the accumulators, it shows
    // which elements of the thread share a row.
    auto rowwise = make_layout(take<0, 2>(CtaTile{}), Stride<_1, _0>{});
    auto of_thread = fusion::sm90_partition_for_epilogue<kReferenceSource>(
        make_tensor(make_gmem_ptr(static_cast<float const*>(nullptr)), rowwise), args.epi_tile,
        args.tiled_copy, args.thread_idx);
    Tensor slots = make_tensor_like<float>(of_thread);
    Tensor slot_rows = filter_zeros(args.tCcD, of_thread.stride());
    // residue: what remains of the matrix from the thread's first element on.
    const int row0 = M - get<0>(args.residue_tCcD);
    const int column0 = N - get<1>(args.residue_tCcD) - n * kColumns;
    return Callbacks<decltype(args.tCcD), decltype(slot_rows), decltype(slots)>(
        *params, column_term, args.tCcD, slot_rows, slots, M, N, row0, column0, n, args.thread_idx);
  }

  Params const* params;
  float* column_term;

 private:
  // Threads that share a tile: a warpgroup per 64 rows.
  static constexpr int kThreads = cute::size<0>(CtaTile{}) / 64 * 128;
};

template <class Element, bool kStore, int kRows, bool kTogether>
struct Product {
  using Tile = cute::Shape<cute::Int<kRows>, cute::Int<kTileColumns>, cute::_64>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
  using Row = cutlass::layout::RowMajor;
  using Column = cutlass::layout::ColumnMajor;
  using Output = std::conditional_t<kStore, Element, void>;
  using EpilogueSchedule =
      std::conditional_t<kTogether, cutlass::epilogue::TmaWarpSpecializedCooperative,
                         cutlass::epilogue::TmaWarpSpecialized>;
  using MainSchedule =
      std::conditional_t<kTogether, cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                         cutlass::gemm::KernelTmaWarpSpecializedPingpong>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, Row, 8, Output, Row, 8,
      EpilogueSchedule, Exponentials<Tile, Element>>::CollectiveOp;
  using Main = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, Row, 8, Element, Column, 8,
      float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<int(
          sizeof(typename Epilogue::SharedStorage))>,
      MainSchedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Main,
                                                      Epilogue, cutlass::gemm::PersistentScheduler>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static void run(int multiprocessors, const ProductParams& p, Stream stream) {
    typename Gemm::Arguments a{};
    a.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    a.problem_shape = {p.rows, p.vocab, p.hidden_size, 1};
    a.mainloop.ptr_A = static_cast<const Element*>(p.hidden);
    a.mainloop.dA = {p.hidden_stride, cute::_1{}, 0};
    a.mainloop.ptr_B = static_cast<const Element*>(p.weight);
    a.mainloop.dB = {p.weight_stride, cute::_1{}, 0};
    a.epilogue.thread = {
        p.reference,       p.target,  p.bias, p.slope, reinterpret_cast<float2*>(p.partials),
        p.partials_stride, p.exponent};
    if constexpr (kStore) {
      a.epilogue.ptr_D = static_cast<Element*>(p.probabilities);
      a.epilogue.dD = {p.stride, cute::_1{}, 0};
    }
    a.hw_info.sm_count = multiprocessors;
    using Raster = decltype(a.scheduler.raster_order);
    a.scheduler.raster_order = p.raster == 0   ? Raster::Heuristic
                               : p.raster == 1 ? Raster::AlongM
                                               : Raster::AlongN;
    a.scheduler.max_swizzle_size = p.swizzle;
    // can_implement would ask for a vocabulary that is a multiple of 8. The descriptors need that
    // of strides only, and these are checked: the last columns of a tile are cut off by the copy.
    Gemm gemm;
    cutlass::Status status = gemm.initialize(a, nullptr, stream);
    if (status == cutlass::Status::kSuccess) status = gemm.run(stream);
    if (status != cutlass::Status::kSuccess)
      throw std::runtime_error(std::string("grpo_ext: probability_product of ") +
                               std::to_string(p.rows) + " x " + std::to_string(p.hidden_size) +
                               " by a vocabulary of " + std::to_string(p.vocab) + ": " +
                               cutlass::cutlassGetStatusString(status) + " (" +
                               cudaGetErrorString(cudaGetLastError()) + ")");
  }
};

}  // namespace grpo::cuda
