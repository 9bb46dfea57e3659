// Causal scaled dot-product attention with grouped key heads, and its gradient (Dao et al., "FlashAttention", 2022:
// nothing of size length x length is kept; scores are computed again in backward).
//
// Heads are packed, multiplied in units that depend on the length alone, and written. A thread does so for one group of
// them after the other; where these are too few for the threads, so that one sequence uses all cores, threads share the
// units of a few heads at a time. The bits are the same.
#pragma once

#include "cpu/kernels/attention.h"

namespace qlora_native::cpu {

// Scratch of a call from this thread with its present number of threads.
int64_t attention_scratch_bytes(Dtype dtype, const AttentionJob& job, bool backward);

// scratch: aligned to 64 bytes, of attention_scratch_bytes.
void causal_attention(Dtype dtype, const AttentionJob& job, unsigned char* scratch);
void causal_attention_backward(Dtype dtype, const AttentionJob& job, unsigned char* scratch);

}  // namespace qlora_native::cpu
