// Causal attention over blocks of queries and of keys, every product by panels and tiles. Scores above the diagonal are
// not computed but for the blocks that it cuts.
#pragma once

#include "cpu/kernels-attention-gemm-inl.h"
#include "cpu/kernels-attention.h"

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

// ---------------------------------------------------------------------------------------------------------------------
// Forward

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
  [[maybe_unused]] const AttentionTiles tiles;
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

// ---------------------------------------------------------------------------------------------------------------------
// Backward. Scores and what is computed from them lie transposed: rows are keys, columns queries.

constexpr int64_t kBlock = kAttentionKeys * kAttentionQueries;

template <typename E>
struct GradKeys {
  E* keys;             // panels [padded, width]
  E* values;           // panels [padded, width]
  E* keys_transposed;  // panels [width, padded]
  float* grad_k;       // panels [padded, width]: sums over earlier turns
  float* grad_v;       // panels [padded, width]

  GradKeys(Scratch& scratch, const AttentionPlan& plan) {
    E** const operands[] = {&keys, &values, &keys_transposed};
    for (E** const operand : operands) {
      *operand = scratch.take<E>(plan.padded * plan.width);
    }
    grad_k = scratch.take<float>(plan.padded * plan.width);
    grad_v = scratch.take<float>(plan.padded * plan.width);
  }
};

template <typename E>
struct GradQueries {
  E* q_transposed;     // tiles of q^T [width, padded]: [padded / 16][width / 32]
  E* grad_transposed;  // tiles of grad_out^T [width, padded]
  E* q;                // tiles of q [padded, width]: [padded / 32][width / 16]
  E* grad;             // tiles of grad_out [padded, width]
  float* lse;          // [padded]
  float* delta;        // [padded]: grad_out . out
  float* grad_k;       // panels [padded, width]
  float* grad_v;       // panels [padded, width]
  float* grad_q;       // of each segment: panels [width, queries from its first key on]

  GradQueries(Scratch& scratch, const AttentionPlan& plan) {
    E** const operands[] = {&q_transposed, &grad_transposed, &q, &grad};
    for (E** const operand : operands) {
      *operand = scratch.take<E>(plan.padded * plan.width);
    }
    lse = scratch.take<float>(plan.padded);
    delta = scratch.take<float>(plan.padded);
    grad_k = scratch.take<float>(plan.padded * plan.width);
    grad_v = scratch.take<float>(plan.padded * plan.width);
    grad_q = scratch.take<float>(queries_before(plan, plan.segments) * plan.width);
  }

  // Queries that see the segments before one, counted once a segment.
  static int64_t queries_before(const AttentionPlan& plan, int64_t segment) {
    return segment * plan.padded - plan.segment * (segment * (segment - 1) / 2);
  }
  // What a segment adds to grad_q of queries [i, i + 32).
  float* grad_q_of(const AttentionPlan& plan, int64_t segment, int64_t i) const {
    return grad_q + (queries_before(plan, segment) + i - segment * plan.segment) * plan.width;
  }
};

template <typename E>
struct GradOwn {
  E* weights;           // panels [64 keys, padded queries]
  E* grad_scores;       // panels [64 keys, padded queries]
  E* score_tiles;       // tiles of grad_scores [64 keys, 32 queries]
  float* scores;        // a panel [64 keys, 32 queries]
  float* grad_weights;  // a panel [64 keys, 32 queries]

  GradOwn(Scratch& scratch, const AttentionPlan& plan)
      : weights(scratch.take<E>(kAttentionKeys * plan.padded)),
        grad_scores(scratch.take<E>(kAttentionKeys * plan.padded)),
        score_tiles(scratch.take<E>(kBlock)),
        scores(scratch.take<float>(kBlock)),
        grad_weights(scratch.take<float>(kBlock)) {}
};

