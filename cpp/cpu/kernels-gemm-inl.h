// Products of dense activations with a 4-bit weight, W x and W^T x alike, in tiles of fp32 sums.
//
// y [m, columns] = a [m, depth] b [depth, columns], where b is W^T (forward) or W (input gradient), followed by the
// adapter's r rows. The depth is cut into spans. For each span the rows of a are copied to a packed block, padded with
// zeros and widened to words; 64 columns of b at a time are decoded to panels of kStrip columns, [depth][kStrip], just
// before their first use (Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008). A tile of
// kTileRows x kStrip sums stays in registers for a span and is then added to a buffer of fp32 sums.
//
// Every output is the sum of its spans in rising order, and within a span of its products in rising order. Neither the
// spans nor that order depend on the range of columns, on m, or on the tile: any number of threads gives the same bits.
#pragma once

#include "core/layout.h"
#include "cpu/product.h"
#include "cpu/vec_panel.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

constexpr int64_t kSpan = 256;                 // words of the depth in a span; kSpan x kStrip words fit the first cache
constexpr int64_t kSpanCapacity = kSpan + 64;  // with an adapter of up to 64 words at its end
constexpr int64_t kRowStride = kSpanCapacity + 16;  // words; an odd number of cache lines, so rows spread over the sets
constexpr int64_t kChunkRows = 512;                 // rows of a that are packed at a time
constexpr int64_t kChunkSums = 1 << 20;             // rows by columns of the buffer of sums
constexpr int64_t kStripsOfGroup = kColumnGrain / kStrip;
constexpr int64_t kElementsOfLine = 128;  // packed elements of a cache line

constexpr int64_t limited(int64_t value, int64_t limit) { return value < limit ? value : limit; }
constexpr int64_t rounded_up(int64_t value, int64_t step) { return ceil_div(value, step) * step; }

// A part of the depth: elements [begin, end) of the weight's side, then [low_begin, low_end) of the adapter's.
struct DepthSpan {
  int64_t begin;
  int64_t end;
  int64_t low_begin;
  int64_t low_end;
};

template <int kElements>
struct Depth {
  int64_t length;  // of the weight's side
  int64_t r;

  static constexpr int64_t kElementsOfSpan = kSpan * kElements;
  static constexpr int64_t words(int64_t elements) { return ceil_div(elements, kElements); }

  int64_t weight_spans() const { return ceil_div(length, kElementsOfSpan); }
  bool merges() const {
    const int64_t last = length - (weight_spans() - 1) * kElementsOfSpan;
    return r > 0 && length > 0 && words(last) + words(r) <= kSpanCapacity;
  }
  int64_t spans() const { return weight_spans() + (merges() ? 0 : ceil_div(r, kElementsOfSpan)); }
  DepthSpan span(int64_t index) const {
    const int64_t begin = index * kElementsOfSpan;
    if (index < weight_spans()) {
      const bool last = index == weight_spans() - 1;
      return {begin, last ? length : begin + kElementsOfSpan, 0, last && merges() ? r : 0};
    }
    const int64_t low = begin - weight_spans() * kElementsOfSpan;
    return {length, length, low, r - low < kElementsOfSpan ? r : low + kElementsOfSpan};
  }
  int64_t depth(const DepthSpan& span) const {
    return words(span.end - span.begin) + words(span.low_end - span.low_begin);
  }
};

inline float word_of(Bf16 first, Bf16 second) {
  return std::bit_cast<float>(static_cast<uint32_t>(second.bits) << 16 | first.bits);
}

// ---------------------------------------------------------------------------------------------------------------------
// Packing

// One row of a, `count` elements, to words; the last word is filled with zero.
template <typename T, int kElements>
void pack_row(const T* x, int64_t count, float* words) {
  if constexpr (kElements == 2) {
    std::memcpy(words, x, static_cast<size_t>(count / 2 * 2) * sizeof(T));
    if (count % 2 == 1) {
      words[count / 2] = word_of(x[count - 1], T{});
    }
  } else {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      store(words + i, load(x + i));
    }
    for (; i < count; ++i) {
      words[i] = to_float(x[i]);
    }
  }
}

