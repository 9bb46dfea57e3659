// Forward products of a few tokens in which rows of W go by as streams: their bytes are decoded in registers, once for
// all tokens. Levels are looked up unscaled, x was put in the order of the decode once a call, and each block's sum is
// scaled in fp32.
#pragma once

#include "core/layout.h"
#include "core/product.h"
#include "cpu/isa/vec.h"
#include "cpu/kernels/gguf-inl.h"
#include "cpu/kernels/kernels.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

constexpr int64_t kMaxTokens = 8;       // of a call
constexpr int64_t kTokensAtOnce = 4;    // for which a row is decoded once
constexpr int64_t kBytesAhead = 16384;  // of W that are called for before they are decoded, at least
constexpr int64_t kMaxRowBlocks = 512;
constexpr int64_t kScalesAtOnce = kStreamRows * kMaxRowBlocks;  // of as many rows as they belong to

// Rows lie one after the other, so what is called for ahead is one stream of lines; it must be ahead of all the rows
// that are read side by side.
inline int64_t bytes_ahead(int64_t row_bytes) {
  return kBytesAhead < kStreamRows * row_bytes ? kStreamRows * row_bytes : kBytesAhead;
}

// The adapter's part of y[token, row]. Out of line: most products have none, and the registers are for their loop.
template <typename T>
__attribute__((noinline)) float adapter_part(const RowsJob& rows, int64_t token, int64_t row) {
  const int64_t r = rows.product.r;
  const T* low = static_cast<const T*>(rows.product.low) + token * r;
  const float* up = rows.up + row * r;
  Floats sums = zero();
  int64_t i = 0;
  for (; i + kLanes <= r; i += kLanes) {
    sums = multiply_add(load(low + i), load(up + i), sums);
  }
  float part = total(sums);
  for (; i < r; ++i) {
    part += to_float(low[i]) * up[i];
  }
  return rows.up_scale * part;
}

// y[token, row] = sum + bias + the adapter's part, rounded once.
template <typename T>
inline void finish_output(const RowsJob& rows, int64_t token, int64_t row, float sum) {
  const ProductJob& job = rows.product;
  if (job.bias != nullptr) {
    sum += to_float(static_cast<const T*>(job.bias)[row]);
  }
  if (job.r > 0) {
    sum += adapter_part<T>(rows, token, row);
  }
  static_cast<T*>(job.y)[token * job.n + row] = from_float<T>(sum);
}

// ---------------------------------------------------------------------------------------------------------------------
// 64 weights of a row, 32 bytes, as vectors of fp32 levels

constexpr int64_t kStreamChunk = 64;

// Vectors of levels from the codes. An instruction set without look-ups of bytes brings a StreamLevels of its own.
#if defined(QLORA_NATIVE_BYTE_LOOK_UPS)

// Tables of bytes, one for each byte of a level: the upper two of levels rounded to bf16 for x in bf16, as a product of
// bf16 operands rounds them, all four for wider x.
template <typename T>
class StreamLevels {
 public:
  explicit StreamLevels(const float* levels) {
    alignas(16) uint8_t bytes[4][16];
    for (int i = 0; i < 16; ++i) {
      const float level = kIsBf16<T> ? to_float(from_float<Bf16>(levels[i])) : levels[i];
      const uint32_t bits = std::bit_cast<uint32_t>(level);
      for (int plane = 0; plane < 4; ++plane) {
        bytes[plane][i] = static_cast<uint8_t>(bits >> 8 * plane);
      }
    }
    for (int plane = 0; plane < 4; ++plane) {
      plane_[plane] = load_table(bytes[plane]);
    }
  }

  template <typename Use>
  void decode(const uint8_t* bytes, const Use& use) const {
    for (int part = 0; part < kParts; ++part) {
      const Bytes raw = load_bytes(bytes + part * static_cast<int>(sizeof(Bytes)));
      decode_codes(high_nibbles(raw), 8 * part, use);
      decode_codes(low_nibbles(raw), 8 * part + 4, use);
    }
  }

  static constexpr int element_of(int slot) {
    const int vector = slot / kLanes;
    const int lane = slot % kLanes;
    const int in_lane = lane % 4;
    const int word = kIsBf16<T> ? 2 * in_lane + vector % 2 : 4 * (vector % 2) + in_lane;
    const int byte = vector / 8 * 16 + lane / 4 * 16 + vector % 4 / 2 * 8 + word;
    return 2 * byte + vector % 8 / 4;  // vectors 4 to 7 of a part are of low nibbles
  }

 private:
  static constexpr int kParts = 32 / static_cast<int>(sizeof(Bytes));

