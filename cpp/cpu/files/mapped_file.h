// A file of weights in memory as it lies on the disk: pages come when they are touched, and processes share them.
// Linux.
#pragma once

#include <sys/stat.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/page_plan.h"
#include "cpu/files/bus_error.h"

namespace qlora_native::cpu {

// The file cannot be opened or mapped; a sentence.
class MappedFileError : public std::runtime_error {
  using runtime_error::runtime_error;
};

// A private mapping: a page that is written to becomes memory of this process, nothing reaches the file. Any thread may
// call any method.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::string& path() const { return path_; }
  char* data() const { return data_; }  // [num_bytes()], at this address for as long as the object lives
  int64_t num_bytes() const { return num_bytes_; }
  // Empty while the file has the size and the time of change that it was opened with; else a sentence. A file that was
  // removed or replaced under its name stays what it was.
  std::string change() const;

  // Reads the pages that the range touches, and maps them; false if the file no longer has them or a read fails.
  bool fetch(const ByteRange& range) const;
  // Gives up the whole pages of a range, mapping and page cache; those that were written to stay.
  void release(const ByteRange& range) const;
  // Whether touching a page reads that page alone, or the ones around it, up to megabytes.
  void read_around(const ByteRange& range, bool allowed) const;
  int64_t resident_bytes(const ByteRange& range) const;  // in page cache; all of them if the file is somebody else's

 private:
  int64_t end_of_private_pages(const ByteRange& range) const;

  const std::string path_;
  int file_ = -1;
  struct stat opened_{};
  int64_t num_bytes_ = 0;
  char* data_ = nullptr;
  BusErrorSentence lost_pages_;
};

}  // namespace qlora_native::cpu
