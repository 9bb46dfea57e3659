// GPTQ's loop over the columns, a panel of rows at a time.
//
// Every column first gathers what the earlier ones left it, in their order, then is rounded. A lane is a row, so that
// no sum is cut: the bits depend on neither the panel, nor the tile, nor the instruction set. Products and sums are
// kept apart.
//
// Included by kernels/all-inl.h; the same rules hold.
#pragma once

#include "core/layout.h"
#include "cpu/kernels/calibration.h"
#include "cpu/kernels/search-inl.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

constexpr int kFeedbackVectors = kLanes == 16 ? 2 : kParts;  // of rows
constexpr int kFeedbackRows = kFeedbackVectors * kLanes;
constexpr int kFeedbackColumns = kLanes == 16 ? 8 : 4;

// One column of a panel, row by row.
struct PanelColumn {
  alignas(64) float weight[kFeedbackRows];
  alignas(64) float scale[kFeedbackRows];
  alignas(64) float reciprocal[kFeedbackRows];
};

template <typename T>
void gather_column(const FeedbackJob& job, int64_t row, int64_t rows, int64_t column, PanelColumn* to) {
  for (int64_t r = 0; r < kFeedbackRows; ++r) {
    const int64_t at = (row + r) * job.k + column;
    to->weight[r] = r < rows ? to_float(static_cast<const T*>(job.x)[at]) : 0.0f;
    to->scale[r] = r < rows ? job.scales[at / job.block_size] : 0.0f;
  }
  for (int64_t r = 0; r < kFeedbackRows; ++r) {
    to->reciprocal[r] = reciprocal_or_zero(to->scale[r]);
  }
}

// Rounds `target` [rows]; writes the column's codes and its errors, weight - decoded.
template <QuantType kType>
void round_column(const FeedbackJob& job, const Nearest<kType>& nearest, const PanelColumn& of, const Floats* target,
                  int64_t row, int64_t rows, int64_t column, float* errors) {
  alignas(64) uint8_t codes[kFeedbackRows];
  for (int begin = 0; begin < kFeedbackRows; begin += kSumLanes) {
    Floats normalized[kParts];
    Floats levels[kParts];
    for (int part = 0; part < kParts; ++part) {
      normalized[part] = multiply(target[begin / kLanes + part], load(of.reciprocal + begin + part * kLanes));
    }
    nearest.levels(normalized, levels);
    nearest.codes(normalized, codes + begin);
    for (int part = 0; part < kParts; ++part) {
      const int at = begin + part * kLanes;
      store(errors + at, subtract(load(of.weight + at), multiply(levels[part], load(of.scale + at))));
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    job.codes[(row + r) * job.k + column] = codes[r];
  }
}

// target[c] += errors[i] * factor[i][c] for i in [0, count), in order.
inline void gather_errors(const float* errors, const float* factor, int64_t count, Floats (*target)[kFeedbackVectors]) {
  for (int64_t i = 0; i < count; ++i) {
    Floats error[kFeedbackVectors];
    for (int v = 0; v < kFeedbackVectors; ++v) {
      error[v] = load(errors + i * kFeedbackRows + v * kLanes);
    }
    for (int c = 0; c < kFeedbackColumns; ++c) {
      const Floats by = all(factor[i * kFeedbackColumns + c]);
      for (int v = 0; v < kFeedbackVectors; ++v) {
        target[c][v] = add(target[c][v], multiply(error[v], by));
      }
    }
  }
}

template <typename T, QuantType kType>
void feedback_panels_of(const FeedbackJob& job, int64_t first, int64_t last, float* errors) {
  const Nearest<kType> nearest;
  PanelColumn columns[kFeedbackColumns];
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t row = panel * kFeedbackRows;
    const int64_t rows = job.n - row < kFeedbackRows ? job.n - row : kFeedbackRows;
    for (int64_t begin = 0; begin < job.k; begin += kFeedbackColumns) {
      const float* factor = job.factor + feedback_offset(begin, kFeedbackColumns);
      const int64_t width = job.k - begin < kFeedbackColumns ? job.k - begin : kFeedbackColumns;
      Floats target[kFeedbackColumns][kFeedbackVectors];
      for (int64_t c = 0; c < kFeedbackColumns; ++c) {
        if (c < width) {
          gather_column<T>(job, row, rows, job.order[begin + c], &columns[c]);
        }
        for (int v = 0; v < kFeedbackVectors; ++v) {
          target[c][v] = c < width ? load(columns[c].weight + v * kLanes) : zero();
        }
      }
      gather_errors(errors, factor, begin, target);
      for (int64_t c = 0; c < width; ++c) {
        float* own = errors + (begin + c) * kFeedbackRows;
        round_column(job, nearest, columns[c], target[c], row, rows, job.order[begin + c], own);
        for (int64_t later = c + 1; later < width; ++later) {
          const Floats by = all(factor[(begin + c) * kFeedbackColumns + later]);
          for (int v = 0; v < kFeedbackVectors; ++v) {
            target[later][v] = add(target[later][v], multiply(load(own + v * kLanes), by));
          }
        }
      }
    }
  }
}

template <typename T>
void feedback_panels(const FeedbackJob& job, int64_t first, int64_t last, float* errors) {
  (job.type == QuantType::kNf4 ? feedback_panels_of<T, QuantType::kNf4>
                               : feedback_panels_of<T, QuantType::kFp4>)(job, first, last, errors);
}

constexpr CalibrationKernels kCalibration = {
    {search_blocks<float>, search_blocks<Bf16>, search_blocks<Fp16>},
    {feedback_panels<float>, feedback_panels<Bf16>, feedback_panels<Fp16>},
    kFeedbackRows,
    kFeedbackColumns,
};

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
