#include "core/nested_code.h"
#include "python/bindings.h"

namespace qlora_native::python {

WeightView checked_weight(const WeightFields& fields) {
  const auto [packed, absmax, absmax_codes, nested_absmax, nested_offset, nested_code, levels, quant_type, numel,
              block_size] = fields;
  static constexpr Levels built_in[2] = {nf4_levels(), fp4_levels()};
  check_block_size(block_size);
  checked_size(numel, "numel");
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
  return weight;
}

}  // namespace qlora_native::python
