// The operands of the products in kernels/gemm-inl.h as words: packed rows of the dense side, decoded panels of the
// weight and of the adapter.
#pragma once

#include "core/layout.h"
#include "cpu/isa/vec.h"
#include "cpu/kernels/kernels.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

constexpr int64_t kSpan = 256;                 // words of the depth in a span; kSpan x kStrip words fit the first cache
constexpr int64_t kSpanCapacity = kSpan + 32;  // with an adapter of up to 32 words at its end
constexpr int64_t kRowStride = kSpanCapacity + 16;  // words; an odd number of cache lines, so rows spread over the sets
constexpr int64_t kStripsOfGroup = kColumnGrain / kStrip;
constexpr int64_t kElementsOfLine = 128;  // 4-bit elements of a cache line

constexpr int64_t limited(int64_t value, int64_t limit) { return value < limit ? value : limit; }

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

// Rows [first, last) of x in a span: block [rows][kRowStride].
template <typename T>
void pack_rows(const GemmJob& job, const DepthSpan& span, int64_t first, int64_t last, float* block) {
  constexpr int kElements = WordProduct<T>::kElements;
  constexpr int64_t kAhead = 8;  // rows; a piece of a row is too short for the hardware to foresee the next
  const int64_t length = job.depth();
  const T* x = static_cast<const T*>(job.x);
  for (int64_t row = first; row < last; ++row, block += kRowStride) {
    for (int64_t i = span.begin; i < span.end; i += 64 / int64_t{sizeof(T)}) {
      prefetch_far(x + limited(row + kAhead, last - 1) * length + i);
    }
    pack_row<T, kElements>(x + row * length + span.begin, span.end - span.begin, block);
  }
}

