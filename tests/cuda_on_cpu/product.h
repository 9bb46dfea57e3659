// A product with a 4-bit weight on the device, and its truth in double precision.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "cpp/oracle.h"
#include "cuda/linear_4bit.h"
#include "cuda_on_cpu/device_weight.h"
#include "cuda_on_cpu/product_case.h"

namespace cuemu {

using namespace qlora_native;

// One case with its operands on the device and its truth.
template <typename T>
class Product {
 public:
  explicit Product(const Case& given)
      : c(given),
        reduction_(c.forward ? c.k : c.n),
        columns_(c.forward ? c.n : c.k),
        weight_(c.n * c.k, c.block_size, c.nested, c.type, static_cast<uint64_t>(c.n * 131 + c.k)),
        random_(static_cast<uint64_t>(c.m * 7 + c.r)),
        x_(oracle::uniform_values<T>(random_, c.m * reduction_)),
        bias_(oracle::uniform_values<T>(random_, c.bias ? columns_ : 0)),
        low_(oracle::uniform_values<T>(random_, c.m * c.r)),
        up_(oracle::uniform_values<T>(random_, columns_ * c.r)),
        on_device_(weight_.view),
        device_x_(x_),
        device_bias_(bias_),
        device_low_(low_),
        device_up_(up_) {
    find_truth();
  }

  cudaError_t launch(const cuda::MatmulPlan& plan, const DeviceBuffer<T>& y, unsigned char* workspace,
                     cudaStream_t stream) {
    const ProductJob call{on_device_.view(),
                          oracle::Storage<T>::kDtype,
                          c.forward,
                          device_x_.data(),
                          device_bias_.data(),
                          device_low_.data(),
                          device_up_.data(),
                          c.r,
                          y.data(),
                          c.m,
                          c.n,
                          c.k};
    return cuda::launch_linear_4bit(call, plan, workspace, stream);
  }

  cudaError_t launch(const cuda::MatmulPlan& plan, const DeviceBuffer<T>& y, cudaStream_t stream = nullptr) {
    const DeviceBuffer<unsigned char> workspace(static_cast<size_t>(plan.workspace_bytes));
    return launch(plan, y, workspace.data(), stream);
  }

  // Under every schedule; the sums of unscaled levels may be off by the rounding of a level besides that of y.
  void check(const cuda::MatmulPlan& plan) {
    const std::string what = text_of(c, plan);
    const double unit = std::ldexp(1.0, -oracle::Storage<T>::kFormat.mantissa_bits - 1);
    const bool is_unscaled = plan.kind == cuda::MatmulKind::kGemv && !is_gguf(c.type);
    const double of_terms = is_unscaled ? unit : 1e-5;
    over_all_schedules([&](const char* schedule) {
      DeviceBuffer<T> y(expected_.size());
      CHECK_LAUNCH(launch(plan, y));
      const std::vector<T> got = y.host();
      for (size_t i = 0; i < got.size(); ++i) {
        const double error = std::fabs(oracle::value_of(got[i]) - expected_[i]);
        CHECK(error <= 1.01 * unit * std::fabs(expected_[i]) + of_terms * terms_[i] + 1e-7,
              "%s, %s: [%zu, %zu] is %g, expected %g, terms %g", what.c_str(), schedule,
              i / static_cast<size_t>(columns_), i % static_cast<size_t>(columns_), oracle::value_of(got[i]),
              expected_[i], terms_[i]);
      }
    });
  }

  int64_t columns() const { return columns_; }
  const Case c;

