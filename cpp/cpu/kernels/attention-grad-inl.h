// The gradients of causal attention, for a segment of keys at a time. Scores and what is computed from them lie
// transposed: rows are keys, columns queries.
#pragma once

#include "cpu/kernels/attention-inl.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

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
  [[maybe_unused]] const TileScope tiles;
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
      Sixteen transposed[kSixteen];
      transpose_16(sums, 16 * sizeof(float), transposed);
      for (int64_t r = half; r < half + kSixteen && row + r < job.length; ++r) {
        store_upto(out + r * job.grad_q.row_stride + d, job.head_dim - d, transposed[r - half]);
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
