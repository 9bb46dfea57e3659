// Sizes of a product with a 4-bit weight, and plans for them.
#pragma once

#include <cstdint>
#include <string>

#include "core/layout.h"
#include "cpp/oracle.h"
#include "cuda/matmul_plan.h"

namespace cuemu {

struct Case {
  int64_t m;
  int64_t n;
  int64_t k;
  bool forward = true;
  int64_t r = 0;
  bool bias = false;
  int64_t block_size = 64;
  bool nested = true;
  qlora_native::QuantType type = qlora_native::QuantType::kNf4;
};

inline std::string text_of(const Case& c, const qlora_native::cuda::MatmulPlan& plan) {
  return "m " + std::to_string(c.m) + ", n " + std::to_string(c.n) + ", k " + std::to_string(c.k) +
         (c.forward ? ", forward" : ", input gradient") + ", r " + std::to_string(c.r) + ", block " +
         std::to_string(c.block_size) + ", kind " + std::to_string(static_cast<int>(plan.kind)) + ", tile " +
         std::to_string(plan.rows) + " x " + std::to_string(plan.columns) + ", splits " + std::to_string(plan.splits);
}

inline qlora_native::cuda::MatmulPlan tile_plan(const Case& c, int tile, int splits) {
  const qlora_native::cuda::TileSize& size = qlora_native::cuda::tile_of(c.forward, tile);
  const int64_t workspace =
      splits > 1 ? qlora_native::cuda::split_k_workspace_bytes(c.m, c.forward ? c.n : c.k, size, splits) : 0;
  return {splits > 1 ? qlora_native::cuda::MatmulKind::kSplitK : qlora_native::cuda::MatmulKind::kTile,
          size.rows,
          size.columns,
          splits,
          size.stages,
          size.shared_bytes(),
          workspace};
}

inline qlora_native::cuda::MatmulPlan gemv_plan(const Case& c, int columns) {
  return {qlora_native::cuda::MatmulKind::kGemv, c.m <= 4 ? 4 : c.m <= 8 ? 8 : 16, columns, 1, 0, 0, 0};
}

}  // namespace cuemu
