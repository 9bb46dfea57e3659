#include "core/nested_code.h"
#include "python/bindings.h"

namespace qlora_native::python {
namespace {

WeightView gguf_weight(QuantType type, Address packed, int64_t numel, int64_t block_size) {
  const BlockFormat& format = kBlockFormats[static_cast<int>(type)];
  require(block_size == format.elements && numel % format.elements == 0,
          std::string("a ") + format.name + " weight of " + std::to_string(numel) + " elements in blocks of " +
              std::to_string(block_size) + ": expected whole blocks of " + std::to_string(format.elements) + ".");
  WeightView weight{};
  weight.packed = pointer<const uint8_t>(packed, packed_bytes(type, numel), "packed");
  weight.numel = numel;
  weight.block_size = block_size;
  weight.type = type;
  return weight;
}

}  // namespace

WeightView checked_weight(const WeightFields& fields) {
  const auto [packed, absmax, absmax_codes, nested_absmax, nested_offset, nested_code, levels, quant_type, numel,
              block_size] = fields;
  static constexpr Levels built_in[2] = {nf4_levels(), fp4_levels()};
  checked_size(numel, "numel");
  if (quant_type >= static_cast<int>(QuantType::kQ4_0) && quant_type < kQuantTypes) {
    return gguf_weight(static_cast<QuantType>(quant_type), packed, numel, block_size);
  }
  check_block_size(block_size);
  const QuantType type = checked_quant_type(quant_type);
  const int64_t blocks = num_blocks(numel, block_size);
  const bool nested = absmax_codes != 0;
  require(numel == 0 || nested != (absmax != 0), "expected either fp32 scales or 8-bit scale codes, not both or none.");
  WeightView weight{};
  weight.packed = pointer<const uint8_t>(packed, packed_bytes(numel), "packed");
  weight.absmax = pointer<const float>(absmax, nested ? 0 : blocks, "absmax");
  weight.absmax_codes = pointer<const uint8_t>(absmax_codes, nested ? blocks : 0, "absmax codes");
  weight.nested_absmax = pointer<const float>(nested_absmax, nested ? num_nested_blocks(blocks) : 0, "nested_absmax");
  weight.nested_offset = pointer<const float>(nested_offset, nested ? 1 : 0, "nested_offset");
  weight.nested_code = nested_code == 0 ? kNestedCode.value : pointer<const float>(nested_code, 256, "nested_code");
  weight.levels = levels == 0 ? built_in[static_cast<int>(type)].value : pointer<const float>(levels, 16, "code");
  weight.numel = numel;
  weight.block_size = block_size;
  weight.type = type;
  return weight;
}

}  // namespace qlora_native::python
