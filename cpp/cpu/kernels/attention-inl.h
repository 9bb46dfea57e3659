// Causal attention over blocks of queries, every product by panels and tiles. Scores above the diagonal are not
// computed but for the blocks that it cuts.
#pragma once

#include "cpu/kernels/attention-gemm-inl.h"
#include "cpu/kernels/attention.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

// Consecutive arrays in a scratch buffer, each aligned to 64 bytes. An address of 0 measures them.
class Scratch {
 public:
  explicit Scratch(const unsigned char* at) : at_(reinterpret_cast<uintptr_t>(at)) {}
  template <typename T>
  T* take(int64_t count) {
    const uintptr_t taken = at_;
    at_ += (static_cast<uintptr_t>(count) * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(taken);
  }
  int64_t taken() const { return static_cast<int64_t>(at_); }

 private:
  uintptr_t at_;
};

template <typename Arrays>
int64_t bytes_of(const AttentionPlan& plan) {
  Scratch scratch(nullptr);
  [[maybe_unused]] const Arrays arrays(scratch, plan);
  return scratch.taken();
}

// The arrays of a key head or of a query head, in the shared scratch of a turn.
template <typename Arrays>
Arrays key_arrays(const AttentionTurn& turn, int64_t key_head) {
  Scratch scratch(turn.shared + (key_head - turn.first_key) * turn.plan.key_bytes);
  return Arrays(scratch, turn.plan);
}
template <typename Arrays>
Arrays query_arrays(const AttentionTurn& turn, int64_t head) {
  const int64_t keys = (turn.last_key - turn.first_key) * turn.plan.key_bytes;
  Scratch scratch(turn.shared + keys + (head - turn.first) * turn.plan.query_bytes);
  return Arrays(scratch, turn.plan);
}

// A head of [batches, heads] flattened.
template <typename T, typename Void>
T* head_of(const HeadsView<Void>& view, int64_t heads, int64_t head) {
  return static_cast<T*>(view.data) + head / heads * view.batch_stride + head % heads * view.head_stride;
}

inline int64_t row_units(const AttentionPlan& plan) { return (plan.padded + kAttentionRows - 1) / kAttentionRows; }

// each(row) for the blocks of 32 rows that unit `part` of a head packs or writes.
template <typename Each>
void by_blocks(const AttentionPlan& plan, int64_t part, const Each& each) {
  const int64_t first = part * kAttentionRows;
  const int64_t last = first + kAttentionRows < plan.padded ? first + kAttentionRows : plan.padded;
  for (int64_t row = first; row < last; row += kPanelWidth) {
    each(row);
  }
}

// each(column, square) for 32 x 32 elements at a time of rows [row, row + 32) of a head.
template <typename T, typename Each>
void by_squares(const AttentionTurn& turn, const T* head, int64_t row_stride, int64_t row, const Each& each) {
  for (int64_t column = 0; column < turn.plan.width; column += kPanelWidth) {
    alignas(64) Packed<T> square[kSquare];
    load_square(head + row * row_stride + column, row_stride, turn.job.length - row, turn.job.head_dim - column,
                square);
    each(column, square);
  }
}

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

template <typename E>
struct ForwardKeys {
  E* keys;    // tiles of k^T [width, padded]: [padded / 16][width / 32]
  E* values;  // tiles of v [padded, width]: [padded / 32][width / 16]

  ForwardKeys(Scratch& scratch, const AttentionPlan& plan)
      : keys(scratch.take<E>(plan.padded * plan.width)), values(scratch.take<E>(plan.padded * plan.width)) {}
};

template <typename E>
struct ForwardOwn {
  E* queries;     // panels [32, width]
  float* scores;  // panels [32, padded]
  E* weights;     // panels [32, padded]; in place of the scores where both are floats
  float* sums;    // panels [32, width]

