// Jobs and kernels of the calibrated methods. "T" is the dtype of the table entry.
#pragma once

#include <cstdint>

#include "core/codebook.h"

namespace qlora_native::cpu {

// Scale i of block b is table[i] * multiplier[b / group] + offset.
struct SearchJob {
  const void* x;  // T [numel]
  int64_t numel;
  int64_t k;  // row length: element i is weighted by moment[i % k]
  int64_t block_size;
  QuantType type;
  const float* moment;  // [k]
  const float* table;   // [count]
  int64_t count;        // at most 256
  int64_t group;
  const float* multiplier;  // [ceil(blocks / group)]
  float offset;
  float low;               // of the block's largest magnitude: smaller scales are passed over,
  float high;              // and larger ones
  const uint8_t* initial;  // [blocks], tried in any case
  uint8_t* packed;         // [ceil(numel / 2)]
  uint8_t* chosen;         // [blocks]
};

struct FeedbackJob {
  const void* x;  // T [n, k]
  int64_t n;
  int64_t k;
  int64_t block_size;
  QuantType type;
  const float* factor;   // tile after tile, each [end of its columns, columns], see CalibrationKernels
  const int64_t* order;  // [k]
  const float* scales;   // [blocks]
  uint8_t* codes;        // [n, k], one a byte
};

// Where the tile that begins at column `begin` begins: those before it hold a triangle, not a square.
constexpr int64_t feedback_offset(int64_t begin, int64_t columns) { return begin * (begin + columns) / 2; }

struct CalibrationKernels {
  void (*search_blocks[3])(const SearchJob& job, int64_t first, int64_t last);  // indexed by Dtype
  // Rows of panels [first, last); `errors` has k * feedback_rows floats.
  void (*feedback_panels[3])(const FeedbackJob& job, int64_t first, int64_t last, float* errors);
  int64_t feedback_rows;     // of x that go together, a panel
  int64_t feedback_columns;  // that are summed together, a tile
};

}  // namespace qlora_native::cpu
