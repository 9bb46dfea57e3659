// A rectangle of a weight, as the functions that decode one take it.
#pragma once

#include <string>

#include "core/panel.h"
#include "python/bindings.h"

namespace qlora_native::python {

// The fields of Panel, in order.
using PanelFields = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;

inline Panel checked_panel(const PanelFields& fields, int64_t numel) {
  const auto [row_length, row_begin, row_end, column_begin, column_end] = fields;
  require(0 <= row_begin && row_begin <= row_end && 0 <= column_begin && column_begin <= column_end &&
              column_end <= row_length && (row_end == 0 || row_length <= numel / row_end),
          "panel [" + std::to_string(row_begin) + ":" + std::to_string(row_end) + ", " + std::to_string(column_begin) +
              ":" + std::to_string(column_end) + "] with rows of " + std::to_string(row_length) +
              " does not lie inside a weight of " + std::to_string(numel) + " elements.");
  return {row_length, row_begin, row_end, column_begin, column_end};
}

}  // namespace qlora_native::python