// The same rows of the adapter's projection, low [rows, r], behind them.
template <typename T>
void pack_low(const T* low, int64_t r, const DepthSpan& span, int64_t rows, float* block) {
  constexpr int kElements = WordProduct<T>::kElements;
  block += Depth<kElements>::words(span.end - span.begin);
  for (int64_t row = 0; span.low_begin < span.low_end && row < rows; ++row, block += kRowStride) {
    pack_row<T, kElements>(low + row * r + span.low_begin, span.low_end - span.low_begin, block);
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

// The packed or dense bytes of W from an element on.
template <typename T>
inline const uint8_t* bytes_at(const GemmJob& job, int64_t element) {
  return job.dense == nullptr ? job.weight.packed + byte_near(job.weight.type, element)
                              : static_cast<const uint8_t*>(job.dense) + element * int64_t{sizeof(T)};
}

// How many elements of W lie in a cache line.
template <typename T>
inline int64_t elements_of_line(const GemmJob& job) {
  if (job.dense != nullptr) {
    return 64 / int64_t{sizeof(T)};
  }
  const BlockFormat& format = kBlockFormats[static_cast<int>(job.weight.type)];
  return is_gguf(job.weight.type) ? 64 * format.elements / format.bytes : kElementsOfLine;
}

// Asks for the cache lines that `count` pieces of W lie in, `length` elements each and `stride` apart, in `parts` equal
// shares: of each line the one that the piece's last byte in it is in, since the first came with the piece before.
// Divisions are made once, since a share stands beside a tile of a thousand cycles.
template <typename T>
class PieceFetcher {
 public:
  PieceFetcher(const GemmJob& job, int64_t element, int64_t stride, int64_t count, int64_t length, int64_t parts)
      : job_(job), element_(element), stride_(stride), length_(length), line_(elements_of_line<T>(job)) {
    lines_ = ceil_div(length, line_);
    each_ = count * lines_ / parts;
    longer_ = count * lines_ - each_ * parts;
  }
  void next() {
    for (int64_t left = each_ + (longer_-- > 0 ? 1 : 0); left > 0; --left) {
      prefetch_far(bytes_at<T>(job_, element_ + limited(length_, (at_ + 1) * line_) - 1));
      if (++at_ == lines_) {
        at_ = 0;
        element_ += stride_;
      }
    }
  }

 private:
  const GemmJob& job_;
  int64_t element_;
  int64_t stride_;
  int64_t length_;
  int64_t line_;
  int64_t lines_;
  int64_t each_;
  int64_t longer_;  // shares of one more
  int64_t at_ = 0;
};

// kLanes words of a dense row: fp32, or pairs of bf16.
template <typename T, int kElements>
inline Floats load_words(const T* p) {
  if constexpr (kElements == 1) {
    return load(p);
  } else {
    return load(reinterpret_cast<const float*>(p));
  }
}

// The forward product in panels: W's rows are columns of b, and the depth runs along a row.
template <typename T>
struct Forward {
  static constexpr int kElements = WordProduct<T>::kElements;

  static constexpr int64_t kColumnsAtOnce = kStrip;
  static constexpr bool kTakesRuns = kElements == 1;  // gguf_panel() for it is there

  static int64_t length(const GemmJob& job) { return job.k; }
  static int64_t columns(const GemmJob& job) { return job.n; }

  // Whole bytes, and every 32 elements of a row in one block. A row that begins within a block would need more.
  static bool is_regular(const GemmJob& job, int64_t) {
    return !is_gguf(job.weight.type) && job.k % job.weight.block_size == 0;
  }

  // A panel of kStrip rows of W, the last row again where there are no more. Its elements, multiples of 32, come in
  // runs of one block: kLanes rows by 32 elements are transposed as packed bytes, which are an eighth of the words.
  __attribute__((noinline)) static void decode_regular(const GemmJob& job, const DepthSpan& span, int64_t first,
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

  // The same from elements [begin, end) of the rows of a dense matrix [.., length]: squares of kLanes rows by kLanes
  // words are transposed.
  __attribute__((noinline)) static void copy_dense(const void* dense, int64_t length, int64_t begin, int64_t end,
                                                   int64_t first, int64_t last, float* panel) {
    const T* w = static_cast<const T*>(dense) + begin;
    const int64_t count = end - begin;
    const int64_t taken = limited(last - first, kStrip);
    constexpr int64_t kPiece = kLanes * kElements;
    const int64_t squares = count / kPiece;
    for (int64_t v = 0; v < taken; v += kLanes) {
      const T* rows[kLanes];
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        rows[lane] = w + (first + limited(v + lane, taken - 1)) * length;
      }
      float* target = panel + v;
      for (int64_t square = 0; square < squares; ++square, target += kLanes * kStrip) {
        Floats words[kLanes];
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes; ++lane) {
          words[lane] = load_words<T, kElements>(rows[lane] + square * kPiece);
        }
        transpose(words);
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes; ++lane) {
          store(target + lane * kStrip, words[lane]);
        }
      }
      const int64_t left = count - squares * kPiece;
      if (left > 0) {
        T padded[size_t{kLanes} * kPiece] = {};
        Floats words[kLanes];
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          std::memcpy(padded + lane * kPiece, rows[lane] + squares * kPiece, static_cast<size_t>(left) * sizeof(T));
          words[lane] = load_words<T, kElements>(padded + lane * kPiece);
        }
        transpose(words);
        for (int64_t word = 0; word < ceil_div(left, kElements); ++word) {
          store(target + word * kStrip, words[word]);
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

  // Of what decoding columns [first, last) will read.
  static PieceFetcher<T> fetcher(const GemmJob& job, const DepthSpan& span, int64_t first, int64_t last,
                                 int64_t parts) {
    return {job, first * job.k + span.begin, job.k, last - first, span.end - span.begin, parts};
  }

  // The same of any weight: kLanes rows are decoded as they lie, then transposed.
  __attribute__((noinline)) static void decode_any(const GemmJob& job, const DepthSpan& span, int64_t first,
                                                   int64_t last, float* panel) {
    alignas(64) T rows[size_t{kLanes} * kSpan * kElements];
    const int64_t count = span.end - span.begin;
    for (int64_t column = first; column < last; column += kLanes, panel += kLanes) {
      const int64_t taken = limited(last - column, kLanes);
      for (int64_t row = 0; row < taken; ++row) {
        const int64_t begin = (column + row) * job.k + span.begin;
        dequantize_span<T>(job.weight, begin, begin + count, rows + row * count);
      }
      copy_dense(rows, count, 0, count, 0, taken, panel);
    }
  }

  static int64_t adapter_length(const GemmJob& job) { return job.r; }  // of a row of up
  static int64_t down_length(const GemmJob& job) { return job.k; }
};

// The product with W itself: the depth runs over W's rows.
template <typename T>
struct GradInput {
  static constexpr int kElements = WordProduct<T>::kElements;

  static constexpr int64_t kColumnsAtOnce = kColumnGrain;  // panels side by side, which share scaled tables
  static constexpr bool kTakesRuns = true;

  static int64_t length(const GemmJob& job) { return job.n; }
  static int64_t columns(const GemmJob& job) { return job.k; }

  static bool is_regular(const GemmJob& job, int64_t first) {
    return !is_gguf(job.weight.type) && job.k % job.weight.block_size == 0 && first % kColumnGrain == 0;
  }

  __attribute__((noinline)) static void decode_regular(const GemmJob& job, const DepthSpan& span, int64_t first,
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
        const uint8_t* bytes_below = i + 1 < count ? bytes + row_bytes : bytes;
#if defined(__AVX512BF16__)
        if constexpr (kElements == 2) {
          const PairTable pairs(load(weight.levels), scales[i], scales[i + 1]);
          for (int64_t piece = 0; piece < pieces; ++piece) {
            float* target = column_of(word, piece * kMinBlock);
            for (int half = 0; half < 2; ++half) {
              store_word(target + half * kLanes,
                         pairs.at(bytes + piece * kMinBlock / 2, bytes_below + piece * kMinBlock / 2, half));
            }
          }
          continue;
        }
#endif
        const LevelTable table = levels.scaled<T>(scales[i]);
        const LevelTable below = kElements == 1 ? table : levels.scaled<T>(scales[i + 1]);
        for (int64_t piece = 0; piece < pieces; ++piece) {
          decode_piece(table, below, bytes + piece * kMinBlock / 2, bytes_below + piece * kMinBlock / 2,
                       column_of(word, piece * kMinBlock));
        }
      }
    }
  }

  // The same from rows [begin, end) of a dense matrix [.., length], which already lie along the panels'.
  __attribute__((noinline)) static void copy_dense(const void* dense, int64_t length, int64_t begin, int64_t end,
                                                   int64_t first, int64_t last, float* panels) {
    const T* w = static_cast<const T*>(dense) + begin * length + first;
    const int64_t count = end - begin;
    const int64_t columns = last - first;
    for (int64_t i = 0; i < count; i += kElements, w += kElements * length) {
      const bool has_second = kElements == 2 && i + 1 < count;
      float* word = panels + i / kElements * kStrip;
      int64_t column = 0;
      for (; column + kLanes <= columns; column += kLanes) {
        const Floats value = load(w + column);
        if constexpr (kElements == 1) {
          store_word(column_of(word, column), value);
        } else {
          store_word(column_of(word, column), pair_up(value, has_second ? load(w + length + column) : zero()));
        }
      }
      for (; column < columns; ++column) {
        put<T, kElements>(panels, i, column, w[column]);
        if (has_second) {
          put<T, kElements>(panels, i + 1, column, w[length + column]);
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

  // A column group of a block of 256 needs scales that lie beside others: with the first, whole blocks are fetched.
  static PieceFetcher<T> fetcher(const GemmJob& job, const DepthSpan& span, int64_t first, int64_t last,
                                 int64_t parts) {
    const bool is_first = is_gguf(job.weight.type) && first % job.weight.block_size == 0;
    const int64_t length = is_first ? limited(job.k - first, job.weight.block_size) : 0;
    return {
        job,  span.begin * job.k + first, job.k, span.end - span.begin, length > last - first ? length : last - first,
        parts};
  }

  // The same of any weight: a few rows are decoded as they lie, then copied.
  __attribute__((noinline)) static void decode_any(const GemmJob& job, const DepthSpan& span, int64_t first,
                                                   int64_t last, float* panels) {
    constexpr int64_t kRows = 32;
    alignas(64) T rows[size_t{kRows} * kColumnGrain];
    const int64_t columns = last - first;
    for (int64_t i = span.begin; i < span.end; i += kRows, panels += kRows / kElements * kStrip) {
      const int64_t taken = limited(span.end - i, kRows);
      for (int64_t row = 0; row < taken; ++row) {
        const int64_t begin = (i + row) * job.k + first;
        dequantize_span<T>(job.weight, begin, begin + columns, rows + row * columns);
      }
      copy_dense(rows, columns, 0, taken, 0, columns, panels);
    }
  }

  static int64_t adapter_length(const GemmJob& job) { return job.k; }
  static int64_t down_length(const GemmJob& job) { return job.r; }
};

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
