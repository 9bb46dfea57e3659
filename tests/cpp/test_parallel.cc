// cpu/parallel.h: what a loop throws reaches its caller, whichever thread threw it.
#include <atomic>
#include <stdexcept>
#include <string>

#include "caller_state.h"
#include "check.h"
#include "cpu/parallel.h"

using namespace qlora_native;

namespace {

template <typename Loop>
std::string thrown_by(const Loop& loop) {
  try {
    loop();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "nothing";
}

constexpr int64_t kUnits = 1000;

// A loop of each kind, of which the bodies from unit `first` on throw.
void check_loops(int64_t first) {
  const std::string expected = first < kUnits ? "unit" : "nothing";
  const auto visit = [first](int64_t unit) {
    if (unit >= first) {
      throw std::runtime_error("unit");
    }
  };
  const std::string by_ranges = thrown_by([&] {
    cpu::parallel_for(kUnits, 1, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        visit(unit);
      }
    });
  });
  const std::string by_units = thrown_by([&] { cpu::parallel_units(kUnits, [&](int64_t i, int64_t) { visit(i); }); });
  CHECK(by_ranges == expected && by_units == expected, "%s, %s", by_ranges.c_str(), by_units.c_str());
}

TEST(parallel_loops_throw_to_their_caller) {
  const FlushesSubnormals caller;
  for (const int count : {1, 4}) {
    const Threads threads(count);
    for (const int64_t first : {int64_t{0}, kUnits - 1, kUnits}) {  // all threads, one of them, none
      check_loops(first);
    }
  }
  CHECK(caller.still(), "the caller's flags are gone");
}

TEST(parallel_loops_take_as_many_threads_as_torch) {
  const Threads threads(5);
  cpu::threads_of_torch = [] { return 2; };
  std::atomic<int64_t> calls{0};
  cpu::parallel_for(kUnits, 1, [&](int64_t, int64_t) { ++calls; });
  const int64_t wanted = cpu::unit_threads(kUnits);
  cpu::threads_of_torch = nullptr;
#if defined(_OPENMP)
  CHECK(calls == 2 && wanted == 2, "%ld ranges, %ld threads", static_cast<long>(calls), static_cast<long>(wanted));
#else
  CHECK(calls == 1 && wanted == 1, "%ld ranges, %ld threads", static_cast<long>(calls), static_cast<long>(wanted));
#endif
}

}  // namespace
