// A quantized weight in device memory, every array of it with exact bounds.
#pragma once

#include <cstdint>
#include <vector>

#include "core/gguf.h"
#include "core/layout.h"
#include "core/weight_view.h"
#include "cuda_on_cpu/harness.h"

namespace cuemu {

class DeviceWeight {
 public:
  // packed_offset: bytes past a multiple of 256 at which the packed codes begin.
  explicit DeviceWeight(const qlora_native::WeightView& host, size_t packed_offset = 0)
      : packed_(copied(host.packed, qlora_native::packed_bytes(host.type, host.numel)), packed_offset),
        absmax_(copied(host.absmax, blocks_of(host))),
        codes_(copied(host.absmax_codes, blocks_of(host))),
        nested_absmax_(copied(host.absmax_codes == nullptr ? nullptr : host.nested_absmax,
                              qlora_native::num_nested_blocks(blocks_of(host)))),
        nested_offset_(copied(host.nested_offset, 1)),
        nested_code_(copied(host.nested_code, 256)),
        levels_(copied(host.levels, 16)) {
    view_ = host;
    view_.packed = packed_.data();
    view_.absmax = absmax_.data();
    view_.absmax_codes = codes_.data();
    view_.nested_absmax = nested_absmax_.data();
    view_.nested_offset = nested_offset_.data();
    view_.nested_code = nested_code_.data();
    view_.levels = levels_.data();
  }

  const qlora_native::WeightView& view() const { return view_; }

 private:
  static int64_t blocks_of(const qlora_native::WeightView& host) {
    return qlora_native::num_blocks(host.numel, host.block_size);
  }

  template <typename T>
  static std::vector<T> copied(const T* from, int64_t count) {
    return from == nullptr ? std::vector<T>() : std::vector<T>(from, from + count);
  }

  DeviceBuffer<uint8_t> packed_;
  DeviceBuffer<float> absmax_;
  DeviceBuffer<uint8_t> codes_;
  DeviceBuffer<float> nested_absmax_;
  DeviceBuffer<float> nested_offset_;
  DeviceBuffer<float> nested_code_;
  DeviceBuffer<float> levels_;
  qlora_native::WeightView view_;
};

}  // namespace cuemu
