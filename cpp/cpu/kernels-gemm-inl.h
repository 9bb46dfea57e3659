// Products of dense activations with a 4-bit weight, W x and W^T x alike, in tiles of fp32 sums.
//
// y [m, columns] = a [m, depth] b [depth, columns], where b is W^T (forward) or W (input gradient), followed by the
// adapter's r rows (kernels-panels-inl.h). The depth is cut into spans. For each span the rows of a are copied to a
// packed block, padded with zeros and widened to words; the columns of b are decoded a panel of kStrip at a time,
// [depth][kStrip], just before their use (Goto and van de Geijn, "Anatomy of high-performance matrix multiplication",
// 2008). A tile of kMicroRows x kStrip sums stays in registers for a span and is then added to a buffer of fp32 sums.
//
// Every output is the sum of its spans in rising order, and within a span of its products in rising order. Neither the
// spans nor that order depend on the range of columns, on m, or on the tile: any number of threads gives the same bits.
#pragma once

#include "cpu/kernels-panels-inl.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

constexpr int64_t kChunkRows = 512;      // rows of a that are packed at a time
constexpr int64_t kChunkSums = 1 << 20;  // rows by columns of the buffer of sums

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

// The sums of a tile, plus the bias, rounded to y; `columns` of them, at most kStrip.
template <typename T>
void write_tile(const float* sums, int64_t rows, int64_t columns, const T* bias, T* y, int64_t stride) {
  alignas(64) float added[kStrip];
  for (int64_t j = 0; j < kStrip; ++j) {
    added[j] = bias != nullptr && j < columns ? to_float(bias[j]) : 0.0f;
  }
  for (int64_t row = 0; row < rows; ++row, sums += kStrip, y += stride) {
    if (columns == kStrip) {
      for (int v = 0; v < kStrip; v += kLanes) {
        store_as(y + v, bias == nullptr ? load(sums + v) : add(load(sums + v), load(added + v)));
      }
    } else {
      for (int64_t j = 0; j < columns; ++j) {
        y[j] = from_float<T>(bias == nullptr ? sums[j] : sums[j] + added[j]);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The product

struct ProductScratch {
  float* panels;  // [kStripsOfGroup][kSpanCapacity][kStrip]
  float* rows;    // [rows][kRowStride]
  float* sums;    // [strips][rows][kStrip]
};

inline int64_t chunk_rows(int64_t m) { return m == 0 ? 1 : ceil_div(m, ceil_div(m, kChunkRows)); }

inline int64_t chunk_columns(int64_t m, int64_t columns) {
  return limited(rounded_up(columns, kColumnGrain), kChunkSums / chunk_rows(m) / kColumnGrain * kColumnGrain);
}

constexpr int64_t kPanelFloats = kStripsOfGroup * kSpanCapacity * kStrip;

int64_t columns_scratch_bytes(const ProductJob& job, int64_t columns) {
  const int64_t rows = chunk_rows(job.m);
  const int64_t floats = kPanelFloats + rows * kRowStride + rows * chunk_columns(job.m, columns);
  return rounded_up(floats * int64_t{sizeof(float)}, 64);
}

// Rows [top, bottom) by columns [first, last).
template <typename T, typename Side>
void product_chunk(const ProductJob& job, int64_t top, int64_t bottom, int64_t first, int64_t last,
                   const ProductScratch& scratch) {
  using Product = WordProduct<T>;
  const Depth<Product::kElements> depth{Side::length(job), job.low == nullptr ? 0 : job.r};
  const int64_t rows = bottom - top;
  const int64_t tiles = ceil_div(rows, kMicroRows);
  const int64_t stride = Side::columns(job);
  const T* bias = static_cast<const T*>(job.bias);
  T* y = static_cast<T*>(job.y);
  const int64_t spans = depth.spans();
  for (int64_t index = 0; index < spans; ++index) {
    const DepthSpan span = depth.span(index);
    const int64_t words = depth.depth(span);
    pack_rows<T, Product::kElements>(job, depth.length, span, top, bottom, scratch.rows);
    for (int64_t column = first; column < last; column += kStrip) {
      const int64_t strip = (column - first) / kStrip;
      if ((column - first) % Side::kColumnsAtOnce == 0) {
        decode_columns<T, Side>(job, span, column, limited(last, column + Side::kColumnsAtOnce), scratch.panels);
      }
      const float* panel = column_of(scratch.panels, (column - first) % Side::kColumnsAtOnce);
      // The next panels' bytes are fetched under the multiplication, a few lines a tile: all at once they would keep
      // the decoder's loads and stores waiting. After the last panels come the first ones of the next span.
      const int64_t here = column - (column - first) % Side::kColumnsAtOnce;
      const bool wraps = here + Side::kColumnsAtOnce >= last;
      const int64_t next = wraps ? first : here + Side::kColumnsAtOnce;
      const DepthSpan next_span = wraps && index + 1 < spans ? depth.span(index + 1) : span;
      const int64_t columns = limited(last - column, kStrip);
      float* sums = scratch.sums + strip * rows * kStrip;
      for (int64_t t = 0; t < tiles; ++t) {  // of heights that differ by one at most
        const int64_t row = rows * t / tiles;
        const int64_t count = rows * (t + 1) / tiles - row;
        float* target = sums + row * kStrip;
        Side::fetch(job, next_span, next, limited(last, next + Side::kColumnsAtOnce),
                    (column - here) / kStrip * tiles + t, Side::kColumnsAtOnce / kStrip * tiles);
        tile_of<Product>(count)(scratch.rows + row * kRowStride, panel, words, index > 0, target);
        if (index == spans - 1) {
          write_tile<T>(target, count, columns, bias == nullptr ? nullptr : bias + column,
                        y + (top + row) * stride + column, stride);
        }
      }
    }
  }
}

// An empty sum: y is the bias, or zero.
template <typename T, typename Side>
void fill_columns(const ProductJob& job, int64_t first, int64_t last) {
  for (int64_t row = 0; row < job.m; ++row) {
    for (int64_t column = first; column < last; ++column) {
      static_cast<T*>(job.y)[row * Side::columns(job) + column] =
          job.bias == nullptr ? from_float<T>(0.0f) : static_cast<const T*>(job.bias)[column];
    }
  }
}

template <typename T, typename Side>
void product_columns(const ProductJob& job, int64_t first, int64_t last, void* scratch) {
  if (Side::length(job) == 0 && job.low == nullptr) {
    fill_columns<T, Side>(job, first, last);
    return;
  }
  ProductScratch parts{};
  parts.panels = static_cast<float*>(scratch);
  parts.rows = parts.panels + kPanelFloats;
  parts.sums = parts.rows + chunk_rows(job.m) * kRowStride;
  const int64_t width = chunk_columns(job.m, last - first);
  const int64_t chunks = ceil_div(job.m, kChunkRows);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t column = first; column < last; column += width) {
      product_chunk<T, Side>(job, job.m * chunk / chunks, job.m * (chunk + 1) / chunks, column,
                             limited(last, column + width), parts);
    }
  }
}

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