template <typename T, int kElements>
void pack_rows(const ProductJob& job, int64_t length, const DepthSpan& span, int64_t first, int64_t last,
               float* block) {
  const T* x = static_cast<const T*>(job.x);
  const T* low = static_cast<const T*>(job.low);
  constexpr int64_t kAhead = 8;  // rows; a piece of a row is too short for the hardware to foresee the next
  const int64_t words = Depth<kElements>::words(span.end - span.begin);
  for (int64_t row = first; row < last; ++row, block += kRowStride) {
    for (int64_t i = span.begin; i < span.end; i += 64 / int64_t{sizeof(T)}) {
      prefetch_far(x + limited(row + kAhead, last - 1) * length + i);
    }
    pack_row<T, kElements>(x + row * length + span.begin, span.end - span.begin, block);
    if (span.low_begin < span.low_end) {
      pack_row<T, kElements>(low + row * job.r + span.low_begin, span.low_end - span.low_begin, block + words);
    }
  }
}

// Where a column of a group lies in its panels.
inline float* column_of(float* panels, int64_t column) {
  return panels + column / kStrip * (kSpanCapacity * kStrip) + column % kStrip;
}

// Element [depth, column] of a group, which shares its word with the element beside it in depth.
template <typename T, int kElements>
void put(float* panels, int64_t depth, int64_t column, T value) {
  float* word = column_of(panels, column) + depth / kElements * kStrip;
  if constexpr (kElements == 1) {
    *word = to_float(value);
  } else {
    const uint32_t before = std::bit_cast<uint32_t>(*word);
    *word = std::bit_cast<float>(depth % 2 == 0 ? uint32_t{value.bits}
                                                : (before & 0xffffu) | static_cast<uint32_t>(value.bits) << 16);
  }
}

// A panel has left the first cache since it was last written, and a store waits for its line.
inline void store_word(float* target, Floats words) {
  constexpr int64_t kAhead = 32;  // words of depth
  prefetch(target + kAhead * kStrip);
  store(target, words);
}

template <int kElements>
void put_pair(float* panel, int64_t depth, Floats even, Floats odd) {
  if constexpr (kElements == 1) {
    store_word(panel + depth * kStrip, even);
    store_word(panel + (depth + 1) * kStrip, odd);
  } else {
    store_word(panel + depth / 2 * kStrip, pair_up(even, odd));
  }
}

// The scales of the blocks that hold `count` elements, a row apart, of a weight whose rows are whole blocks. A NaN
// becomes the canonical one, which rounding by integer arithmetic keeps.
inline void scales_down(const WeightView& weight, int64_t first_element, int64_t row_length, int64_t count,
                        float* scales) {
  const int shift = __builtin_ctzll(static_cast<uint64_t>(weight.block_size));
  const int64_t step = row_length >> shift;
  int64_t block = first_element >> shift;
  const auto canonical = [](float scale) { return scale != scale ? std::bit_cast<float>(0x7fc00000u) : scale; };
  if (weight.absmax != nullptr) {
    for (int64_t i = 0; i < count; ++i, block += step) {
      scales[i] = canonical(weight.absmax[block]);
    }
    return;
  }
  const uint8_t* codes = weight.absmax_codes;
  const float* nested_code = weight.nested_code;
  const float* nested_absmax = weight.nested_absmax;
  const float offset = *weight.nested_offset;
  for (int64_t i = 0; i < count; ++i, block += step) {
    scales[i] = canonical(decode_scale(nested_code[codes[block]], nested_absmax[block >> 8], offset));
  }
}

// The forward product in panels: W's rows are columns of b, and the depth runs along a row.
template <typename T>
struct Forward {
  static constexpr int kElements = WordProduct<T>::kElements;

  static constexpr int64_t kColumnsAtOnce = kStrip;

  static int64_t length(const ProductJob& job) { return job.k; }
  static int64_t columns(const ProductJob& job) { return job.n; }

  // Whole bytes, and every 32 elements of a row in one block. A row that begins within a block would need more.
  static bool is_regular(const ProductJob& job, int64_t) { return job.k % job.weight.block_size == 0; }

