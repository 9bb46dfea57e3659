#include "cpu/causal_attention.h"

#include <algorithm>

#include "core/layout.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace qlora_native::cpu {
namespace {

constexpr int64_t kSharedBytes = 2 << 20;  // of the heads that are worked on at once, where threads need no more
constexpr int64_t kMaxSegments = 8;        // each brings a grad_q of its own
constexpr int64_t kMinSegment = 128;
constexpr int64_t kUnitsPerThread = 4;

const AttentionKernels& kernels_of(Dtype dtype) { return kernels().attention[static_cast<int>(dtype)]; }

AttentionPlan plan_of(Dtype dtype, const AttentionJob& job, bool backward) {
  AttentionPlan plan{};
  plan.padded = rounded_up(job.length, kAttentionKeys);
  plan.width = rounded_up(job.head_dim, 32);
  plan.group = job.heads / job.kv_heads;
  const int64_t segments = std::min(kMaxSegments, ceil_div(plan.padded, kMinSegment));
  plan.segment = rounded_up(ceil_div(plan.padded, segments), kAttentionKeys);
  plan.segments = ceil_div(plan.padded, plan.segment);
  (backward ? kernels_of(dtype).measure_backward : kernels_of(dtype).measure_forward)(plan);
  return plan;
}

// Of `heads` query heads from the first of a group on, or within one.
int64_t shared_bytes(const AttentionPlan& plan, int64_t heads) {
  return ceil_div(heads, plan.group) * plan.key_bytes + heads * plan.query_bytes;
}

// Query heads of a turn: a part of a group or whole groups, as many as fit, but enough to keep the threads busy.
int64_t heads_per_turn(const AttentionJob& job, const AttentionPlan& plan) {
  const int64_t total = job.batches * job.heads;
  const auto is_enough = [&](int64_t heads) { return heads * plan.segments >= kUnitsPerThread * available_threads(); };
  int64_t taken = 1;
  for (int64_t heads = 2; heads <= total; ++heads) {
    if (heads < plan.group ? plan.group % heads != 0 : heads % plan.group != 0) {
      continue;
    }
    if (shared_bytes(plan, heads) > kSharedBytes && is_enough(taken)) {
      break;
    }
    taken = heads;
  }
  return taken;
}

// run(turn, own) for all heads in turns; own(thread) is a thread's scratch.
template <typename Run>
void by_turns(const AttentionJob& job, const AttentionPlan& plan, unsigned char* scratch, const Run& run) {
  const int64_t heads = heads_per_turn(job, plan);
  const int64_t total = job.batches * job.heads;
  unsigned char* const own = scratch + shared_bytes(plan, heads);
  for (int64_t first = 0; first < total; first += heads) {
    const int64_t last = std::min(total, first + heads);
    const AttentionTurn turn{job, plan, first, last, first / plan.group, ceil_div(last, plan.group), scratch};
    run(turn, [&](int64_t units, AttentionKernels::Phase phase) {
      parallel_units(units, [&](int64_t unit, int64_t thread) { phase(turn, unit, own + thread * plan.own_bytes); });
    });
  }
}

}  // namespace

int64_t attention_scratch_bytes(Dtype dtype, const AttentionJob& job, bool backward) {
  const AttentionPlan plan = plan_of(dtype, job, backward);
  return shared_bytes(plan, heads_per_turn(job, plan)) + available_threads() * plan.own_bytes;
}

void causal_attention(Dtype dtype, const AttentionJob& job, unsigned char* scratch) {
  const AttentionPlan plan = plan_of(dtype, job, false);
  const AttentionKernels& kernel = kernels_of(dtype);
  by_turns(job, plan, scratch, [&](const AttentionTurn& turn, const auto& in_parallel) {
    in_parallel((turn.last_key - turn.first_key) * ceil_div(plan.padded, kAttentionRows), kernel.pack_forward);
    in_parallel((turn.last - turn.first) * ceil_div(job.length, kAttentionQueries), kernel.attend);
  });
}

void causal_attention_backward(Dtype dtype, const AttentionJob& job, unsigned char* scratch) {
  const AttentionPlan plan = plan_of(dtype, job, true);
  const AttentionKernels& kernel = kernels_of(dtype);
  const int64_t rows = ceil_div(plan.padded, kAttentionRows);
  by_turns(job, plan, scratch, [&](const AttentionTurn& turn, const auto& in_parallel) {
    const int64_t heads = turn.last - turn.first;
    const int64_t keys = turn.last_key - turn.first_key;
    in_parallel((heads + (turn.first % plan.group == 0 ? keys : 0)) * rows, kernel.pack_backward);
    in_parallel(heads * plan.segments, kernel.grad_segment);
    in_parallel((heads + keys) * rows, kernel.write_grads);
  });
}

}  // namespace qlora_native::cpu
