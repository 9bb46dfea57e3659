#include "cpu/causal_attention.h"

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace qlora_native::cpu {
namespace {

constexpr int64_t kAlignment = 64;

// Heads [first, last) of thread `part`: in equal runs, so that neighbours share their packed keys.
template <typename Run>
void by_heads(int64_t units, int64_t bytes, unsigned char* scratch, const Run& run) {
  const int64_t threads = attention_threads(units);
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      run(units * part / threads, units * (part + 1) / threads, scratch + part * bytes);
    }
  });
}

}  // namespace

int64_t attention_threads(int64_t units) { return unit_threads(units); }

int64_t attention_scratch_bytes(int64_t length, int64_t head_dim, bool backward) {
  const int64_t padded = (length + kAttentionKeys - 1) / kAttentionKeys * kAttentionKeys;
  constexpr int64_t kArrays = 20;  // each may be padded to the alignment
  const int64_t rows = padded * head_dim;
  const int64_t bytes = backward ? 7 * 2 * rows + 3 * 4 * rows + 2 * 2 * kAttentionKeys * padded +
                                       (2 + 4 + 4) * kAttentionKeys * kAttentionQueries + 2 * 4 * padded
                                 : 2 * 2 * rows + (2 + 4) * kAttentionQueries * (head_dim + padded);
  return (bytes + (kArrays + 1) * kAlignment) / kAlignment * kAlignment;
}

void causal_attention(const AttentionJob& job, int64_t batches, unsigned char* scratch) {
  const auto kernel = kernels().attention.forward;
  by_heads(batches * job.heads, attention_scratch_bytes(job.length, job.head_dim, false), scratch,
           [&](int64_t first, int64_t last, unsigned char* own) { kernel(job, first, last, own); });
}

void causal_attention_backward(const AttentionGradJob& job, int64_t batches, unsigned char* scratch) {
  const auto kernel = kernels().attention.backward;
  by_heads(batches * job.forward.kv_heads, attention_scratch_bytes(job.forward.length, job.forward.head_dim, true),
           scratch, [&](int64_t first, int64_t last, unsigned char* own) { kernel(job, first, last, own); });
}

}  // namespace qlora_native::cpu
