// Products with a stack of experts, and the gradients of their adapters: the bits of each expert's own.
#include <cstring>
#include <numeric>

#include "check.h"
#include "core/layout.h"
#include "cpu/experts_4bit.h"
#include "cpu/parallel.h"
#include "oracle.h"

using namespace qlora_native;

namespace {

struct Case {
  std::vector<int64_t> rows;  // of each expert; the last ones are of none
  int64_t n, k, r;
  bool nested;
  QuantType type = QuantType::kNf4;
  int64_t block = 64;
};

template <typename T>
bool same(const std::vector<T>& left, const std::vector<T>& right) {
  return left.size() == right.size() &&
         (left.empty() || std::memcmp(left.data(), right.data(), left.size() * sizeof(T)) == 0);
}

template <typename T>
std::vector<T> zeros(int64_t count) {
  return std::vector<T>(static_cast<size_t>(count));
}

// The weight of one expert, its scales decoded.
struct Slice {
  std::vector<float> scales;
  WeightView view;

  Slice(const WeightView& stack, int64_t expert, int64_t numel) : view(stack) {
    view.numel = numel;
    view.packed += expert * packed_bytes(stack.type, numel);
    if (is_gguf(stack.type)) {
      return;
    }
    const int64_t blocks = num_blocks(numel, stack.block_size);
    for (int64_t block = 0; block < blocks; ++block) {
      scales.push_back(stack.scale(expert * blocks + block));
    }
    view.absmax = scales.data();
    view.absmax_codes = nullptr;
  }
};

template <typename T>
void check_case(const Case& c, bool forward) {
  const auto count = static_cast<int64_t>(c.rows.size()) - 1;
  const int64_t m = std::accumulate(c.rows.begin(), c.rows.end(), int64_t{0});
  const int64_t depth = forward ? c.k : c.n;
  const int64_t width = forward ? c.n : c.k;
  const Dtype dtype = oracle::Storage<T>::kDtype;
  const oracle::RandomWeight weight(count * c.n * c.k, c.block, c.nested, c.type, 1);
  oracle::Random random(2);
  const auto x = oracle::uniform_values<T>(random, m * depth);
  const auto stored_down = oracle::uniform_values<float>(random, count * c.r * c.k);
  const auto stored_up = oracle::uniform_values<float>(random, count * c.r * c.n);
  const auto down = oracle::uniform_values<T>(random, count * c.r * depth);
  const auto up = oracle::uniform_values<T>(random, count * c.r * width);
  const auto right = oracle::uniform_values<T>(random, m * width);
  auto y = oracle::uniform_values<T>(random, m * width);
  auto low = oracle::uniform_values<T>(random, m * c.r);
  auto gradient = oracle::uniform_values<float>(random, count * c.r * width);
  std::vector<int64_t> offsets(c.rows.size());
  std::partial_sum(c.rows.begin(), c.rows.end() - 1, offsets.begin() + 1);

  cpu::ExpertsJob stack{};
  stack.experts = {count, offsets.data()};
  cpu::GemmJob& job = stack.job;
  job.weight = weight.view;
  job.dtype = dtype;
  job.forward = forward;
  job.x = x.data();
  job.y = y.data();
  job.m = m;
  job.n = c.n;
  job.k = c.k;
  job.r = c.r;
  if (c.r > 0) {
    job.down = down.data();
    job.up = up.data();
    job.made_low = low.data();
    job.low = low.data();
    stack.stored_down = stored_down.data();
    stack.stored_up = stored_up.data();
  }
  job.down_scale = forward ? 1.0f : 0.75f;
  stack.up_scale = 0.75f;
  const oracle::Scratch scratch(cpu::experts_4bit_scratch_bytes(stack));
  cpu::experts_4bit(stack, scratch.aligned);
  const cpu::OuterJob outer{low.data(), right.data(), 0, c.r, width, 0.5f, gradient.data()};
  const oracle::Scratch room(cpu::experts_outer_scratch_bytes(dtype, stack.experts, outer));
  cpu::experts_outer(dtype, stack.experts, outer, room.aligned);

  auto own_y = zeros<T>(m * width);
  auto own_low = zeros<T>(m * c.r);
  auto own_gradient = zeros<float>(count * c.r * width);
  for (int64_t expert = 0; expert < count; ++expert) {
    const Slice slice(weight.view, expert, c.n * c.k);
    const int64_t first = offsets[static_cast<size_t>(expert)];
    cpu::GemmCall call{job};
    call.job.weight = slice.view;
    call.job.m = stack.experts.rows(expert);
    call.job.x = x.data() + first * depth;
    call.job.y = own_y.data() + first * width;
    if (c.r > 0) {
      call.job.made_low = own_low.data() + first * c.r;
      call.job.low = call.job.made_low;
      call.job.down = down.data() + expert * c.r * depth;
      call.job.up = up.data() + expert * c.r * width;
      if (forward && call.job.m <= cpu::few_rows(dtype)) {
        call.as_stored = true;
        call.up_scale = 0.75f;
        call.job.down = stored_down.data() + expert * c.r * c.k;
        call.job.up = stored_up.data() + expert * c.r * c.n;
      }
    }
    const oracle::Scratch memory(cpu::linear_4bit_scratch_bytes(call));
    cpu::linear_4bit(call, memory.aligned);
    const oracle::Scratch space(cpu::outer_scratch_bytes(dtype, call.job.m, c.r, width));
    cpu::outer(dtype, own_low.data() + first * c.r, right.data() + first * width, call.job.m, c.r, width, 0.5f,
               own_gradient.data() + expert * c.r * width, space.aligned);
  }
  const char* direction = forward ? "forward" : "gradient";
  CHECK(same(y, own_y), "%s, n %ld: y differs", direction, static_cast<long>(c.n));
  CHECK(same(low, own_low), "%s, n %ld: low differs", direction, static_cast<long>(c.n));
  CHECK(same(gradient, own_gradient), "%s, n %ld: the outer product differs", direction, static_cast<long>(c.n));
}

TEST(experts_have_the_bits_of_single_products) {
  std::vector<Case> cases = {
      {{9, 0}, 48, 64, 4, true},
      {{0, 1, 0, 0}, 96, 128, 3, true},
      {{3, 20, 0, 5, 2}, 80, 192, 8, true},
      {{7, 0, 530, 2, 40, 0}, 128, 128, 8, true},
      {{30, 1, 12, 0}, 1100, 64, 16, false},
      {{6, 3, 17, 0}, 64, 65, 5, true, QuantType::kFp4},
      {{40, 0, 2, 17, 3}, 112, 320, 0, true},
      {{0, 0, 3}, 64, 64, 2, false},
  };
  for (const QuantType type : oracle::kGgufTypes) {
    cases.push_back({{2, 33, 0, 1}, 70, 2 * oracle::block_of(type), 5, false, type, oracle::block_of(type)});
  }
  int (*const before)() = cpu::threads_of_torch.load();
  for (int (*const threads)() : {+[] { return 1; }, +[] { return 3; }}) {
    cpu::threads_of_torch.store(threads);
    for (const Case& c : cases) {
      for (const bool forward : {true, false}) {
        check_case<float>(c, forward);
        check_case<Bf16>(c, forward);
        check_case<Fp16>(c, forward);
      }
    }
  }
  cpu::threads_of_torch.store(before);
}

}  // namespace
