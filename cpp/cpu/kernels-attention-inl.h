// Causal attention over one head at a time, every product by tiles. Scores above the diagonal are not computed but for
// the blocks that it cuts.
#pragma once

#include "cpu/kernels-attention.h"
#include "cpu/kernels-paired-inl.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

// Consecutive arrays in a scratch buffer, each aligned to 64 bytes.
class Scratch {
 public:
  explicit Scratch(unsigned char* at) : at_(at) {}
  template <typename T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(at_);
    at_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return taken;
  }

 private:
  unsigned char* at_;
};

// Sixteen zeros, then sixteen ones: from + 16 - d on, lanes below d are zero.
struct StepTable {
  float value[32];
};
constexpr StepTable step_table(float below, float from) {
  StepTable table{};
  for (int i = 0; i < 32; ++i) {
    table.value[i] = i < 16 ? below : from;
  }
  return table;
}
inline const float* lanes_from(const StepTable& table, int64_t first) {
  return table.value + 16 - (first < 0 ? 0 : first > 16 ? 16 : first);
}

constexpr float kMasked = -3.0e38f;

// Scores of one query against keys [0, position] to weights exp(scale (s - top)), zero behind; returns their sum.
inline float softmax_weights(const float* scores, int64_t position, int64_t columns, float scale, Bf16* weights,
                             float* top) {
  static constexpr StepTable kBound = step_table(3.0e38f, kMasked);
  const int64_t seen = position + 1;
  Sixteen highest = splat(kMasked);
  for (int64_t j = 0; j < seen; j += kSixteen) {
    highest = larger(highest, smaller(load16(lanes_from(kBound, seen - j)), load16(scores + j)));
  }
  *top = max16(highest);
  const Sixteen factor = splat(scale);
  const Sixteen shift = splat(-*top * scale);
  Sixteen sums = splat(0.0f);
  int64_t j = 0;
  for (; j < seen; j += kSixteen) {
    const Sixteen s = smaller(load16(lanes_from(kBound, seen - j)), load16(scores + j));
    const Sixteen weight = exp16(fused(s, factor, shift));
    sums = sums + weight;
    store_narrow(weights + j, weight);
  }
  for (; j < columns; j += kSixteen) {
    store_narrow(weights + j, splat(0.0f));
  }
  return sum16(sums);
}

void attention_heads(const AttentionJob& job, int64_t first, int64_t last, unsigned char* memory) {
  [[maybe_unused]] const AttentionTiles tiles;
  const int64_t width = job.head_dim;
  const int64_t padded = job.padded();
  Scratch scratch(memory);
  Bf16* keys = scratch.take<Bf16>(padded * width);
  Bf16* values = scratch.take<Bf16>(padded * width);
  Bf16* queries = scratch.take<Bf16>(kAttentionQueries * width);
  Bf16* weights = scratch.take<Bf16>(kAttentionQueries * padded);
  float* scores = scratch.take<float>(kAttentionQueries * padded);
  float* sums = scratch.take<float>(kAttentionQueries * width);
  const PairedTiles key_tiles{keys, kPairedTile, width / 32 * kPairedTile};
  const PairedTiles value_tiles{values, width / 16 * kPairedTile, kPairedTile};
  int64_t packed = -1;
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t batch = unit / job.heads;
    const int64_t head = unit % job.heads;
    const int64_t kv_head = head / (job.heads / job.kv_heads);
    if (packed != batch * job.kv_heads + kv_head) {
      packed = batch * job.kv_heads + kv_head;
      pack_transposed(job.k.at(batch, kv_head), job.k.row_stride, job.length, padded, width, keys);
      pack_rows(job.v.at(batch, kv_head), job.v.row_stride, job.length, padded, width, values);
    }
    const Bf16* q = job.q.at(batch, head);
    Bf16* out = job.out.at(batch, head);
    for (int64_t i = 0; i < job.length; i += kAttentionQueries) {
      const int64_t rows = job.length - i < kAttentionQueries ? job.length - i : kAttentionQueries;
      const int64_t columns = i + kAttentionQueries;
      copy_rows(q + i * job.q.row_stride, job.q.row_stride, rows, kAttentionQueries, width, queries);
      paired_product(queries, width, key_tiles, kAttentionQueries, columns, width / 32, scores, padded, false);
      float totals[kAttentionQueries];
      for (int64_t row = 0; row < kAttentionQueries; ++row) {
        float top = 0.0f;
        totals[row] = softmax_weights(scores + row * padded, i + row, columns, job.scale, weights + row * padded, &top);
        if (row < rows) {
          job.lse[unit * job.length + i + row] = top * job.scale + __builtin_logf(totals[row]);
        }
      }
      paired_product(weights, padded, value_tiles, kAttentionQueries, width, columns / 32, sums, width, false);
      for (int64_t row = 0; row < rows; ++row) {
        const Sixteen share = splat(1.0f / totals[row]);
        for (int64_t d = 0; d < width; d += kSixteen) {
          store16(out + (i + row) * job.out.row_stride + d, load16(sums + row * width + d) * share);
        }
      }
    }
  }
}

