#include "cuda_on_cpu/matrix.h"

#include <array>
#include <cstring>

#include "cuda_on_cpu/counters.h"
#include "cuda_on_cpu/device.h"
#include "cuda_on_cpu/race.h"
#include "cuda_on_cpu/rendezvous.h"
#include "cuda_on_cpu/report.h"

namespace cuemu {
namespace {

constexpr int kRowBytes = 16;
constexpr int kBankGroups = 8;  // of four banks of four bytes

struct LoadPayload {
  const std::byte* row;
  uint32_t* registers;  // [4]
  Trans trans;
};

// Passes that eight rows of 16 bytes take: a pass reads one word of each bank, so one row of each group of four banks.
uint64_t wavefronts(const std::array<const std::byte*, 8>& rows) {
  uint64_t most = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    const size_t place = arena_offset(rows[i]) / kRowBytes;
    uint64_t before = 0;  // other rows in the same banks
    bool met = false;
    for (size_t j = 0; j < i; ++j) {
      const size_t other = arena_offset(rows[j]) / kRowBytes;
      met |= other == place;
      bool counted = other % kBankGroups != place % kBankGroups;
      for (size_t k = 0; k < j && !counted; ++k) {
        counted = rows[k] == rows[j];
      }
      before += !counted;
    }
    if (!met) {
      most = before + 1 > most ? before + 1 : most;
    }
  }
  return most;
}

void load_all(Warp& warp, uint32_t) {
  const Site site = self->site;
  const auto& mine = *static_cast<LoadPayload*>(self->payload);
  Thread* const last = self;
  for (int i = 0; i < kLanes; ++i) {
    self = &lane_of(warp, i);
    const std::byte* row = static_cast<LoadPayload*>(self->payload)->row;
    check_shared_16(self->verb, row, site);
    note_shared(row, kRowBytes, Access::kRead, Where::site(site));
  }
  self = last;
  for (int matrix = 0; matrix < 4; ++matrix) {
    std::array<const std::byte*, 8> rows;
    uint16_t elements[8][8];
    for (int row = 0; row < 8; ++row) {
      rows[static_cast<size_t>(row)] = static_cast<LoadPayload*>(lane_of(warp, 8 * matrix + row).payload)->row;
      std::memcpy(elements[row], rows[static_cast<size_t>(row)], kRowBytes);
    }
    ++counters().ldmatrix;
    counters().ldmatrix_wavefronts += wavefronts(rows);
    for (int i = 0; i < kLanes; ++i) {
      const int group = i / 4;
      const int pair = i % 4 * 2;
      const bool across = mine.trans == Trans::kYes;
      const uint32_t low = across ? elements[pair][group] : elements[group][pair];
      const uint32_t high = across ? elements[pair + 1][group] : elements[group][pair + 1];
      static_cast<LoadPayload*>(lane_of(warp, i).payload)->registers[matrix] = high << 16 | low;
    }
  }
}

struct MultiplyPayload {
  float* d;           // [4]
  const uint32_t* a;  // [4] or [2]
  const uint32_t* b;  // [2] or [1]
  qlora_native::Dtype dtype;
  bool k16;
};

float element(uint32_t word, int half, qlora_native::Dtype dtype) {
  const auto bits = static_cast<uint16_t>(word >> (16 * half));
  return dtype == qlora_native::Dtype::kBfloat16 ? to_float(qlora_native::Bf16{bits})
                                                 : to_float(qlora_native::Fp16{bits});
}

void multiply_all(Warp& warp, uint32_t) {
  const auto& mine = *static_cast<MultiplyPayload*>(self->payload);
  const int depth = mine.k16 ? 16 : 8;
  float a[16][16];
  float b[16][8];
  float d[16][8];
  for (int i = 0; i < kLanes; ++i) {
    const auto& from = *static_cast<MultiplyPayload*>(lane_of(warp, i).payload);
    const int group = i / 4;
    const int pair = i % 4 * 2;
    for (int r = 0; r < depth / 4; ++r) {  // registers of a: rows group and group + 8 of one half of k, then the other
      for (int half = 0; half < 2; ++half) {
        a[group + r % 2 * 8][pair + half + r / 2 * 8] = element(from.a[r], half, mine.dtype);
      }
    }
    for (int r = 0; r < depth / 8; ++r) {
      for (int half = 0; half < 2; ++half) {
        b[pair + half + r * 8][group] = element(from.b[r], half, mine.dtype);
      }
    }
    for (int r = 0; r < 4; ++r) {
      d[group + r / 2 * 8][pair + r % 2] = from.d[r];
    }
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < depth; ++k) {
      for (int n = 0; n < 8; ++n) {
        d[m][n] += a[m][k] * b[k][n];
      }
    }
  }
  for (int i = 0; i < kLanes; ++i) {
    float* to = static_cast<MultiplyPayload*>(lane_of(warp, i).payload)->d;
    for (int r = 0; r < 4; ++r) {
      to[r] = d[i / 4 + r / 2 * 8][i % 4 * 2 + r % 2];
    }
  }
  ++counters().mma;
}

}  // namespace

void load_matrices(uint32_t* registers, const void* row, Trans trans, Site site) {
  LoadPayload payload{static_cast<const std::byte*>(row), registers, trans};
  meet_warp(trans == Trans::kYes ? "ldmatrix_x4_trans" : "ldmatrix_x4", site, kAllLanes, true, &payload, load_all);
}

void multiply(float* d, const uint32_t* a, const uint32_t* b, qlora_native::Dtype dtype, bool k16, Site site) {
  if (device().sm < 80 && dtype == qlora_native::Dtype::kBfloat16) {
    fail(site, "mma of bf16: sm_%d has none", device().sm);
  }
  MultiplyPayload payload{d, a, b, dtype, k16};
  meet_warp(k16 ? "mma_m16n8k16" : "mma_m16n8k8", site, kAllLanes, true, &payload, multiply_all);
}

}  // namespace cuemu