template <typename T>
void measure_backward(AttentionPlan& plan) {
  plan.key_bytes = bytes_of<GradKeys<Packed<T>>>(plan);
  plan.query_bytes = bytes_of<GradQueries<Packed<T>>>(plan);
  plan.own_bytes = bytes_of<GradOwn<Packed<T>>>(plan);
}

template <typename T>
void pack_grad_keys(const AttentionTurn& turn, int64_t head, int64_t row) {
  using E = Packed<T>;
  const AttentionJob& job = turn.job;
  const int64_t width = turn.plan.width;
  const int64_t panel = turn.plan.padded * kPanelWidth;
  const auto to = key_arrays<GradKeys<E>>(turn, head);
  const auto copy = [&](const E* square, E* out) { std::memcpy(out, square, kSquare * sizeof(E)); };
  by_squares(turn, head_of<const T>(job.k, job.kv_heads, head), job.k.row_stride, row,
             [&](int64_t column, const E* square) {
               copy(square, to.keys + column / kPanelWidth * panel + row * kPanelWidth);
               transpose_square(square, to.keys_transposed + row * width + column * kPanelWidth);
             });
  by_squares(turn, head_of<const T>(job.v, job.kv_heads, head), job.v.row_stride, row,
             [&](int64_t column, const E* square) {
               copy(square, to.values + column / kPanelWidth * panel + row * kPanelWidth);
             });
}

template <typename T>
void pack_grad_queries(const AttentionTurn& turn, int64_t head, int64_t row) {
  using E = Packed<T>;
  const AttentionJob& job = turn.job;
  const int64_t width = turn.plan.width;
  const auto to = query_arrays<GradQueries<E>>(turn, head);
  const T* out = head_of<const T>(job.out, job.heads, head);
  const T* grad_out = head_of<const T>(job.grad_out, job.heads, head);
  const auto pack = [&](const T* x, int64_t row_stride, E* transposed, E* straight) {
    by_squares(turn, x, row_stride, row, [&](int64_t column, const E* square) {
      tiles_of_transpose(square, transposed + row * width + column * 16, width * 16);
      tiles_of(square, straight + row * width + column * kPanelWidth);
    });
  };
  pack(head_of<const T>(job.q, job.heads, head), job.q.row_stride, to.q_transposed, to.q);
  pack(grad_out, job.grad_out.row_stride, to.grad_transposed, to.grad);
  for (int64_t i = row; i < row + kPanelWidth; ++i) {
    Sixteen products = splat(0.0f);
    for (int64_t d = 0; i < job.length && d < job.head_dim; d += kSixteen) {
      products = fused(load_upto(out + i * job.out.row_stride + d, job.head_dim - d),
                       load_upto(grad_out + i * job.grad_out.row_stride + d, job.head_dim - d), products);
    }
    to.delta[i] = sum16(products);
    to.lse[i] = i < job.length ? job.lse[head * job.length + i] : 1.0e30f;  // padding gets no weight
  }
}

template <typename T>
void pack_backward(const AttentionTurn& turn, int64_t unit, unsigned char*) {
  const int64_t heads = turn.last - turn.first;
  const int64_t head = unit / row_units(turn.plan);
  by_blocks(turn.plan, unit % row_units(turn.plan), [&](int64_t row) {
    if (head < heads) {
      pack_grad_queries<T>(turn, turn.first + head, row);
    } else {
      pack_grad_keys<T>(turn, turn.first_key + head - heads, row);
    }
  });
}

