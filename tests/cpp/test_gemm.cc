// How products are shared out over threads, the low-rank product inside them, and outer products.
#include <array>
#include <numeric>

#include "check.h"
#include "core/layout.h"
#include "cpu/kernels/gemm.h"
#include "cpu/linear_4bit.h"
#include "oracle.h"
#include "silicon.h"

using namespace qlora_native;

namespace {

struct Layer {
  int64_t n;
  int64_t k;
};

struct Model {
  const char* name;
  std::vector<Layer> layers;  // of a decoder layer
};

const std::array<Model, 3> kModels = {{
    {"SmolLM2-135M", {{576, 576}, {192, 576}, {192, 576}, {576, 576}, {1536, 576}, {1536, 576}, {576, 1536}}},
    {"Qwen2.5-1.5B", {{1536, 1536}, {256, 1536}, {256, 1536}, {1536, 1536}, {8960, 1536}, {8960, 1536}, {1536, 8960}}},
    {"Llama-3-8B",
     {{4096, 4096}, {1024, 4096}, {1024, 4096}, {4096, 4096}, {14336, 4096}, {14336, 4096}, {4096, 14336}}},
}};

// The products that the busiest thread does, as rows by columns.
int64_t most_work(const cpu::GemmPlan& plan, int64_t m, int64_t width, int64_t threads) {
  std::vector<int64_t> work(static_cast<size_t>(threads), 0);
  for (int64_t index = 0; index < plan.units(); ++index) {  // each unit to the thread that is free first
    const cpu::GemmUnit unit = plan.unit(index, m, width);
    *std::min_element(work.begin(), work.end()) +=
        (unit.last_row - unit.first_row) * (unit.last_column - unit.first_column);
  }
  return *std::max_element(work.begin(), work.end());
}

double efficiency(const Model& model, bool forward, int64_t threads) {
  constexpr int64_t kTokens = 512;
  double all = 0.0;
  double longest = 0.0;
  for (const Layer& layer : model.layers) {
    const int64_t width = forward ? layer.n : layer.k;
    const int64_t depth = forward ? layer.k : layer.n;
    all += static_cast<double>(kTokens * width * depth);
    longest += static_cast<double>(most_work(cpu::plan_gemm(kTokens, width, threads), kTokens, width, threads) * depth);
  }
  return all / (longest * static_cast<double>(threads));
}

TEST(gemm_plan_uses_many_threads) {
  for (const Model& model : kModels) {
    for (const int64_t threads : {2, 3, 4, 8, 16, 32}) {
      for (const bool forward : {true, false}) {
        const double found = efficiency(model, forward, threads);
        CHECK(found >= 0.9, "%s, %ld threads: %.3f of the threads' time is used", model.name,
              static_cast<long>(threads), found);
      }
    }
  }
}

TEST(gemm_plan_covers_every_output_once) {
  for (const int64_t threads : {1, 2, 5, 16, 64}) {
    for (const int64_t m : {1, 7, 48, 100, 511, 1025}) {
      for (const int64_t width : {1, 63, 64, 65, 192, 1536, 5000}) {
        const cpu::GemmPlan plan = cpu::plan_gemm(m, width, threads);
        int64_t covered = 0;
        for (int64_t index = 0; index < plan.units(); ++index) {
          const cpu::GemmUnit unit = plan.unit(index, m, width);
          CHECK(unit.first_column % cpu::kColumnGrain == 0, "unit %ld begins at column %ld", static_cast<long>(index),
                static_cast<long>(unit.first_column));
          CHECK(unit.first_row < unit.last_row && unit.first_column < unit.last_column, "unit %ld is empty",
                static_cast<long>(index));
          covered += (unit.last_row - unit.first_row) * (unit.last_column - unit.first_column);
        }
        CHECK(covered == m * width, "%ld threads, %ld x %ld: %ld outputs are covered", static_cast<long>(threads),
              static_cast<long>(m), static_cast<long>(width), static_cast<long>(covered));
      }
    }
  }
}

void run_gemm(const cpu::GemmJob& job) {
  const oracle::Scratch scratch(cpu::gemm_scratch_bytes(job));
  cpu::gemm(job, scratch.aligned);
}

// With `down` the product makes its own low-rank part: the same bits as two products one after the other.
template <typename T>
void check_low(int64_t m, int64_t n, int64_t k, int64_t r, bool forward) {
  const oracle::RandomWeight weight(n * k, 64, true, QuantType::kNf4, 5);
  oracle::Random random(static_cast<uint64_t>(m));
  const int64_t depth = forward ? k : n;
  const int64_t width = forward ? n : k;
  const std::vector<T> x = oracle::uniform_values<T>(random, m * depth);
  const std::vector<T> down = oracle::uniform_values<T>(random, depth * r);
  const std::vector<T> up = oracle::uniform_values<T>(random, width * r);
  std::vector<T> low(static_cast<size_t>(m * r));
  std::vector<T> y(static_cast<size_t>(m * width));
  cpu::GemmCall call{};
  call.job.weight = weight.view;
  call.job.dtype = oracle::Storage<T>::kDtype;
  call.job.forward = forward;
  call.job.x = x.data();
  call.job.low = low.data();
  call.job.up = up.data();
  call.job.r = r;
  call.job.y = y.data();
  call.job.m = m;
  call.job.n = n;
  call.job.k = k;
  call.job.down = down.data();
  call.job.made_low = low.data();
  call.job.down_scale = forward ? 1.0f : 0.5f;
  const oracle::Scratch scratch(cpu::linear_4bit_scratch_bytes(call));
  cpu::linear_4bit(call, scratch.aligned);
  silicon::add(low);
  silicon::add(y);
  constexpr double kStep = 1.0 / static_cast<double>(int64_t{2} << oracle::Storage<T>::kFormat.mantissa_bits);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < r; ++j) {
      double expected = 0.0;
      double magnitude = 0.0;
      for (int64_t l = 0; l < depth; ++l) {
        const double product = oracle::value_of(x[static_cast<size_t>(i * depth + l)]) *
                               oracle::value_of(down[static_cast<size_t>(forward ? j * depth + l : l * r + j)]);
        expected += call.job.down_scale * product;
        magnitude += std::fabs(product);
      }
      const double got = oracle::value_of(low[static_cast<size_t>(i * r + j)]);
      CHECK(std::fabs(got - expected) <= kStep * std::fabs(expected) + 0x1p-19 * magnitude,
            "m %ld: low [%ld, %ld] is %g, expected %g", static_cast<long>(m), static_cast<long>(i),
            static_cast<long>(j), got, expected);
    }
  }
  run_gemm(call.job);
  std::vector<T> apart(low.size());
  cpu::GemmJob low_job{};
  low_job.dtype = call.job.dtype;
  low_job.forward = forward;
  low_job.x = x.data();
  low_job.dense = down.data();
  low_job.scale = call.job.down_scale;
  low_job.y = apart.data();
  low_job.m = m;
  low_job.n = forward ? r : n;
  low_job.k = forward ? k : r;
  run_gemm(low_job);
  CHECK(std::memcmp(low.data(), apart.data(), low.size() * sizeof(T)) == 0, "m %ld: low has other bits alone",
        static_cast<long>(m));
  cpu::linear_4bit(call, scratch.aligned);
  const std::vector<T> made = y;
  call.job.down = nullptr;
  const oracle::Scratch again(cpu::linear_4bit_scratch_bytes(call));
  cpu::linear_4bit(call, again.aligned);
  CHECK(std::memcmp(made.data(), y.data(), y.size() * sizeof(T)) == 0, "m %ld: other bits", static_cast<long>(m));
}

