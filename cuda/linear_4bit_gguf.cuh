// y = x W^T with W in a format of GGUF, whose blocks are read once, as they lie: by a kernel for at most 16 tokens, or
// by one for tiles of up to 64.
//
// As in linear_4bit_small.cuh rows of W fill the 16 rows of the MMA and tokens its columns, eight at once; but weights
// go into it scaled and rounded by the exact rule, so that blocks need not be kept apart. Blocks of 17 to 210 bytes
// begin at odd distances: a warp copies the bytes of 256 elements of its rows to shared memory, 16 at a time from the
// multiple of 16 before them on, one step ahead of their use; of few tokens, it meets no other warp before the end.
//
// Lane 4g + t decodes elements 64t to 64t + 63 of rows g and g + 8, of tiles 32t to 32t + 31 of each half of them, four
// at a time. A code of up to 7 bits, in the third byte of 0x43000000, is the float 128 + code, and one of 8 bits in the
// second byte of 0x47000000 is 32768 + code. Of such a float, fma(float, factor, -(128 + offset) * factor) is the
// rounded product (code - offset) * factor: factors have up to 19 bits, so that nothing but the last step rounds.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/gguf.h"
#include "cuda/dequantize_4bit_gguf.cuh"
#include "cuda/linear_4bit.cuh"
#include "cuda/linear_4bit_fragment.cuh"
#include "cuda/linear_4bit_small.cuh"
#include "cuda/matmul_plan.h"
#include "cuda/wp.cuh"

