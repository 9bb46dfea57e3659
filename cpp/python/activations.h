// Checked jobs of core/activations.h, for the bindings of every device.
#pragma once

#include <array>
#include <string>

#include "core/activations.h"
#include "python/bindings.h"

namespace qlora_native::python {

inline void check_rows(int64_t rows, int64_t width) {
  checked_size(rows, "rows");
  checked_size(width, "width");
  require(width > 0, "rms_norm: x is [" + std::to_string(rows) + ", " + std::to_string(width) +
                         "]: expected at least one column.");
}

inline RmsNormJob checked_rms_norm(Dtype type, Address x, Address weight, float eps, int64_t rows, int64_t width,
                                   Address y, Address rstd) {
  check_rows(rows, width);
  return {any_pointer(type, x, product_of({rows, width}), "x"), any_pointer(type, weight, width, "weight"), width, eps,
          any_pointer(type, y, product_of({rows, width}), "y"), pointer<float>(rstd, rows, "rstd")};
}

inline RmsNormGradJob checked_rms_norm_backward(Dtype type, Address grad_y, Address x, Address weight, Address rstd,
                                                int64_t rows, int64_t width, Address grad_x) {
  check_rows(rows, width);
  return {any_pointer(type, grad_y, product_of({rows, width}), "grad_y"),
          any_pointer(type, x, product_of({rows, width}), "x"),
          any_pointer(type, weight, width, "weight"),
          pointer<float>(rstd, rows, "rstd"),
          width,
          any_pointer(type, grad_x, product_of({rows, width}), "grad_x")};
}

inline SwigluJob checked_swiglu(Dtype type, Address gate, Address up, int64_t numel, Address y) {
  checked_size(numel, "numel");
  return {any_pointer(type, gate, numel, "gate"), any_pointer(type, up, numel, "up"), any_pointer(type, y, numel, "y")};
}

inline SwigluGradJob checked_swiglu_backward(Dtype type, Address grad_y, Address gate, Address up, int64_t numel,
                                             Address grad_gate, Address grad_up) {
  checked_size(numel, "numel");
  return {any_pointer(type, grad_y, numel, "grad_y"), any_pointer(type, gate, numel, "gate"),
          any_pointer(type, up, numel, "up"), any_pointer(type, grad_gate, numel, "grad_gate"),
          any_pointer(type, grad_up, numel, "grad_up")};
}

using RotaryShape = std::array<int64_t, 4>;    // batches, heads, length, head_dim
using RotaryStrides = std::array<int64_t, 3>;  // of the first three, in elements; the last one is 1

inline RotaryJob checked_rotary(Dtype type, Address x, const RotaryStrides& x_strides, Address cosine, Address sine,
                                int64_t angle_batches, const RotaryShape& shape, bool inverse, Address y,
                                const RotaryStrides& y_strides) {
  const auto [batches, heads, length, head_dim] = shape;
  require(batches >= 0 && heads >= 0 && length >= 0 && head_dim > 0 && head_dim % 2 == 0,
          "rotary: a head has " + std::to_string(head_dim) + " dimensions: expected an even number.");
  require(angle_batches == 1 || angle_batches == batches, "rotary: cos has " + std::to_string(angle_batches) +
                                                              " rows for " + std::to_string(batches) +
                                                              " of x: expected one for all or one for each.");
  const int64_t numel = product_of({batches, heads, length, head_dim});
  const int64_t angles = product_of({angle_batches, length, head_dim});
  return {any_pointer(type, x, numel, "x"),
          {x_strides[0], x_strides[1], x_strides[2]},
          any_pointer(type, cosine, angles, "cos"),
          any_pointer(type, sine, angles, "sin"),
          angle_batches == 1 ? 0 : length,
          batches,
          heads,
          length,
          head_dim,
          inverse,
          any_pointer(type, y, numel, "y"),
          {y_strides[0], y_strides[1], y_strides[2]}};
}

}  // namespace qlora_native::python