  template <typename Use>
  void decode_codes(Bytes codes, int first, const Use& use) const {
    const Bytes top = look_up(plane_[3], codes);
    const Bytes next = look_up(plane_[2], codes);
    if constexpr (kIsBf16<T>) {
      use(first, even_floats(zip_low(next, top)));
      use(first + 1, odd_floats(zip_low(next, top)));
      use(first + 2, even_floats(zip_high(next, top)));
      use(first + 3, odd_floats(zip_high(next, top)));
    } else {
      const Bytes third = look_up(plane_[1], codes);
      const Bytes last = look_up(plane_[0], codes);
      use(first, first_floats(zip_low(next, top), zip_low(last, third)));
      use(first + 1, last_floats(zip_low(next, top), zip_low(last, third)));
      use(first + 2, first_floats(zip_high(next, top), zip_high(last, third)));
      use(first + 3, last_floats(zip_high(next, top), zip_high(last, third)));
    }
  }

  Bytes plane_[4];
};

#endif

// ---------------------------------------------------------------------------------------------------------------------
// Rows of W side by side

// How a chunk of a row is multiplied with x in T, reordered to X.
template <typename T>
struct Stream {
  using X = float;
  using Table = StreamLevels<T>;
  static constexpr int64_t kChunk = kStreamChunk;

  // x [k] to whole chunks, each in the order of the decode.
  static void reorder(const T* x, int64_t k, X* out) {
    float chunk[kChunk];
    for (int64_t i = 0; i < k; i += kChunk) {
      for (int j = 0; j < kChunk; j += kLanes) {
        store(chunk + j, load(x + i + j));
      }
      for (int j = 0; j < kChunk; ++j) {
        out[i + j] = chunk[Table::element_of(j)];
      }
    }
  }

  // For tokens [token, token + kTokens) and rows [row, row + kStreamRows): x [kTokens, k] reordered, `scales`
  // [kStreamRows, blocks].
  template <int kTokens>
  static void dot_rows(const RowsJob& rows, int64_t token, const X* x, const float* scales, const Table& table,
                       int64_t row) {
    // Two sums of a block where few are on the way at once: enough to hide their latency.
    constexpr int kSums = kTokens == 1 && kLanes < 16 ? 2 : 1;
    const ProductJob& job = rows.product;
    const int64_t k = job.k;
    const int64_t row_bytes = k / 2;
    const int64_t blocks = k / job.weight.block_size;
    const int chunk_to_block = std::countr_zero(static_cast<uint64_t>(job.weight.block_size)) - 6;
    const uint8_t* bytes = job.weight.packed + row * row_bytes;
    const uint8_t* ahead = bytes + bytes_ahead(row_bytes);
    Floats sums[size_t{kTokens}][size_t{kStreamRows}];
    for (auto& of_token : sums) {
      for (Floats& sum : of_token) {
        sum = zero();
      }
    }
    const int64_t chunks = k / kChunk;
    for (int64_t chunk = 0; chunk < chunks; ++chunk, bytes += kChunk / 2, ahead += kStreamRows * kChunk / 2) {
      for (int line = 0; line < kStreamRows * kChunk / 2; line += 64) {
        prefetch_far(ahead + line);
      }
      const float* values = x + chunk * kChunk;
      const float* of_chunk = scales + (chunk >> chunk_to_block);
#pragma GCC unroll 4
      for (int r = 0; r < kStreamRows; ++r) {
        Floats part[size_t{kTokens}][size_t{kSums}];
        table.decode(bytes + r * row_bytes, [&](int v, Floats levels) {
          for (int t = 0; t < kTokens; ++t) {
            const Floats value = load(values + t * k + v * kLanes);
            Floats& sum = part[t][v % kSums];
            sum = v < kSums ? multiply(levels, value) : multiply_add(levels, value, sum);
          }
        });
        const Floats scale = broadcast(of_chunk + r * blocks);
        for (int t = 0; t < kTokens; ++t) {
          const Floats sum = kSums == 2 ? add(part[t][0], part[t][kSums - 1]) : part[t][0];
          sums[t][r] = multiply_add(sum, scale, sums[t][r]);
        }
      }
    }
    float totals[size_t{kTokens}][size_t{kStreamRows}];
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
      for (int r = 0; r < kStreamRows; ++r) {
        totals[t][r] = total(sums[t][r]);
      }
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int r = 0; r < kStreamRows; ++r) {
        finish_output<T>(rows, token + t, row + r, totals[t][r]);
      }
    }
  }
};

#if defined(__AVX512BF16__)

// 128 weights of a row, 64 bytes, are decoded by three shifts and four permutations: word w of the bytes holds elements
// 4 w to 4 w + 3, so every fourth element stands in each vector that comes out. No broadcast: on Zen 4 one of 128 bits
// takes the unit that permutes.
template <>
struct Stream<Bf16> {
  using X = Bf16;
  static constexpr int64_t kChunk = 128;