  // A panel of kStrip rows of W, the last row again where there are no more. Its elements, multiples of 32, come in
  // runs of one block: kLanes rows by 32 elements are transposed as packed bytes, which are an eighth of the words.
  __attribute__((noinline)) static void decode_regular(const ProductJob& job, const DepthSpan& span, int64_t first,
                                                       int64_t last, float* panel) {
    const WeightView weight = job.weight;  // a copy, which stores to panels cannot change
    const LevelTable levels(weight.levels);
    const int64_t count = span.end - span.begin;
    const int64_t run = limited(weight.block_size, count);
    const int64_t taken = limited(last - first, kStrip);
    const uint8_t* rows[kStrip];
    for (int64_t column = 0; column < kStrip; ++column) {
      const int64_t row = first + limited(column, taken - 1);
      rows[column] = weight.packed + (row * job.k + span.begin) / 2;
    }
    alignas(64) float scales[kStrip] = {};
    for (int64_t at = 0; at < count; at += run) {
      scales_down(weight, first * job.k + span.begin + at, job.k, taken, scales);
      for (int64_t v = 0; v < kStrip; v += kLanes) {
        for (int64_t i = at; i < at + run; i += 32) {
          decode_square(levels, load(scales + v), rows + v, i, panel + v);
        }
      }
    }
  }

  // kLanes rows by elements [i, i + 32).
  static void decode_square(const LevelTable& levels, Floats scales, const uint8_t* const* rows, int64_t i,
                            float* panel) {
    Words codes[4];
    transpose_codes(rows, i / 2, codes);
    for (int quad = 0; quad < 4; ++quad) {
      const auto pair = [&]<unsigned kByte>() {
        const Floats even = multiply(levels.at(shift_right<8 * kByte + 4>(codes[quad])), scales);
        const Floats odd = multiply(levels.at(shift_right<8 * kByte>(codes[quad])), scales);
        put_pair<kElements>(panel, i + 8 * quad + 2 * kByte, round_through<T>(even), round_through<T>(odd));
      };
      pair.template operator()<0>();
      pair.template operator()<1>();
      pair.template operator()<2>();
      pair.template operator()<3>();
    }
  }

  // Bytes that decoding columns [first, last) will read, one of `parts` shares of their cache lines: those that the
  // last bytes of each piece lie in, since the first ones were fetched with the piece before.
  static void fetch(const ProductJob& job, const DepthSpan& span, int64_t first, int64_t last, int64_t part,
                    int64_t parts) {
    const int64_t lines = ceil_div(span.end - span.begin, kElementsOfLine);
    const int64_t total = (last - first) * lines;
    for (int64_t i = total * part / parts; i < total * (part + 1) / parts; ++i) {
      const int64_t end = limited(span.end, span.begin + (i % lines + 1) * kElementsOfLine);
      prefetch_far(job.weight.packed + ((first + i / lines) * job.k + end - 1) / 2);
    }
  }

  static void decode_any(const ProductJob& job, const DepthSpan& span, int64_t first, int64_t last, float* panels) {
    T values[size_t{kSpan * kElements}];
    for (int64_t column = first; column < last; ++column) {
      const int64_t start = column * job.k;
      dequantize_span<T>(job.weight, start + span.begin, start + span.end, values);
      for (int64_t i = span.begin; i < span.end; ++i) {
        put<T, kElements>(panels, i - span.begin, column - first, values[i - span.begin]);
      }
    }
  }

  static T adapter(const ProductJob& job, int64_t depth, int64_t column) {
    return static_cast<const T*>(job.up)[column * job.r + depth];
  }
};

// The product with W itself: the depth runs over W's rows.
template <typename T>
struct GradInput {
  static constexpr int kElements = WordProduct<T>::kElements;

  static constexpr int64_t kColumnsAtOnce = kColumnGrain;  // panels side by side, which share scaled tables

  static int64_t length(const ProductJob& job) { return job.n; }
  static int64_t columns(const ProductJob& job) { return job.k; }

  static bool is_regular(const ProductJob& job, int64_t first) {
    return job.k % job.weight.block_size == 0 && first % kColumnGrain == 0;
  }