  ForwardOwn(Scratch& scratch, const AttentionPlan& plan)
      : queries(scratch.take<E>(kAttentionQueries * plan.width)),
        scores(scratch.take<float>(kAttentionQueries * plan.padded)) {
    if constexpr (sizeof(E) == sizeof(float)) {
      weights = scores;
    } else {
      weights = scratch.take<E>(kAttentionQueries * plan.padded);
    }
    sums = scratch.take<float>(kAttentionQueries * plan.width);
  }
};

template <typename T>
void measure_forward(AttentionPlan& plan) {
  plan.key_bytes = bytes_of<ForwardKeys<Packed<T>>>(plan);
  plan.query_bytes = 0;
  plan.own_bytes = bytes_of<ForwardOwn<Packed<T>>>(plan);
}

template <typename T>
void pack_forward(const AttentionTurn& turn, int64_t unit, unsigned char*) {
  const AttentionJob& job = turn.job;
  const int64_t width = turn.plan.width;
  const int64_t head = turn.first_key + unit / row_units(turn.plan);
  const auto to = key_arrays<ForwardKeys<Packed<T>>>(turn, head);
  const T* k = head_of<const T>(job.k, job.kv_heads, head);
  const T* v = head_of<const T>(job.v, job.kv_heads, head);
  by_blocks(turn.plan, unit % row_units(turn.plan), [&](int64_t row) {
    by_squares(turn, k, job.k.row_stride, row, [&](int64_t column, const Packed<T>* square) {
      tiles_of_transpose(square, to.keys + row * width + column * 16, width * 16);
    });
    by_squares(turn, v, job.v.row_stride, row, [&](int64_t column, const Packed<T>* square) {
      tiles_of(square, to.values + row * width + column * kPanelWidth);
    });
  });
}

constexpr float kMasked = -3.0e38f;

// Scores of a query against keys [0, seen), in panels of 32 rows, to weights exp(scale (s - top)), zero behind in the
// panel that the last key seen is in; returns their sum.
template <typename E>
inline float softmax_weights(const float* scores, int64_t seen, float scale, E* weights, float* top) {
  static constexpr StepTable kBound = step_table(3.0e38f, kMasked);
  const int64_t last = (seen - 1) / kPanelWidth * kPanelWidth;  // where the panel with the last key begins
  const auto masked = [&](int64_t j, int64_t half) {
    return smaller(load16(lanes_from(kBound, seen - j - half)), load16(scores + j * kPanelWidth + half));
  };
  Sixteen highest = larger(masked(last, 0), masked(last, kSixteen));
  for (int64_t j = 0; j < last; j += kPanelWidth) {
    highest = larger(highest, larger(load16(scores + j * kPanelWidth), load16(scores + j * kPanelWidth + kSixteen)));
  }
  *top = max16(highest);
  const Sixteen factor = splat(scale);
  const Sixteen shift = splat(-*top * scale);
  Sixteen sums = splat(0.0f);
  const auto weigh = [&](int64_t at, Sixteen score) {
    const Sixteen weight = exp16(fused(score, factor, shift));
    sums = sums + weight;
    store_narrow(weights + at, weight);
  };
  for (int64_t j = 0; j < last; j += kPanelWidth) {
    weigh(j * kPanelWidth, load16(scores + j * kPanelWidth));
    weigh(j * kPanelWidth + kSixteen, load16(scores + j * kPanelWidth + kSixteen));
  }
  weigh(last * kPanelWidth, masked(last, 0));
  weigh(last * kPanelWidth + kSixteen, masked(last, kSixteen));
  return sum16(sums);
}

template <typename T>
void attend(const AttentionTurn& turn, int64_t unit, unsigned char* memory) {
  using E = Packed<T>;
  [[maybe_unused]] const TileScope tiles;
  const AttentionJob& job = turn.job;
  const int64_t width = turn.plan.width;
  const int64_t blocks = (job.length + kAttentionQueries - 1) / kAttentionQueries;
  const int64_t head = turn.first + unit / blocks;
  const int64_t i = (blocks - 1 - unit % blocks) * kAttentionQueries;  // those with the most keys first
  const int64_t rows = job.length - i < kAttentionQueries ? job.length - i : kAttentionQueries;
  const int64_t seen = i + kAttentionQueries;
  const auto from = key_arrays<ForwardKeys<E>>(turn, head / turn.plan.group);
  Scratch scratch(memory);
  const ForwardOwn<E> own(scratch, turn.plan);
  const T* q = head_of<const T>(job.q, job.heads, head);
  T* out = head_of<T>(job.out, job.heads, head);
  for (int64_t column = 0; column < width; column += kPanelWidth) {
    load_square(q + i * job.q.row_stride + column, job.q.row_stride, rows, job.head_dim - column,
                own.queries + column * kPanelWidth);
  }
  multiply_panels<E>({own.queries, kSquare}, {from.keys, kTile, width * 16}, kAttentionQueries, seen,
                     width / kPanelWidth, {own.scores, kSquare}, false);
  float totals[kAttentionQueries];
  for (int64_t row = 0; row < kAttentionQueries; ++row) {
    float top = 0.0f;
    totals[row] =
        softmax_weights(own.scores + row * kPanelWidth, i + row + 1, job.scale, own.weights + row * kPanelWidth, &top);
    if (row < rows) {
      job.lse[head * job.length + i + row] = top * job.scale + __builtin_logf(totals[row]);
    }
  }
  multiply_panels<E>({own.weights, kSquare}, {from.values, width * kPanelWidth, kTile}, kAttentionQueries, width,
                     seen / kPanelWidth, {own.sums, kSquare}, false);
  for (int64_t row = 0; row < rows; ++row) {
    const Sixteen share = splat(1.0f / totals[row]);
    for (int64_t d = 0; d < job.head_dim; d += kSixteen) {
      const float* sums = own.sums + d / kPanelWidth * kSquare + row * kPanelWidth + d % kPanelWidth;
      store_upto(out + (i + row) * job.out.row_stride + d, job.head_dim - d, load16(sums) * share);
    }
  }
}

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
