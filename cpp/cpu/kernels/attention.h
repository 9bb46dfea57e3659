// Jobs and kernels of causal attention.
#pragma once

#include <cstdint>

#include "core/half.h"

namespace qlora_native::cpu {

inline constexpr int64_t kAttentionKeys = 64;     // keys of a block; lengths are padded to it
inline constexpr int64_t kAttentionQueries = 32;  // queries of a block, and the step of a reduction
inline constexpr int64_t kAttentionRows = 128;    // rows that are packed, or written, as one unit of work

// A tensor [batch, heads, length, head_dim] by its strides in elements; the last one is 1. Void: void or const void.
template <typename Void>
struct HeadsView {
  Void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;
};

struct AttentionJob {
  int64_t batches;
  int64_t heads;
  int64_t kv_heads;
  int64_t length;
  int64_t head_dim;  // a multiple of 8
  float scale = 1.0f;
  HeadsView<const void> q{};  // [batches, heads, length, head_dim], of one dtype like all of these
  HeadsView<const void> k{};  // [batches, kv_heads, length, head_dim]
  HeadsView<const void> v{};  // [batches, kv_heads, length, head_dim]
  HeadsView<void> out{};      // as q: written by forward, read by backward, as is lse
  float* lse = nullptr;       // [batches, heads, length]: log of the sum of exp(scale q.k)
  HeadsView<const void> grad_out{};
  HeadsView<void> grad_q{};
  HeadsView<void> grad_k{};
  HeadsView<void> grad_v{};
};

// How a job is divided. Nothing here depends on the number of threads.
struct AttentionPlan {
  int64_t padded;       // length, in whole blocks of keys
  int64_t width;        // head_dim, to a multiple of 32
  int64_t group;        // query heads of a key head
  int64_t segment;      // keys whose gradients are one unit of work
  int64_t segments;     // of a head
  int64_t key_bytes;    // shared scratch of a key head
  int64_t query_bytes;  // shared scratch of a query head
  int64_t own_bytes;    // scratch of a thread
};

// Query heads [first, last) of [batches, heads] flattened: of whole groups, or all of one.
struct AttentionTurn {
  const AttentionJob& job;
  const AttentionPlan& plan;
  int64_t first;
  int64_t last;
  int64_t first_key;  // key heads [first_key, last_key) of [batches, kv_heads] flattened
  int64_t last_key;
  unsigned char* shared;  // [last_key - first_key][key_bytes], [last - first][query_bytes]
};

// Of one dtype. A phase is done before the next begins; its units may run in any order, on any threads. Scratch is
// aligned to 64 bytes.
struct AttentionKernels {
  using Measure = void (*)(AttentionPlan& plan);  // fills in the bytes
  using Phase = void (*)(const AttentionTurn& turn, int64_t unit, unsigned char* own);

  Measure measure_forward;
  Phase pack_forward;  // units: key heads x rows
  Phase attend;        // units: query heads x blocks of queries

  Measure measure_backward;
  Phase pack_backward;  // units: (query heads, then key heads unless an earlier turn packed them) x rows
  Phase grad_segment;   // units: query heads x segments
  Phase write_grads;    // units: (query heads, then key heads) x rows
};

}  // namespace qlora_native::cpu
