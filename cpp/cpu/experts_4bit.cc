#include "cpu/experts_4bit.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/gguf.h"
#include "core/layout.h"
#include "cpu/kernels/kernels.h"
#include "cpu/parallel.h"

namespace qlora_native::cpu {
namespace {

constexpr int64_t kPartsPerThread = 8;  // so that threads end at about the same time
constexpr int64_t kPartColumns = 1024;  // at most: the sums of its rows stay in the second cache

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Columns [first, last) of an expert's result.
struct Part {
  int64_t expert;
  int64_t first;
  int64_t last;
};

// The parts of all experts with rows, of about equal time, the experts with the most rows first: what comes last is
// small. Each part packs its rows and decodes its columns of W, so parts are as wide as the number of threads allows.
std::vector<Part> parts_of(const Experts& experts, int64_t width) {
  std::vector<int64_t> order;
  int64_t total = 0;
  for (int64_t expert = 0; expert < experts.count; ++expert) {
    if (experts.rows(expert) > 0) {
      order.push_back(expert);
      total += experts.rows(expert) + kDecodeRows;
    }
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t left, int64_t right) { return experts.rows(left) > experts.rows(right); });
  std::vector<Part> parts;
  for (const int64_t expert : order) {
    const int64_t share =
        total * width / (kPartsPerThread * available_threads() * (experts.rows(expert) + kDecodeRows)) + 1;
    const int64_t cuts = ceil_div(width, std::min(rounded_up(share, kColumnGrain), kPartColumns));
    const int64_t columns = cuts == 0 ? 1 : rounded_up(ceil_div(width, cuts), kColumnGrain);
    for (int64_t first = 0; first < width; first += columns) {
      parts.push_back({expert, first, std::min(first + columns, width)});
    }
  }
  return parts;
}

int64_t blocks_of_expert(const ExpertsJob& job) {
  return num_blocks(job.job.weight.numel / std::max<int64_t>(1, job.experts.count), job.job.weight.block_size);
}

// Scales of scales are for kNestedBlock blocks: where an expert's do not begin with one, its scales are decoded before.
bool decodes_scales(const ExpertsJob& job) {
  return job.job.weight.absmax_codes != nullptr && blocks_of_expert(job) % kNestedBlock != 0;
}

int64_t scale_bytes(const ExpertsJob& job) {
  const int64_t blocks = decodes_scales(job) ? job.experts.count * blocks_of_expert(job) : 0;
  return rounded_up(blocks * int64_t{sizeof(float)}, 64);
}

WeightView weight_of(const ExpertsJob& job, int64_t expert, const float* scales) {
  WeightView weight = job.job.weight;
  weight.numel /= job.experts.count;
  weight.packed += expert * packed_bytes(weight.type, weight.numel);
  const int64_t first = expert * blocks_of_expert(job);
  if (decodes_scales(job)) {
    weight.absmax_codes = nullptr;
    weight.absmax = scales == nullptr ? nullptr : scales + first;
  } else if (weight.absmax_codes != nullptr) {
    weight.absmax_codes += first;
    weight.nested_absmax += first / kNestedBlock;
  } else if (weight.absmax != nullptr) {
    weight.absmax += first;
  }
  return weight;
}

// The product of one expert. `scales`: of all experts, where they are decoded; null before there is memory for them.
GemmCall call_of(const ExpertsJob& stack, int64_t expert, const float* scales) {
  GemmCall call{};
  GemmJob& job = call.job;
  job = stack.job;
  const auto after = [&](const void* memory, int64_t elements) {
    return memory == nullptr ? nullptr : static_cast<const char*>(memory) + elements * bytes_of(job.dtype);
  };
  const int64_t row = stack.experts.offsets[expert];
  job.m = stack.experts.rows(expert);
  job.weight = weight_of(stack, expert, scales);
  job.x = after(job.x, row * job.depth());
  job.y = const_cast<char*>(after(job.y, row * job.width()));
  job.low = after(job.low, row * job.r);
  job.made_low = const_cast<void*>(job.low);
  call.as_stored = job.forward && job.r > 0 && job.m <= few_rows(job.dtype);
  if (call.as_stored) {
    job.down = stack.stored_down + expert * job.r * job.k;
    job.up = stack.stored_up + expert * job.n * job.r;
    call.up_scale = stack.up_scale;
  } else {
    job.down = after(job.down, expert * job.r * job.depth());
    job.up = after(job.up, expert * job.r * job.width());
  }
  return call;
}

// Of each thread.
int64_t part_bytes(const ExpertsJob& job, const std::vector<Part>& parts) {
  int64_t most = 0;
  for (const Part& part : parts) {
    most = std::max(most, part_scratch_bytes(call_of(job, part.expert, nullptr), part.last - part.first));
  }
  return rounded_up(most, 64);
}

int64_t outer_bytes(Dtype dtype, const Experts& experts, OuterJob job, const std::vector<Part>& parts) {
  int64_t most = 0;
  for (const Part& part : parts) {
    job.m = experts.rows(part.expert);
    most = std::max(most, outer_part_scratch_bytes(dtype, job, part.last - part.first));
  }
  return rounded_up(most, 64);
}

// Those of no expert, in memory [m, width].
void clear_rows(const ExpertsJob& job, void* memory, int64_t width) {
  const int64_t bytes = width * bytes_of(job.job.dtype);
  const int64_t last = job.experts.offsets[job.experts.count];
  if (last < job.job.m && bytes > 0) {
    std::memset(static_cast<char*>(memory) + last * bytes, 0, static_cast<size_t>((job.job.m - last) * bytes));
  }
}

int64_t size_of(const std::vector<Part>& parts) { return static_cast<int64_t>(parts.size()); }

}  // namespace

