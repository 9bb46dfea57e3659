// The kernels of the calibrated methods against loops that say what is meant, bit for bit, whatever the instruction set
// and the number of threads.
#include <cmath>
#include <limits>
#include <string>

#include "caller_state.h"
#include "check.h"
#include "cpu/gptq_4bit.h"
#include "cpu/search_scales_4bit.h"
#include "oracle.h"

using namespace qlora_native;

namespace {

constexpr QuantType kTypes[2] = {QuantType::kNf4, QuantType::kFp4};

// Mostly moderate, with blocks of zeros and of subnormals.
template <typename T>
std::vector<T> weights(oracle::Random& random, int64_t numel) {
  std::vector<T> made;
  for (int64_t i = 0; i < numel; ++i) {
    const int64_t kind = i / 64 % 7;
    made.push_back(from_float<T>(kind == 3 ? 0.0f : kind == 5 ? random.uniform() * 0x1p-140f : random.uniform()));
  }
  return made;
}

float reciprocal_of(float scale) {
  const float reciprocal = 1.0f / scale;
  return std::isfinite(reciprocal) ? reciprocal : 0.0f;
}

uint8_t code_of(QuantType type, float normalized) {
  return static_cast<uint8_t>(oracle::code_of(type, oracle::value_of(normalized)));
}

std::vector<uint8_t> packed_of(const std::vector<uint8_t>& codes, QuantType type) {
  std::vector<uint8_t> bytes;
  for (size_t i = 0; i < codes.size(); i += 2) {
    bytes.push_back(pack_nibbles(codes[i], i + 1 < codes.size() ? codes[i + 1] : zero_code(type)));
  }
  return bytes;
}

struct Searched {
  std::vector<uint8_t> packed;
  std::vector<uint8_t> chosen;
  bool operator==(const Searched&) const = default;
};

template <typename T>
Searched expected_search(const cpu::SearchJob& job) {
  const T* x = static_cast<const T*>(job.x);
  const Levels levels = levels_of(job.type);
  Searched found;
  std::vector<uint8_t> codes(static_cast<size_t>(job.numel));
  for (int64_t block = 0; block * job.block_size < job.numel; ++block) {
    const int64_t begin = block * job.block_size;
    const int64_t end = std::min(job.numel, begin + job.block_size);
    float absmax = 0.0f;
    for (int64_t i = begin; i < end; ++i) {
      absmax = std::max(absmax, std::fabs(to_float(x[i])));
    }
    const auto scale_of = [&](int64_t i) {
      const float product = job.table[i] * job.multiplier[block / job.group];
      return product + job.offset;
    };
    int64_t chosen = job.initial[block];
    float best = std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < job.count; ++i) {
      const float scale = scale_of(i);
      const float size = std::fabs(scale);
      if (i != job.initial[block] && !(absmax * job.low <= size && size <= absmax * job.high)) {
        continue;
      }
      float sums[16] = {};
      for (int64_t at = begin; at < end; ++at) {
        const float value = to_float(x[at]);
        const float decoded = levels.value[code_of(job.type, value * reciprocal_of(scale))] * scale;
        const float error = value - decoded;
        const float square = error * error;
        const float term = job.moment[at % job.k] * square;
        sums[(at - begin) % 16] += term;
      }
      for (int half = 8; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) {
          sums[lane] += sums[lane + half];
        }
      }
      if (sums[0] < best) {
        best = sums[0];
        chosen = i;
      }
    }
    found.chosen.push_back(static_cast<uint8_t>(chosen));
    for (int64_t at = begin; at < end; ++at) {
      codes[static_cast<size_t>(at)] = code_of(job.type, to_float(x[at]) * reciprocal_of(scale_of(chosen)));
    }
  }
  found.packed = packed_of(codes, job.type);
  return found;
}