// From scores and gradients of the weights of keys [j, j + rows) and queries [i, i + 32) to the weights and the
// gradients of the scores: p = exp(scale s - lse), ds = p (dp - delta). lse and delta begin at i.
template <typename E>
inline void grad_block(const GradOwn<E>& own, const float* lse, const float* delta, int64_t i, int64_t j, int64_t rows,
                       float scale) {
  static constexpr StepTable kOpen = step_table(0.0f, 1.0f);
  const int64_t panel = (i - j) * kAttentionKeys;
  const Sixteen factor = splat(scale);
  for (int64_t half = 0; half < kAttentionQueries; half += kSixteen) {
    const Sixteen shift = splat(0.0f) - load16(lse + half);
    const Sixteen mean = load16(delta + half);
    for (int64_t row = 0; row < rows; row += 2) {
      Sixteen grads[2];
      for (int64_t r = 0; r < 2; ++r) {
        const int64_t at = (row + r) * kAttentionQueries + half;
        // A query's weights are at most 1; keys that it does not see may score anything.
        const Sixteen exponent = smaller(splat(0.0f), fused(load16(own.scores + at), factor, shift));
        Sixteen weight = exp16(exponent);
        const int64_t first_seen = j + row + r - (i + half);
        if (first_seen > 0) {
          weight = weight * load16(lanes_from(kOpen, first_seen));
        }
        grads[r] = weight * (load16(own.grad_weights + at) - mean);
        store_narrow(own.weights + panel + at, weight);
        store_narrow(own.grad_scores + panel + at, grads[r]);
      }
      store_two_rows(own.score_tiles + (row / kPanelWidth * 2 + half / kSixteen) * kTile, row % kPanelWidth, grads[0],
                     grads[1]);
    }
  }
}

template <typename T>
void grad_segment(const AttentionTurn& turn, int64_t unit, unsigned char* memory) {
  using E = Packed<T>;
  [[maybe_unused]] const AttentionTiles tiles;
  const AttentionPlan& plan = turn.plan;
  const int64_t width = plan.width;
  const int64_t panel = plan.padded * kPanelWidth;
  const int64_t segment = unit % plan.segments;  // those with the most queries first
  const int64_t head = turn.first + unit / plan.segments;
  const int64_t first = segment * plan.segment;
  const int64_t last = first + plan.segment < plan.padded ? first + plan.segment : plan.padded;
  const auto key = key_arrays<GradKeys<E>>(turn, head / plan.group);
  const auto query = query_arrays<GradQueries<E>>(turn, head);
  Scratch scratch(memory);
  const GradOwn<E> own(scratch, plan);
  for (int64_t j = first; j < last; j += kAttentionKeys) {
    for (int64_t i = j; i < plan.padded; i += kAttentionQueries) {
      const int64_t rows = i == j ? kAttentionKeys / 2 : kAttentionKeys;  // none of these queries sees the others
      const int64_t at = i * width;
      multiply_panels<E>({key.keys + j * kPanelWidth, panel}, {query.q_transposed + at, kTile, width * 16}, rows,
                         kAttentionQueries, width / kPanelWidth, {own.scores, kBlock}, false);
      multiply_panels<E>({key.values + j * kPanelWidth, panel}, {query.grad_transposed + at, kTile, width * 16}, rows,
                         kAttentionQueries, width / kPanelWidth, {own.grad_weights, kBlock}, false);
      grad_block(own, query.lse + i, query.delta + i, i, j, rows, turn.job.scale);
      multiply_panels<E>({key.keys_transposed + j * width, width * kPanelWidth}, {own.score_tiles, 2 * kTile, kTile},
                         width, kAttentionQueries, rows / kPanelWidth,
                         {query.grad_q_of(plan, segment, i), width * kPanelWidth}, j > first);
    }
    const auto sum_over_queries = [&](const E* scores, const E* tiles_of_rows, float* out) {
      for (int64_t half = 0; half < kAttentionKeys;
           half += kPanelWidth) {  // the second one is first seen 32 queries later
        multiply_panels<E>({scores + half * (kAttentionKeys + kPanelWidth), kBlock},
                           {tiles_of_rows + (j + half) * width, width * kPanelWidth, kTile}, kPanelWidth, width,
                           (plan.padded - j - half) / kPanelWidth, {out + (j + half) * kPanelWidth, panel}, false);
      }
    };
    sum_over_queries(own.weights, query.grad, query.grad_v);
    sum_over_queries(own.grad_scores, query.q, query.grad_k);
  }
}

