// The forward product in bf16 where the CPU has a dot product of bf16 pairs (AVX512-BF16): y = x W^T, straight from the
// packed bytes, with no transposition.
//
// A vector of the panel holds 8 weights of each of 4 rows of W, a quarter of the vector a row: 16 bytes of each row, a
// shift, and a lookup in the four rows' tables of scaled levels. A table is 16 products rounded to bf16, the exact
// rule, made once for a block. x is packed in the order of the reduction that this decode leaves, and broadcast by
// quarters. A register of sums holds four partial sums of each of 4 outputs, which are added up when a span ends.
//
// Spans of the depth and the order within them are as in kernels/gemm-inl.h: they depend on K and r alone, so any
// number of threads gives the same bits.
#pragma once

#include "cpu/kernels/outer-inl.h"

#if defined(__AVX512BF16__)

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

constexpr int kQuads = 4;               // vectors of 4 rows in a strip
constexpr int kQuadStrip = 4 * kQuads;  // rows of W, columns of y
constexpr int kQuadRows = 6;            // rows of x in a tile: 6 x 4 sums, 4 vectors of the panel, 1 of x
constexpr int64_t kStepElements = 8;    // of the depth that a vector holds of each row
constexpr int64_t kGroupElements = 32;  // of the depth that 16 packed bytes hold
constexpr int64_t kSpanBlocks = kSpan * 2 / kGroupElements;
constexpr int64_t kPackedElements = 1 << 18;      // of x that stay in the second cache while W passes by
constexpr int64_t kQuadTokens = 256;              // rows of x up to which a short depth goes by quads
constexpr int64_t kQuadDepth = 2048;              // beyond both the pairs of kernels/gemm-inl.h are as fast
constexpr int64_t kQuadSpan = kSpanCapacity * 2;  // elements of a span, its adapter included, at most

inline int64_t steps_of(const DepthSpan& span) {
  return ceil_div(span.end - span.begin, kStepElements) + ceil_div(span.low_end - span.low_begin, kStepElements);
}

// Four vectors of sums, each with four partial sums of rows 4 i + v in quarter i, to the 16 sums in the order of rows.
inline Floats quads_total(Floats a, Floats b, Floats c, Floats d) {
  const Floats ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const Floats cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  return add(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
}

// Cache lines to ask for while a product runs, one a step at most: a burst would fill the buffers of outstanding misses
// that x needs to come from the second cache.
struct Fetches {
  const uint8_t* const* lines;
  uint32_t position;  // in 1/65536 of a line
  uint32_t pace;      // the same a step
};

// sums [kRows][16] (+)= x [steps][kRows][8] times a panel [steps][kQuads][4 rows][8].
template <int kRows>
void quad_tile(const Bf16* x, const Bf16* panel, int64_t steps, bool adds, float* sums, Fetches fetches) {
  Floats sum[size_t{kRows}][size_t{kQuads}];
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row) {
    prefetch(sums + row * kQuadStrip);
#pragma GCC unroll 4
    for (int v = 0; v < kQuads; ++v) {
      sum[row][v] = zero();
    }
  }
  for (int64_t i = 0; i < steps; ++i, x += kRows * kStepElements, panel += kQuadStrip * kStepElements) {
    prefetch(fetches.lines[fetches.position >> 16]);
    fetches.position += fetches.pace;
    __m512bh w[kQuads];
#pragma GCC unroll 4
    for (int v = 0; v < kQuads; ++v) {
      w[v] = std::bit_cast<__m512bh>(_mm512_load_si512(panel + v * 32));
    }
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) {
      const __m128i piece = _mm_load_si128(reinterpret_cast<const __m128i*>(x + row * kStepElements));
      const __m512bh quarters = std::bit_cast<__m512bh>(_mm512_broadcast_i32x4(piece));
#pragma GCC unroll 4
      for (int v = 0; v < kQuads; ++v) {
        sum[row][v] = _mm512_dpbf16_ps(sum[row][v], w[v], quarters);
      }
    }
  }
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row) {
    const Floats total = quads_total(sum[row][0], sum[row][1], sum[row][2], sum[row][3]);
    float* target = sums + row * kQuadStrip;
    store(target, adds ? add(load(target), total) : total);
  }
}

