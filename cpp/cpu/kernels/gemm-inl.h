// Products of activations with a 4-bit or a dense weight, W x and W^T x alike, in tiles of fp32 sums.
//
// y [m, columns] = a [m, depth] b [depth, columns], where b is W^T (forward) or W (input gradient), followed by the
// adapter's r rows (kernels/gemm-operands-inl.h). The depth is cut into spans. For each span the rows of a are copied
// to a packed block, padded with zeros and widened to words; the columns of b are decoded, or copied from a dense W, a
// panel of kStrip at a time, [depth][kStrip], just before their use (Goto and van de Geijn, "Anatomy of
// high-performance matrix multiplication", 2008). A tile of kMicroRows x kStrip sums stays in registers for a span and
// is then added to a buffer of fp32 sums. Each unit packs the rows that it needs: one packed copy for all threads was
// slower by an eighth, because half of it then comes out of another core's cache.
//
// Every output is the sum of its spans in rising order, and within a span of its products in rising order. Neither the
// spans nor that order depend on the unit, on m, or on the tile: any number of threads gives the same bits.
#pragma once

#include "cpu/kernels/gemm-gguf-inl.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

// Columns [first, last) of b, at most kColumnsAtOnce, to panels. What the panels hold beyond them never reaches y.
template <typename T, typename Side>
void decode_columns(const GemmJob& job, const DepthSpan& span, int64_t first, int64_t last, float* panels) {
  if (span.begin < span.end) {
    if (job.dense != nullptr) {
      Side::copy_dense(job.dense, job.k, span.begin, span.end, first, last, panels);
    } else if (Side::kTakesRuns && has_runs(job)) {
      if constexpr (Side::kTakesRuns) {
        gguf_panel(Side{}, job, span, first, last, panels);
      }
    } else if (Side::is_regular(job, first)) {
      Side::decode_regular(job, span, first, last, panels);
    } else {
      Side::decode_any(job, span, first, last, panels);
    }
  }
  if (span.low_begin < span.low_end) {
    float* below = panels + ceil_div(span.end - span.begin, Side::kElements) * kStrip;
    Side::copy_dense(job.up, Side::adapter_length(job), span.low_begin, span.low_end, first, last, below);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Tiles

// sums[kRows][kStrip] (+)= rows of a, kPitch words apart, times the first kVectors vectors of a panel. A row's words
// lie kStep apart.
template <typename Product, int64_t kPitch, int64_t kStep, int kVectors, int kRows>
void tile(const float* a, const float* panel, int64_t depth, bool adds, float* sums) {
  Floats sum[size_t{kRows}][size_t{kVectors}];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[row][v] = zero();
      prefetch(sums + row * kStrip + v * kLanes);
    }
  }
  for (int64_t i = 0; i < depth; ++i, a += kStep, panel += kStrip) {
    Floats w[size_t{kVectors}];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      w[v] = load(panel + v * kLanes);
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const Floats x = broadcast(a + row * kPitch);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sum[row][v] = Product::step(x, w[v], sum[row][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* target = sums + row * kStrip + v * kLanes;
      store(target, adds ? add(load(target), sum[row][v]) : sum[row][v]);
    }
  }
}

using Tile = void (*)(const float* a, const float* panel, int64_t depth, bool adds, float* sums);

template <typename Product, int64_t kPitch = kRowStride, int64_t kStep = 1, int kVectors = kTileVectors>
Tile tile_of(int64_t rows) {
  static_assert(kMicroRows <= 12);
  static constexpr Tile tiles[12] = {
      tile<Product, kPitch, kStep, kVectors, 1>,
      tile<Product, kPitch, kStep, kVectors, 2>,
      tile<Product, kPitch, kStep, kVectors, 3>,
      tile<Product, kPitch, kStep, kVectors, 4>,
      tile<Product, kPitch, kStep, kVectors, limited(kMicroRows, 5)>,
      tile<Product, kPitch, kStep, kVectors, limited(kMicroRows, 6)>,
      tile<Product, kPitch, kStep, kVectors, limited(kMicroRows, 7)>,
      tile<Product, kPitch, kStep, kVectors, limited(kMicroRows, 8)>,
      tile<Product, kPitch, kStep, kVectors, limited(kMicroRows, 9)>,
      tile<Product, kPitch, kStep, kVectors, limited(kMicroRows, 10)>,
      tile<Product, kPitch, kStep, kVectors, limited(kMicroRows, 11)>,
      tile<Product, kPitch, kStep, kVectors, limited(kMicroRows, 12)>,
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

int64_t gemm_unit_bytes(const GemmJob& job, int64_t rows, int64_t columns) {
  const int64_t low = job.down == nullptr ? 0 : rounded_up(job.r, kStrip) + job.r;
  const int64_t floats = kPanelFloats + rows * (kRowStride + rounded_up(columns, kColumnGrain) + low);
  return rounded_up(floats * int64_t{sizeof(float)}, 64);
}

// An empty sum: y is the bias, or zero.
template <typename T>
void fill_unit(const GemmJob& job, const GemmUnit& unit) {
  const T* bias = static_cast<const T*>(job.bias);
  for (int64_t row = unit.first_row; row < unit.last_row; ++row) {
    for (int64_t column = unit.first_column; column < unit.last_column; ++column) {
      const float value = bias == nullptr ? 0.0f : to_float(bias[column]);
      static_cast<T*>(job.y)[row * job.width() + column] = from_float<T>(value);
    }
  }
}

// The rows of a unit, in tiles of heights that differ by one at most.
struct RowTiles {
  int64_t count;
  int64_t height;
  int64_t taller;  // the first ones, which have a row more

  explicit RowTiles(int64_t rows)
      : count(ceil_div(rows, kMicroRows)), height(rows / count), taller(rows - height * count) {}
  int64_t rows_of(int64_t index) const { return height + (index < taller ? 1 : 0); }
};

// Adds the products of a span's packed rows with `down` to sums, a strip of the adapter's columns after another.
template <typename T, typename Side>
void project(const GemmJob& job, const DepthSpan& span, int64_t rows, const float* a, float* panels, float* sums) {
  using Product = WordProduct<T>;
  const RowTiles tiles(rows);
  const int64_t words = ceil_div(span.end - span.begin, Product::kElements);
  for (int64_t group = 0; group < job.r; group += Side::kColumnsAtOnce) {
    const int64_t group_end = limited(job.r, group + Side::kColumnsAtOnce);
    Side::copy_dense(job.down, Side::down_length(job), span.begin, span.end, group, group_end, panels);
    for (int64_t column = group; column < group_end; column += kStrip) {
      const bool is_narrow = job.r - column <= kLanes;
      const float* panel = column_of(panels, column - group);
      float* target = sums + column * rows;
      int64_t row = 0;
      for (int64_t t = 0; t < tiles.count; ++t) {
        const int64_t height = tiles.rows_of(t);
        const Tile tile = is_narrow ? tile_of<Product, kRowStride, 1, 1>(height) : tile_of<Product>(height);
        tile(a + row * kRowStride, panel, words, span.begin > 0, target + row * kStrip);
        row += height;
      }
    }
  }
}

// Rounds the sums to the projection of a unit's rows, and writes it where the unit is the one to do it.
template <typename T>
void write_projection(const GemmJob& job, const GemmUnit& unit, const float* sums, T* low) {
  const int64_t rows = unit.last_row - unit.first_row;
  for (int64_t column = 0; column < job.r; column += kStrip) {
    const int64_t columns = limited(job.r - column, kStrip);
    write_tile<T>(sums + column * rows, rows, columns, job.down_scale, nullptr, low + column, job.r);
  }
  if (unit.first_column == 0) {
    std::memcpy(static_cast<T*>(job.made_low) + unit.first_row * job.r, low,
                static_cast<size_t>(rows * job.r) * sizeof(T));
  }
}

template <typename T, typename Side>
void product_unit(const GemmJob& job, const GemmUnit& unit, float* scratch) {
  using Product = WordProduct<T>;
  const Depth<Product::kElements> depth{Side::length(job), job.low == nullptr ? 0 : job.r};
  const int64_t rows = unit.last_row - unit.first_row;
  const RowTiles tiles(rows);
  const int64_t stride = Side::columns(job);
  const int64_t first = unit.first_column;
  const int64_t last = unit.last_column;
  const int64_t following = last < stride ? last : 0;  // columns that a thread takes next, as far as can be foreseen
  const T* bias = static_cast<const T*>(job.bias);
  T* y = static_cast<T*>(job.y);
  float* panels = scratch;
  float* a = panels + kPanelFloats;
  float* all_sums = a + rows * kRowStride;
  float* low_sums = all_sums + rows * rounded_up(last - first, kColumnGrain);
  T* own_low = reinterpret_cast<T*>(low_sums + rows * rounded_up(job.r, kStrip));
  const T* low = job.down == nullptr ? static_cast<const T*>(job.low) + unit.first_row * job.r : own_low;
  const int64_t spans = depth.spans();
  for (int64_t index = 0; index < spans; ++index) {
    const DepthSpan span = depth.span(index);
    const int64_t words = depth.depth(span);
    pack_rows<T>(job, span, unit.first_row, unit.last_row, a);
    if (job.down != nullptr && span.begin < span.end) {
      project<T, Side>(job, span, rows, a, panels, low_sums);
      if (span.end == depth.length) {
        write_projection(job, unit, low_sums, own_low);
      }
    }
    pack_low(low, job.r, span, rows, a);
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
          Side::fetcher(job, next_span, next, next_end, ceil_div(group_end - group, kStrip) * tiles.count);
      for (int64_t column = group; column < group_end; column += kStrip) {
        const float* panel = column_of(panels, column - group);
        const int64_t columns = limited(last - column, kStrip);
        float* sums = all_sums + (column - first) * rows;
        int64_t row = 0;
        for (int64_t t = 0; t < tiles.count; ++t) {
          const int64_t count = tiles.rows_of(t);
          float* target = sums + row * kStrip;
          fetcher.next();
          if (index == spans - 1) {  // where the sums go afterwards
            const T* line = y + (unit.first_row + row) * stride + column;
            for (int64_t i = 0; i < count; ++i, line += stride) {
              __builtin_prefetch(line, 1);
              __builtin_prefetch(line + columns - 1, 1);
            }
          }
          tile_of<Product>(count)(a + row * kRowStride, panel, words, index > 0, target);
          if (index == spans - 1) {
            const T* added = bias == nullptr ? nullptr : bias + column;
            const int64_t at = (unit.first_row + row) * stride + column;
            write_tile(target, count, columns, job.scale, added, y + at, stride);
          }
          row += count;
        }
      }
    }
  }
}

inline bool gemm_makes_low(const GemmJob& job) { return job.depth() > 0; }

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

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