  struct Table {
    __m512i level;
    explicit Table(const float* levels)
        : level(_mm512_broadcast_i64x4(std::bit_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(levels))))) {}
  };

  static void reorder(const Bf16* x, int64_t k, X* out) {
    alignas(64) static constexpr uint16_t kFourth[32] = {0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60};
    for (int64_t i = 0; i < k; i += kChunk, out += kChunk) {
      const bool whole = k - i >= kChunk;
      __m512i part[4] = {_mm512_loadu_si512(x + i), _mm512_loadu_si512(x + i + 32)};
      part[2] = whole ? _mm512_loadu_si512(x + i + 64) : _mm512_setzero_si512();
      part[3] = whole ? _mm512_loadu_si512(x + i + 96) : _mm512_setzero_si512();
      for (int quarter = 0; quarter < 4; ++quarter) {
        const __m512i places =
            _mm512_add_epi16(_mm512_load_si512(kFourth), _mm512_set1_epi16(static_cast<int16_t>(quarter)));
        const __m512i low = _mm512_permutex2var_epi16(part[0], places, part[1]);
        const __m512i high = _mm512_permutex2var_epi16(part[2], places, part[3]);
        _mm512_storeu_si512(out + quarter * 32, _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1));
      }
    }
  }

  // Out of line: inlined side by side, those of several tokens spill.
  template <int kTokens>
  __attribute__((noinline)) static void dot_rows(const RowsJob& rows, int64_t token, const X* x, const float* scales,
                                                 const Table& table, int64_t row) {
    const ProductJob& job = rows.product;
    const int64_t x_stride = rounded_up(job.k, kChunk);
    const int64_t row_bytes = job.k / 2;
    const uint8_t* bytes = job.weight.packed + row * row_bytes;
    const uint8_t* ahead = bytes + bytes_ahead(row_bytes);
    const int64_t blocks = job.k / job.weight.block_size;
    const int half_to_block = std::countr_zero(static_cast<uint64_t>(job.weight.block_size)) - 6;  // halves are of 64
    __m512 sums[size_t{kTokens}][size_t{kStreamRows}];
    for (auto& of_token : sums) {
      for (__m512& sum : of_token) {
        sum = _mm512_setzero_ps();
      }
    }
    const auto scale_of = [&](int r, int64_t half) {
      return _mm_castps_si128(_mm_load_ss(scales + r * blocks + (half >> half_to_block)));
    };
    // `second`: the half whose scale the upper half of the chunk takes.
    const auto step = [&](int64_t chunk, const __m512i* codes, int64_t second) {
      __m512 part[size_t{kTokens}][size_t{kStreamRows}];
      const Bf16* values = x + chunk * kChunk;
      const auto add_quarter = [&](int quarter, const auto& shifted) {
        for (int r = 0; r < kStreamRows; ++r) {
          const auto w = std::bit_cast<__m512bh>(_mm512_permutexvar_epi16(shifted(codes[r]), table.level));
          for (int t = 0; t < kTokens; ++t) {
            const __m512 before = quarter == 0 ? _mm512_setzero_ps() : part[t][r];
            part[t][r] = _mm512_dpbf16_ps(before, w, Dot<Bf16>::load_operand(values + t * x_stride + quarter * 32));
          }
        }
      };
      add_quarter(0, [](__m512i v) { return _mm512_srli_epi16(v, 4); });
      add_quarter(1, [](__m512i v) { return v; });
      add_quarter(2, [](__m512i v) { return _mm512_srli_epi16(v, 12); });
      add_quarter(3, [](__m512i v) { return _mm512_srli_epi16(v, 8); });
      for (int r = 0; r < kStreamRows; ++r) {
        const __m512i first = _mm512_broadcastd_epi32(scale_of(r, 2 * chunk));
        const __m512 scale = _mm512_castsi512_ps(_mm512_mask_broadcastd_epi32(first, 0xff00, scale_of(r, second)));
        for (int t = 0; t < kTokens; ++t) {
          sums[t][r] = _mm512_fmadd_ps(part[t][r], scale, sums[t][r]);
        }
      }
    };
    const int64_t chunks = job.k / kChunk;
    __m512i codes[size_t{kStreamRows}];
    for (int64_t chunk = 0; chunk < chunks; ++chunk, ahead += kStreamRows * 64) {
      for (int r = 0; r < kStreamRows; ++r) {
        prefetch_far(ahead + 64 * r);
        codes[r] = _mm512_loadu_si512(bytes + r * row_bytes + chunk * 64);
      }
      step(chunk, codes, 2 * chunk + 1);
    }
    if (job.k % kChunk != 0) {  // half a chunk, beside zeros of x
      prefetch_far(ahead);
      for (int r = 0; r < kStreamRows; ++r) {
        const void* from = bytes + r * row_bytes + chunks * 64;
        codes[r] = _mm512_zextsi256_si512(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
      }
      step(chunks, codes, 2 * chunks);
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int r = 0; r < kStreamRows; ++r) {
        finish_output<Bf16>(rows, token + t, row + r, _mm512_reduce_add_ps(sums[t][r]));
      }
    }
  }
};

