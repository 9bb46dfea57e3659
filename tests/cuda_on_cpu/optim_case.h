// Tensors of an optimizer twice: in host memory for the CPU op, in device memory with exact bounds for the kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "core/optim.h"
#include "core/state_code.h"
#include "cpp/oracle.h"
#include "cpu/gradient_norm.h"
#include "cuda/gradient_norm.h"
#include "cuda/tensor_list.h"
#include "cuda_on_cpu/harness.h"

namespace cuemu {

struct TensorSpec {
  int64_t numel;
  qlora_native::Dtype dtype = qlora_native::Dtype::kFloat32;
  bool coded = false;
  int64_t group = 0;
  size_t offset = 0;  // elements past an aligned address, of everything on the device
};

class OptimCase {
 public:
  using Bytes = std::vector<unsigned char>;

  OptimCase(const std::vector<TensorSpec>& specs, uint64_t seed) : specs_(specs), random_(seed) {
    for (const TensorSpec& spec : specs) {
      const auto numel = static_cast<size_t>(spec.numel);
      const size_t element = spec.dtype == qlora_native::Dtype::kFloat32 ? 4 : 2;
      const size_t state = spec.coded ? 1 : 4;
      const size_t blocks = spec.coded ? (numel + 255) / 256 : 0;
      const size_t sizes[kParts] = {
          numel * element, numel * element, numel * state, numel * state, blocks * 4, blocks * 4, 4};
      const size_t widths[kParts] = {element, element, state, state, 4, 4, 4};
      Tensor& tensor = tensors_.emplace_back();
      for (int part = 0; part < kParts; ++part) {
        tensor.host[part].resize(sizes[part]);
        tensor.device[part] = std::make_unique<DeviceBuffer<unsigned char>>(sizes[part], spec.offset * widths[part]);
      }
    }
    for (size_t i = 0; i < tensors_.size(); ++i) {
      Tensor& tensor = tensors_[i];
      fill(specs[i], kParam, 1.0f);
      host_list_.push_back(row(specs[i], [&](int part) { return tensor.host[part].data(); }));
      device_list_.push_back(row(specs[i], [&](int part) { return tensor.device[part]->data(); }));
      for (int part = 0; part < kParts; ++part) {
        upload(tensor, part);
      }
    }
    const int64_t num_chunks = qlora_native::cuda::count_chunks(device_list_.data(), count());
    std::vector<qlora_native::cuda::OptimChunk> chunks(static_cast<size_t>(num_chunks));
    qlora_native::cuda::fill_chunks(device_list_.data(), count(), chunks.data());
    table_ = std::make_unique<DeviceBuffer<qlora_native::OptimTensor>>(device_list_);
    chunks_ = std::make_unique<DeviceBuffer<qlora_native::cuda::OptimChunk>>(chunks);
    const auto bytes = static_cast<size_t>(qlora_native::cuda::gradient_norm_workspace(num_chunks));
    workspace_ = std::make_unique<DeviceBuffer<unsigned char>>(Bytes(bytes));
  }

  int64_t count() const { return static_cast<int64_t>(host_list_.size()); }
  const qlora_native::OptimTensor* host() const { return host_list_.data(); }
  qlora_native::cuda::OptimTable device() const {
    return {table_->data(), chunks_->data(), count(), static_cast<int64_t>(chunks_->size())};
  }
  void* workspace() const { return workspace_->data(); }
  const std::vector<TensorSpec>& specs() const { return specs_; }
  const std::vector<qlora_native::OptimTensor>& device_rows() const { return device_list_; }  // on the host

  // New gradients, the same on both sides. Some blocks hold zeros alone, some magnitudes of which the squares are
  // subnormal.
  void new_gradients(float scale = 1.0f) {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      fill(specs_[i], kGrad, scale, i);
      upload(tensors_[i], kGrad);
    }
  }

  void set_gradient(size_t tensor, int64_t element, float value) {
    set(specs_[tensor].dtype, tensors_[tensor].host[kGrad], static_cast<size_t>(element), value);
    upload(tensors_[tensor], kGrad);
  }

  // Parameters, states, absmaxes and steps of the device against those of the host: the same bytes, or NaN both.
  void check_same(const char* what) const {
    static constexpr const char* kNames[kParts] = {"param",  "grad",   "exp_avg", "exp_avg_sq",
                                                   "absmax", "absmax", "step"};
    for (size_t i = 0; i < tensors_.size(); ++i) {
      for (int part = 0; part < kParts; ++part) {
        const Bytes& expected = tensors_[i].host[part];
        const Bytes got = tensors_[i].device[part]->host();
        const bool halves = (part == kParam || part == kGrad) && specs_[i].dtype != qlora_native::Dtype::kFloat32;
        const bool floats = !halves && (part < kExpAvg || part >= kAbsmax || !specs_[i].coded);
        const size_t width = halves ? 2 : floats ? 4 : 1;
        for (size_t at = 0; at < expected.size(); at += width) {
          const bool same = std::memcmp(&got[at], &expected[at], width) == 0 ||
                            (floats && both_nan<float>(&got[at], &expected[at])) ||
                            (halves && (specs_[i].dtype == qlora_native::Dtype::kBfloat16
                                            ? both_nan<qlora_native::Bf16>(&got[at], &expected[at])
                                            : both_nan<qlora_native::Fp16>(&got[at], &expected[at])));
          CHECK(same, "%s: tensor %zu, %s %zu: %s, expected %s", what, i, kNames[part], at / width,
                hex(&got[at], width).c_str(), hex(&expected[at], width).c_str());
        }
      }
    }
  }