using QuadTile = void (*)(const Bf16* x, const Bf16* panel, int64_t steps, bool adds, float* sums, Fetches fetches);
constexpr QuadTile kQuadTiles[kQuadRows] = {quad_tile<1>, quad_tile<2>, quad_tile<3>,
                                            quad_tile<4>, quad_tile<5>, quad_tile<6>};

// ---------------------------------------------------------------------------------------------------------------------
// Packing and decoding

// One row of a tile of `rows`: out [steps][rows][8].
inline void pack_quads(const Bf16* x, const Bf16* low, const DepthSpan& span, int64_t rows, Bf16* out) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 4, 8,  12, 16, 20, 24, 28, 1, 5, 9,  13, 17, 21, 25, 29,
                                                      2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31};
  const __m512i order = _mm512_load_si512(kOrder);
  const auto put_step = [&](__m128i step) {
    _mm_store_si128(reinterpret_cast<__m128i*>(out), step);
    out += rows * kStepElements;
  };
  for (int64_t i = span.begin; i < span.end; i += kGroupElements) {
    const __m512i group = _mm512_permutexvar_epi16(order, _mm512_loadu_si512(x + i));
    put_step(_mm512_castsi512_si128(group));
    put_step(_mm512_extracti32x4_epi32(group, 1));
    put_step(_mm512_extracti32x4_epi32(group, 2));
    put_step(_mm512_extracti32x4_epi32(group, 3));
  }
  for (int64_t i = span.low_begin; i < span.low_end; i += kStepElements) {
    const auto filled = static_cast<__mmask8>((1u << limited(span.low_end - i, kStepElements)) - 1u);
    put_step(_mm_maskz_loadu_epi16(filled, low + i));
  }
}

// The adapter's part of 16 columns of y.
inline void put_adapter_quads(const GemmJob& job, const DepthSpan& span, int64_t first, int64_t last, Bf16* panel) {
  const Bf16* up = static_cast<const Bf16*>(job.up);
  panel += ceil_div(span.end - span.begin, kStepElements) * kQuadStrip * kStepElements;
  for (int64_t i = span.low_begin; i < span.low_end; i += kStepElements, panel += kQuadStrip * kStepElements) {
    const auto filled = static_cast<__mmask8>((1u << limited(span.low_end - i, kStepElements)) - 1u);
    for (int row = 0; row < kQuadStrip; ++row) {
      const __m128i piece = _mm_maskz_loadu_epi16(filled, up + limited(first + row, last - 1) * job.r + i);
      _mm_store_si128(reinterpret_cast<__m128i*>(panel + row % 4 * 32 + row / 4 * kStepElements), piece);
    }
  }
}

// The scales of blocks [first, first + blocks) of a row. What is looked up is put together in a register: vectors read
// back from single stores would wait for all stores to the panel before them.
inline void quad_scales(const WeightView& weight, int64_t first, int64_t blocks, float* scales) {
  if (weight.absmax != nullptr) {
    std::memcpy(scales, weight.absmax + first, static_cast<size_t>(blocks) * sizeof(float));
    return;
  }
  constexpr int64_t kLanes = 8;
  const __m256 offset = _mm256_set1_ps(*weight.nested_offset);
  for (int64_t block = 0; block < blocks; block += kLanes) {
    const int64_t begin = first + block;
    const int64_t count = limited(kLanes, blocks - block);
    uint64_t codes = 0;
    if (count == kLanes) {
      std::memcpy(&codes, weight.absmax_codes + begin, sizeof(codes));
    } else {
      for (int64_t i = 0; i < count; ++i) {
        codes |= static_cast<uint64_t>(weight.absmax_codes[begin + i]) << (8 * i);
      }
    }
    const auto code = [&](int i) { return weight.nested_code[(codes >> (8 * i)) & 255]; };
    const __m256 value = _mm256_setr_ps(code(0), code(1), code(2), code(3), code(4), code(5), code(6), code(7));
    const uint64_t group = static_cast<uint64_t>(begin) / kNestedBlock;
    __m256 nested = _mm256_set1_ps(weight.nested_absmax[group]);
    if (static_cast<uint64_t>(begin + count - 1) / kNestedBlock != group) {
      const auto later = static_cast<__mmask8>(0xffu << (kNestedBlock - static_cast<uint64_t>(begin) % kNestedBlock));
      nested = _mm256_mask_blend_ps(later, nested, _mm256_set1_ps(weight.nested_absmax[group + 1]));
    }
    _mm256_storeu_ps(scales + block, _mm256_add_ps(_mm256_mul_ps(value, nested), offset));
  }
}

