// Outer products, the gradients of an adapter: out [r, width] = scale * left^T right, from tensors with a token a row.
//
// A few rows of out by a depth of many tokens read `right` once and do little with it, so here the depth is cut into
// short pieces and all columns of a unit follow each other within one: memory is read along its rows. Both operands
// are copied as panels [depth][kStrip] (kernels/gemm-operands-inl.h) and multiplied in the tiles of kernels/gemm-inl.h.
//
// Every output is the sum of its pieces in rising order, and within a piece of its products in rising order: any number
// of threads gives the same bits.
#pragma once

#include "cpu/kernels/gemm-inl.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

constexpr int64_t kPieceWords = 32;  // of the depth: a piece of 64 columns stays in the first cache

int64_t outer_unit_bytes(int64_t columns) {
  const int64_t floats = 2 * kPanelFloats + kColumnGrain * rounded_up(columns, kStrip);
  return rounded_up(floats * int64_t{sizeof(float)}, 64);
}

// Columns [first, last) of `rows` rows of out, from `row` on; at most kColumnGrain rows.
template <typename T>
void outer_rows(const OuterJob& job, int64_t row, int64_t rows, int64_t first, int64_t last, float* scratch) {
  using Product = WordProduct<T>;
  constexpr int64_t kDepth = kPieceWords * Product::kElements;
  float* lefts = scratch;
  float* rights = lefts + kPanelFloats;
  float* all_sums = rights + kPanelFloats;
  GemmJob fetched{};
  fetched.dense = job.right;
  fetched.k = job.width;
  const int64_t fetches = ceil_div(rows, kMicroRows) * ceil_div(last - first, kStrip);
  for (int64_t begin = 0; begin < job.m; begin += kDepth) {
    const int64_t end = limited(begin + kDepth, job.m);
    const int64_t words = ceil_div(end - begin, Product::kElements);
    GradInput<T>::copy_dense(job.left, job.r, begin, end, row, row + rows, lefts);
    PieceFetcher<T> fetcher =
        GradInput<T>::fetcher(fetched, {end, limited(end + kDepth, job.m), 0, 0}, first, last, fetches);
    for (int64_t group = first; group < last; group += kColumnGrain) {
      const int64_t group_end = limited(last, group + kColumnGrain);
      GradInput<T>::copy_dense(job.right, job.width, begin, end, group, group_end, rights);
      for (int64_t column = group; column < group_end; column += kStrip) {
        float* sums = all_sums + (column - first) * rows;
        for (int64_t strip = 0; strip < rows; strip += kStrip) {  // of rows that share a panel
          const int64_t count = limited(kStrip, rows - strip);
          const int64_t tiles = ceil_div(count, kMicroRows);
          for (int64_t t = 0; t < tiles; ++t) {
            const int64_t from = strip + t * count / tiles;
            const int64_t height = strip + (t + 1) * count / tiles - from;
            fetcher.next();
            tile_of<Product, 1, kStrip>(height)(column_of(lefts, from), column_of(rights, column - group), words,
                                                begin > 0, sums + from * kStrip);
          }
        }
      }
    }
  }
  for (int64_t column = first; column < last; column += kStrip) {
    const float* sums = all_sums + (column - first) * rows;
    write_tile<T>(sums, rows, limited(kStrip, last - column), job.scale, nullptr, job.out + row * job.width + column,
                  job.width);
  }
}

template <typename T>
void outer_columns(const OuterJob& job, int64_t first, int64_t last, void* scratch) {
  for (int64_t row = 0; row < job.r; row += kColumnGrain) {
    outer_rows<T>(job, row, limited(kColumnGrain, job.r - row), first, last, static_cast<float*>(scratch));
  }
}

template <typename T>
constexpr GemmKernels kGemm = {gemm_product<T>, gemm_unit_bytes, gemm_makes_low, outer_columns<T>, outer_unit_bytes};

#if !defined(__AVX512BF16__)
constexpr GemmKernels kGemmBf16 = kGemm<Bf16>;
#endif

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
