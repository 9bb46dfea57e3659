// Causal scaled dot-product attention in bf16 with grouped key heads, and its gradient (Dao et al., "FlashAttention",
// 2022: nothing of size length x length is kept; scores are computed again in backward).
#pragma once

#include "cpu/kernels-attention.h"

namespace qlora_native::cpu {

// Scratch for each of the threads that the call will use; see attention_threads.
int64_t attention_scratch_bytes(int64_t length, int64_t head_dim, bool backward);
int64_t attention_threads(int64_t units);

void causal_attention(const AttentionJob& job, int64_t batches,
                      unsigned char* scratch);  // [attention_threads(batches * heads)][attention_scratch_bytes]

void causal_attention_backward(
    const AttentionGradJob& job, int64_t batches,
    unsigned char* scratch);  // [attention_threads(batches * kv_heads)][attention_scratch_bytes]

}  // namespace qlora_native::cpu
