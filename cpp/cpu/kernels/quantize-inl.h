// Quantizing blocks: the plain rule, and around the vector code of the instruction set what is the same for all.
//
// Included by kernels/all-inl.h; the same rules hold.
#pragma once

#include "core/layout.h"
#include "cpu/isa/vec.h"
#include "cpu/kernels/kernels.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

// As many blocks as the first cache holds are read twice: for their largest magnitudes, then for their codes. While the
// codes are found, the next chunk is on its way from memory.
constexpr int64_t kElementsPerChunk = kMaxBlock;

constexpr int kSumLanes = 16;
constexpr int kParts = kSumLanes / kLanes;  // vectors that hold 16 values

// Every stride-th entry of a sorted table of decision points: what one level of a bisection compares with.
struct BisectionLevel {
  float value[8];
};

template <typename Table>
constexpr BisectionLevel bisection_level(const Table& table, int first, int stride, int count) {
  BisectionLevel level{};
  for (int i = 0; i < count; ++i) {
    level.value[i] = table.value[first + i * stride];
  }
  return level;
}

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE

#include QLORA_NATIVE_QUANTIZE_INL  // vec.h names it

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr uint32_t kMagnitudeMask = 0x7fffffffu;

// `count` elements of one block by the rule itself.
template <typename T>
void encode_plain(const T* x, int64_t count, const Normalizer& by, QuantType type, uint8_t* packed) {
  const auto code = [&](int64_t i) {
    if (i >= count) {
      return zero_code(type);
    }
    const float normalized = by(to_float(x[i]));
    return type == QuantType::kNf4 ? nf4_code(normalized) : fp4_code(normalized);
  };
  for (int64_t i = 0; i < count; i += 2) {
    packed[i / 2] = pack_nibbles(code(i), code(i + 1));
  }
}

void fill_with_zero_code(int64_t count, QuantType type, uint8_t* packed) {
  const uint8_t zero = zero_code(type);
  std::memset(packed, pack_nibbles(zero, zero), static_cast<size_t>(packed_bytes(count)));
}

// Any block, short, tiny, zero or not finite. Returns the index of its first non-finite element, or -1.
template <typename T>
int64_t quantize_block_plain(const BlockJob& job, int64_t block) {
  const int64_t begin = block * job.block_size;
  const int64_t left = job.numel - begin;
  const int64_t count = left < job.block_size ? left : job.block_size;
  const T* x = static_cast<const T*>(job.x) + begin;
  uint8_t* packed = job.packed + begin / 2;
  uint32_t highest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = std::bit_cast<uint32_t>(to_float(x[i])) & kMagnitudeMask;
    if (magnitude >= kInfinityBits) {
      return begin + i;
    }
    highest = magnitude > highest ? magnitude : highest;
  }
  const float absmax = std::bit_cast<float>(highest);
  job.absmax[block] = absmax;
  if (highest == 0) {
    fill_with_zero_code(count, job.type, packed);
  } else {
    encode_plain(x, count, normalizer_of(absmax), job.type, packed);
  }
  return -1;
}

constexpr int64_t kBlocksPerChunk = kElementsPerChunk / kMinBlock;

// Whole blocks [block, block + count), at most a chunk. Returns as quantize_block_plain.
template <typename T, QuantType kType>
int64_t quantize_chunk(const BlockJob& job, int log2_block, int64_t block, int64_t count) {
  alignas(64) float factor[kBlocksPerChunk];
  const T* x = static_cast<const T*>(job.x) + block * job.block_size;
  uint8_t* packed = job.packed + block * job.block_size / 2;
  float* absmax = job.absmax + block;
  for (int64_t i = 0; i < count; ++i) {
    absmax[i] = to_float(largest_magnitude(x + i * job.block_size, job.block_size));
  }
  uint32_t odd = 0;  // a block of zeros, of tiny values (both have no finite reciprocal) or with non-finite ones
  for (int64_t i = 0; i < count; ++i) {
    factor[i] = 1.0f / absmax[i];
    odd |= static_cast<uint32_t>(std::bit_cast<uint32_t>(factor[i]) == kInfinityBits) |
           static_cast<uint32_t>(std::bit_cast<uint32_t>(absmax[i]) >= kInfinityBits);
  }
  if (odd == 0) {
    encode<T, kType>(x, count << log2_block, factor, log2_block, packed);
    return -1;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = i << log2_block;
    if (std::bit_cast<uint32_t>(absmax[i]) == 0) {
      fill_with_zero_code(job.block_size, job.type, packed + begin / 2);
    } else if (std::bit_cast<uint32_t>(absmax[i]) < kInfinityBits &&
               std::bit_cast<uint32_t>(factor[i]) != kInfinityBits) {
      encode<T, kType>(x + begin, job.block_size, factor + i, log2_block, packed + begin / 2);
    } else if (const int64_t bad = quantize_block_plain<T>(job, block + i); bad >= 0) {
      return bad;
    }
  }
  return -1;
}

template <typename T, QuantType kType>
int64_t quantize_whole_blocks(const BlockJob& job, int64_t first, int64_t last) {
  int log2_block = 0;
  while (int64_t{1} << log2_block < job.block_size) {
    ++log2_block;
  }
  const int64_t step = kElementsPerChunk >> log2_block;
  for (int64_t block = first; block < last; block += step) {
    const int64_t count = last - block < step ? last - block : step;
    if (const int64_t bad = quantize_chunk<T, kType>(job, log2_block, block, count); bad >= 0) {
      return bad;
    }
  }
  return -1;
}

template <typename T>
int64_t quantize_blocks(const BlockJob& job, int64_t first, int64_t last) {
  const int64_t whole = job.numel / job.block_size;  // blocks that are not cut short
  const int64_t end = last < whole ? last : whole;
  const int64_t bad = job.type == QuantType::kNf4 ? quantize_whole_blocks<T, QuantType::kNf4>(job, first, end)
                                                  : quantize_whole_blocks<T, QuantType::kFp4>(job, first, end);
  return bad >= 0 || end == last ? bad : quantize_block_plain<T>(job, end);
}

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