namespace qlora_native::cuda {

// How rows of a format lie in memory and in a stage.
template <QuantType kType>
struct GgufLayout {
  static constexpr BlockFormat kFormat = kFormatOf<kType>;
  static constexpr int kAlignment = std::min(16, kFormat.bytes & -kFormat.bytes);  // of every block
  static constexpr int kStepBytes = kGgufStep / kFormat.elements * kFormat.bytes;
  static constexpr int kChunks = gguf_chunks(kFormat);
  static constexpr int kPitch = gguf_pitch(kFormat);
  static constexpr int kStage = kSmallRows * kPitch;  // chunks
};

// A half at an even address, by one instruction.
QLORA_NATIVE_HD float aligned_half(const uint8_t* p) {
  return __half2float(__ushort_as_half(*reinterpret_cast<const uint16_t*>(p)));
}

// A word at any byte, at a multiple of 2, or of 4.
template <QuantType kType>
__device__ __forceinline__ uint32_t word_at(const uint8_t* p) {
  if constexpr (GgufLayout<kType>::kAlignment >= 4) {
    return *reinterpret_cast<const uint32_t*>(p);
  } else if constexpr (GgufLayout<kType>::kAlignment == 1) {  // of the words that hold it, of which a stage has both
    const auto at = static_cast<unsigned>(reinterpret_cast<uintptr_t>(p) % 4);
    const auto* words = reinterpret_cast<const uint32_t*>(p - at);
    return __funnelshift_r(words[0], words[at == 0 ? 0 : 1], 8 * at);
  }
  const auto* halves = reinterpret_cast<const uint16_t*>(p);
  return halves[0] | static_cast<uint32_t>(halves[1]) << 16;
}

// Each of the low four bits in a byte of its own, as a 16.
__device__ __forceinline__ uint32_t fifth_bits(uint32_t bits) { return (bits & 15) * 0x02040810 & 0x10101010; }

// The levels plus 128 of four codes in the bytes of a word.
template <QuantType kType>
__device__ __forceinline__ uint32_t levels_of(uint32_t codes) {
  constexpr uint64_t kLow = levels_word(kType, 0) ^ 0x8080808080808080;
  constexpr uint64_t kHigh = levels_word(kType, 8) ^ 0x8080808080808080;
  const Selectors of(__byte_perm(codes | codes >> 4, 0, 0x4420));
  const uint32_t low = wp::select_bytes(static_cast<uint32_t>(kLow), kLow >> 32, of.among_eight);
  const uint32_t high = wp::select_bytes(static_cast<uint32_t>(kHigh), kHigh >> 32, of.among_eight);
  return wp::select_bytes(low, high, of.which_half);
}

// Gguf<kType>::code of elements i to i + 3, plus kOffsetOf<kType>, in the bytes of a word; i is a multiple of 4.
template <QuantType kType>
__device__ __forceinline__ uint32_t four_codes(const uint8_t* block, unsigned i) {
  constexpr uint32_t kNibbles = 0x0f0f0f0f;
  const auto nibble_of_32 = [&](unsigned at) { return word_at<kType>(block + at + i % 16) >> (i / 16 * 4) & kNibbles; };
  const auto nibble_of_256 = [&](unsigned at) {
    return word_at<kType>(block + at + i / 64 * 32 + i % 32) >> (i / 32 % 2 * 4) & kNibbles;
  };
  if constexpr (kType == QuantType::kQ4_0) {
    return nibble_of_32(2);
  } else if constexpr (kType == QuantType::kQ4_1) {
    return nibble_of_32(4);
  } else if constexpr (kType == QuantType::kQ5_0) {
    return nibble_of_32(6) | fifth_bits(word_at<kType>(block + 2) >> i);
  } else if constexpr (kType == QuantType::kQ5_1) {
    return nibble_of_32(8) | fifth_bits(word_at<kType>(block + 4) >> i);
  } else if constexpr (kType == QuantType::kQ8_0) {
    return word_at<kType>(block + 2 + i) ^ 0x80808080;
  } else if constexpr (kType == QuantType::kQ4_K) {
    return nibble_of_256(16);
  } else if constexpr (kType == QuantType::kQ5_K) {
    return nibble_of_256(48) | (word_at<kType>(block + 16 + i % 32) >> i / 32 & 0x01010101) << 4;
  } else if constexpr (kType == QuantType::kQ6_K) {
    const uint32_t low = word_at<kType>(block + i / 128 * 64 + i % 64) >> (i / 64 % 2 * 4) & kNibbles;
    const uint32_t high = word_at<kType>(block + 128 + i / 128 * 32 + i % 32) >> (i / 32 % 4 * 2) & 0x03030303;
    return low | high << 4;
  } else {
    static_assert(has_levels(kType));
    return levels_of<kType>(nibble_of_32(GgufLayout<kType>::kFormat.bytes - 16));
  }
}

template <QuantType kType>
inline constexpr int kOffsetOf = kType == QuantType::kQ4_0                        ? 8
                                 : kType == QuantType::kQ5_0                      ? 16
                                 : kType == QuantType::kQ6_K                      ? 32
                                 : kType == QuantType::kQ8_0 || has_levels(kType) ? 128
                                                                                  : 0;

// Four weights as two words of T, by the exact rule.
template <typename T, QuantType kType>
__device__ __forceinline__ void four_weights(uint32_t codes, const GgufScale& scale, uint32_t& first,
                                             uint32_t& second) {
  constexpr bool kIsWide = kOffsetOf<kType> == 128;  // codes of 8 bits
  constexpr float kBase = (kIsWide ? 32768.0f : 128.0f) + kOffsetOf<kType>;
  const float base = __fmul_rn(-kBase, scale.factor);
  float values[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t bits = kIsWide ? __byte_perm(codes, 0x47000000, 0x7404 | static_cast<unsigned>(i) << 4)
                                  : __byte_perm(codes, 0x43000000, 0x7044 | static_cast<unsigned>(i) << 8);
    // MXFP4's factors reach 2^127, where the base would overflow.
    values[i] = kType == QuantType::kMxfp4 ? __fmul_rn(__fsub_rn(__uint_as_float(bits), kBase), scale.factor)
                                           : __fmaf_rn(__uint_as_float(bits), scale.factor, base);
    values[i] = Gguf<kType>::kAdds ? __fadd_rn(values[i], scale.addend) : values[i];
  }
  first = wp::pack_word<T>(values);
  second = wp::pack_word<T>(values + 2);
}

// Rows g and g + 8 of W from a first one on, as lane 4g + t copies and reads them. Those beyond the edge repeat the
// last one: what comes of them is not stored.
template <QuantType kType>
struct GgufRows {
  using Layout = GgufLayout<kType>;
  const uint8_t* of[2];
  const uint8_t* end;  // of the weight
  int num_bytes;       // of a row

  __device__ GgufRows(const WeightView& weight,  // [n, k]
                      int64_t n, int64_t k, int64_t first_row)
      : num_bytes(static_cast<int>(k / Layout::kFormat.elements) * Layout::kFormat.bytes) {
    end = weight.packed + n * num_bytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t wanted = first_row + 8 * half + static_cast<int>(threadIdx.x) % 32 / 4;
      of[half] = weight.packed + (wanted < n ? wanted : n - 1) * num_bytes;
    }
  }