 private:
  void find_truth() {
    const auto size = static_cast<size_t>(c.n * c.k);
    std::vector<double> w(size);
    for (size_t i = 0; i < size; ++i) {
      w[i] = oracle::dequantized(weight_.view, static_cast<int64_t>(i), oracle::Storage<T>::kFormat);
    }
    const std::vector<double> x = oracle::doubles_of(x_), bias = oracle::doubles_of(bias_),
                              low = oracle::doubles_of(low_), up = oracle::doubles_of(up_);
    for (int64_t i = 0; i < c.m; ++i) {
      for (int64_t j = 0; j < columns_; ++j) {
        double sum = c.bias ? bias[static_cast<size_t>(j)] : 0.0;
        double magnitude = std::fabs(sum);
        const auto add = [&sum, &magnitude](double product) {
          sum += product;
          magnitude += std::fabs(product);
        };
        for (int64_t l = 0; l < reduction_; ++l) {
          add(x[static_cast<size_t>(i * reduction_ + l)] *
              w[static_cast<size_t>(c.forward ? j * c.k + l : l * c.k + j)]);
        }
        for (int64_t l = 0; l < c.r; ++l) {
          add(low[static_cast<size_t>(i * c.r + l)] *
              up[static_cast<size_t>(c.forward ? j * c.r + l : l * columns_ + j)]);
        }
        expected_.push_back(sum);
        terms_.push_back(magnitude);
      }
    }
  }

  int64_t reduction_;
  int64_t columns_;
  oracle::RandomWeight weight_;
  oracle::Random random_;
  std::vector<T> x_, bias_, low_, up_;
  DeviceWeight on_device_;
  DeviceBuffer<T> device_x_, device_bias_, device_low_, device_up_;
  std::vector<double> expected_, terms_;
};

// A token that is one 1 gives a row or a column of W itself: every weight to the last bit of the rule. Tiles round
// level times scale as dequantize_4bit does, and so do GGUF's products; few tokens multiply by the level of NF4 or FP4
// in 16 bits, and the scale comes after that.
template <typename T>
void check_one_hot(const Case& c, const cuda::MatmulPlan& plan) {
  const oracle::RandomWeight weight(c.n * c.k, c.block_size, c.nested, c.type, 11);
  const DeviceWeight on_device(weight.view);
  const int64_t reduction = c.forward ? c.k : c.n;
  const int64_t columns = c.forward ? c.n : c.k;
  const auto place = [&](int64_t token) { return (token * 37 + 5) % reduction; };
  std::vector<T> x(static_cast<size_t>(c.m * reduction));
  for (int64_t i = 0; i < c.m; ++i) {
    x[static_cast<size_t>(i * reduction + place(i))] = from_float<T>(1.0f);
  }
  const DeviceBuffer<T> device_x(x), y(static_cast<size_t>(c.m * columns));
  const DeviceBuffer<unsigned char> workspace(static_cast<size_t>(plan.workspace_bytes));
  const ProductJob call{on_device.view(),
                        oracle::Storage<T>::kDtype,
                        c.forward,
                        device_x.data(),
                        nullptr,
                        nullptr,
                        nullptr,
                        0,
                        y.data(),
                        c.m,
                        c.n,
                        c.k};
  CHECK_LAUNCH(cuda::launch_linear_4bit(call, plan, workspace.data(), nullptr));
  const std::vector<T> got = y.host();
  const oracle::Format format = oracle::Storage<T>::kFormat;
  for (int64_t i = 0; i < c.m * columns; ++i) {
    const int64_t from = place(i / columns), to = i % columns;
    const int64_t element = c.forward ? to * c.k + from : from * c.k + to;
    double expected = oracle::dequantized(weight.view, element, format);
    if (plan.kind == cuda::MatmulKind::kGemv && !is_gguf(c.type)) {
      const double level = oracle::rounded(format, oracle::value_of(weight.view.levels[weight.view.code(element)]));
      const double scale = oracle::scale_of(weight.view, element / c.block_size);
      expected = oracle::rounded(format, oracle::rounded(oracle::kFloat, level * scale));
    }
    const double value = oracle::value_of(got[static_cast<size_t>(i)]);
    CHECK(value == expected, "%s: [%ld, %ld] is %g, expected %g", text_of(c, plan).c_str(),
          static_cast<long>(i / columns), static_cast<long>(to), value, expected);
  }
}

}  // namespace cuemu
