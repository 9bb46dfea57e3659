// Causal scaled dot-product attention with grouped key heads, and its gradient (Dao et al., "FlashAttention", 2022:
// nothing of size length x length is kept; scores are computed again in backward).
//
// Threads share a few heads at a time: these are packed, then multiplied in units that depend on the length alone, then
// written, so that one sequence with few heads uses all of them and the bits do not depend on their number.
#pragma once

#include "cpu/kernels-attention.h"

namespace qlora_native::cpu {

// Scratch of a call from this thread with its present number of threads.
int64_t attention_scratch_bytes(Dtype dtype, const AttentionJob& job, bool backward);

// scratch: aligned to 64 bytes, of attention_scratch_bytes.
void causal_attention(Dtype dtype, const AttentionJob& job, unsigned char* scratch);
void causal_attention_backward(Dtype dtype, const AttentionJob& job, unsigned char* scratch);

}  // namespace qlora_native::cpu
