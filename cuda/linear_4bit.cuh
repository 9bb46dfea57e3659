// The launches of the 4-bit matrix products for one dtype: what linear_4bit_bf16.cu and linear_4bit_fp16.cu
// instantiate.
#pragma once

#include <cstdint>
#include <limits>

#include "core/layout.h"
#include "core/product.h"
#include "cuda/linear_4bit.h"
#include "cuda/linear_4bit_fragment.cuh"
#include "cuda/linear_4bit_small.cuh"
#include "cuda/linear_4bit_split_k.cuh"
#include "cuda/linear_4bit_tile.cuh"
#include "cuda/wp.cuh"

namespace qlora_native::cuda {

// Of W for the kernels of few tokens, which count them in 32 bits up to two steps of a CTA beyond the last.
inline constexpr int64_t kMostSmallColumns = std::numeric_limits<int32_t>::max() - 2 * 8 * kSmallStep;

template <typename T, int kGroups>
cudaError_t launch_small(const ProductJob& product, int rows, cudaStream_t stream) {
  const int64_t ctas = ceil_div(product.n, rows);
  if (ctas > kMostCtas) {
    return cudaErrorInvalidValue;
  }
  return wp::launch(linear_4bit_small_kernel<T, kGroups>, dim3(static_cast<unsigned>(ctas)),
                    dim3(32 * small_warps(kGroups)), 0, stream, small_job<T>(product, rows));
}

template <typename T>
cudaError_t launch_gemv(const ProductJob& product, const MatmulPlan& plan, cudaStream_t stream) {
  const int rows = plan.columns;  // of W a CTA
  if (!product.forward || product.m > kGemvTokens || product.weight.block_size < kReductionStep ||
      product.k > kMostSmallColumns || (rows != 16 && rows != 32 && rows != 64)) {
    return cudaErrorInvalidValue;
  }
  return product.m > 8   ? launch_small<T, 4>(product, rows, stream)
         : product.m > 4 ? launch_small<T, 2>(product, rows, stream)
                         : launch_small<T, 1>(product, rows, stream);
}

template <typename T>
cudaError_t launch_reduce(const TileJob<T>& job, int tile_columns, cudaStream_t stream) {
  constexpr int64_t kMostReduceCtas = 1 << 16;
  const int64_t ctas = ceil_div(job.m * ceil_div(job.columns, 8), kReduceThreads);
  return wp::launch(linear_4bit_reduce_kernel<T>,
                    dim3(static_cast<unsigned>(ctas < kMostReduceCtas ? ctas : kMostReduceCtas)), dim3(kReduceThreads),
                    0, stream, job.partial, job.bias, job.y, job.m, job.columns,
                    static_cast<int64_t>(job.column_tiles) * tile_columns, job.splits);
}

// The job of a plan, to launch_tile.
template <typename T>
TileJob<T> tile_job(const ProductJob& product, const MatmulPlan& plan, void* workspace) {
  return {product.weight,
          static_cast<const T*>(product.x),
          static_cast<const T*>(product.bias),
          static_cast<const T*>(product.low),
          static_cast<const T*>(product.up),
          static_cast<T*>(product.y),
          plan.splits > 1 ? static_cast<float*>(workspace) : nullptr,
          product.m,
          product.k,
          product.depth(),
          product.width(),
          product.r,
          block_shift_of(product.weight),
          plan.splits,
          0,
          0};
}

// workspace_bytes: what the plan asked for. staged: bytes of shared memory behind those of the tile.
template <typename Shape, typename T>
cudaError_t launch_tile(void (*kernel)(TileJob<T>), TileJob<T> job, int64_t workspace_bytes, cudaStream_t stream,
                        int staged = 0) {
  const int64_t row_tiles = ceil_div(job.m, Shape::kRows);
  const int64_t column_tiles = ceil_div(job.columns, Shape::kColumns);
  const bool has_parts = job.splits >= 1 && job.splits <= ceil_div(job.reduction, kReductionStep);
  const bool holds_sums =
      job.splits == 1 || (job.partial != nullptr &&
                          split_k_workspace_bytes(job.m, job.columns, Shape::kSize, job.splits) <= workspace_bytes);
  const bool counts_columns = !Shape::kSize.fragments || job.k <= kMostSmallColumns;
  if (row_tiles > kMostCtas / column_tiles || !has_parts || !holds_sums || !counts_columns) {
    return cudaErrorInvalidValue;
  }
  job.row_tiles = static_cast<int>(row_tiles);
  job.column_tiles = static_cast<int>(column_tiles);
  const dim3 grid(static_cast<unsigned>(row_tiles * column_tiles), static_cast<unsigned>(job.splits));
  const cudaError_t error = wp::launch(kernel, grid, dim3(Shape::kThreads),
                                       static_cast<size_t>(Shape::kSize.shared_bytes() + staged), stream, job);
  return error == cudaSuccess && job.splits > 1 ? launch_reduce(job, Shape::kColumns, stream) : error;
}

template <typename T>
cudaError_t launch_tiles(const ProductJob& product, const MatmulPlan& plan, void* workspace, cudaStream_t stream) {
  const TileJob<T> job = tile_job<T>(product, plan, workspace);
  const int64_t bytes = plan.workspace_bytes;
  switch (plan.rows) {
    case Tile16::kRows:
      return product.forward ? launch_tile<Fragments16>(linear_4bit_fragment_kernel<T, Fragments16>, job, bytes, stream)
                             : launch_tile<Tile16>(linear_4bit_tile_kernel<T, Tile16, false>, job, bytes, stream);
    case Tile32::kRows:
      return product.forward ? launch_tile<Fragments32>(linear_4bit_fragment_kernel<T, Fragments32>, job, bytes, stream)
                             : launch_tile<Tile32>(linear_4bit_tile_kernel<T, Tile32, false>, job, bytes, stream);
    case Tile64::kRows:
      return product.forward ? launch_tile<Fragments64>(linear_4bit_fragment_kernel<T, Fragments64>, job, bytes, stream)
                             : launch_tile<Tile64>(linear_4bit_tile_kernel<T, Tile64, false>, job, bytes, stream);
    case Tile128::kRows:
      return product.forward ? launch_tile<Tile128>(linear_4bit_tile_kernel<T, Tile128, true>, job, bytes, stream)
                             : launch_tile<Tile128>(linear_4bit_tile_kernel<T, Tile128, false>, job, bytes, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename T>
cudaError_t launch_linear(const ProductJob& product, const MatmulPlan& plan, void* workspace, cudaStream_t stream) {
  switch (plan.kind) {
    case MatmulKind::kGemv:
      return launch_gemv<T>(product, plan, stream);
    case MatmulKind::kSplitK:
    case MatmulKind::kTile:
      return launch_tiles<T>(product, plan, workspace, stream);
    case MatmulKind::kTwoStep:
      break;
  }
  return cudaErrorInvalidValue;
}

// Of a weight in a format of GGUF: linear_4bit_gguf.cuh.
template <typename T>
cudaError_t launch_gguf(const ProductJob& product, const MatmulPlan& plan, void* workspace, cudaStream_t stream);

extern template cudaError_t launch_reduce<Bf16>(const TileJob<Bf16>&, int, cudaStream_t);
extern template cudaError_t launch_reduce<Fp16>(const TileJob<Fp16>&, int, cudaStream_t);
extern template cudaError_t launch_linear<Bf16>(const ProductJob&, const MatmulPlan&, void*, cudaStream_t);
extern template cudaError_t launch_linear<Fp16>(const ProductJob&, const MatmulPlan&, void*, cudaStream_t);

}  // namespace qlora_native::cuda
