// The branches inside the quantizing and decoding kernels: chunks of many blocks, cells of the codes, streaming stores.
#include <cstdlib>
#include <type_traits>

#include "check.h"
#include "core/arithmetic.h"
#include "cpu/kernels/kernels.h"
#include "oracle.h"

using namespace qlora_native;

namespace {

constexpr QuantType kTypes[2] = {QuantType::kNf4, QuantType::kFp4};

uint8_t rule_code(QuantType type, float normalized) {
  return type == QuantType::kNf4 ? nf4_code(normalized) : fp4_code(normalized);
}

// Set it to try every float; that takes a minute.
bool exhaustive() { return std::getenv("QLORA_NATIVE_TEST_EXHAUSTIVE") != nullptr; }

// ---------------------------------------------------------------------------------------------------------------------
// Codes

// The kernel's code of each value of [-1, 1]: the 64th element of each block is one, so the others normalize to
// themselves.
class CodesOfKernel {
 public:
  explicit CodesOfKernel(QuantType type) : type_(type) {}

  void add(float x) {
    x_.push_back(x);
    if (x_.size() % 64 == 63) {
      x_.push_back(1.0f);
    }
    if (x_.size() == size_t{1} << 20) {
      flush();
    }
  }

  void flush() {
    if (x_.empty()) {
      return;
    }
    x_.resize((x_.size() + 63) / 64 * 64, 1.0f);
    std::vector<uint8_t> packed(x_.size() / 2);
    std::vector<float> absmax(x_.size() / 64);
    const cpu::BlockJob job{x_.data(), static_cast<int64_t>(x_.size()), 64, type_, packed.data(), absmax.data()};
    cpu::kernels().quantize_blocks[0](job, 0, static_cast<int64_t>(absmax.size()));
    for (size_t i = 0; i < x_.size(); ++i) {
      const int code = i % 2 == 0 ? packed[i / 2] >> 4 : packed[i / 2] & 15;
      const int expected = rule_code(type_, x_[i]);
      CHECK(code == expected, "%a gave %d, expected %d", static_cast<double>(x_[i]), code, expected);
    }
    x_.clear();
  }