// 16 rows of W from `first`, the last of them again beyond `last`, to a panel, a piece of kGroups groups at a time that
// lies in one block.
template <int kGroups>
__attribute__((noinline)) void decode_quads(const GemmJob& job, const DepthSpan& span, int64_t first, int64_t last,
                                            Bf16* panel) {
  const WeightView weight = job.weight;  // a copy, which stores to the panel cannot change
  const int shift = std::countr_zero(static_cast<uint64_t>(weight.block_size));
  constexpr int64_t kPiece = kGroups * kGroupElements;
  const int64_t pieces = (span.end - span.begin) / kPiece;
  const int pieces_of_block = shift - std::countr_zero(static_cast<uint64_t>(kPiece));  // in powers of 2
  const int64_t blocks = ((pieces - 1) >> pieces_of_block) + 1;
  const Floats levels = load(weight.levels);
  const __m512i nibble = _mm512_set1_epi16(15);
  // Which of the four tables of 16 entries.
  const __m512i quarter = _mm512_set_epi64(0x0030003000300030, 0x0030003000300030, 0x0020002000200020,
                                           0x0020002000200020, 0x0010001000100010, 0x0010001000100010, 0, 0);
  for (int v = 0; v < kQuads; ++v) {
    alignas(64) float scales[4][kSpanBlocks];
    const uint8_t* rows[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int64_t element = limited(first + v + 4 * i, last - 1) * job.k + span.begin;
      rows[i] = weight.packed + element / 2;
      quad_scales(weight, element >> shift, blocks, scales[i]);
    }
    Bf16* out = panel + v * 32;
    const uint8_t* row0 = rows[0];
    const uint8_t* row1 = rows[1];
    const uint8_t* row2 = rows[2];
    const uint8_t* row3 = rows[3];
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t block = piece >> pieces_of_block;
      const __m512i low = PairTable(levels, scales[0][block], scales[1][block]).level;
      const __m512i high = PairTable(levels, scales[2][block], scales[3][block]).level;
      const auto put_step = [&](int64_t step, __m512i codes) {
        const __m512i index = _mm512_ternarylogic_epi32(codes, nibble, quarter, 0xea);  // (codes & nibble) | quarter
        _mm512_store_si512(out + step * (kQuadStrip * kStepElements), _mm512_permutex2var_epi16(low, index, high));
      };
#pragma GCC unroll 2
      for (int group = 0; group < kGroups; ++group) {
        const auto bytes = [&](const uint8_t* row) {
          return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + group * (kGroupElements / 2)));
        };
        __m512i codes = _mm512_castsi128_si512(bytes(row0));
        codes = _mm512_inserti32x4(codes, bytes(row1), 1);
        codes = _mm512_inserti32x4(codes, bytes(row2), 2);
        codes = _mm512_inserti32x4(codes, bytes(row3), 3);
        put_step(group * 4, _mm512_srli_epi16(codes, 4));
        put_step(group * 4 + 1, codes);
        put_step(group * 4 + 2, _mm512_srli_epi16(codes, 12));
        put_step(group * 4 + 3, _mm512_srli_epi16(codes, 8));
      }
      row0 += kPiece / 2;
      row1 += kPiece / 2;
      row2 += kPiece / 2;
      row3 += kPiece / 2;
      out += kPiece * kQuadStrip;
    }
  }
}

