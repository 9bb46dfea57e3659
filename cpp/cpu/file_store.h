// Paged memory on a CPU: one arena that is private memory, as fast as any, until its bytes move into a file. Then the
// same addresses show the file, and its pages can be sent away and fetched again. Linux only.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "core/page_plan.h"

namespace qlora_native::cpu {

// The file has no name: it is made with O_TMPFILE, or unlinked as soon as it is open, so that nothing is left behind
// however the process ends. Its space is reserved when it is made.
//
// A function that throws, throws std::runtime_error with a sentence, and leaves the bytes where they were. Ranges are
// whole pages. fetch, start_write, release and evict do nothing to bytes that are in private memory.
class FileStore {
 public:
  // Zeroed memory; a file from the start if in_file. `folder` is not touched before there is to be a file.
  FileStore(int64_t num_bytes, std::string folder, bool in_file);
  ~FileStore();
  FileStore(const FileStore&) = delete;
  FileStore& operator=(const FileStore&) = delete;

  char* data() const { return data_; }  // [num_bytes()], at this address for as long as the store lives
  int64_t num_bytes() const { return num_bytes_; }
  bool in_file() const { return file_ >= 0; }

  // Moves all bytes into a file, piece by piece, never holding them twice. Throws if the folder is missing, not
  // writable, in memory itself (tmpfs), or without room for all of them.
  void to_file();
  // Moves all bytes back into private memory and gives the file up. Throws if there is no memory for them.
  void to_memory();

  void fetch(const std::vector<ByteRange>& ranges);        // returns when they are resident and may be written to
  void start_write(const std::vector<ByteRange>& ranges);  // begins to write them to the disk, and waits for nothing
  void release(const std::vector<ByteRange>& ranges);      // returns when they are on the disk and no longer resident
  void evict();                                            // releases everything

  int64_t resident_bytes() const;                          // as the system counts them, in memory or file
  int64_t bytes_in() const { return bytes_in_.load(); }    // fetched so far
  int64_t bytes_out() const { return bytes_out_.load(); }  // released so far

 private:
  int64_t num_bytes_;  // whole pages
  std::string folder_;
  char* data_ = nullptr;
  int file_ = -1;
  std::atomic<int64_t> bytes_in_{0};
  std::atomic<int64_t> bytes_out_{0};
};

int64_t page_bytes();  // of this machine

}  // namespace qlora_native::cpu