template <typename T>
void check_search() {
  struct Size {
    int64_t n, k, block_size;
  };
  for (const Size size : {Size{1, 1, 32}, Size{3, 96, 64}, Size{5, 77, 64}, Size{2, 576, 64}, Size{1, 4100, 4096}}) {
    const int64_t numel = size.n * size.k;
    const int64_t blocks = num_blocks(numel, size.block_size);
    oracle::Random random(static_cast<uint64_t>(numel));
    const std::vector<T> x = weights<T>(random, numel);
    std::vector<float> moment;
    for (int64_t i = 0; i < size.k; ++i) {
      moment.push_back(i % 11 == 0 ? 0.0f : std::ldexp(std::fabs(random.uniform()), random.byte() % 8));
    }
    std::vector<uint8_t> initial;
    for (int64_t i = 0; i < blocks; ++i) {
      initial.push_back(random.byte());
    }
    const std::vector<float> multiplier(static_cast<size_t>(num_nested_blocks(blocks)), 1.25f);
    for (const QuantType type : kTypes) {
      for (const int threads : {1, 3}) {
        const Threads of_caller(threads);
        Searched got{std::vector<uint8_t>(static_cast<size_t>(packed_bytes(numel))),
                     std::vector<uint8_t>(static_cast<size_t>(blocks))};
        const cpu::SearchJob job{x.data(),
                                 numel,
                                 size.k,
                                 size.block_size,
                                 type,
                                 moment.data(),
                                 kNestedCode.value,
                                 256,
                                 kNestedBlock,
                                 multiplier.data(),
                                 -0.01f,
                                 0.375f,
                                 1.125f,
                                 initial.data(),
                                 got.packed.data(),
                                 got.chosen.data()};
        cpu::search_scales_4bit(job, oracle::Storage<T>::kDtype);
        const std::string what = std::to_string(size.n) + " x " + std::to_string(size.k);
        CHECK(got == expected_search<T>(job), "%s, type %d, %d threads", what.c_str(), static_cast<int>(type), threads);
      }
    }
  }
}

TEST(search_of_scales_for_fp32) { check_search<float>(); }
TEST(search_of_scales_for_bf16) { check_search<Bf16>(); }
TEST(search_of_scales_for_fp16) { check_search<Fp16>(); }

struct GptqCase {
  int64_t n, k, block_size;
  std::vector<float> factor;
  std::vector<int64_t> order;
  std::vector<float> scales;
};

// Column by column, each handing its error on at once.
template <typename T>
std::vector<uint8_t> expected_gptq(const GptqCase& of, const std::vector<T>& x, QuantType type) {
  const Levels levels = levels_of(type);
  const auto at = [&](int64_t row, int64_t i) { return row * of.k + of.order[static_cast<size_t>(i)]; };
  std::vector<float> target;
  for (const T value : x) {
    target.push_back(to_float(value));
  }
  const std::vector<float> weight = target;
  std::vector<uint8_t> codes(x.size());
  for (int64_t i = 0; i < of.k; ++i) {
    for (int64_t row = 0; row < of.n; ++row) {
      const auto here = static_cast<size_t>(at(row, i));
      const float scale = of.scales[here / static_cast<size_t>(of.block_size)];
      codes[here] = code_of(type, target[here] * reciprocal_of(scale));
      const float decoded = levels.value[codes[here]] * scale;
      const float error = weight[here] - decoded;
      for (int64_t later = i + 1; later < of.k; ++later) {
        const float handed = error * of.factor[static_cast<size_t>(i * of.k + later)];
        target[static_cast<size_t>(at(row, later))] += handed;
      }
    }
  }
  return packed_of(codes, type);
}

template <typename T>
void check_gptq() {
  struct Size {
    int64_t n, k, block_size;
  };
  for (const Size size :
       {Size{0, 5, 32}, Size{1, 1, 32}, Size{2, 3, 32}, Size{17, 64, 64}, Size{33, 77, 32}, Size{70, 96, 64}}) {
    const auto numel = static_cast<size_t>(size.n * size.k);
    oracle::Random random(numel);
    const std::vector<T> x = weights<T>(random, size.n * size.k);
    GptqCase of{size.n, size.k, size.block_size, {}, {}, {}};
    for (int64_t i = 0; i < size.k * size.k; ++i) {
      of.factor.push_back(i / size.k < i % size.k ? 0.25f * random.uniform() : std::nanf(""));  // the rest is not read
    }
    for (int64_t i = 0; i < size.k; ++i) {
      of.order.push_back(size.k - 1 - i);
    }
    for (int64_t i = 0; i < num_blocks(size.n * size.k, size.block_size); ++i) {
      of.scales.push_back(i % 9 == 4 ? 0.0f : random.uniform());
    }
    for (const QuantType type : kTypes) {
      const std::vector<uint8_t> expected = expected_gptq(of, x, type);
      for (const int threads : {1, 3}) {
        const Threads of_caller(threads);
        std::vector<uint8_t> packed(expected.size());
        cpu::gptq_4bit(x.data(), oracle::Storage<T>::kDtype, size.n, size.k, size.block_size, type, of.factor.data(),
                       of.order.data(), of.scales.data(), packed.data());
        CHECK(packed == expected, "%ld x %ld, type %d, %d threads", static_cast<long>(size.n),
              static_cast<long>(size.k), static_cast<int>(type), threads);
      }
    }
  }
}

TEST(gptq_for_fp32) { check_gptq<float>(); }
TEST(gptq_for_bf16) { check_gptq<Bf16>(); }
TEST(gptq_for_fp16) { check_gptq<Fp16>(); }

}  // namespace