  // Bytes between a multiple of 16 and the step that begins at byte `at` of a row.
  __device__ __forceinline__ int before(int half, int at) const {
    return static_cast<int>(reinterpret_cast<uintptr_t>(of[half] + at) % 16);
  }

  // Starts the copies of a step. No chunk lies beyond the weight, whose bytes are a multiple of 16 as n is of 8, but of
  // formats with an odd number of bytes a block: of their last chunk only what is there is read.
  __device__ __forceinline__ void start(int at, uint4* stage) const {  // [kSmallRows, kPitch]
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int begin = 16 * (lane % 4) - before(half, at);  // of the lane's first chunk, from the step on
      const int left = min(num_bytes - at, Layout::kStepBytes) - begin;
      const uint8_t* from = of[half] + at + begin;
      uint4* to = stage + (8 * half + lane / 4) * Layout::kPitch + lane % 4;
#pragma unroll
      for (int i = 0; i < Layout::kChunks; i += 4) {
        if (16 * i < left) {
          const bool is_whole = Layout::kAlignment > 1 || end - (from + 16 * i) >= 16;
          wp::cp_async_16(to + i, from + 16 * i, is_whole ? 16 : static_cast<int>(end - (from + 16 * i)));
        }
      }
    }
  }

  // Where the step that begins at byte `at` lies in its stage.
  __device__ __forceinline__ const uint8_t* staged(int half, int at, const uint4* stage) const {
    const int row = 8 * half + static_cast<int>(threadIdx.x) % 32 / 4;
    return reinterpret_cast<const uint8_t*>(stage + row * Layout::kPitch) + before(half, at);
  }
};

// Four weights of each of two rows, from element `at` + 4 * quad of their blocks on, as the MMA takes them. Those from
// `at` on, a multiple of 32, to `at` + 31 come in order, since they share scales.
template <typename T, QuantType kType>
__device__ __forceinline__ void decode_quad(const uint8_t* const (&blocks)[2], unsigned at, int quad,
                                            GgufScale (&scales)[2], uint32_t (&a)[4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const unsigned first = at + 4 * static_cast<unsigned>(quad);
    if (quad % 4 == 0 && (quad == 0 || kType == QuantType::kQ6_K)) {
      scales[half] = Gguf<kType>::template scale<aligned_half>(blocks[half], static_cast<int>(first));
    }
    four_weights<T, kType>(four_codes<kType>(blocks[half], first), scales[half], a[half], a[2 + half]);
  }
}

// Adds the products of elements `first` to `first` + 31 of a step, which belong to one block. Eight tokens more where
// `is_wide`.
template <typename T, QuantType kType>
__device__ __forceinline__ void gguf_products(const uint8_t* const (&steps)[2], unsigned first,
                                              const uint4 (&tokens)[2][4], bool is_wide, float (&sums)[2][4]) {
  constexpr BlockFormat kFormat = kFormatOf<kType>;
  const unsigned at = first % kFormat.elements;
  const unsigned block = first / kFormat.elements * kFormat.bytes;
  const uint8_t* const blocks[2] = {steps[0] + block, steps[1] + block};
  GgufScale scales[2];
#pragma unroll
  for (int quad = 0; quad < 8; ++quad) {
    uint32_t a[4];
    decode_quad<T, kType>(blocks, at, quad, scales, a);
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      const uint4 eight = tokens[group][quad / 2];
      const uint32_t b[2] = {quad % 2 == 0 ? eight.x : eight.z, quad % 2 == 0 ? eight.y : eight.w};
      if (group == 0 || is_wide) {
        wp::mma_m16n8k16<T>(sums[group], a, b);
      }
    }
  }
}

