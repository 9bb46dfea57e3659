// cpu/files/mapped_file.h and cpu/files/weight_stream.h: what is read and given up, and that the bytes are the file's
// meanwhile.
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/files/file_store.h"
#include "cpu/files/weight_stream.h"

using namespace qlora_native;
using cpu::MappedFile;

namespace {

constexpr int64_t kUnit = 256 << 10;
constexpr int64_t kUnits = 6;

// A file whose unit i holds bytes i + 1, on the disk and not in the page cache, without a name once it is mapped.
std::shared_ptr<MappedFile> written() {
  std::string path = (cpu::lies_in_memory(".") ? "/var/tmp/stream_test-" : "stream_test-") + std::string(6, 'X');
  const int file = mkstemp(path.data());
  CHECK(file >= 0, "no file for the test");
  for (int64_t unit = 0; unit < kUnits; ++unit) {
    const std::vector<char> bytes(kUnit, static_cast<char>(unit + 1));
    CHECK(write(file, bytes.data(), bytes.size()) == kUnit, "not written");
  }
  CHECK(fsync(file) == 0, "not on the disk");
  const auto mapped = std::make_shared<MappedFile>(path);
  mapped->release({0, mapped->num_bytes()});
  unlink(path.c_str());
  close(file);
  return mapped;
}

long resident(const MappedFile& file, int64_t unit) {
  return static_cast<long>(file.resident_bytes({unit * kUnit, (unit + 1) * kUnit}));
}

}  // namespace

TEST(weight_stream_holds_what_is_wanted) {
  const auto file = written();
  std::vector<cpu::Unit> units;
  for (int64_t unit = 0; unit < kUnits - 1; ++unit) {
    units.push_back({{file, {unit * kUnit, (unit + 1) * kUnit}}});
  }
  cpu::WeightStream stream(units, {{file, {(kUnits - 1) * kUnit, kUnits * kUnit}}}, {});
  for (int round = 0; round < 3; ++round) {
    for (int64_t unit = 0; unit + 1 < kUnits - 1; ++unit) {
      CHECK(stream.want({unit, unit + 1}, unit, unit == 0), "a read failed");
      const char* const bytes = file->data() + unit * kUnit;
      CHECK(bytes[0] == unit + 1 && std::memcmp(bytes, bytes + 1, kUnit - 1) == 0, "other bytes");
    }
    stream.settle();
  }
  CHECK(stream.held() == std::set<int64_t>({kUnits - 3, kUnits - 2}), "others are held");
  for (int64_t unit = 0; unit < kUnits; ++unit) {
    const long expected = unit < kUnits - 3 ? 0 : kUnit;
    CHECK(resident(*file, unit) == expected, "unit %ld: %ld bytes", static_cast<long>(unit), resident(*file, unit));
  }
  CHECK(stream.bytes_read() == (5 + 2 * 5) * kUnit, "%ld bytes were read", static_cast<long>(stream.bytes_read()));
}

TEST(weight_stream_of_two_threads) {
  const auto file = written();
  std::vector<cpu::Unit> units;
  for (int64_t unit = 0; unit < kUnits; ++unit) {
    units.push_back({{file, {unit * kUnit, (unit + 1) * kUnit}}});
  }
  cpu::WeightStream stream(units, {}, {});
  std::atomic<int> wrong{0};
  const auto visit = [&](int64_t first) {
    for (int64_t round = 0; round < 50 * kUnits; ++round) {
      const int64_t unit = (first + round) % kUnits;
      const bool is_read = stream.want({unit, (unit + 1) % kUnits}, unit, unit == 0);
      wrong += !is_read || file->data()[unit * kUnit] != unit + 1 ? 1 : 0;
    }
  };
  std::thread other([&] { visit(kUnits / 2); });
  visit(0);
  other.join();
  CHECK(wrong == 0, "%d visits found other bytes", wrong.load());
}

TEST(weight_stream_keeps_what_was_written_to) {
  const auto file = written();
  file->data()[kUnit + 5] = 77;
  file->release({0, file->num_bytes()});
  CHECK(file->data()[kUnit + 5] == 77, "a page of this process was dropped");
  CHECK(file->change().empty(), "%s", file->change().c_str());
}

TEST(weight_stream_refuses_a_file_that_is_not_there) {
  try {
    MappedFile("/nowhere/at.all");
    CHECK(false, "no exception");
  } catch (const cpu::MappedFileError& error) {
    CHECK(std::strstr(error.what(), "cannot be opened") != nullptr, "%s", error.what());
  }
}