#endif

// ---------------------------------------------------------------------------------------------------------------------
// The choice between streams and, for a weight in GGUF's blocks, runs (kernels/rows-gguf-inl.h)

inline bool goes_by_runs(const ProductJob& job) { return is_gguf(job.weight.type) && job.k > 0 && job.k % kRun == 0; }

// x [m, k] in fp32, and then the sums of its runs, [m, k / kRun].
inline int64_t run_scratch_bytes(const ProductJob& job) {
  return job.m * (job.k + job.k / kRun) * static_cast<int64_t>(sizeof(float));
}

template <typename T>
void widen_tokens(const ProductJob& job, float* out) {
  const T* x = static_cast<const T*>(job.x);
  float* run_sums = out + job.m * job.k;
  for (int64_t at = 0; at < job.m * job.k; at += kRun, out += kRun) {
    Floats sum = zero();
    for (int i = 0; i < kRun; i += kLanes) {
      const Floats values = load(x + at + i);
      store(out + i, values);
      sum = add(sum, values);
    }
    *run_sums++ = total(sum);
  }
}

inline bool goes_by_streams(const ProductJob& job) {
  const int64_t block_size = job.weight.block_size;
  return !is_gguf(job.weight.type) && job.k > 0 && block_size >= 64 && job.k % block_size == 0 &&
         job.k / block_size <= kMaxRowBlocks;
}

template <typename T>
int64_t stream_scratch_bytes(const ProductJob& job) {
  using S = Stream<T>;
  const int64_t bytes = job.m * rounded_up(job.k, S::kChunk) * static_cast<int64_t>(sizeof(typename S::X));
  return goes_by_streams(job) ? bytes : goes_by_runs(job) ? run_scratch_bytes(job) : 0;
}

template <typename T>
void reorder_tokens(const ProductJob& job, void* reordered) {
  using S = Stream<T>;
  auto* out = static_cast<typename S::X*>(reordered);
  if (goes_by_runs(job)) {
    widen_tokens<T>(job, static_cast<float*>(reordered));
  }
  for (int64_t token = 0; goes_by_streams(job) && token < job.m; ++token) {
    S::reorder(static_cast<const T*>(job.x) + token * job.k, job.k, out + token * rounded_up(job.k, S::kChunk));
  }
}

// Rows [first, last) as far as they come in multiples of kStreamRows; returns the first row that is left.
template <typename T>
int64_t linear_rows_by_streams(const RowsJob& rows, int64_t first, int64_t last) {
  using S = Stream<T>;
  const ProductJob& job = rows.product;
  const typename S::Table table(job.weight.levels);
  const ScaleDecoder decode_scales_of(job.weight);
  alignas(64) float scales[kScalesAtOnce];
  const auto* reordered = static_cast<const typename S::X*>(rows.reordered);
  const int64_t blocks = job.k / job.weight.block_size;
  const int64_t rows_at_once = kScalesAtOnce / blocks / kStreamRows * kStreamRows;
  const int64_t end = first + (last - first) / kStreamRows * kStreamRows;
  for (int64_t begin = first; begin < end; begin += rows_at_once) {
    const int64_t stop = end - begin < rows_at_once ? end : begin + rows_at_once;
    decode_scales_of(begin * blocks, stop * blocks, scales);
    for (int64_t row = begin; row < stop; row += kStreamRows) {
      const float* of_row = scales + (row - begin) * blocks;
      for (int64_t token = 0; token < job.m; token += kTokensAtOnce) {
        const typename S::X* x = reordered + token * rounded_up(job.k, S::kChunk);
        switch (job.m - token) {
          case 1:
            S::template dot_rows<1>(rows, token, x, of_row, table, row);
            break;
          case 2:
            S::template dot_rows<2>(rows, token, x, of_row, table, row);
            break;
          case 3:
            S::template dot_rows<3>(rows, token, x, of_row, table, row);
            break;
          default:
            S::template dot_rows<kTokensAtOnce>(rows, token, x, of_row, table, row);
        }
      }
    }
  }
  return end;
}

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
