// Runs every primitive once and gives what it wrote: on a GPU (main.cu) or in the emulator (test_conformance.cc).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "conformance/primitives.cuh"

namespace conformance {

struct Result {
  std::string name;
  std::vector<uint32_t> words;
};

inline void check(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(what + ": " + cudaGetErrorString(error));
  }
}

// Floats of the cases that rounding goes wrong on, as words, [32, 4]; plain numbers in between.
inline std::vector<uint32_t> awkward_floats() {
  std::vector<uint32_t> words = {
      0x3f808000, 0x3f818000, 0x3f807fff, 0x3f808001,  // ties of bf16, and beside them
      0x3f801000, 0x3f803000, 0x3f800fff, 0x3f801001,  // ties of fp16
      0x477fefff, 0x477ff000, 0x477fe000, 0x7f7fffff,  // the largest fp16, overflow, the largest float
      0x33000000, 0x33000001, 0x33800000, 0x38ffe000,  // subnormals of fp16
      0x00000001, 0x007fffff, 0x00800000, 0x80000001,  // subnormals of fp32
      0x7f800000, 0xff800000, 0x00000000, 0x80000000,  // infinities, zeros
      0x7f7f8000, 0x7f7f7fff, 0xff7f8000, 0x0000ffff,  // rounding to infinity; to a subnormal of bf16
  };
  for (uint32_t state = 1; words.size() < 4 * kLanes;) {
    state = state * 1664525u + 1013904223u;
    words.push_back(0x3f000000u ^ (state >> 4 & 0x83ffffffu));
  }
  return words;
}

class Runner {
 public:
  Runner() {
    const std::vector<uint32_t> floats = awkward_floats();
    check(cudaMalloc(&in_, floats.size() * sizeof(uint32_t)), "cudaMalloc");
    check(cudaMalloc(&out_, sizeof(uint32_t) * kLanes * kMostWords), "cudaMalloc");
    check(cudaMemcpy(in_, floats.data(), floats.size() * sizeof(uint32_t), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  Runner(const Runner&) = delete;
  Runner& operator=(const Runner&) = delete;
  ~Runner() {
    cudaFree(in_);
    cudaFree(out_);
  }

  const uint32_t* in() const { return static_cast<const uint32_t*>(in_); }

  template <typename... Parameters, typename... Arguments>
  Result run(const char* name, int words_a_lane, void (*kernel)(Parameters...), Arguments... arguments) {
    Result result{name, std::vector<uint32_t>(static_cast<size_t>(words_a_lane * kLanes))};
    check(wp::launch(kernel, dim3(1), dim3(kLanes), 0, nullptr, arguments..., static_cast<uint32_t*>(out_)), name);
    check(cudaMemcpy(result.words.data(), out_, result.words.size() * sizeof(uint32_t), cudaMemcpyDeviceToHost), name);
    return result;
  }

 private:
  void* in_ = nullptr;
  void* out_ = nullptr;
};

// `compute_capability`: 10 * major + minor; bf16 products begin at 80.
inline std::vector<Result> run_all(int compute_capability) {
  Runner runner;
  std::vector<Result> results;
  results.push_back(runner.run("ldmatrix", 4, ldmatrix<false>));
  results.push_back(runner.run("ldmatrix_trans", 4, ldmatrix<true>));
  if (compute_capability >= 80) {
    results.push_back(runner.run("mma_m16n8k16_bf16", 4, mma_m16n8k16<Bf16>));
  }
  results.push_back(runner.run("mma_m16n8k16_fp16", 4, mma_m16n8k16<Fp16>));
  results.push_back(runner.run("mma_m16n8k8_fp16", 4, mma_m16n8k8_fp16));
  results.push_back(runner.run("cp_async", 8, cp_async, runner.in()));
  results.push_back(runner.run("rounding", 12, rounding, runner.in()));
  results.push_back(runner.run("arithmetic", 6, arithmetic, runner.in()));
  results.push_back(runner.run("warp_intrinsics", 8, warp_intrinsics));
  results.push_back(runner.run("atomics", 1, atomics));
  return results;
}

// One line a primitive: its name and its words in hexadecimal.
inline std::string text_of(const std::vector<Result>& results) {
  std::string text;
  for (const Result& result : results) {
    text += result.name;
    for (const uint32_t word : result.words) {
      char digits[12];
      std::snprintf(digits, sizeof(digits), " %08x", word);
      text += digits;
    }
    text += '\n';
  }
  return text;
}

}  // namespace conformance
