// A rectangle of a weight that is decoded at once.
#pragma once

#include <cstdint>

namespace qlora_native {

// Rows [row_begin, row_end) and columns [column_begin, column_end) of a weight seen as [rows, row_length].
struct Panel {
  int64_t row_length;
  int64_t row_begin;
  int64_t row_end;
  int64_t column_begin;
  int64_t column_end;

  constexpr int64_t rows() const { return row_end - row_begin; }
  constexpr int64_t columns() const { return column_end - column_begin; }
};

}  // namespace qlora_native
