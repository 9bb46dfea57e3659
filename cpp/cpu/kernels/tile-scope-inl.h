// AMX's tile registers, configured alike for all kernels: eight of 16 rows of 64 bytes.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

// Tile registers hold their state only inside this scope, so that no context switch saves them for nothing. Behind it
// the caller's configuration is back: llama.cpp sets its own once a thread.
class TileScope {
 public:
  TileScope() {
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;  // bytes a row
      config[48 + tile] = 16;      // rows
    }
    _tile_storeconfig(before_);
    _tile_loadconfig(config);
  }
  ~TileScope() {
    if (before_[0] == 0) {
      _tile_release();
    } else {
      _tile_loadconfig(before_);
    }
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  alignas(64) uint8_t before_[64];
};

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