// A run of each of two rows of W in GGUF's blocks, a half of a vector each.
template <QuantType kType>
class TwoRuns {
 public:
  TwoRuns(const RunPlace& at, const RunPlace& below, const BlockScales<kType>* scales) {
    RunCodes codes[2];
    unpack_run<kType>(at, codes[0]);
    unpack_run<kType>(below, codes[1]);
    codes_ = _mm512_inserti64x4(_mm512_castsi256_si512(std::bit_cast<__m256i>(codes[0].all)),
                                std::bit_cast<__m256i>(codes[1].all), 1);
    const auto spread = [&](auto member) {  // of each half of a run
      const auto of_row = [&](const BlockScales<kType>& row, unsigned run) {
        const float first = row.at(2 * run).*member;
        return kType == QuantType::kQ6_K ? _mm256_set_m128(_mm_set1_ps(row.at(2 * run + 1).*member), _mm_set1_ps(first))
                                         : _mm256_set1_ps(first);
      };
      return _mm512_castsi512_ps(
          _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_castps_si256(of_row(scales[0], at.run))),
                             _mm256_castps_si256(of_row(scales[1], below.run)), 1));
    };
    factor_ = spread(&GgufScale::factor);
    if constexpr (Gguf<kType>::kAdds) {
      addend_ = spread(&GgufScale::addend);
    }
  }

  // Elements kByte, kByte + 4, ..., of each row 8.
  template <int kByte>
  Floats values() const {
    const Floats codes = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(codes_, 24 - 8 * kByte), 24));
    return Gguf<kType>::kAdds ? multiply_add(codes, factor_, addend_) : multiply(codes, factor_);
  }

 private:
  __m512i codes_;
  Floats factor_;
  Floats addend_;
};

// The same of GGUF's blocks.
template <QuantType kType, bool kWhole>
__attribute__((noinline)) void decode_quads_of_runs(const GemmJob& job, const DepthSpan& span, int64_t first,
                                                    int64_t last, Bf16* panel) {
  constexpr unsigned kTaken = kWhole ? kRunsOfBlock<kType> : 1;
  for (int v = 0; v < kQuads; ++v) {
    Bf16* out = panel + v * 32;
    RunPlace at[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      at[i] = run_at<kType>(job.weight.packed, limited(first + v + 4 * i, last - 1) * job.k + span.begin);
    }
    for (int64_t left = (span.end - span.begin) / kRun; left > 0; left -= kTaken) {
      const BlockScales<kType> scales[4] = {BlockScales<kType>(at[0].block), BlockScales<kType>(at[1].block),
                                            BlockScales<kType>(at[2].block), BlockScales<kType>(at[3].block)};
#pragma GCC unroll 8
      for (unsigned run = 0; run < kTaken; ++run) {
        const auto run_of = [&](int i) { return RunPlace{at[i].block, kWhole ? run : at[i].run}; };
        const TwoRuns<kType> low(run_of(0), run_of(1), scales);
        const TwoRuns<kType> high(run_of(2), run_of(3), scales + 2);
        const auto put_step = [&]<int kByte>() {
          const __m512bh quads = _mm512_cvtne2ps_pbh(high.template values<kByte>(), low.template values<kByte>());
          _mm512_store_si512(out + kByte * (kQuadStrip * kStepElements), std::bit_cast<__m512i>(quads));
        };
        put_step.template operator()<0>();
        put_step.template operator()<1>();
        put_step.template operator()<2>();
        put_step.template operator()<3>();
        out += 4 * kQuadStrip * kStepElements;
      }
#pragma GCC unroll 4
      for (RunPlace& row : at) {
        row.run += kTaken;
        if (kWhole || row.run == kRunsOfBlock<kType>) {
          row = {row.block + kBlockFormat<kType>.bytes, 0};
        }
      }
    }
  }
}

// 16 rows of W from `first`, the last of them again beyond `last`, to a panel.
inline void decode_strip(const GemmJob& job, const DepthSpan& span, int64_t first, int64_t last, Bf16* panel) {
  if (is_gguf(job.weight.type)) {
    with_gguf(job.weight.type, [&]<QuantType kType>() {
      const bool whole = kRunsOfBlock<kType> == 1 || has_whole_rows<kType>(job.k);
      (whole ? decode_quads_of_runs<kType, true>
             : decode_quads_of_runs<kType, kRunsOfBlock<kType> == 1>)(job, span, first, last, panel);
    });
  } else {
    (job.weight.block_size == kGroupElements ? decode_quads<1> : decode_quads<2>)(job, span, first, last, panel);
  }
}

constexpr int64_t kFetchTiles = 4;  // the last tiles of a span, which fetch the next panel's bytes
constexpr int64_t kFetchLines = kSpan * 2 / kElementsOfLine + 1;  // cache lines of a row in a span and of its scales
constexpr int64_t kGgufFetchLines = 10;                           // the same of the widest of GGUF's blocks

