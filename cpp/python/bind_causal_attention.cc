#include <pybind11/stl.h>

#include <array>

#include "cpu/causal_attention.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

using Shape = std::array<int64_t, 5>;                          // batches, heads, kv_heads, length, head_dim
using Heads = std::tuple<Address, int64_t, int64_t, int64_t>;  // address; strides of batch, head, row in elements

template <typename T>
cpu::HeadsView<T> view(const Heads& heads, const char* what) {
  const auto [address, batch, head, row] = heads;
  return {pointer<T>(address, 1, what), batch, head, row};
}

void check_shape(const Shape& shape) {
  const auto [batches, heads, kv_heads, length, head_dim] = shape;
  require(batches > 0 && kv_heads > 0 && heads > 0 && heads % kv_heads == 0 && length > 0 && head_dim > 0 &&
              head_dim % 32 == 0,
          "causal_attention: " + std::to_string(batches) + " x " + std::to_string(heads) + " heads over " +
              std::to_string(kv_heads) + " key heads, " + std::to_string(length) + " x " + std::to_string(head_dim) +
              ": expected heads in equal groups and a multiple of 32 dimensions.");
}

cpu::AttentionJob job_of(const Shape& shape, float scale, const Heads& q, const Heads& k, const Heads& v,
                         const Heads& out, Address lse) {
  check_shape(shape);
  const auto [batches, heads, kv_heads, length, head_dim] = shape;
  return {view<const Bf16>(q, "q"),
          view<const Bf16>(k, "k"),
          view<const Bf16>(v, "v"),
          view<Bf16>(out, "out"),
          pointer<float>(lse, batches * heads * length, "lse"),
          heads,
          kv_heads,
          length,
          head_dim,
          scale};
}

unsigned char* aligned_scratch(Address scratch) {
  require(scratch % 64 == 0, "causal_attention: scratch is not aligned to 64 bytes.");
  return pointer<unsigned char>(scratch, 1, "scratch");
}

int64_t scratch_bytes(const Shape& shape, bool backward) {
  check_shape(shape);
  const auto [batches, heads, kv_heads, length, head_dim] = shape;
  return cpu::attention_threads(batches * (backward ? kv_heads : heads)) *
         cpu::attention_scratch_bytes(length, head_dim, backward);
}

void forward(const Shape& shape, float scale, const Heads& q, const Heads& k, const Heads& v, const Heads& out,
             Address lse, Address scratch) {
  cpu::causal_attention(job_of(shape, scale, q, k, v, out, lse), shape[0], aligned_scratch(scratch));
}

void backward(const Shape& shape, float scale, const Heads& q, const Heads& k, const Heads& v, const Heads& out,
              Address lse, const Heads& grad_out, const Heads& grad_q, const Heads& grad_k, const Heads& grad_v,
              Address scratch) {
  cpu::causal_attention_backward(
      {job_of(shape, scale, q, k, v, out, lse), view<const Bf16>(grad_out, "grad_out"), view<Bf16>(grad_q, "grad_q"),
       view<Bf16>(grad_k, "grad_k"), view<Bf16>(grad_v, "grad_v")},
      shape[0], aligned_scratch(scratch));
}

}  // namespace

void bind_causal_attention(py::module_& module) {
  module.def("causal_attention_scratch_bytes", &scratch_bytes, py::arg("shape"), py::arg("backward"),
             "Bytes of scratch that a call with torch's present number of threads needs.");
  module.def("causal_attention", &forward, py::arg("shape"), py::arg("scale"), py::arg("q"), py::arg("k"), py::arg("v"),
             py::arg("out"), py::arg("lse"), py::arg("scratch"), py::call_guard<py::gil_scoped_release>(),
             "Causal attention of bf16 heads.");
  module.def("causal_attention_backward", &backward, py::arg("shape"), py::arg("scale"), py::arg("q"), py::arg("k"),
             py::arg("v"), py::arg("out"), py::arg("lse"), py::arg("grad_out"), py::arg("grad_q"), py::arg("grad_k"),
             py::arg("grad_v"), py::arg("scratch"), py::call_guard<py::gil_scoped_release>(),
             "Gradients of causal_attention to q, k and v.");
}

}  // namespace qlora_native::python