 private:
  QuantType type_;
  std::vector<float> x_;
};

// `reach` floats on either side of each point, as far as they lie in [-1, 1]; both signs.
template <typename Codes>
void add_surroundings(const std::vector<float>& points, int reach, Codes& codes) {
  for (const float point : points) {
    const auto bits = static_cast<int64_t>(oracle::bits_of(std::fabs(point)));
    for (int64_t near = bits - reach; near <= bits + reach; ++near) {
      const float x = std::bit_cast<float>(static_cast<uint32_t>(std::max<int64_t>(near, 0)));
      if (x <= 1.0f) {
        codes.add(x);
        codes.add(-x);
      }
    }
  }
}

template <typename Codes>
void add_every_float(Codes& codes) {
  for (uint32_t bits = 0; bits <= oracle::bits_of(1.0f); ++bits) {
    codes.add(std::bit_cast<float>(bits));
    codes.add(-std::bit_cast<float>(bits));
  }
}

TEST(codes_around_every_decision_and_cell_edge) {
  for (const QuantType type : kTypes) {
    CodesOfKernel codes(type);
    std::vector<float> points{0.0f, 0x1p-126f, 1.0f};
    constexpr Nf4Boundaries boundaries = nf4_boundaries();
    points.insert(points.end(), boundaries.value, boundaries.value + 15);
    constexpr Fp4Pivots pivots = fp4_pivots();
    points.insert(points.end(), pivots.value, pivots.value + 7);
    for (int half_cell = 1; half_cell < 2 * static_cast<int>(kCellsPerUnit); ++half_cell) {
      points.push_back(static_cast<float>(half_cell) / (2.0f * kCellsPerUnit));
    }
    add_surroundings(points, 2000, codes);
    oracle::Random random(3);
    for (int i = 0; i < 200000; ++i) {
      codes.add(random.uniform());
      codes.add(std::ldexp(random.uniform(), -static_cast<int>(random.byte() % 140)));
    }
    if (exhaustive()) {
      add_every_float(codes);
    }
    codes.flush();
  }
}

// The largest element of a block may normalize to just above one.
TEST(largest_element_takes_the_last_code) {
  oracle::Random random(5);
  std::vector<float> x;
  for (int block = 0; block < 20000; ++block) {
    const float largest = std::fabs(random.any_finite());
    for (int i = 0; i < 32; ++i) {
      x.push_back(i % 2 == 0 ? largest : -largest);
    }
  }
  int above_one = 0;
  for (const QuantType type : kTypes) {
    std::vector<uint8_t> packed(x.size() / 2);
    std::vector<float> absmax(x.size() / 32);
    const cpu::BlockJob job{x.data(), static_cast<int64_t>(x.size()), 32, type, packed.data(), absmax.data()};
    CHECK(cpu::kernels().quantize_blocks[0](job, 0, 20000) == -1, "finite");
    for (size_t i = 0; i < x.size(); i += 2) {
      const bool zero = absmax[i / 32] == 0.0f;
      above_one += !zero && normalizer_of(absmax[i / 32])(x[i]) > 1.0f ? 1 : 0;
      const int both = type == QuantType::kNf4 ? 0xf0 : 0x3b;
      const int expected = zero ? zero_code(type) * 17 : both;
      CHECK(packed[i / 2] == expected, "largest %a gave %02x", static_cast<double>(x[i]), packed[i / 2]);
    }
  }
  CHECK(above_one > 1000, "only %d values above one", above_one);
}

// The kernel's nested code of each value: every group of 256 holds a one, and the offset is zero.
class NestedCodesOfKernel {
 public:
  void add(float x) {
    x_.push_back(x);
    if (x_.size() % 256 == 255) {
      x_.push_back(1.0f);
    }
    if (x_.size() == size_t{1} << 20) {
      flush();
    }
  }

  void flush() {
    if (x_.empty()) {
      return;
    }
    x_.push_back(1.0f);
    const auto blocks = static_cast<int64_t>(x_.size());
    std::vector<uint8_t> codes(x_.size());
    std::vector<float> absmax(static_cast<size_t>(num_nested_blocks(blocks)));
    const cpu::ScaleJob job{x_.data(), blocks, 0.0f, codes.data(), absmax.data()};
    cpu::kernels().quantize_scale_groups(job, 0, num_nested_blocks(blocks));
    for (size_t i = 0; i < x_.size(); ++i) {
      CHECK(codes[i] == nearest_nested_code(x_[i]), "%a gave %d, expected %d", static_cast<double>(x_[i]), codes[i],
            nearest_nested_code(x_[i]));
    }
    x_.clear();
  }

 private:
  std::vector<float> x_;
};

TEST(nested_codes_around_every_threshold_and_cell_edge) {
  NestedCodesOfKernel codes;
  std::vector<float> points{0.0f, 0x1p-126f, 1.0f};
  for (int i = 0; i < 255; ++i) {
    points.push_back(nested_threshold(i));
  }
  add_surroundings(points, 1000, codes);
  std::vector<float> edges;
  for (uint32_t cell = 0; cell < NestedCells::kCount; ++cell) {
    edges.push_back(std::bit_cast<float>((NestedCells::kFirst + cell) << NestedCells::kShift));
  }
  add_surroundings(edges, 20, codes);
  oracle::Random random(3);
  for (int i = 0; i < 200000; ++i) {
    codes.add(random.uniform());
    codes.add(std::ldexp(random.uniform(), -static_cast<int>(random.byte() % 140)));
  }
  if (exhaustive()) {
    add_every_float(codes);
  }
  codes.flush();
}

// ---------------------------------------------------------------------------------------------------------------------
// Chunks

// Blocks of ordinary, zero, tiny and huge values in turn.
template <typename T>
std::vector<T> mixed_input(int64_t numel, int64_t block_size, uint64_t seed) {
  oracle::Random random(seed);
  std::vector<T> x(static_cast<size_t>(numel));
  int kind = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    if (i % static_cast<size_t>(block_size) == 0) {
      kind = random.byte() % 8;
    }
    const int huge = std::is_same_v<T, Fp16> ? 15 : 100;
    const int exponent = kind == 1 ? -135 : kind == 2 ? huge : kind == 3 ? -20 : 0;
    x[i] = from_float<T>(kind == 0 ? std::copysign(0.0f, random.uniform()) : std::ldexp(random.uniform(), exponent));
  }
  return x;
}