  __attribute__((noinline)) static void decode_regular(const ProductJob& job, const DepthSpan& span, int64_t first,
                                                       int64_t last, float* panels) {
    const WeightView weight = job.weight;  // a copy, which stores to panels cannot change
    const LevelTable levels(weight.levels);
    const int64_t run = limited(weight.block_size, kColumnGrain);
    const int64_t count = span.end - span.begin;
    const int64_t row_bytes = job.k / 2;
    float scales[size_t{kSpan * kElements} + 1];
    for (int64_t column = first; column < last; column += run) {
      scales_down(weight, span.begin * job.k + column, job.k, count, scales);
      scales[count] = 0.0f;  // where a last row has none to pair with
      const uint8_t* bytes = weight.packed + (span.begin * job.k + column) / 2;
      float* word = column_of(panels, column - first);
      const int64_t pieces = limited(run, last - column) / kMinBlock;
      for (int64_t i = 0; i < count; i += kElements, word += kStrip, bytes += kElements * row_bytes) {
        const LevelTable table = levels.scaled<T>(scales[i]);
        const LevelTable below = kElements == 1 ? table : levels.scaled<T>(scales[i + 1]);
        const uint8_t* bytes_below = i + 1 < count ? bytes + row_bytes : bytes;
        for (int64_t piece = 0; piece < pieces; ++piece) {
          decode_piece(table, below, bytes + piece * kMinBlock / 2, bytes_below + piece * kMinBlock / 2,
                       column_of(word, piece * kMinBlock));
        }
      }
    }
  }

  // kMinBlock elements of a row, or of two.
  static void decode_piece(const LevelTable& table, [[maybe_unused]] const LevelTable& below, const uint8_t* bytes,
                           [[maybe_unused]] const uint8_t* bytes_below, float* word) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kMinBlock; i += kLanes) {
      const Floats value = table.at(natural_codes(bytes, i));
      if constexpr (kElements == 1) {
        store_word(column_of(word, i), value);
      } else {
        store_word(column_of(word, i), pair_up(value, below.at(natural_codes(bytes_below, i))));
      }
    }
  }

  static void fetch(const ProductJob& job, const DepthSpan& span, int64_t, int64_t last, int64_t part, int64_t parts) {
    const int64_t total = span.end - span.begin;
    for (int64_t i = total * part / parts; i < total * (part + 1) / parts; ++i) {
      prefetch_far(job.weight.packed + ((span.begin + i) * job.k + last - 1) / 2);
    }
  }

  static void decode_any(const ProductJob& job, const DepthSpan& span, int64_t first, int64_t last, float* panels) {
    T values[size_t{kColumnGrain}];
    for (int64_t row = span.begin; row < span.end; ++row) {
      const int64_t start = row * job.k;
      dequantize_span<T>(job.weight, start + first, start + last, values);
      for (int64_t column = first; column < last; ++column) {
        put<T, kElements>(panels, row - span.begin, column - first, values[column - first]);
      }
    }
  }

  static T adapter(const ProductJob& job, int64_t depth, int64_t column) {
    return static_cast<const T*>(job.up)[depth * job.k + column];
  }
};

// Columns [first, last) of b, at most kColumnsAtOnce, to panels. What the panels hold beyond them never reaches y.
template <typename T, typename Side>
void decode_columns(const ProductJob& job, const DepthSpan& span, int64_t first, int64_t last, float* panels) {
  if (span.begin < span.end) {
    if (Side::is_regular(job, first)) {
      Side::decode_regular(job, span, first, last, panels);
    } else {
      Side::decode_any(job, span, first, last, panels);
    }
  }
  const int64_t words = ceil_div(span.end - span.begin, Side::kElements);
  for (int64_t column = first; column < last; ++column) {
    for (int64_t depth = span.low_begin; depth < span.low_end; ++depth) {
      put<T, Side::kElements>(panels + words * kStrip, depth - span.low_begin, column - first,
                              Side::adapter(job, depth, column));
    }
  }
}

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
  static_assert(kTileRows <= 12);
  static constexpr Tile tiles[12] = {
      tile<Product, 1>, tile<Product, 2>,
      tile<Product, 3>, tile<Product, 4>,
      tile < Product,   kTileRows < 5 ? kTileRows : 5 >,
      tile < Product,   kTileRows < 6 ? kTileRows : 6 >,
      tile < Product,   kTileRows < 7 ? kTileRows : 7 >,
      tile < Product,   kTileRows < 8 ? kTileRows : 8 >,
      tile < Product,   kTileRows < 9 ? kTileRows : 9 >,
      tile < Product,   kTileRows < 10 ? kTileRows : 10 >,
      tile < Product,   kTileRows < 11 ? kTileRows : 11 >,
      tile < Product,   kTileRows < 12 ? kTileRows : 12 >,
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

inline int64_t chunk_rows(int64_t m) { return ceil_div(m, ceil_div(m, kChunkRows)); }

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
  const int64_t tiles = ceil_div(rows, kTileRows);
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
