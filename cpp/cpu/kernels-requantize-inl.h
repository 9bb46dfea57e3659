// The codes nearest to W + scale * B A under the scales that W has.
//
// An element's sum runs over the rank in order, fused, on every instruction set, so that the bits depend on neither the
// tile nor the thread. Blocks keep their scales: the adapter's part is added to the old level in units of them, so that
// no change at all keeps every code.
//
// Included by kernels-inl.h; the same rules hold.
#pragma once

#include "core/layout.h"
#include "cpu/kernels-nearest-inl.h"
#include "cpu/kernels-scales-inl.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

constexpr int64_t kChunkColumns = 512;  // of a tile of rows, whose levels stay in the first cache
constexpr int64_t kTileColumns = kSixteenColumns * kSixteen;

// What was decoded of a tile of rows, a chunk of columns wide.
struct LevelTile {
  alignas(64) float value[kSixteenRows][kChunkColumns];
  float factor[kSixteenRows][kChunkColumns / kMinBlock];  // of the adapter's part, a block each
};

// Levels of elements [begin, begin + columns), and scale / (the block's scale), 0 where that has no finite reciprocal.
inline void load_levels(const RequantizeJob& job, int64_t begin, int64_t columns, float* value, float* factor) {
  const WeightView& weight = job.weight;
  const Decoder<float> decode(weight.levels, 1.0f);
  for (int64_t i = 0; i < columns; i += 2 * Decoder<float>::kBytes) {
    decode.step(weight.packed + (begin + i) / 2, value + i);
  }
  const int64_t first = begin / weight.block_size;
  const int64_t last = ceil_div(begin + columns, weight.block_size);
  load_scales(weight, first, last, factor);
  for (int64_t i = 0; i < last - first; ++i) {
    factor[i] = reciprocal_or_zero(factor[i]) * job.scale;
  }
}

// value = level + factor * (B A), cut off at the outer levels, for columns [column, column + kTileColumns) of the tile.
inline void add_adapter(const RequantizeJob& job, const float* const* b, int64_t row, int64_t rows, int64_t chunk,
                        int64_t column, LevelTile* tile) {
  Sixteen sums[kSixteenRows][kSixteenColumns];
  for (auto& sums_of_row : sums) {
    for (Sixteen& sum : sums_of_row) {
      sum = splat(0.0f);
    }
  }
  for (int64_t j = 0; j < job.r; ++j) {
    const float* a = job.a + j * job.k + chunk + column;
    Sixteen columns[kSixteenColumns];
    for (int v = 0; v < kSixteenColumns; ++v) {
      columns[v] = load16(a + v * kSixteen);
    }
    for (int i = 0; i < kSixteenRows; ++i) {
      const Sixteen by = splat(b[i][j]);
      for (int v = 0; v < kSixteenColumns; ++v) {
        sums[i][v] = fused(by, columns[v], sums[i][v]);
      }
    }
  }
  const Sixteen lowest = splat(-1.0f);
  const Sixteen highest = splat(1.0f);
  for (int i = 0; i < kSixteenRows && i < rows; ++i) {
    const int64_t begin = (row + i) * job.k + chunk;
    const int64_t block = (begin + column) / job.weight.block_size - begin / job.weight.block_size;
    const Sixteen factor = splat(tile->factor[i][block]);
    for (int v = 0; v < kSixteenColumns; ++v) {
      float* value = tile->value[i] + column + v * kSixteen;
      store16(value, smaller(larger(fused(sums[i][v], factor, load16(value)), lowest), highest));
    }
  }
}

// Rows [first, last), which are whole blocks of kMinBlock.
template <QuantType kType>
void requantize_rows(const RequantizeJob& job, int64_t first, int64_t last) {
  LevelTile tile;
  const float one = 1.0f;
  for (int64_t row = first; row < last; row += kSixteenRows) {
    const int64_t rows = last - row < kSixteenRows ? last - row : kSixteenRows;
    const float* b[size_t{kSixteenRows}];
    for (int64_t i = 0; i < kSixteenRows; ++i) {
      b[i] = job.b + (row + (i < rows ? i : 0)) * job.r;  // missing rows repeat the first
    }
    for (int64_t chunk = 0; chunk < job.k; chunk += kChunkColumns) {
      const int64_t columns = job.k - chunk < kChunkColumns ? job.k - chunk : kChunkColumns;
      for (int64_t i = 0; i < rows; ++i) {
        load_levels(job, (row + i) * job.k + chunk, columns, tile.value[i], tile.factor[i]);
      }
      for (int64_t column = 0; column < columns; column += kTileColumns) {
        add_adapter(job, b, row, rows, chunk, column, &tile);
      }
      for (int64_t i = 0; i < rows; ++i) {
        encode<float, kType>(tile.value[i], columns, &one, 31, job.packed + ((row + i) * job.k + chunk) / 2);
      }
    }
  }
}

// Bytes [first, last), element by element: for rows of any length.
template <QuantType kType>
void requantize_bytes(const RequantizeJob& job, int64_t first, int64_t last) {
  const WeightView& weight = job.weight;
  const auto code = [&](int64_t element) {
    if (element >= weight.numel) {
      return zero_code(kType);
    }
    const float* a = job.a + element % job.k;
    const float* b = job.b + element / job.k * job.r;
    float sum = 0.0f;
    for (int64_t j = 0; j < job.r; ++j) {
      sum = __builtin_fmaf(b[j], a[j * job.k], sum);
    }
    const float factor = reciprocal_or_zero(weight.scale(element / weight.block_size)) * job.scale;
    const float value = __builtin_fmaf(sum, factor, weight.levels[weight.code(element)]);
    const float above = value > -1.0f ? value : -1.0f;
    const float inside = above < 1.0f ? above : 1.0f;
    return kType == QuantType::kNf4 ? nf4_code(inside) : fp4_code(inside);
  };
  for (int64_t i = first; i < last; ++i) {
    job.packed[i] = pack_nibbles(code(2 * i), code(2 * i + 1));
  }
}

void requantize(const RequantizeJob& job, int64_t first, int64_t last) {
  const bool is_nf4 = job.weight.type == QuantType::kNf4;
  if (job.goes_by_rows()) {
    (is_nf4 ? requantize_rows<QuantType::kNf4> : requantize_rows<QuantType::kFp4>)(job, first, last);
  } else {
    (is_nf4 ? requantize_bytes<QuantType::kNf4> : requantize_bytes<QuantType::kFp4>)(job, first, last);
  }
}

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