template <typename T>
T job_value(const cpu::BlockJob& job, int64_t i) {
  return static_cast<const T*>(job.x)[i];
}

template <typename T>
void check_chunks() {
  for (int64_t block_size = kMinBlock; block_size <= kMaxBlock; block_size *= 2) {
    for (const int64_t numel : {int64_t{4096}, int64_t{3 * 4096 + 5 * 32 + 7}, int64_t{2 * 4096 + 96}}) {
      for (const size_t lead : {size_t{0}, size_t{1}}) {  // misaligned input and output
        const std::vector<T> x = mixed_input<T>(numel + 1, block_size, static_cast<uint64_t>(numel + block_size));
        const QuantType type = kTypes[lead];
        const int64_t blocks = num_blocks(numel, block_size);
        std::vector<uint8_t> packed(lead + static_cast<size_t>(packed_bytes(numel)));
        std::vector<float> absmax(static_cast<size_t>(blocks));
        const cpu::BlockJob job{x.data() + lead, numel, block_size, type, packed.data() + lead, absmax.data()};
        const auto kernel = cpu::kernels().quantize_blocks[static_cast<int>(oracle::Storage<T>::kDtype)];
        const int64_t cut = blocks / 3;  // the second call begins inside a chunk of the first
        CHECK(kernel(job, 0, cut) == -1 && kernel(job, cut, blocks) == -1, "finite");
        for (int64_t i = 0; i < numel; ++i) {
          const int64_t block = i / block_size;
          double highest = 0.0;
          for (int64_t j = block * block_size; i % block_size == 0 && j < std::min(numel, (block + 1) * block_size);
               ++j) {
            highest = std::max(highest, std::fabs(oracle::value_of(job_value<T>(job, j))));
          }
          const double scale = oracle::value_of(absmax[static_cast<size_t>(block)]);
          CHECK(i % block_size != 0 || scale == highest, "scale %a, expected %a", scale, highest);
          const int byte = job.packed[i / 2];
          const int code = i % 2 == 0 ? byte >> 4 : byte & 15;
          const double normalized =
              scale == 0.0 ? 0.0 : oracle::normalized(oracle::value_of(job_value<T>(job, i)), scale);
          const int expected = scale == 0.0 ? zero_code(type) : oracle::code_of(type, normalized);
          CHECK(code == expected, "block %d, element %d of %d: %d, expected %d", static_cast<int>(block_size),
                static_cast<int>(i), static_cast<int>(numel), code, expected);
        }
      }
    }
  }
}

TEST(quantize_chunks_of_fp32) { check_chunks<float>(); }
TEST(quantize_chunks_of_bf16) { check_chunks<Bf16>(); }
TEST(quantize_chunks_of_fp16) { check_chunks<Fp16>(); }