int64_t experts_4bit_scratch_bytes(const ExpertsJob& job) {
  const std::vector<Part> parts = parts_of(job.experts, job.job.width());
  return scale_bytes(job) + unit_threads(size_of(parts)) * part_bytes(job, parts);
}

void experts_4bit(const ExpertsJob& job, unsigned char* scratch) {
  clear_rows(job, job.job.y, job.job.width());
  clear_rows(job, job.job.made_low, job.job.r);
  const std::vector<Part> parts = parts_of(job.experts, job.job.width());
  float* scales = reinterpret_cast<float*>(scratch);
  unsigned char* own = scratch + scale_bytes(job);
  const int64_t bytes = part_bytes(job, parts);
  // What the parts of an expert share, by whoever has its first one.
  const bool shares = decodes_scales(job) || job.job.r > 0;
  parallel_units(shares ? size_of(parts) : 0, [&](int64_t index, int64_t thread) {
    const Part& part = parts[static_cast<size_t>(index)];
    if (part.first > 0) {
      return;
    }
    if (decodes_scales(job)) {
      const int64_t first = part.expert * blocks_of_expert(job);
      kernels().decode_scales(job.job.weight, first, first + blocks_of_expert(job), scales + first);
    }
    if (job.job.r > 0) {
      project_part(call_of(job, part.expert, scales), own + thread * bytes);
    }
  });
  parallel_units(size_of(parts), [&](int64_t index, int64_t thread) {
    const Part& part = parts[static_cast<size_t>(index)];
    linear_4bit_part(call_of(job, part.expert, scales), part.first, part.last, own + thread * bytes);
  });
}

int64_t experts_outer_scratch_bytes(Dtype dtype, const Experts& experts, const OuterJob& job) {
  const std::vector<Part> parts = parts_of(experts, job.width);
  return unit_threads(size_of(parts)) * outer_bytes(dtype, experts, job, parts);
}

void experts_outer(Dtype dtype, const Experts& experts, const OuterJob& job, unsigned char* scratch) {
  for (int64_t expert = 0; expert < experts.count; ++expert) {
    if (experts.rows(expert) == 0) {
      std::fill_n(job.out + expert * job.r * job.width, job.r * job.width, 0.0f);
    }
  }
  const std::vector<Part> parts = parts_of(experts, job.width);
  const int64_t bytes = outer_bytes(dtype, experts, job, parts);
  parallel_units(size_of(parts), [&](int64_t index, int64_t thread) {
    const Part& part = parts[static_cast<size_t>(index)];
    const int64_t row = experts.offsets[part.expert];
    OuterJob own = job;
    own.left = static_cast<const char*>(job.left) + row * job.r * bytes_of(dtype);
    own.right = static_cast<const char*>(job.right) + row * job.width * bytes_of(dtype);
    own.m = experts.rows(part.expert);
    own.out += part.expert * job.r * job.width;
    outer_part(dtype, own, part.first, part.last, scratch + thread * bytes);
  });
}

}  // namespace qlora_native::cpu
