#include "cpu/causal_attention.h"

#include <algorithm>

#include "core/layout.h"
#include "cpu/kernels/kernels.h"
#include "cpu/parallel.h"

namespace qlora_native::cpu {
namespace {

constexpr int64_t kTurnBytes = 2 << 20;    // of the heads of a turn, where threads need no more: a second-level cache
constexpr int64_t kAloneBytes = 32 << 20;  // at most, of all threads that take turns alone
constexpr int64_t kMaxSegments = 8;        // each brings a grad_q of its own
constexpr int64_t kMinSegment = 128;
constexpr int64_t kUnitsPerThread = 4;
constexpr int64_t kSmall = 1 << 22;  // multiplications that one thread does sooner than several begin

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

// Who works on which heads. Bits do not depend on it.
struct Division {
  int64_t alone;   // threads that take whole groups, each in turns of its own; 0 if all of them share each turn
  int64_t heads;   // query heads of a turn: a part of a group, or whole groups
  int64_t shared;  // bytes of them
  int64_t bytes;   // of all turns and threads
};

// As many heads as fit and, of turns for all threads, enough to keep `threads` of them busy.
int64_t heads_per_turn(const AttentionPlan& plan, int64_t total, int64_t threads) {
  int64_t taken = 1;
  for (int64_t heads = 2; heads <= total; ++heads) {
    if (heads < plan.group ? plan.group % heads != 0 : heads % plan.group != 0) {
      continue;
    }
    if (shared_bytes(plan, heads) > kTurnBytes && taken * plan.segments >= kUnitsPerThread * threads) {
      break;
    }
    taken = heads;
  }
  return taken;
}

Division division_of(const AttentionJob& job, const AttentionPlan& plan) {
  const int64_t groups = job.batches * job.kv_heads;
  const bool is_small = job.batches * job.heads * job.length * job.length * plan.width < kSmall;
  const int64_t threads = is_small ? 1 : available_threads();
  const bool is_even = 10 * groups >= 9 * threads * ceil_div(groups, threads);
  const int64_t own = heads_per_turn(plan, plan.group, 0);
  const int64_t workers = std::min(groups, threads);
  const int64_t bytes = workers * (shared_bytes(plan, own) + plan.own_bytes);
  if (threads == 1 || (is_even && bytes <= kAloneBytes)) {
    return {workers, own, shared_bytes(plan, own), bytes};
  }
  const int64_t heads = heads_per_turn(plan, groups * plan.group, threads);
  return {0, heads, shared_bytes(plan, heads), shared_bytes(plan, heads) + threads * plan.own_bytes};
}

// run(turn, each) for all heads in turns; each(units, phase) is to run the units of a phase of the turn.
template <typename Run>
void by_turns(const AttentionJob& job, const AttentionPlan& plan, unsigned char* scratch, const Run& run) {
  const Division division = division_of(job, plan);
  const auto turns = [&](int64_t first, int64_t last, unsigned char* shared, const auto& each) {
    for (int64_t head = first; head < last; head += division.heads) {
      const int64_t end = std::min(last, head + division.heads);
      const AttentionTurn turn{job, plan, head, end, head / plan.group, ceil_div(end, plan.group), shared};
      run(turn, [&](int64_t units, AttentionKernels::Phase phase) { each(turn, units, phase); });
    }
  };
  const int64_t groups = job.batches * job.kv_heads;
  if (division.alone == 0) {
    unsigned char* const own = scratch + division.shared;
    turns(0, groups * plan.group, scratch, [&](const AttentionTurn& turn, int64_t units, auto phase) {
      parallel_units(units, [&](int64_t unit, int64_t thread) { phase(turn, unit, own + thread * plan.own_bytes); });
    });
    return;
  }
  const auto take_group = [&](int64_t group, int64_t thread) {
    unsigned char* const shared = scratch + thread * (division.shared + plan.own_bytes);
    const auto in_order = [&](const AttentionTurn& turn, int64_t units, auto phase) {
      for (int64_t unit = 0; unit < units; ++unit) {
        phase(turn, unit, shared + division.shared);
      }
    };
    turns(group * plan.group, (group + 1) * plan.group, shared, in_order);
  };
  if (division.alone > 1) {
    parallel_units(groups, take_group);
  } else {
    parallel_for(groups, groups, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        take_group(group, 0);
      }
    });
  }
}

}  // namespace

int64_t attention_scratch_bytes(Dtype dtype, const AttentionJob& job, bool backward) {
  const AttentionPlan plan = plan_of(dtype, job, backward);
  return division_of(job, plan).bytes;
}

void causal_attention(Dtype dtype, const AttentionJob& job, unsigned char* scratch) {
  const AttentionPlan plan = plan_of(dtype, job, false);
  const AttentionKernels& kernel = kernels_of(dtype);
  by_turns(job, plan, scratch, [&](const AttentionTurn& turn, const auto& each) {
    each((turn.last_key - turn.first_key) * ceil_div(plan.padded, kAttentionRows), kernel.pack_forward);
    each((turn.last - turn.first) * ceil_div(job.length, kAttentionQueries), kernel.attend);
  });
}

void causal_attention_backward(Dtype dtype, const AttentionJob& job, unsigned char* scratch) {
  const AttentionPlan plan = plan_of(dtype, job, true);
  const AttentionKernels& kernel = kernels_of(dtype);
  const int64_t rows = ceil_div(plan.padded, kAttentionRows);
  by_turns(job, plan, scratch, [&](const AttentionTurn& turn, const auto& each) {
    const int64_t heads = turn.last - turn.first;
    const int64_t keys = turn.last_key - turn.first_key;
    each((heads + (turn.first % plan.group == 0 ? keys : 0)) * rows, kernel.pack_backward);
    each(heads * plan.segments, kernel.grad_segment);
    each((heads + keys) * rows, kernel.write_grads);
  });
}

}  // namespace qlora_native::cpu