// 16 * row_warps rows of W a CTA; the warps on the same rows take turns along K.
template <typename T, QuantType kType>
__global__ void __launch_bounds__(32 * kGgufWarps, 4) linear_4bit_gguf_kernel(const SmallJob<T> job) {
  using Layout = GgufLayout<kType>;
  constexpr int kWarpChunks = kGgufStages * Layout::kStage;
  WP_SHARED(uint4, staged, size_t{kGgufWarps * kWarpChunks});
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int turns = kGgufWarps / job.row_warps;
  const int cta_rows = job.row_warps * kSmallRows;
  const int64_t cta_row = static_cast<int64_t>(blockIdx.x) * cta_rows;
  const GgufRows<kType> rows(job.weight, job.n, job.k, cta_row + warp % job.row_warps * kSmallRows);
  const bool is_wide = job.m > 8;
  const unsigned of_lane = threadIdx.x % 4 * 64;  // its first element of a step
  const int turn = warp / job.row_warps;
  const T* x[2];  // tokens beyond the edge repeat the last one
#pragma unroll
  for (int group = 0; group < 2; ++group) {
    const int64_t token = 8 * group + lane / 4;
    x[group] = job.x + (token < job.m ? token : job.m - 1) * job.k + turn * kGgufStep + of_lane;
  }

  uint4* stages = staged + warp * kWarpChunks;
  const int k = static_cast<int>(job.k);
  int at = turn * Layout::kStepBytes;
  int stage = 0;
  float sums[2][4] = {};
  if (at < rows.num_bytes) {
    rows.start(at, stages);
  }
  wp::cp_async_commit();
  for (int column = turn * kGgufStep; column < k; column += turns * kGgufStep) {
    const int next = at + turns * Layout::kStepBytes;
    if (next < rows.num_bytes) {
      rows.start(next, stages + (1 - stage) * Layout::kStage);
    }
    wp::cp_async_commit();
    wp::cp_async_wait<1>();
    __syncwarp();
    const uint4* here = stages + stage * Layout::kStage;
    const uint8_t* const steps[2] = {rows.staged(0, at, here), rows.staged(1, at, here)};
#pragma unroll 1
    for (int run = 0; run < 64; run += 32) {
      const unsigned first = of_lane + static_cast<unsigned>(run);
      const bool is_there = Layout::kFormat.elements == kGgufStep || column + static_cast<int>(first) < k;
      uint4 tokens[2][4] = {};  // stay zeros beyond the edge, where the step's first block takes the place of one
#pragma unroll
      for (int group = 0; group < 2; ++group) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (is_there && (group == 0 || is_wide)) {
            tokens[group][i] = wp::load_16(x[group] + run + 8 * i);
          }
        }
      }
      gguf_products<T, kType>(steps, is_there ? first : 0, tokens, is_wide, sums);
    }
    __syncwarp();  // the stage is read: the copies after the next ones overwrite it
    stage = 1 - stage;
    at = next;
    x[0] += turns * kGgufStep;
    x[1] += turns * kGgufStep;
  }
  __syncthreads();  // no copy is under way: the last step waited for its own, and started none
  static_assert(kGgufWarps * kGemvTokens * kSmallRows <= 4 * kGgufWarps * kWarpChunks);
  float* parts = reinterpret_cast<float*>(&staged[0]);
  float* own = parts + warp * (kGemvTokens * kSmallRows);
#pragma unroll
  for (int i = 0; i < 8; ++i) {  // as wp::mma_m16n8k16 lays them out
    const int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
    own[token * kSmallRows + i / 2 % 2 * 8 + lane / 4] = sums[i / 4][i % 4];
  }
  __syncthreads();
  small_store_y<T, kGgufWarps, kGemvTokens>(job, cta_row, cta_rows, turns, parts);
}