// Arrays of one key head and one query head while its gradients are formed; see attention_grad_heads.
struct GradBuffers {
  Bf16* keys;           // [padded, width], rows
  Bf16* values;         // [padded, width], rows
  Bf16* keys_turned;    // [width, padded], rows
  Bf16* q_turned;       // second operand q^T [width, padded]
  Bf16* grad_turned;    // second operand grad_out^T [width, padded]
  Bf16* q_rows;         // second operand q [padded, width]
  Bf16* grad_rows;      // second operand grad_out [padded, width]
  Bf16* weights;        // [64 keys, padded queries], rows
  Bf16* grad_scores;    // [64 keys, padded queries], rows
  Bf16* score_pairs;    // second operand [64 keys, 32 queries]
  float* scores;        // [64 keys, 32 queries]
  float* grad_weights;  // [64 keys, 32 queries]
  float* grad_q;        // [width, padded]
  float* grad_k;        // [padded, width]
  float* grad_v;        // [padded, width]
  float* lse;           // [padded]
  float* delta;         // [padded]: grad_out . out

  GradBuffers(unsigned char* memory, int64_t padded, int64_t width) {
    Scratch scratch(memory);
    Bf16** const arrays[] = {&keys, &values, &keys_turned, &q_turned, &grad_turned, &q_rows, &grad_rows};
    for (Bf16** const array : arrays) {
      *array = scratch.take<Bf16>(padded * width);
    }
    weights = scratch.take<Bf16>(kAttentionKeys * padded);
    grad_scores = scratch.take<Bf16>(kAttentionKeys * padded);
    score_pairs = scratch.take<Bf16>(kAttentionKeys * kAttentionQueries);
    scores = scratch.take<float>(kAttentionKeys * kAttentionQueries);
    grad_weights = scratch.take<float>(kAttentionKeys * kAttentionQueries);
    grad_q = scratch.take<float>(padded * width);
    grad_k = scratch.take<float>(padded * width);
    grad_v = scratch.take<float>(padded * width);
    lse = scratch.take<float>(padded);
    delta = scratch.take<float>(padded);
  }
};

// From scores and gradients of the weights of keys [j, j + 64) and queries [i, i + 32), transposed, to the weights and
// the gradients of the scores: p = exp(scale s - lse), ds = p (dp - delta).
inline void grad_block(const GradBuffers& b, int64_t i, int64_t j, int64_t padded, float scale) {
  static constexpr StepTable kOpen = step_table(0.0f, 1.0f);
  const Sixteen factor = splat(scale);
  for (int64_t half = 0; half < kAttentionQueries; half += kSixteen) {
    const Sixteen lse = splat(0.0f) - load16(b.lse + i + half);
    const Sixteen delta = load16(b.delta + i + half);
    for (int64_t row = 0; row < kAttentionKeys; row += 2) {
      Sixteen grads[2];
      for (int64_t r = 0; r < 2; ++r) {
        const int64_t at = (row + r) * kAttentionQueries + half;
        // A query's weights are at most 1; keys that it does not see may score anything.
        const Sixteen exponent = smaller(splat(0.0f), fused(load16(b.scores + at), factor, lse));
        Sixteen weight = exp16(exponent);
        const int64_t first_seen = j + row + r - (i + half);
        if (first_seen > 0) {
          weight = weight * load16(lanes_from(kOpen, first_seen));
        }
        grads[r] = weight * (load16(b.grad_weights + at) - delta);
        store_narrow(b.weights + (row + r) * padded + i + half, weight);
        store_narrow(b.grad_scores + (row + r) * padded + i + half, grads[r]);
      }
      const int64_t tile = row / kStepLength * 2 + half / kSixteen;
      store_paired(b.score_pairs + tile * kPairedTile + row % kStepLength * 16, grads[0], grads[1]);
    }
  }
}

inline void write_rows(const float* sums, int64_t length, int64_t width, float scale, Bf16* out, int64_t row_stride) {
  const Sixteen factor = splat(scale);
  for (int64_t row = 0; row < length; ++row) {
    for (int64_t d = 0; d < width; d += kSixteen) {
      store16(out + row * row_stride + d, load16(sums + row * width + d) * factor);
    }
  }
}

// The same from sums [width, padded] that lie turned.
inline void write_turned(const float* sums, int64_t padded, int64_t length, int64_t width, float scale, Bf16* out,
                         int64_t row_stride) {
  const Sixteen factor = splat(scale);
  for (int64_t row = 0; row < length; row += kSixteen) {
    for (int64_t d = 0; d < width; d += kSixteen) {
      Sixteen turned[kSixteen];
      turn_square(sums + d * padded + row, padded, turned);
      for (int64_t r = 0; r < kSixteen && row + r < length; ++r) {
        store16(out + (row + r) * row_stride + d, turned[r] * factor);
      }
    }
  }
}

