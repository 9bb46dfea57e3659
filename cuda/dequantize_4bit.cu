#include <bit>
#include <cstdint>

#include "cuda/dequantize_4bit.cuh"
#include "cuda/dequantize_4bit.h"
#include "cuda/dequantize_4bit_gguf.cuh"
#include "cuda/grid.h"

namespace qlora_native::cuda {
namespace {

template <typename T>
cudaError_t launch_gguf(const WeightView& weight, const Runs& runs, void* out, cudaStream_t stream) {
  const bool vectors = runs.first % weight.block_size == 0 && are_aligned(kVectorBytes, out) &&
                       (runs.count == 1 || (runs.apart % weight.block_size == 0 && runs.length % kPerVector<T> == 0));
  return with_gguf(weight.type, [&]<QuantType kType>() {
    return wp::launch(dequantize_gguf_kernel<T, kType>,
                      dim3(grid_blocks(runs.count * runs.tiles, kDequantizeThreads / 32)), dim3(kDequantizeThreads), 0,
                      stream, weight.packed, vectors, runs, static_cast<T*>(out));
  });
}

template <typename T>
cudaError_t launch(const WeightView& weight, const Runs& runs, void* out, cudaStream_t stream) {
  if (is_gguf(weight.type)) {
    return launch_gguf<T>(weight, runs, out, stream);
  }
  // The codes of a vector stay within bytes and blocks only from a multiple of them on.
  constexpr int kVector = kPerVector<T>;
  const bool vectors = runs.first % kVector == 0 &&
                       (runs.count == 1 || (runs.length % kVector == 0 && runs.apart % kVector == 0)) &&
                       are_aligned(kVectorBytes, weight.packed + runs.first / 2, out);
  return wp::launch(dequantize_4bit_kernel<T>, dim3(grid_blocks(runs.count * runs.tiles, kDequantizeThreads / 32)),
                    dim3(kDequantizeThreads), 0, stream, weight,
                    std::countr_zero(static_cast<uint64_t>(weight.block_size)), vectors, runs, static_cast<T*>(out));
}

Runs runs_of(const Panel& panel) {
  const int64_t first = panel.row_begin * panel.row_length + panel.column_begin;
  const bool whole = panel.columns() == panel.row_length;
  const int64_t length = whole ? panel.rows() * panel.row_length : panel.columns();
  return {first, whole ? 1 : panel.rows(), length, panel.row_length, ceil_div(length, kDequantizeTile)};
}

}  // namespace

cudaError_t launch_dequantize_4bit(const WeightView& weight, Dtype dtype, void* out, cudaStream_t stream) {
  return launch_dequantize_4bit(weight, {weight.numel, 0, 1, 0, weight.numel}, dtype, out, stream);
}

cudaError_t launch_dequantize_4bit(const WeightView& weight, const Panel& panel, Dtype dtype, void* out,
                                   cudaStream_t stream) {
  const Runs runs = runs_of(panel);
  if (runs.count * runs.length == 0) {
    return cudaSuccess;
  }
  switch (dtype) {
    case Dtype::kFloat32:
      return launch<float>(weight, runs, out, stream);
    case Dtype::kBfloat16:
      return launch<Bf16>(weight, runs, out, stream);
    case Dtype::kFloat16:
      return launch<Fp16>(weight, runs, out, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t find_image() {
  cudaFuncAttributes attributes{};
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&dequantize_4bit_kernel<float>));
}

}  // namespace qlora_native::cuda