// A tile of linear_4bit_fragment.cuh, but that the blocks of two of its steps are staged at once.
template <int kTile, QuantType kQuantType>
struct GgufShape : FragmentShape<kTile> {
  static constexpr QuantType kType = kQuantType;
  static constexpr int kTogether = kGgufStep / FragmentShape<kTile>::kSize.step();
  static_assert(FragmentShape<kTile>::kThreads == 32 * kGgufWarps);
  static_assert(FragmentShape<kTile>::kStages <= kTogether + 1, "else blocks are waited for too late");
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kResident)
    linear_4bit_gguf_tile_kernel(const TileJob<T> job) {
  using Owner = Tile<T, Shape, true>;
  using Layout = GgufLayout<Shape::kType>;
  constexpr BlockFormat kFormat = Layout::kFormat;
  const Owner tile(job);
  WarpSums<T, Shape, true> warp;  // of y^T
  const GgufRows<Shape::kType> rows(job.weight, job.columns, job.k, tile.first_column + warp.row);
  const int before = static_cast<int>(tile.first_step) / Shape::kTogether;
  uint4* stages = tile.x + Shape::kSize.shared_bytes() / 16 + warp.row * (kGgufStages * Layout::kPitch);
  const auto start = [&](int step) {  // of the blocks
    if (Shape::kTogether * step < tile.steps) {
      rows.start((before + step) * Layout::kStepBytes, stages + step % kGgufStages * Layout::kStage);
    }
  };
  start(0);
  start(1);
  TokenCopies<T, Shape, true> copies(tile);
  for (int step = 0; step < Shape::kStages - 1; ++step) {
    copies.start_next();
    wp::cp_async_commit();
  }
  const int run = 32 * (warp.lane % 4);  // of a step
  const int x_at = swizzled<Owner::kStep / 8>(warp.lane / 4, run / 8);
  int left = static_cast<int>(job.k - tile.first_step * Owner::kStep) - run;  // of a row, from the run on
  for (int step = 0; step < tile.steps; ++step, left -= Owner::kStep) {
    // Behind the barrier the step's operands are complete, and those of the last step are no longer read.
    wp::cp_async_wait<Shape::kStages - 2>();
    __syncthreads();
    const int of_blocks = step / Shape::kTogether;
    if (step > 0 && step % Shape::kTogether == 0) {
      start(of_blocks + 1);
    }
    copies.start_next();
    wp::cp_async_commit();
    // Beyond the edge the step's first block takes the place of one, and meets zeros in x.
    const auto first = static_cast<unsigned>(left > 0 ? step % Shape::kTogether * Owner::kStep + run : 0);
    const uint4* here = stages + of_blocks % kGgufStages * Layout::kStage;
    const int at = (before + of_blocks) * Layout::kStepBytes;
    const unsigned block = first / kFormat.elements * kFormat.bytes;
    const uint8_t* const blocks[2] = {rows.staged(0, at, here) + block, rows.staged(1, at, here) + block};
    const uint4* x = tile.x + copies.stage * Owner::kStageChunks;  // the oldest: it is overwritten next
    GgufScale scales[2];
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        decode_quad<T, Shape::kType>(blocks, first % kFormat.elements, 2 * word + i, scales, a[i]);
      }
      multiply_fragments<T, Shape>(warp, x + (x_at ^ word), a);
    }
  }
  finish_fragments(tile, warp);
}

// Rows of bytes that 32 bits count, as LaneRows does.
inline constexpr int64_t kMostGgufColumns = int64_t{1} << 30;

template <typename T>
cudaError_t launch_gguf(const ProductJob& product, const MatmulPlan& plan, void* workspace, cudaStream_t stream) {
  if (!product.forward || product.k > kMostGgufColumns || product.k % product.weight.block_size != 0 ||
      product.n % 8 != 0) {
    return cudaErrorInvalidValue;
  }
  if (plan.kind != MatmulKind::kGemv) {
    return with_gguf(product.weight.type, [&]<QuantType kType>() {
      using Shape32 = GgufShape<5, kType>;
      using Shape64 = GgufShape<6, kType>;
      const TileJob<T> job = tile_job<T>(product, plan, workspace);
      const int64_t bytes = plan.workspace_bytes;
      constexpr int kStaged = gguf_staged_bytes(kFormatOf<kType>);
      return plan.rows == Shape32::kRows
                 ? launch_tile<Shape32>(linear_4bit_gguf_tile_kernel<T, Shape32>, job, bytes, stream, kStaged)
             : plan.rows == Shape64::kRows
                 ? launch_tile<Shape64>(linear_4bit_gguf_tile_kernel<T, Shape64>, job, bytes, stream, kStaged)
                 : cudaErrorInvalidValue;
    });
  }
  const int rows = plan.columns;
  if (product.m > kGemvTokens || (rows != 16 && rows != 32 && rows != 64) || product.n / rows >= kMostCtas) {
    return cudaErrorInvalidValue;
  }
  const auto ctas = static_cast<unsigned>(ceil_div(product.n, rows));
  return with_gguf(product.weight.type, [&]<QuantType kType>() {
    return wp::launch(linear_4bit_gguf_kernel<T, kType>, dim3(ctas), dim3(32 * kGgufWarps), 0, stream,
                      small_job<T>(product, rows));
  });
}

}  // namespace qlora_native::cuda
