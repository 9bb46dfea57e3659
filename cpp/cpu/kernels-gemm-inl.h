// Products of activations with a 4-bit or a dense weight, W x and W^T x alike, in tiles of fp32 sums.
//
// y [m, columns] = a [m, depth] b [depth, columns], where b is W^T (forward) or W (input gradient), followed by the
// adapter's r rows (kernels-gemm-operands-inl.h). The depth is cut into spans. For each span the rows of a are copied
// to a packed block, padded with zeros and widened to words; the columns of b are decoded, or copied from a dense W, a
// panel of kStrip at a time, [depth][kStrip], just before their use (Goto and van de Geijn, "Anatomy of
// high-performance matrix multiplication", 2008). A tile of kMicroRows x kStrip sums stays in registers for a span and
// is then added to a buffer of fp32 sums. Each unit packs the rows that it needs: one packed copy for all threads was
// slower by an eighth, because half of it then comes out of another core's cache.
//
// Every output is the sum of its spans in rising order, and within a span of its products in rising order. Neither the
// spans nor that order depend on the unit, on m, or on the tile: any number of threads gives the same bits.
#pragma once

#include "cpu/kernels-gemm-operands-inl.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Tiles

// sums[kRows][kStrip] (+)= rows of a, kRowStride apart, times a panel.
template <typename Product, int kRows>
void tile(const float* a, const float* panel, int64_t depth, bool adds, float* sums) {
  Floats sum[size_t{kRows}][size_t{kTileVectors}];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      sum[row][v] = zero();
      prefetch(sums + row * kStrip + v * kLanes);
    }
  }
  for (int64_t i = 0; i < depth; ++i, ++a, panel += kStrip) {
    Floats w[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      w[v] = load(panel + v * kLanes);
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const Floats x = broadcast(a + row * kRowStride);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        sum[row][v] = Product::step(x, w[v], sum[row][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      float* target = sums + row * kStrip + v * kLanes;
      store(target, adds ? add(load(target), sum[row][v]) : sum[row][v]);
    }
  }
}

using Tile = void (*)(const float* a, const float* panel, int64_t depth, bool adds, float* sums);

template <typename Product>
Tile tile_of(int64_t rows) {
  static_assert(kMicroRows <= 12);
  static constexpr Tile tiles[12] = {
      tile<Product, 1>, tile<Product, 2>,
      tile<Product, 3>, tile<Product, 4>,
      tile < Product,   kMicroRows < 5 ? kMicroRows : 5 >,
      tile < Product,   kMicroRows < 6 ? kMicroRows : 6 >,
      tile < Product,   kMicroRows < 7 ? kMicroRows : 7 >,
      tile < Product,   kMicroRows < 8 ? kMicroRows : 8 >,
      tile < Product,   kMicroRows < 9 ? kMicroRows : 9 >,
      tile < Product,   kMicroRows < 10 ? kMicroRows : 10 >,
      tile < Product,   kMicroRows < 11 ? kMicroRows : 11 >,
      tile < Product,   kMicroRows < 12 ? kMicroRows : 12 >,
  };
  return tiles[rows - 1];
}

// The sums of a tile, scaled, plus the bias, rounded to y; `columns` of them, at most kStrip.
template <typename T, typename Out>
void write_tile(const float* sums, int64_t rows, int64_t columns, float scale, const T* bias, Out* y, int64_t stride) {
  alignas(64) float added[kStrip];
  alignas(64) float factor[kStrip];
  for (int64_t j = 0; j < kStrip; ++j) {
    added[j] = bias != nullptr && j < columns ? to_float(bias[j]) : 0.0f;
    factor[j] = scale;
  }
  for (int64_t row = 0; row < rows; ++row, sums += kStrip, y += stride) {
    if (columns == kStrip) {
      for (int v = 0; v < kStrip; v += kLanes) {
        const Floats sum = multiply(load(sums + v), load(factor));
        store_as(y + v, bias == nullptr ? sum : add(sum, load(added + v)));
      }
    } else {
      for (int64_t j = 0; j < columns; ++j) {
        const float sum = sums[j] * scale;
        y[j] = from_float<Out>(bias == nullptr ? sum : sum + added[j]);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The product

constexpr int64_t kPanelFloats = kStripsOfGroup * kSpanCapacity * kStrip;

int64_t gemm_unit_bytes(const GemmJob&, int64_t rows, int64_t columns) {
  const int64_t floats = kPanelFloats + rows * (kRowStride + rounded_up(columns, kColumnGrain));
  return rounded_up(floats * int64_t{sizeof(float)}, 64);
}

// An empty sum: y is the bias, or zero.
template <typename T>
void fill_unit(const GemmJob& job, const GemmUnit& unit) {
  const T* bias = static_cast<const T*>(job.bias);
  for (int64_t row = unit.first_row; row < unit.last_row; ++row) {
    for (int64_t column = unit.first_column; column < unit.last_column; ++column) {
      const float value = bias == nullptr ? 0.0f : to_float(bias[column]);
      if (job.fp32_y) {
        static_cast<float*>(job.y)[row * job.width() + column] = value;
      } else {
        static_cast<T*>(job.y)[row * job.width() + column] = from_float<T>(value);
      }
    }
  }
}

template <typename T, typename Side>
void product_unit(const GemmJob& job, const GemmUnit& unit, float* scratch) {
  using Product = WordProduct<T>;
  const Depth<Product::kElements> depth{Side::length(job), job.low == nullptr ? 0 : job.r};
  const int64_t rows = unit.last_row - unit.first_row;
  const int64_t tiles = ceil_div(rows, kMicroRows);
  const int64_t height = rows / tiles;
  const int64_t taller = rows - height * tiles;  // tiles that have a row more
  const int64_t stride = Side::columns(job);
  const int64_t first = unit.first_column;
  const int64_t last = unit.last_column;
  const int64_t following = last < stride ? last : 0;  // columns that a thread takes next, as far as can be foreseen
  const T* bias = static_cast<const T*>(job.bias);
  float* panels = scratch;
  float* a = panels + kPanelFloats;
  float* all_sums = a + rows * kRowStride;
  const int64_t spans = depth.spans();
  for (int64_t index = 0; index < spans; ++index) {
    const DepthSpan span = depth.span(index);
    const int64_t words = depth.depth(span);
    pack_rows<T>(job, span, unit.first_row, unit.last_row, a);
    for (int64_t group = first; group < last; group += Side::kColumnsAtOnce) {
      const int64_t group_end = limited(last, group + Side::kColumnsAtOnce);
      decode_columns<T, Side>(job, span, group, group_end, panels);
      // The next panels' bytes are fetched under the multiplication, a few lines a tile: all at once they would keep
      // the decoder's loads and stores waiting. After the last panels come the first ones of the next span.
      const bool wraps = group_end == last;
      const bool ends = wraps && index + 1 == spans;
      const int64_t next = ends ? following : wraps ? first : group_end;
      const int64_t next_end = limited(ends ? stride : last, next + Side::kColumnsAtOnce);
      const DepthSpan next_span = ends ? depth.span(0) : wraps ? depth.span(index + 1) : span;
      PieceFetcher<T> fetcher =
          Side::fetcher(job, next_span, next, next_end, ceil_div(group_end - group, kStrip) * tiles);
      for (int64_t column = group; column < group_end; column += kStrip) {
        const float* panel = column_of(panels, column - group);
        const int64_t columns = limited(last - column, kStrip);
        float* sums = all_sums + (column - first) * rows;
        int64_t row = 0;
        for (int64_t t = 0; t < tiles; ++t) {  // of heights that differ by one at most
          const int64_t count = height + (t < taller ? 1 : 0);
          float* target = sums + row * kStrip;
          fetcher.next();
          if (index == spans - 1) {  // where the sums go afterwards
            const int64_t bytes = job.fp32_y ? 4 : int64_t{sizeof(T)};
            char* y = static_cast<char*>(job.y) + ((unit.first_row + row) * stride + column) * bytes;
            for (int64_t i = 0; i < count; ++i, y += stride * bytes) {
              __builtin_prefetch(y, 1);
              __builtin_prefetch(y + columns * bytes - 1, 1);
            }
          }
          tile_of<Product>(count)(a + row * kRowStride, panel, words, index > 0, target);
          if (index == spans - 1) {
            const T* added = bias == nullptr ? nullptr : bias + column;
            const int64_t at = (unit.first_row + row) * stride + column;
            if (job.fp32_y) {
              write_tile(target, count, columns, job.scale, added, static_cast<float*>(job.y) + at, stride);
            } else {
              write_tile(target, count, columns, job.scale, added, static_cast<T*>(job.y) + at, stride);
            }
          }
          row += count;
        }
      }
    }
  }
}

template <typename T>
void gemm_product(const GemmJob& job, const GemmUnit& unit, void* scratch) {
  if (unit.first_row == unit.last_row) {
    return;
  }
  if (job.depth() == 0 && job.low == nullptr) {
    fill_unit<T>(job, unit);
    return;
  }
  const auto product = job.forward ? product_unit<T, Forward<T>> : product_unit<T, GradInput<T>>;
  product(job, unit, static_cast<float*>(scratch));
}

template <typename T>
constexpr GemmKernels kGemm = {gemm_product<T>, gemm_unit_bytes};

#if !defined(__AVX512BF16__)
constexpr GemmKernels kGemmBf16 = kGemm<Bf16>;
#endif

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
