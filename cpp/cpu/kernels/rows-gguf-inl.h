// Forward products of a few tokens with a weight in GGUF's blocks: a row of W goes by as codes, which meet x in fp32,
// and each sum of codes is scaled. A minimum is met by the sum of x over its elements, made once a call.
#pragma once

#include "cpu/kernels/gguf-inl.h"
#include "cpu/kernels/streams-inl.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

// sums[r][t]: rows of x from `token` on times rows of W from `row` on, the last of them again from `last` on.
template <QuantType kType, int kTokens, int kRows>
__attribute__((noinline)) void dot_runs(const RowsJob& rows, int64_t token, int64_t row, int64_t last,
                                        float (*sums_of)[kTokensAtOnce]) {
  constexpr int kScaled = kType == QuantType::kQ6_K ? 16 : kRun;  // elements that share a scale
  constexpr int64_t kRunBytes = int64_t{kBlockFormat<kType>.bytes} * kRun / kBlockFormat<kType>.elements;
  const ProductJob& job = rows.product;
  const int64_t runs = job.k / kRun;
  const float* x = static_cast<const float*>(rows.reordered) + token * job.k;
  const float* run_sums = static_cast<const float*>(rows.reordered) + job.m * job.k + token * runs;
  const uint8_t* ahead = job.weight.packed + row * runs * kRunBytes + bytes_ahead(runs * kRunBytes);
  Floats sums[size_t{kRows}][size_t{kTokens}];
  float minima[size_t{kRows}][size_t{kTokens}] = {};
  int64_t begins[size_t{kRows}];
  for (int r = 0; r < kRows; ++r) {
    begins[r] = (row + r < last ? row + r : last - 1) * job.k;
    for (Floats& sum : sums[r]) {
      sum = zero();
    }
  }
  // Runs at a time: a block, unless rows begin inside of blocks.
  const int64_t taken = has_whole_rows<kType>(job.k) ? kRunsOfBlock<kType> : 1;
  for (int64_t run = 0; run < runs; run += taken) {
    for (int64_t line = 0; line < kRows * kRunBytes * taken; line += 64) {
      prefetch_far(ahead + line);
    }
    ahead += kRows * kRunBytes * taken;
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      RunPlace at = run_at<kType>(job.weight.packed, begins[r] + run * kRun);
      const BlockScales<kType> scales(at.block);
      for (int64_t i = run; i < run + taken; ++i, ++at.run) {
        Floats part[size_t{kTokens}];
        each_of_run<kType>(at, scales, [&](int element, Floats codes, const GgufScale& scale) {
          for (int t = 0; t < kTokens; ++t) {
            const Floats value = load(x + t * job.k + i * kRun + element);
            part[t] = element % kScaled == 0 ? multiply(codes, value) : multiply_add(codes, value, part[t]);
            if ((element + kLanes) % kScaled == 0) {
              sums[r][t] = multiply_add(part[t], all(scale.factor), sums[r][t]);
            }
            if (Gguf<kType>::kAdds && element + kLanes == kRun) {
              minima[r][t] += scale.addend * run_sums[t * runs + i];
            }
          }
        });
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) {
      sums_of[r][t] = total(sums[r][t]) + minima[r][t];
    }
  }
}

constexpr int kRunRows = 2;  // rows of W that share each load of x

using DotRuns = void (*)(const RowsJob& rows, int64_t token, int64_t row, int64_t last, float (*sums)[kTokensAtOnce]);

inline DotRuns run_dot(QuantType type, int64_t tokens) {
  return with_gguf(type, [&]<QuantType kType>() -> DotRuns {
    constexpr DotRuns kDots[kTokensAtOnce] = {dot_runs<kType, 1, kRunRows>, dot_runs<kType, 2, kRunRows>,
                                              dot_runs<kType, 3, kRunRows>, dot_runs<kType, 4, kRunRows>};
    return kDots[tokens - 1];
  });
}

template <typename T>
void linear_rows_by_runs(const RowsJob& rows, int64_t first, int64_t last) {
  for (int64_t token = 0; token < rows.product.m; token += kTokensAtOnce) {
    const int64_t left = rows.product.m - token;
    const int64_t tokens = left < kTokensAtOnce ? left : kTokensAtOnce;
    const DotRuns dot = run_dot(rows.product.weight.type, tokens);
    for (int64_t row = first; row < last; row += kRunRows) {
      float sums[kRunRows][kTokensAtOnce];
      dot(rows, token, row, last, sums);
      for (int64_t r = 0; r < kRunRows && row + r < last; ++r) {
        for (int64_t t = 0; t < tokens; ++t) {
          finish_output<T>(rows, token + t, row + r, sums[r][t]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
