// Panels of weights in GGUF's blocks, and the choice of how columns come to panels.
#pragma once

#include "cpu/kernels-gemm-operands-inl.h"
#include "cpu/kernels-gguf-inl.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

constexpr int64_t kPieceRuns = 2;  // of a row that are decoded at a time
constexpr int64_t kPieceElements = kPieceRuns * kRun;
static_assert(kPieceElements == kColumnGrain);

// Every row and every span of it begins at a run.
inline bool has_runs(const GemmJob& job) { return is_gguf(job.weight.type) && job.k % kRun == 0; }

// A panel of kStrip rows of W whose words are fp32: pieces of kLanes rows are decoded and transposed.
template <typename T>
__attribute__((noinline)) void gguf_panel(const Forward<T>&, const GemmJob& job, const DepthSpan& span, int64_t first,
                                          int64_t last, float* panel) {
  alignas(64) float rows[size_t{kLanes}][size_t{kPieceElements}];
  const DecodeRuns decode = run_decoder(job.weight.type);
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

// Rows of W already lie along the panels'. `first` is a multiple of kColumnGrain.
template <typename T>
__attribute__((noinline)) void gguf_panel(const GradInput<T>&, const GemmJob& job, const DepthSpan& span, int64_t first,
                                          int64_t last, float* panels) {
  constexpr int kElements = WordProduct<T>::kElements;
  alignas(64) float rows[size_t{kElements}][size_t{kPieceElements}];
  const DecodeRuns decode = run_decoder(job.weight.type);
  for (int64_t row = span.begin; row < span.end; row += kElements, panels += kStrip) {
    for (int64_t below = 0; below < kElements; ++below) {
      if (row + below < span.end) {
        decode(job.weight.packed, (row + below) * job.k + first, (last - first) / kRun, rows[below]);
      } else {
        std::memset(rows[below], 0, sizeof rows[below]);  // meets a zero, and must be finite for that
      }
    }
    for (int64_t i = 0; i < last - first; i += kLanes) {
      if constexpr (kElements == 1) {
        store_word(column_of(panels, i), round_through<T>(load(rows[0] + i)));
      } else {
        store_word(column_of(panels, i), rounded_pair(load(rows[0] + i), load(rows[1] + i)));
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