 private:
  enum Part { kParam, kGrad, kExpAvg, kExpAvgSq, kAbsmax, kAbsmaxSq, kStep, kParts };

  struct Tensor {
    Bytes host[kParts];
    std::unique_ptr<DeviceBuffer<unsigned char>> device[kParts];
  };

  template <typename Address>
  static qlora_native::OptimTensor row(const TensorSpec& spec, const Address& address) {
    const auto floats = [&](int part) { return reinterpret_cast<float*>(address(part)); };
    return {address(kParam),
            address(kGrad),
            address(kExpAvg),
            address(kExpAvgSq),
            spec.coded ? floats(kAbsmax) : nullptr,
            spec.coded ? floats(kAbsmaxSq) : nullptr,
            floats(kStep),
            spec.numel,
            spec.dtype,
            spec.group};
  }

  static void set(qlora_native::Dtype dtype, Bytes& bytes, size_t element, float value) {
    const auto put = [&](auto rounded) {
      std::memcpy(bytes.data() + element * sizeof rounded, &rounded, sizeof rounded);
    };
    switch (dtype) {
      case qlora_native::Dtype::kBfloat16:
        return put(qlora_native::from_float<qlora_native::Bf16>(value));
      case qlora_native::Dtype::kFloat16:
        return put(qlora_native::from_float<qlora_native::Fp16>(value));
      default:
        return put(value);
    }
  }

  void fill(const TensorSpec& spec, Part part, float scale, size_t tensor = 0) {
    Bytes& bytes = tensors_[part == kParam ? filled_++ : tensor].host[part];
    for (int64_t i = 0; i < spec.numel; ++i) {
      float v = random_.uniform() * scale;
      if (part == kGrad) {
        const int64_t stretch = i / 256 % 8;
        v = stretch == 5 ? 0.0f : stretch == 6 ? v * 1e-21f : v * random_.uniform();
      }
      set(spec.dtype, bytes, static_cast<size_t>(i), v);
    }
  }

  void upload(const Tensor& tensor, int part) const {
    if (!tensor.host[part].empty()) {
      std::memcpy(tensor.device[part]->data(), tensor.host[part].data(), tensor.host[part].size());
    }
  }

  template <typename T>
  static bool both_nan(const unsigned char* a, const unsigned char* b) {
    T x;
    T y;
    std::memcpy(&x, a, sizeof x);
    std::memcpy(&y, b, sizeof y);
    return std::isnan(qlora_native::to_float(x)) && std::isnan(qlora_native::to_float(y));
  }

  static std::string hex(const unsigned char* bytes, size_t count) {
    std::string text = "0x";
    for (size_t i = count; i-- > 0;) {
      static constexpr char kDigits[] = "0123456789abcdef";
      text += kDigits[bytes[i] >> 4];
      text += kDigits[bytes[i] & 15];
    }
    return text;
  }

  std::vector<TensorSpec> specs_;
  oracle::Random random_;
  std::vector<Tensor> tensors_;
  size_t filled_ = 0;
  std::vector<qlora_native::OptimTensor> host_list_, device_list_;
  std::unique_ptr<DeviceBuffer<qlora_native::OptimTensor>> table_;
  std::unique_ptr<DeviceBuffer<qlora_native::cuda::OptimChunk>> chunks_;
  std::unique_ptr<DeviceBuffer<unsigned char>> workspace_;
};

// Scalars in device memory that a step reads and writes.
struct StepScalars {
  DeviceBuffer<double> norm{1};
  DeviceBuffer<float> grad_scale{1};
  DeviceBuffer<float> found_inf{1};
  DeviceBuffer<double> grad_norm{1};
  DeviceBuffer<float> skipped{1};
  DeviceBuffer<uint32_t> finished{std::vector<uint32_t>{0}};

  qlora_native::cuda::StepResults results() const { return {grad_norm.data(), skipped.data()}; }
};

// Every dtype, both forms of states, partial vectors, state blocks and chunks, two groups, nothing at all.
inline std::vector<TensorSpec> mixed_tensors() {
  using qlora_native::Dtype;
  return {{1},
          {300, Dtype::kBfloat16},
          {8192 + 8192 + 17, Dtype::kFloat32},
          {0},
          {257, Dtype::kFloat16, false, 1},
          {5000, Dtype::kFloat32, true, 1},
          {8192 + 300, Dtype::kBfloat16, true},
          {1000, Dtype::kFloat16, true},
          {8192, Dtype::kBfloat16, false, 1},
          {700, Dtype::kBfloat16, false, 0, 1},
          {700, Dtype::kFloat32, true, 0, 3}};
}

}  // namespace cuemu