// Adds one query head's part to grad_k and grad_v, and writes its grad_q.
void grad_of_query_head(const AttentionGradJob& job, int64_t batch, int64_t head, bool first_of_group,
                        const GradBuffers& b) {
  const AttentionJob& forward = job.forward;
  const int64_t width = forward.head_dim;
  const int64_t padded = forward.padded();
  const int64_t length = forward.length;
  const Bf16* out = forward.out.at(batch, head);
  const Bf16* grad_out = job.grad_out.at(batch, head);
  const float* lse = forward.lse + (batch * forward.heads + head) * length;
  for (int64_t i = 0; i < padded; ++i) {
    Sixteen products = splat(0.0f);
    for (int64_t d = 0; i < length && d < width; d += kSixteen) {
      products = fused(load16(out + i * forward.out.row_stride + d), load16(grad_out + i * job.grad_out.row_stride + d),
                       products);
    }
    b.delta[i] = sum16(products);
    b.lse[i] = i < length ? lse[i] : 1.0e30f;  // padding gets no weight
  }
  const Bf16* q = forward.q.at(batch, head);
  pack_transposed(q, forward.q.row_stride, length, padded, width, b.q_turned);
  pack_transposed(grad_out, job.grad_out.row_stride, length, padded, width, b.grad_turned);
  pack_rows(q, forward.q.row_stride, length, padded, width, b.q_rows);
  pack_rows(grad_out, job.grad_out.row_stride, length, padded, width, b.grad_rows);
  const int64_t turned_column = width / 32 * kPairedTile;
  const int64_t rows_step = width / 16 * kPairedTile;
  for (int64_t j = 0; j < padded; j += kAttentionKeys) {
    for (int64_t i = j; i < padded; i += kAttentionQueries) {
      const int64_t at = i / 16 * turned_column;
      paired_product(b.keys + j * width, width, {b.q_turned + at, kPairedTile, turned_column}, kAttentionKeys,
                     kAttentionQueries, width / 32, b.scores, kAttentionQueries, false);
      paired_product(b.values + j * width, width, {b.grad_turned + at, kPairedTile, turned_column}, kAttentionKeys,
                     kAttentionQueries, width / 32, b.grad_weights, kAttentionQueries, false);
      grad_block(b, i, j, padded, forward.scale);
      paired_product(b.keys_turned + j, padded, {b.score_pairs, 2 * kPairedTile, kPairedTile}, width, kAttentionQueries,
                     kAttentionKeys / 32, b.grad_q + i, padded, j > 0);
    }
    const int64_t steps = (padded - j) / 32;
    const int64_t from = j / 32 * rows_step;
    paired_product(b.weights + j, padded, {b.grad_rows + from, rows_step, kPairedTile}, kAttentionKeys, width, steps,
                   b.grad_v + j * width, width, !first_of_group);
    paired_product(b.grad_scores + j, padded, {b.q_rows + from, rows_step, kPairedTile}, kAttentionKeys, width, steps,
                   b.grad_k + j * width, width, !first_of_group);
  }
  write_turned(b.grad_q, padded, length, width, forward.scale, job.grad_q.at(batch, head), job.grad_q.row_stride);
}

void attention_grad_heads(const AttentionGradJob& job, int64_t first, int64_t last, unsigned char* memory) {
  [[maybe_unused]] const AttentionTiles tiles;
  const AttentionJob& forward = job.forward;
  const int64_t width = forward.head_dim;
  const int64_t padded = forward.padded();
  const int64_t group = forward.heads / forward.kv_heads;
  const GradBuffers buffers(memory, padded, width);
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t batch = unit / forward.kv_heads;
    const int64_t kv_head = unit % forward.kv_heads;
    const Bf16* k = forward.k.at(batch, kv_head);
    copy_rows(k, forward.k.row_stride, forward.length, padded, width, buffers.keys);
    copy_rows(forward.v.at(batch, kv_head), forward.v.row_stride, forward.length, padded, width, buffers.values);
    for (int64_t d = 0; d < width; ++d) {
      for (int64_t j = 0; j < padded; ++j) {
        buffers.keys_turned[d * padded + j] = buffers.keys[j * width + d];
      }
    }
    for (int64_t member = 0; member < group; ++member) {
      grad_of_query_head(job, batch, kv_head * group + member, member == 0, buffers);
    }
    write_rows(buffers.grad_k, forward.length, width, forward.scale, job.grad_k.at(batch, kv_head),
               job.grad_k.row_stride);
    write_rows(buffers.grad_v, forward.length, width, 1.0f, job.grad_v.at(batch, kv_head), job.grad_v.row_stride);
  }
}

constexpr AttentionKernels kAttention = {attention_heads, attention_grad_heads};

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