// Adds up what the segments of a query head made of grad_q of 32 queries, and writes it.
template <typename T>
void write_grad_q(const AttentionTurn& turn, int64_t head, int64_t row) {
  const AttentionJob& job = turn.job;
  const auto from = query_arrays<GradQueries<Packed<T>>>(turn, head);
  const Sixteen factor = splat(job.scale);
  T* out = head_of<T>(job.grad_q, job.heads, head) + row * job.grad_q.row_stride;
  for (int64_t d = 0; d < job.head_dim; d += kSixteen) {
    for (int64_t half = 0; half < kPanelWidth && row + half < job.length; half += kSixteen) {
      float sums[16 * 16];
      for (int64_t r = 0; r < kSixteen; ++r) {
        Sixteen sum = splat(0.0f);
        for (int64_t segment = 0; segment * turn.plan.segment <= row; ++segment) {
          sum = sum + load16(from.grad_q_of(turn.plan, segment, row) + (d + r) * kPanelWidth + half);
        }
        store16(sums + 16 * r, sum * factor);
      }
      Sixteen turned[kSixteen];
      transpose_16(sums, 16, turned);
      for (int64_t r = half; r < half + kSixteen && row + r < job.length; ++r) {
        store_upto(out + r * job.grad_q.row_stride + d, job.head_dim - d, turned[r - half]);
      }
    }
  }
}

// Adds up what the query heads of a group made of the gradients of 32 keys, and writes it after the last of them.
template <typename T>
void write_grad_k_and_v(const AttentionTurn& turn, int64_t key_head, int64_t row) {
  using E = Packed<T>;
  const AttentionJob& job = turn.job;
  const int64_t group = turn.plan.group;
  const int64_t first = turn.first > key_head * group ? turn.first : key_head * group;
  const int64_t last = turn.last < (key_head + 1) * group ? turn.last : (key_head + 1) * group;
  const auto sums = key_arrays<GradKeys<E>>(turn, key_head);
  const auto add_up = [&](float* GradQueries<E>::* part, float* kept, float scale, const HeadsView<void>& view) {
    T* out = head_of<T>(view, job.kv_heads, key_head) + row * view.row_stride;
    const Sixteen factor = splat(scale);
    for (int64_t d = 0; d < job.head_dim; d += kSixteen) {
      for (int64_t r = 0; r < kPanelWidth && row + r < job.length; ++r) {
        const int64_t at = d / kPanelWidth * turn.plan.padded * kPanelWidth + (row + r) * kPanelWidth + d % kPanelWidth;
        Sixteen sum = first == key_head * group ? splat(0.0f) : load16(kept + at);
        for (int64_t head = first; head < last; ++head) {
          sum = sum + load16(query_arrays<GradQueries<E>>(turn, head).*part + at);
        }
        if (last == (key_head + 1) * group) {
          store_upto(out + r * view.row_stride + d, job.head_dim - d, sum * factor);
        } else {
          store16(kept + at, sum);
        }
      }
    }
  };
  add_up(&GradQueries<E>::grad_k, sums.grad_k, job.scale, job.grad_k);
  add_up(&GradQueries<E>::grad_v, sums.grad_v, 1.0f, job.grad_v);
}

template <typename T>
void write_grads(const AttentionTurn& turn, int64_t unit, unsigned char*) {
  const int64_t heads = turn.last - turn.first;
  const int64_t head = unit / row_units(turn.plan);
  by_blocks(turn.plan, unit % row_units(turn.plan), [&](int64_t row) {
    if (head < heads) {
      write_grad_q<T>(turn, turn.first + head, row);
    } else {
      write_grad_k_and_v<T>(turn, turn.first_key + head - heads, row);
    }
  });
}

template <typename T>
constexpr AttentionKernels attention_kernels() {
  return {measure_forward<T>, pack_forward<T>, attend<T>,     measure_backward<T>,
          pack_backward<T>,   grad_segment<T>, write_grads<T>};
}

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
