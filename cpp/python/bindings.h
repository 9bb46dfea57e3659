// One function a file registers its op; what they share in checking stands here.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "core/codebook.h"
#include "core/gguf.h"
#include "core/half.h"
#include "core/layout.h"
#include "core/weight_view.h"

namespace qlora_native::python {

// Addresses cross as integers: the caller owns the memory and keeps it alive for the call.
using Address = uintptr_t;

void bind_causal_attention(pybind11::module_& module);
void bind_quantize_4bit(pybind11::module_& module);
void bind_dequantize_4bit(pybind11::module_& module);
void bind_experts_4bit(pybind11::module_& module);
void bind_linear_4bit(pybind11::module_& module);
void bind_adamw_step(pybind11::module_& module);
void bind_lion_step(pybind11::module_& module);
void bind_gptq_4bit(pybind11::module_& module);
void bind_gradient_norm(pybind11::module_& module);
void bind_linear_cross_entropy(pybind11::module_& module);
void bind_mapped_file(pybind11::module_& module);
void bind_paging(pybind11::module_& module);
void bind_rms_norm(pybind11::module_& module);
void bind_rotary(pybind11::module_& module);
void bind_search_scales_4bit(pybind11::module_& module);
void bind_swiglu(pybind11::module_& module);

inline void require(bool condition, const char* sentence) {
  if (!condition) {
    throw std::invalid_argument(sentence);
  }
}

inline void require(bool condition, const std::string& sentence) { require(condition, sentence.c_str()); }

// A method for def(). pybind11 hands None to a pointer to a member as a null `this`, which a reference refuses.
template <typename Class, typename Result, typename... Arguments>
auto method(Result (Class::*function)(Arguments...)) {
  return [function](Class& self, Arguments... arguments) -> Result {
    return (self.*function)(std::forward<Arguments>(arguments)...);
  };
}

template <typename Class, typename Result, typename... Arguments>
auto method(Result (Class::*function)(Arguments...) const) {
  return [function](const Class& self, Arguments... arguments) -> Result {
    return (self.*function)(std::forward<Arguments>(arguments)...);
  };
}

// The system would read a path to its first null byte alone.
inline const std::string& checked_path(const std::string& path, const char* what) {
  const size_t null = path.find('\0');
  if (null != std::string::npos) {
    require(false, std::string(what) + " has a null byte, its byte " + std::to_string(null) + ": expected none.");
  }
  return path;
}

inline constexpr int64_t kMostBytes = int64_t{1} << 56;  // no address space is larger

// A number of elements, rows or columns.
inline int64_t checked_size(int64_t size, const char* what) {
  if (size < 0 || size > kMostBytes) {
    require(false, std::string(what) + " is " + std::to_string(size) + ": expected 0 to 2^56.");
  }
  return size;
}

// The product of sizes; one more than kMostBytes, which pointer() refuses, if it is larger.
inline int64_t product_of(std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes) {
    if (__builtin_mul_overflow(product, size, &product) || product > kMostBytes) {
      return kMostBytes + 1;
    }
  }
  return product;
}

// No sentence is built while all is well: a call has many checks, and may be short itself.
template <typename T>
T* pointer(Address address, int64_t count, const char* what) {
  if (count < 0 || count > kMostBytes / static_cast<int64_t>(sizeof(T))) {
    require(false, std::string(what) + " has " + std::to_string(count) + " elements: expected fewer, and 0 at least.");
  }
  if (address == 0 && count != 0) {
    require(false, std::string(what) + " is a null pointer, but " + std::to_string(count) + " elements are expected.");
  }
  if (address % alignof(T) != 0) {
    require(false, std::string(what) + " is not aligned to " + std::to_string(alignof(T)) + " bytes.");
  }
  return reinterpret_cast<T*>(address);
}

// Whether a function may run in the scratch that it is given.
inline bool holds(Address scratch, int64_t scratch_bytes, int64_t needed) {
  return scratch_bytes >= needed && scratch % 64 == 0 && (scratch != 0 || needed == 0);
}

// A weight of `numel` elements as a matrix.
inline void check_shape(int64_t n, int64_t k, int64_t numel) {
  checked_size(n, "n");
  checked_size(k, "k");
  if (n == 0 ? numel != 0 : numel % n != 0 || numel / n != k) {
    require(false, "a weight of " + std::to_string(numel) + " elements is not [" + std::to_string(n) + ", " +
                       std::to_string(k) + "].");
  }
}

inline Dtype checked_dtype(int value) {
  if (value < 0 || value > 2) {
    require(false, "dtype is " + std::to_string(value) + ": expected 0 (float32), 1 (bfloat16) or 2 (float16).");
  }
  return static_cast<Dtype>(value);
}

// The address of `count` elements of a dtype, as the job structs hold it.
inline void* any_pointer(Dtype dtype, Address address, int64_t count, const char* what) {
  return dtype == Dtype::kFloat32 ? static_cast<void*>(pointer<float>(address, count, what))
                                  : pointer<uint16_t>(address, count, what);
}

// A type that weights can be quantized to here.
inline QuantType checked_quant_type(int value) {
  require(value == 0 || value == 1, "quant_type is " + std::to_string(value) + ": expected 0 (nf4) or 1 (fp4).");
  return static_cast<QuantType>(value);
}

inline void check_block_size(int64_t block_size) {
  require(is_block_size(block_size), "block_size is " + std::to_string(block_size) + ": expected a power of two from " +
                                         std::to_string(kMinBlock) + " to " + std::to_string(kMaxBlock) + ".");
}

// A weight as Weight.pointers() in Python gives it: the addresses of packed, absmax, absmax_codes, nested_absmax,
// nested_offset, nested_code and levels; quant_type, numel, block_size.
using WeightFields = std::tuple<Address, Address, Address, Address, Address, Address, Address, int, int64_t, int64_t>;

// Checks a weight; 0 for `levels` or `nested_code` means the built-in table of `quant_type`.
// Exactly one of `absmax` and `absmax_codes` is given, unless the weight is empty or of a GGUF type.
WeightView checked_weight(const WeightFields& fields);

}  // namespace qlora_native::python
