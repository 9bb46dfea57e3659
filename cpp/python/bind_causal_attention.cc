#include <pybind11/stl.h>

#include <array>

#include "cpu/causal_attention.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace qlora_native::python {
namespace {

using Shape = std::array<int64_t, 5>;                          // batches, heads, kv_heads, length, head_dim
using Heads = std::tuple<Address, int64_t, int64_t, int64_t>;  // address; strides of batch, head, row in elements

template <typename Void>
cpu::HeadsView<Void> view(Dtype dtype, const Heads& heads, const char* what) {
  const auto [address, batch, head, row] = heads;
  return {any_pointer(dtype, address, 1, what), batch, head, row};
}

cpu::AttentionJob job_of(const Shape& shape) {
  const auto [batches, heads, kv_heads, length, head_dim] = shape;
  require(batches > 0 && kv_heads > 0 && heads > 0 && heads % kv_heads == 0 && length > 0 && head_dim > 0 &&
              head_dim % 8 == 0,
          "causal_attention: " + std::to_string(batches) + " x " + std::to_string(heads) + " heads over " +
              std::to_string(kv_heads) + " key heads, " + std::to_string(length) + " x " + std::to_string(head_dim) +
              ": expected heads in equal groups and a multiple of 8 dimensions.");
  checked_size(product_of({batches, heads, length, head_dim}), "the number of elements of q");
  return {batches, heads, kv_heads, length, head_dim};
}

cpu::AttentionJob job_of(Dtype dtype, const Shape& shape, float scale, const Heads& q, const Heads& k, const Heads& v,
                         const Heads& out, Address lse) {
  cpu::AttentionJob job = job_of(shape);
  job.scale = scale;
  job.q = view<const void>(dtype, q, "q");
  job.k = view<const void>(dtype, k, "k");
  job.v = view<const void>(dtype, v, "v");
  job.out = view<void>(dtype, out, "out");
  job.lse = pointer<float>(lse, product_of({job.batches, job.heads, job.length}), "lse");
  return job;
}

unsigned char* aligned_scratch(Address scratch) {
  require(scratch % 64 == 0, "causal_attention: scratch is not aligned to 64 bytes.");
  return pointer<unsigned char>(scratch, 1, "scratch");
}

int64_t scratch_bytes(int dtype, const Shape& shape, bool backward) {
  return cpu::attention_scratch_bytes(checked_dtype(dtype), job_of(shape), backward);
}

void causal_attention_forward(int dtype, const Shape& shape, float scale, const Heads& q, const Heads& k,
                              const Heads& v, const Heads& out, Address lse, Address scratch) {
  const Dtype type = checked_dtype(dtype);
  cpu::causal_attention(type, job_of(type, shape, scale, q, k, v, out, lse), aligned_scratch(scratch));
}

void causal_attention_backward(int dtype, const Shape& shape, float scale, const Heads& q, const Heads& k,
                               const Heads& v, const Heads& out, Address lse, const Heads& grad_out,
                               const Heads& grad_q, const Heads& grad_k, const Heads& grad_v, Address scratch) {
  const Dtype type = checked_dtype(dtype);
  cpu::AttentionJob job = job_of(type, shape, scale, q, k, v, out, lse);
  job.grad_out = view<const void>(type, grad_out, "grad_out");
  job.grad_q = view<void>(type, grad_q, "grad_q");
  job.grad_k = view<void>(type, grad_k, "grad_k");
  job.grad_v = view<void>(type, grad_v, "grad_v");
  cpu::causal_attention_backward(type, job, aligned_scratch(scratch));
}

}  // namespace

void bind_causal_attention(py::module_& module) {
  module.def("causal_attention_scratch_bytes", &scratch_bytes, py::arg("dtype"), py::arg("shape"), py::arg("backward"),
             "Bytes of scratch that a call with torch's present number of threads needs.");
  module.def("causal_attention", &causal_attention_forward, py::arg("dtype"), py::arg("shape"), py::arg("scale"),
             py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"), py::arg("scratch"),
             py::call_guard<py::gil_scoped_release>(), "Causal attention of heads of one dtype.");
  module.def("causal_attention_backward", &causal_attention_backward, py::arg("dtype"), py::arg("shape"),
             py::arg("scale"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"),
             py::arg("grad_out"), py::arg("grad_q"), py::arg("grad_k"), py::arg("grad_v"), py::arg("scratch"),
             py::call_guard<py::gil_scoped_release>(), "Gradients of causal_attention to q, k and v.");
}

}  // namespace qlora_native::python