void check_lows(int64_t m, int64_t n, int64_t k, int64_t r, bool forward) {
  check_low<float>(m, n, k, r, forward);
  check_low<Bf16>(m, n, k, r, forward);
  check_low<Fp16>(m, n, k, r, forward);
}

TEST(product_makes_its_low_rank_part) {
  for (const bool forward : {true, false}) {
    for (const int64_t m : {1, 3, 8, 9, 70}) {
      check_lows(m, 130, 192, 7, forward);
    }
    check_lows(19, 530, 576, 16, forward);  // several spans of the depth
    check_lows(19, 640, 640, 33, forward);  // an adapter of several strips, and of several groups
    check_lows(19, 1100, 1088, 70, forward);
    check_lows(5, 64, 128, 300, forward);  // one whose rows take spans of their own
  }
}

template <typename T>
void check_outer(int64_t m, int64_t r, int64_t width) {
  oracle::Random random(static_cast<uint64_t>(m + r + width));
  const std::vector<T> left = oracle::uniform_values<T>(random, m * r);
  const std::vector<T> right = oracle::uniform_values<T>(random, m * width);
  std::vector<float> out(static_cast<size_t>(r * width), 7.0f);
  constexpr Dtype kDtype = oracle::Storage<T>::kDtype;
  const oracle::Scratch scratch(cpu::outer_scratch_bytes(kDtype, m, r, width));
  cpu::outer(kDtype, left.data(), right.data(), m, r, width, 0.25f, out.data(), scratch.aligned);
  silicon::add(out);
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      double expected = 0.0;
      double magnitude = 0.0;
      for (int64_t l = 0; l < m; ++l) {
        const double product = oracle::value_of(left[static_cast<size_t>(l * r + i)]) *
                               oracle::value_of(right[static_cast<size_t>(l * width + j)]);
        expected += 0.25 * product;
        magnitude += std::fabs(product);
      }
      const double got = static_cast<double>(out[static_cast<size_t>(i * width + j)]);
      CHECK(std::fabs(got - expected) <= 0x1p-23 * magnitude * (4.0 + std::sqrt(m)),
            "m %ld r %ld: [%ld, %ld] is %g, expected %g", static_cast<long>(m), static_cast<long>(r),
            static_cast<long>(i), static_cast<long>(j), got, expected);
    }
  }
}

template <typename T>
void check_outers() {
  for (const int64_t m : {0, 1, 2, 31, 300}) {
    check_outer<T>(m, 16, 70);
    check_outer<T>(m, 5, 64);
  }
  check_outer<T>(1025, 3, 130);
  check_outer<T>(40, 100, 33);
}

TEST(outer_products) {
  check_outers<float>();
  check_outers<Bf16>();
  check_outers<Fp16>();
}

}  // namespace