inline int64_t fetch_lines(const GemmJob& job) {
  return is_gguf(job.weight.type) ? ceil_div(kSpan * 2, elements_of_line<Bf16>(job)) : kFetchLines;
}

// The lines that decoding 16 rows from `first` will read, kFetchLines a row: those that the last bytes of each stretch
// lie in, since the first ones came with the stretch before, and the one where the scales begin.
inline void fetch_quads(const GemmJob& job, const DepthSpan& span, int64_t first, int64_t last, const uint8_t** lines) {
  const int shift = std::countr_zero(static_cast<uint64_t>(job.weight.block_size));
  const int64_t count = fetch_lines(job);
  const int64_t of_line = elements_of_line<Bf16>(job);
  for (int row = 0; row < kQuadStrip; ++row) {
    const int64_t element = limited(first + row, last - 1) * job.k;
    if (is_gguf(job.weight.type)) {
      for (int64_t line = 1; line <= count; ++line) {
        *lines++ = bytes_at<Bf16>(job, element + limited(span.end, span.begin + line * of_line) - 1);
      }
      continue;
    }
    for (int64_t line = 1; line < kFetchLines; ++line) {
      const int64_t end = limited(span.end, span.begin + line * kElementsOfLine);
      *lines++ = job.weight.packed + (element + end - 1) / 2;
    }
    const int64_t block = (element + span.begin) >> shift;
    *lines++ = job.weight.absmax == nullptr ? job.weight.absmax_codes + block
                                            : reinterpret_cast<const uint8_t*>(job.weight.absmax + block);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The product

inline int64_t spans_at_once(int64_t rows) {
  const int64_t spans = kPackedElements / (rows * kSpan * 2);
  return spans < 1 ? 1 : spans;
}

inline bool goes_by_quads(const GemmJob& job) {
  if (has_runs(job)) {
    return job.forward && job.dense == nullptr && job.k > 0;
  }
  return job.forward && job.dense == nullptr && !is_gguf(job.weight.type) && job.scale == 1.0f && job.k > 0 &&
         (job.m <= kQuadTokens || job.k >= kQuadDepth) && job.weight.block_size >= kGroupElements &&
         job.k % job.weight.block_size == 0;
}

inline void write_quads(const float* sums, int64_t rows, int64_t columns, const Bf16* bias, Bf16* y, int64_t stride) {
  const auto filled = static_cast<__mmask16>((1u << columns) - 1u);
  Floats addend = zero();
  if (bias != nullptr) {
    const __m256i bits = _mm256_maskz_loadu_epi16(filled, bias);
    addend = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  for (int64_t row = 0; row < rows; ++row, sums += kQuadStrip, y += stride) {
    const Floats value = bias == nullptr ? load(sums) : add(load(sums), addend);
    _mm256_mask_storeu_epi16(y, filled, round_to_bf16(value));
  }
}

// Packs rows [first, last) of x for a span: out [tiles][steps][rows of a tile][8], kQuadSpan for each row.
inline void pack_quad_rows(const GemmJob& job, const DepthSpan& span, int64_t first, int64_t last, Bf16* out) {
  const Bf16* x = static_cast<const Bf16*>(job.x);
  const Bf16* low = static_cast<const Bf16*>(job.low);
  for (int64_t row = first; row < last; ++row) {
    constexpr int64_t kAhead = 8;  // rows; a piece of a row is too short for the hardware to foresee the next
    const Bf16* ahead = x + limited(row + kAhead, last - 1) * job.k;
    for (int64_t i = span.begin; i < span.end; i += 32) {
      prefetch(ahead + i);
    }
    const int64_t top = (row - first) / kQuadRows * kQuadRows;
    const int64_t rows = limited(kQuadRows, last - first - top);
    pack_quads(x + row * job.k, low + row * job.r, span, rows,
               out + top * kQuadSpan + (row - first - top) * kStepElements);
  }
}

// Scratch: a panel [kQuadSpan][kQuadStrip], packed rows [spans of a group][rows][kQuadSpan], sums [strips][rows]
// [kQuadStrip].
inline void quad_unit(const GemmJob& job, const GemmUnit& unit, void* scratch) {
  const Depth<2> depth{job.k, job.low == nullptr ? 0 : job.r};
  const int64_t first = unit.first_column;
  const int64_t last = unit.last_column;
  const int64_t rows = unit.last_row - unit.first_row;
  if (rows == 0) {
    return;
  }
  const int64_t tiles = ceil_div(rows, kQuadRows);
  Bf16* panel = static_cast<Bf16*>(scratch);
  const uint8_t* lines[kQuadStrip * kGgufFetchLines];
  const int64_t line_count = kQuadStrip * fetch_lines(job);
  const int64_t fetching = limited(tiles, kFetchTiles);
  const int64_t spans = depth.spans();
  const int64_t at_once = limited(spans, spans_at_once(rows));
  Bf16* packed = panel + kQuadStrip * kQuadSpan;
  float* all_sums = reinterpret_cast<float*>(packed + at_once * rows * kQuadSpan);
  const Bf16* bias = static_cast<const Bf16*>(job.bias);
  Bf16* y = static_cast<Bf16*>(job.y) + unit.first_row * job.n;
  for (int64_t group = 0; group < spans; group += at_once) {
    const int64_t end = limited(group + at_once, spans);
    for (int64_t index = group; index < end; ++index) {
      pack_quad_rows(job, depth.span(index), unit.first_row, unit.last_row,
                     packed + (index - group) * rows * kQuadSpan);
    }
    for (int64_t column = first; column < last; column += kQuadStrip) {
      const int64_t stop = limited(last, column + kQuadStrip);
      float* sums = all_sums + (at_once == spans ? 0 : (column - first) / kQuadStrip * rows * kQuadStrip);
      for (int64_t index = group; index < end; ++index) {
        const DepthSpan span = depth.span(index);
        if (span.begin < span.end) {
          decode_strip(job, span, column, stop, panel);
        }
        put_adapter_quads(job, span, column, stop, panel);
        // The bytes of the next panel are fetched under the multiplication.
        const bool wraps = index + 1 == end;
        const int64_t next = wraps ? column + kQuadStrip : column;
        const DepthSpan next_span = depth.span(wraps ? group : index + 1);
        const Bf16* x = packed + (index - group) * rows * kQuadSpan;
        const int64_t steps = steps_of(span);
        fetch_quads(job, next_span, limited(next, job.n - 1), job.n, lines);
        const auto pace = static_cast<uint32_t>(line_count * 65536 / (fetching * steps));
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t begin = t * kQuadRows;
          const int64_t count = limited(kQuadRows, rows - begin);
          // Before the last tiles, what they would fetch would be pushed out of the first cache again.
          const int64_t turn = t - (tiles - fetching);
          const Fetches fetches{lines, turn < 0 ? 0 : static_cast<uint32_t>(turn * steps) * pace, turn < 0 ? 0 : pace};
          float* target = sums + begin * kQuadStrip;
          kQuadTiles[count - 1](x + begin * kQuadSpan, panel, steps, index > 0, target, fetches);
          if (index == spans - 1) {
            write_quads(target, count, stop - column, bias == nullptr ? nullptr : bias + column,
                        y + begin * job.n + column, job.n);
          }
        }
      }
    }
  }
}

void product_bf16(const GemmJob& job, const GemmUnit& unit, void* scratch) {
  (goes_by_quads(job) ? quad_unit : gemm_product<Bf16>)(job, unit, scratch);
}
int64_t unit_bytes_bf16(const GemmJob& job, int64_t rows, int64_t columns) {
  if (!goes_by_quads(job)) {
    return gemm_unit_bytes(job, rows, columns);
  }
  const Depth<2> depth{job.k, job.low == nullptr ? 0 : job.r};
  // A group of fewer rows may have more spans.
  const int64_t packed = limited(rows * depth.spans(), kPackedElements / (kSpan * 2) + rows);
  const int64_t elements = (kQuadStrip + packed) * kQuadSpan;
  return rounded_up(2 * elements + 4 * rows * rounded_up(columns, kColumnGrain), 64);
}
bool makes_low_bf16(const GemmJob& job) { return !goes_by_quads(job) && gemm_makes_low(job); }

constexpr GemmKernels kGemmBf16 = {product_bf16, unit_bytes_bf16, makes_low_bf16, outer_columns<Bf16>,
                                   outer_unit_bytes};

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE

#endif