TEST(first_non_finite_of_a_chunk) {
  for (const int64_t block_size : {int64_t{32}, int64_t{64}, int64_t{4096}}) {
    for (const int64_t bad : {0, 31, 4095, 4096, 9001, 12299}) {
      std::vector<float> x(12300, 0.5f);
      std::fill(x.begin(), x.begin() + 2000, 0.0f);
      x[static_cast<size_t>(bad)] = std::numeric_limits<float>::quiet_NaN();
      x[12299] = -std::numeric_limits<float>::infinity();
      std::vector<uint8_t> packed(6150);
      std::vector<float> absmax(static_cast<size_t>(num_blocks(12300, block_size)));
      const cpu::BlockJob job{x.data(), 12300, block_size, QuantType::kNf4, packed.data(), absmax.data()};
      const int64_t found = cpu::kernels().quantize_blocks[0](job, 0, num_blocks(12300, block_size));
      CHECK(found == bad, "%d was named, not %d", static_cast<int>(found), static_cast<int>(bad));
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Decoding

// Spans that begin and end anywhere, over several groups of scales, with both kinds of stores.
template <typename T>
void check_spans(int64_t block_size, bool nested) {
  const int64_t numel = 600 * block_size + 13;
  const oracle::RandomWeight weight(numel, block_size, nested, QuantType::kNf4, 31);
  oracle::Random random(17);
  const auto kernel = cpu::kernels().dequantize_span[static_cast<int>(oracle::Storage<T>::kDtype)];
  for (int round = 0; round < 60; ++round) {
    int64_t begin = static_cast<int64_t>(random.bits()) % numel;
    if (round % 3 != 0) {
      begin -= begin % block_size;
    }
    const int64_t length = std::min<int64_t>(numel - begin, random.bits() % 3000);
    const size_t lead = round % 4 == 3 ? 1 : 0;
    const bool stream = round % 2 == 0;
    constexpr size_t kLine = 64 / sizeof(T);
    std::vector<T> buffer(2 * kLine + lead + static_cast<size_t>(length), oracle::from_bits<T>(0x7f7fu));
    const size_t start = (64 - reinterpret_cast<uintptr_t>(buffer.data()) % 64) % 64 / sizeof(T) + lead;
    kernel(weight.view, begin, begin + length, buffer.data() + start, stream);
    for (size_t i = 0; i < buffer.size(); ++i) {
      const auto element = static_cast<int64_t>(i) - static_cast<int64_t>(start);
      if (element < 0 || element >= length) {
        CHECK(oracle::bits_of(buffer[i]) == 0x7f7fu, "written outside, at %d of %d", static_cast<int>(element),
              static_cast<int>(length));
        continue;
      }
      const double expected = oracle::dequantized(weight.view, begin + element, oracle::Storage<T>::kFormat);
      CHECK(oracle::same(oracle::value_of(buffer[i]), expected), "element %d from %d is %a, expected %a",
            static_cast<int>(element), static_cast<int>(begin), oracle::value_of(buffer[i]), expected);
    }
  }
}

template <typename T>
void check_spans_of_blocks() {
  for (const int64_t block_size : {int64_t{32}, int64_t{64}, int64_t{256}}) {
    check_spans<T>(block_size, true);
    check_spans<T>(block_size, false);
  }
}

TEST(decode_any_span_to_fp32) { check_spans_of_blocks<float>(); }
TEST(decode_any_span_to_bf16) { check_spans_of_blocks<Bf16>(); }
TEST(decode_any_span_to_fp16) { check_spans_of_blocks<Fp16>(); }

TEST(decode_scales_from_any_block) {
  const oracle::RandomWeight weight(1000 * 32, 32, true, QuantType::kNf4, 7);
  for (int64_t first = 0; first < 1000; first += 37) {
    for (const int64_t count : {int64_t{1}, int64_t{15}, int64_t{16}, int64_t{300}}) {
      const int64_t last = std::min<int64_t>(1000, first + count);
      std::vector<float> scales(static_cast<size_t>(last - first));
      cpu::kernels().decode_scales(weight.view, first, last, scales.data());
      for (int64_t block = first; block < last; ++block) {
        CHECK(scales[static_cast<size_t>(block - first)] == weight.view.scale(block), "scale %d of [%d, %d)",
              static_cast<int>(block), static_cast<int>(first), static_cast<int>(last));
      }
    }
  }
}

}  // namespace
