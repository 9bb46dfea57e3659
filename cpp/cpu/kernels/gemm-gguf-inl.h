// Panels of weights in GGUF's blocks.
#pragma once

#include "cpu/kernels/gemm-operands-inl.h"
#include "cpu/kernels/gguf-inl.h"

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

// Words of two rows' values, for products whose sums round as well.
#if defined(__AVX512BF16__)
template <QuantType kType>
inline Floats values_for_pairs(Floats codes, const GgufScale& scale) {  // product and addend are one operation
  return Gguf<kType>::kAdds ? multiply_add(codes, all(scale.factor), all(scale.addend))
                            : multiply(codes, all(scale.factor));
}
inline Floats paired(Floats even, Floats odd) {
  const __m512i order =
      _mm512_set_epi64(0x001f000f001e000e, 0x001d000d001c000c, 0x001b000b001a000a, 0x0019000900180008,
                       0x0017000700160006, 0x0015000500140004, 0x0013000300120002, 0x0011000100100000);
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even))));
}
#else
template <QuantType kType>
inline Floats values_for_pairs(Floats codes, const GgufScale& scale) {
  return exact_values<kType>(codes, scale);
}
inline Floats paired(Floats even, Floats odd) { return pair_up(round_through<Bf16>(even), round_through<Bf16>(odd)); }
#endif

// Rows of W already lie along the panels'. `first` is a multiple of kColumnGrain, and kFirstRun its place in the block
// of every row; or rows begin inside of blocks, if it is negative.
template <typename T, QuantType kType, int kFirstRun>
__attribute__((noinline)) void gguf_rows(const GemmJob& job, const DepthSpan& span, int64_t first, int64_t last,
                                         float* panels) {
  static constexpr uint8_t kZeros[size_t{kBlockFormat<kType>.bytes}] = {};
  constexpr bool kInBlock = kFirstRun >= 0 && kRunsOfBlock<kType> > 1;  // the runs of all columns lie in one block
  constexpr unsigned kFixedRun = kFirstRun < 0 ? 0 : kFirstRun;
  constexpr int64_t kAhead = 8;  // rows, each of which lies in other pages
  constexpr int64_t kBytes = kBlockFormat<kType>.bytes;
  const uint8_t* packed = job.weight.packed;
  const int64_t k = job.k;
  const int64_t runs = (last - first) / kRun;
  for (int64_t row = span.begin; row < span.end; row += WordProduct<T>::kElements, panels += kStrip) {
    for (int64_t begin = 0; begin < runs; begin += kInBlock ? runs : 1) {
      const auto place = [&](int64_t of_row) {
        const RunPlace at = run_at<kType>(packed, of_row * k + first + begin * kRun);
        const uint8_t* ahead = at.block + kAhead * k / kBlockFormat<kType>.elements * kBytes;
        for (int64_t line = 0; line < kBytes + 63; line += 64) {
          prefetch(ahead + limited(line, kBytes - 1));
        }
        return kFirstRun >= 0 ? RunPlace{at.block, kFixedRun} : at;
      };
      const RunPlace at = place(row);
      const BlockScales<kType> scales(at.block);
      // What a last row has below it meets a zero, and must be finite for that.
      const bool has_below = WordProduct<T>::kElements == 2 && row + 1 < span.end;
      const RunPlace below = has_below ? place(row + 1) : RunPlace{kZeros, kFixedRun};
      [[maybe_unused]] const BlockScales<kType> scales_below(below.block);
#pragma GCC unroll 2
      for (unsigned i = 0; i < (kInBlock ? kColumnGrain / kRun : 1); ++i) {
        if (begin + i >= runs) {
          break;
        }
        float* words = column_of(panels, (begin + i) * kRun);
        const auto put = [&](int e, Floats values) { store_word(column_of(words, e), values); };
        if constexpr (WordProduct<T>::kElements == 1) {
          each_of_run<kType>({at.block, at.run + i}, scales, [&](int e, Floats codes, const GgufScale& scale) {
            put(e, round_through<T>(exact_values<kType>(codes, scale)));
          });
        } else {
          Floats even[kRun / kLanes];
          each_of_run<kType>({at.block, at.run + i}, scales, [&](int e, Floats codes, const GgufScale& scale) {
            even[e / kLanes] = values_for_pairs<kType>(codes, scale);
          });
          each_of_run<kType>({below.block, below.run + i}, scales_below,
                             [&](int e, Floats codes, const GgufScale& scale) {
                               put(e, paired(even[e / kLanes], values_for_pairs<kType>(codes, scale)));
                             });
        }
      }
    }
  }
}

template <typename T>
void gguf_panel(const GradInput<T>&, const GemmJob& job, const DepthSpan& span, int64_t first, int64_t last,
                float* panels) {
  with_gguf(job.weight.type, [&]<QuantType kType>() {
    const auto rows = [&]<int kFirstRun>() { gguf_rows<T, kType, kFirstRun>(job, span, first, last, panels); };
    if constexpr (kRunsOfBlock<kType> == 1) {
      rows.template operator()<0>();
    } else if (!has_whole_rows<kType>(job.k)) {
      rows.template operator()<-1>();
    } else {
      static_assert(kBlockFormat<kType>.elements == 4 * kColumnGrain);
      switch (first / kColumnGrain % 4) {
        case 0:
          return rows.template operator()<0>();
        case 1:
          return rows.template operator()<2>();
        case 2:
          return rows.template operator()<4>();
        default:
          return rows.template operator()<6>();
      }
    }
  });
}

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
