// The search for the scale of a block among those that its format can store.
//
// Included by kernels/all-inl.h; the same rules hold.
#pragma once

#include "core/layout.h"
#include "cpu/kernels/calibration.h"
#include "cpu/kernels/nearest-inl.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

// Sum of moment * (x - level * scale)^2 over `count` elements, a multiple of 16; no product is fused with a sum.
template <QuantType kType>
float weighted_error(const Nearest<kType>& nearest, const float* x, const float* moment, int64_t count, float scale) {
  const Floats by = all(scale);
  const Floats reciprocal = all(reciprocal_or_zero(scale));
  Floats sums[kParts];
  for (int64_t i = 0; i < count; i += kSumLanes) {
    Floats values[kParts];
    Floats normalized[kParts];
    Floats levels[kParts];
    for (int part = 0; part < kParts; ++part) {
      values[part] = load(x + i + part * kLanes);
      normalized[part] = multiply(values[part], reciprocal);
    }
    nearest.levels(normalized, levels);
    for (int part = 0; part < kParts; ++part) {
      const Floats error = subtract(values[part], multiply(levels[part], by));
      const Floats term = multiply(load(moment + i + part * kLanes), multiply(error, error));
      sums[part] = i == 0 ? term : add(sums[part], term);
    }
  }
  return sum_by_halves(sums);
}

// Codes of a block of `count` elements, padded to a multiple of 16, under `scale`.
template <QuantType kType>
void encode_under(const Nearest<kType>& nearest, const float* x, int64_t count, float scale, uint8_t* packed) {
  const Floats reciprocal = all(reciprocal_or_zero(scale));
  for (int64_t i = 0; i < count; i += kSumLanes) {
    Floats normalized[kParts];
    for (int part = 0; part < kParts; ++part) {
      normalized[part] = multiply(load(x + i + part * kLanes), reciprocal);
    }
    uint8_t codes[kSumLanes];
    nearest.codes(normalized, codes);
    const int64_t left = count - i < kSumLanes ? count - i : kSumLanes;
    for (int64_t j = 0; j < left; j += 2) {
      packed[(i + j) / 2] = pack_nibbles(codes[j], j + 1 < left ? codes[j + 1] : zero_code(kType));
    }
  }
}

template <typename T, QuantType kType>
void search_blocks_of(const SearchJob& job, int64_t first, int64_t last) {
  const Nearest<kType> nearest;
  alignas(64) float x[kMaxBlock];
  alignas(64) float gathered[kMaxBlock];
  float scales[256];
  int64_t scaled_group = -1;  // the one that `scales` belong to
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * job.block_size;
    const int64_t left = job.numel - begin;
    const int64_t count = left < job.block_size ? left : job.block_size;
    uint32_t highest = 0;
    for (int64_t i = 0; i < count; ++i) {
      x[i] = to_float(static_cast<const T*>(job.x)[begin + i]);
      const uint32_t magnitude = std::bit_cast<uint32_t>(x[i]) & kMagnitudeMask;
      highest = magnitude > highest ? magnitude : highest;
    }
    for (int64_t i = count; i < job.block_size; ++i) {
      x[i] = 0.0f;
    }
    const float* moment = job.moment + begin % job.k;
    if (begin % job.k + job.block_size > job.k) {
      int64_t column = begin % job.k;
      for (int64_t i = 0; i < job.block_size; ++i) {
        gathered[i] = i < count ? job.moment[column] : 0.0f;
        column = column + 1 < job.k ? column + 1 : 0;
      }
      moment = gathered;
    }
    if (block / job.group != scaled_group) {
      scaled_group = block / job.group;
      for (int64_t i = 0; i < job.count; ++i) {
        scales[i] = decode_scale(job.table[i], job.multiplier[scaled_group], job.offset);
      }
    }
    const float absmax = std::bit_cast<float>(highest);
    const float lowest = absmax * job.low;
    const float largest = absmax * job.high;
    int candidates[256];
    int num_candidates = 0;
    for (int i = 0; i < static_cast<int>(job.count); ++i) {
      const float size = std::bit_cast<float>(std::bit_cast<uint32_t>(scales[i]) & kMagnitudeMask);
      candidates[num_candidates] = i;
      num_candidates +=
          static_cast<int>((lowest <= size) & (size <= largest)) | static_cast<int>(i == job.initial[block]);
    }
    float best = std::bit_cast<float>(kInfinityBits);
    int chosen = job.initial[block];
    for (int i = 0; i < num_candidates; ++i) {
      const float error = weighted_error(nearest, x, moment, job.block_size, scales[candidates[i]]);
      chosen = error < best ? candidates[i] : chosen;
      best = error < best ? error : best;
    }
    job.chosen[block] = static_cast<uint8_t>(chosen);
    encode_under(nearest, x, count, scales[chosen], job.packed + begin / 2);
  }
}

template <typename T>
void search_blocks(const SearchJob& job, int64_t first, int64_t last) {
  (job.type == QuantType::kNf4 ? search_blocks_of<T, QuantType::kNf4>
                               : search_blocks_of<T, QuantType::kFp4>)(job, first, last);
}

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
