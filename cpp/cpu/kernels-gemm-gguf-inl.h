// Panels of weights in GGUF's blocks, and the choice of how columns come to panels.
#pragma once

#include "cpu/kernels-gemm-operands-inl.h"
#include "cpu/kernels-gguf-inl.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

constexpr int64_t kPieceRuns = 4;  // of a row that are decoded at a time
constexpr int64_t kPieceElements = kPieceRuns * kRun;

// Every row and every span of it begins at a run.
inline bool has_runs(const GemmJob& job) { return is_gguf(job.weight.type) && job.k % kRun == 0; }

// A panel of kStrip rows of W whose words are fp32: pieces of kLanes rows are decoded and transposed.
template <typename T>
__attribute__((noinline)) void gguf_panel(const Forward<T>&, const GemmJob& job, const DepthSpan& span, int64_t first,
                                          int64_t last, float* panel) {
  alignas(64) float rows[size_t{kLanes}][size_t{kPieceElements}];
  const DecodeRuns<float> decode = run_decoder(job.weight.type);
  const int64_t taken = limited(last - first, kStrip);
  for (int64_t v = 0; v < taken; v += kLanes) {
    float* target = panel + v;
    for (int64_t at = span.begin; at < span.end; at += kPieceElements) {
      const int64_t runs = limited(kPieceRuns, (span.end - at) / kRun);
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t row = first + limited(v + lane, taken - 1);
        decode(job.weight.packed, row * job.k + at, runs, rows[lane]);
      }
      for (int64_t i = 0; i < runs * kRun; i += kLanes, target += kLanes * kStrip) {
        Floats words[kLanes];
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes; ++lane) {
          words[lane] = round_through<T>(load(rows[lane] + i));
        }
        transpose(words);
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes; ++lane) {
          store(target + lane * kStrip, words[lane]);
        }
      }
    }
  }
}

// Words of two rows, of elements [i, i + kLanes) each.
#if defined(__AVX512BF16__)
using PairedRow = Bf16;
inline DecodeRuns<Bf16> pair_decoder(QuantType type) { return run_decoder_to_bf16(type); }
inline Floats paired(const Bf16* even, const Bf16* odd) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)));
  return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
#else
using PairedRow = float;
inline DecodeRuns<float> pair_decoder(QuantType type) { return run_decoder(type); }
inline Floats paired(const float* even, const float* odd) {
  return pair_up(round_through<Bf16>(load(even)), round_through<Bf16>(load(odd)));
}
#endif

// Rows of W already lie along the panels'. `first` is a multiple of kColumnGrain.
template <typename T>
__attribute__((noinline)) void gguf_panel(const GradInput<T>&, const GemmJob& job, const DepthSpan& span, int64_t first,
                                          int64_t last, float* panels) {
  const int64_t runs = (last - first) / kRun;
  if constexpr (WordProduct<T>::kElements == 1) {
    alignas(64) float values[kColumnGrain];
    const DecodeRuns<float> decode = run_decoder(job.weight.type);
    for (int64_t row = span.begin; row < span.end; ++row, panels += kStrip) {
      decode(job.weight.packed, row * job.k + first, runs, values);
      for (int64_t i = 0; i < last - first; i += kLanes) {
        store_word(column_of(panels, i), round_through<T>(load(values + i)));
      }
    }
  } else {
    alignas(64) PairedRow values[2][kColumnGrain] = {};
    const DecodeRuns<PairedRow> decode = pair_decoder(job.weight.type);
    for (int64_t row = span.begin; row < span.end; row += 2, panels += kStrip) {
      decode(job.weight.packed, row * job.k + first, runs, values[0]);
      if (row + 1 < span.end) {
        decode(job.weight.packed, (row + 1) * job.k + first, runs, values[1]);
      } else {
        std::memset(values[1], 0, sizeof values[1]);  // meets a zero, and must be finite for that
      }
      for (int64_t i = 0; i < last - first; i += kLanes) {
        store_word(column_of(panels, i), paired(values[0] + i, values[1] + i));
      }
    }
  }
}

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

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
