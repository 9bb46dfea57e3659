// Jobs and kernels of causal attention.
#pragma once

#include <cstdint>

#include "core/half.h"

namespace qlora_native::cpu {

inline constexpr int64_t kAttentionKeys = 64;     // keys of a block; lengths are padded to it
inline constexpr int64_t kAttentionQueries = 32;  // queries of a block, and the step of a reduction

// A tensor [batch, heads, length, head_dim] by its strides in elements; the last one is 1.
template <typename T>
struct HeadsView {
  T* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;

  T* at(int64_t batch, int64_t head) const { return data + batch * batch_stride + head * head_stride; }
};

struct AttentionJob {
  HeadsView<const Bf16> q;  // [batch, heads, length, head_dim]
  HeadsView<const Bf16> k;  // [batch, kv_heads, length, head_dim]
  HeadsView<const Bf16> v;  // [batch, kv_heads, length, head_dim]
  HeadsView<Bf16> out;      // as q
  float* lse;               // [batch, heads, length]: log of the sum of exp(scale q.k)
  int64_t heads;
  int64_t kv_heads;
  int64_t length;
  int64_t head_dim;  // a multiple of 32
  float scale;

  int64_t padded() const { return (length + kAttentionKeys - 1) / kAttentionKeys * kAttentionKeys; }
};

struct AttentionGradJob {
  AttentionJob forward;  // with the out and lse that it made
  HeadsView<const Bf16> grad_out;
  HeadsView<Bf16> grad_q;
  HeadsView<Bf16> grad_k;
  HeadsView<Bf16> grad_v;
};

struct AttentionKernels {
  // Heads [first, last) of [batch, heads] flattened. scratch: aligned to 64 bytes, of attention_scratch_bytes.
  void (*forward)(const AttentionJob& job, int64_t first, int64_t last, unsigned char* scratch);
  // Key heads [first, last) of [batch, kv_heads] flattened, with all queries that see them.
  void (*backward)(const AttentionGradJob& job, int64_t first, int64_t last, unsigned char* scratch);
};

}  // namespace qlora_native::cpu
