// The codes nearest to W + scale * B A under the scales that W has.
//
// An element's sum runs over the rank in order, fused, on every instruction set, so that the bits depend on neither the
// tile nor the thread. Blocks keep their scales: the adapter's part is added to the old level in units of them, so that
// no change at all keeps every code.
//
// Included by kernels-inl.h; the same rules hold.
#pragma once

#include "core/gguf.h"
#include "core/layout.h"
#include "cpu/kernels-gguf-inl.h"
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
  float factor[kSixteenRows][kChunkColumns / kSixteen];  // of the adapter's part
};

// Levels of elements [begin, begin + columns), and scale / (the block's scale), 0 where that has no finite reciprocal.
inline void load_levels(const RequantizeJob& job, int64_t begin, int64_t columns, float* value, float* factor) {
  const WeightView& weight = job.weight;
  const Decoder<float> decode(weight.levels, 1.0f);
  for (int64_t i = 0; i < columns; i += 2 * Decoder<float>::kBytes) {
    decode.step(weight.packed + (begin + i) / 2, value + i);
  }
  const int64_t first = begin / weight.block_size;
  float of_blocks[kChunkColumns / kMinBlock];
  load_scales(weight, first, ceil_div(begin + columns, weight.block_size), of_blocks);
  for (int64_t i = 0; i < columns / kSixteen; ++i) {
    factor[i] = reciprocal_or_zero(of_blocks[(begin + i * kSixteen) / weight.block_size - first]) * job.scale;
  }
}

// The same of a GGUF type.
template <QuantType kType>
void load_gguf_levels(const RequantizeJob& job, int64_t begin, int64_t columns, float* value, float* factor) {
  const uint8_t* block = job.weight.packed + packed_bytes(kType, begin);
  for (; columns > 0; columns -= kBlockFormat<kType>.elements, block += kBlockFormat<kType>.bytes) {
    const BlockScales<kType> scales(block);
    for (unsigned run = 0; run < kRunsOfBlock<kType>; ++run, value += kRun) {
      each_of_run<kType>({block, run}, scales,
                         [&](int i, Floats levels, const GgufScale&) { store(value + i, levels); });
      *factor++ = reciprocal_or_zero(scales.at(2 * run).factor) * job.scale;
      *factor++ = reciprocal_or_zero(scales.at(2 * run + 1).factor) * job.scale;
    }
  }
}

// value = level + factor * (B A), cut off at the outer levels, for columns [column, column + kTileColumns) of the tile.
inline void add_adapter(const RequantizeJob& job, const float* const* b, int64_t rows, int64_t chunk, int64_t column,
                        LevelTile* tile) {
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
  const GgufCodes& codes = kGgufCodes[static_cast<int>(job.weight.type)];
  const bool in_blocks = is_gguf(job.weight.type);
  const Sixteen lowest = splat(in_blocks ? static_cast<float>(codes.lowest) : -1.0f);
  const Sixteen highest = splat(in_blocks ? static_cast<float>(codes.highest) : 1.0f);
  for (int i = 0; i < kSixteenRows && i < rows; ++i) {
    for (int v = 0; v < kSixteenColumns; ++v) {
      const Sixteen factor = splat(tile->factor[i][column / kSixteen + v]);
      float* value = tile->value[i] + column + v * kSixteen;
      store16(value, smaller(larger(fused(sums[i][v], factor, load16(value)), lowest), highest));
    }
  }
}

// Blocks with the codes nearest to values in units of levels, and the scales of `from`.
template <QuantType kType>
void encode_gguf(const float* value, int64_t columns, const uint8_t* from, uint8_t* to) {
  constexpr BlockFormat kFormat = kBlockFormat<kType>;
  uint8_t codes[size_t{kFormat.elements}];
  for (int64_t i = 0; i < columns; i += kFormat.elements, from += kFormat.bytes, to += kFormat.bytes) {
    for (int j = 0; j < kFormat.elements; ++j) {
      if constexpr (kType == QuantType::kIq4Nl) {
        constexpr Iq4NlLevels kLevels = iq4_nl_levels();
        int code = 0;
        for (int level = 1; level < 16; ++level) {
          code += value[i + j] > static_cast<float>(kLevels.value[level - 1] + kLevels.value[level]) / 2;
        }
        codes[j] = static_cast<uint8_t>(code);
      } else {
        // The sum's lowest bits are those of the nearest integer, of two that are as near the even one.
        const auto nearest = std::bit_cast<uint32_t>(value[i + j] + 0x1.8p23f);
        codes[j] = static_cast<uint8_t>(nearest - static_cast<uint32_t>(kGgufCodes[static_cast<int>(kType)].zero));
      }
    }
    std::memcpy(to, from, kFormat.bytes);
    put_codes<kType>(codes, to);
  }
}

// Rows [first, last), which are whole blocks of kMinBlock, or of the GGUF type.
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
        const int64_t begin = (row + i) * job.k + chunk;
        if constexpr (is_gguf(kType)) {
          load_gguf_levels<kType>(job, begin, columns, tile.value[i], tile.factor[i]);
        } else {
          load_levels(job, begin, columns, tile.value[i], tile.factor[i]);
        }
      }
      for (int64_t column = 0; column < columns; column += kTileColumns) {
        add_adapter(job, b, rows, chunk, column, &tile);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t byte = packed_bytes(kType, (row + i) * job.k + chunk);
        if constexpr (is_gguf(kType)) {
          encode_gguf<kType>(tile.value[i], columns, job.weight.packed + byte, job.packed + byte);
        } else {
          encode<float, kType>(tile.value[i], columns, &one, 31, job.packed + byte);
        }
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
  if (is_gguf(job.weight.type)) {
    with_gguf(job.weight.type, [&]<QuantType kType> { requantize_rows<kType>(job, first, last); });
    return;
  }
  const bool is_nf4 = job.weight.type == QuantType::kNf4;
  if (job.goes_by_rows()) {
    (is_nf4 ? requantize_rows<QuantType::kNf4> : requantize_rows<QuantType::kFp4>)(job, first, last);
  } else {
    (is_nf4 ? requantize_bytes<QuantType::kNf4> : requantize_bytes<QuantType::kFp4>)(job, first, last);
  }
}

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
