// Paged memory on a CPU: one arena that is private memory, as fast as any, until its bytes move into a file. Then the
// same addresses show the file, and its pages can be sent away and fetched again. Files are for Linux (file_store.cc);
// elsewhere there is private memory only (file_store_memory.cc), and who asks for a file gets PageFileError.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/page_plan.h"
#include "cpu/files/bus_error.h"

namespace qlora_native::cpu {

// The page file cannot be had, written or read; a sentence.
class PageFileError : public std::runtime_error {
  using runtime_error::runtime_error;
};

// The file has no name: it is made with O_TMPFILE, or unlinked as soon as it is open, so that nothing is left behind
// however the process ends. Its space is reserved when it is made: a full disk is an error then. On a copy-on-write
// file system (btrfs, ZFS), where every write takes new space, that is no promise: fetch() finds out, and where nobody
// fetched (or before Linux 5.14) the process ends by SIGBUS, after a sentence.
//
// Ranges are whole pages. What lies in private memory is resident: there is nothing to fetch or release. One thread at
// a time may call what is not const; others may call what is, and read the bytes.
class FileStore {
 public:
  // Zeroed bytes, in a file from the start if in_file. No file is made in `folder` before one is needed.
  FileStore(int64_t num_bytes, std::string folder, bool in_file);
  ~FileStore();
  FileStore(const FileStore&) = delete;
  FileStore& operator=(const FileStore&) = delete;

  char* data() const { return data_; }  // [num_bytes()], at this address for as long as the store lives
  int64_t num_bytes() const { return num_bytes_; }
  int64_t bytes_in_file() const { return in_file_.load(); }

  // Moves all bytes into a file, piece by piece, so that they are never held twice; none of them stays resident.
  // PageFileError if the folder is missing, not writable, in memory itself (tmpfs), or without room for all of them.
  void to_file();
  // Moves all bytes back into private memory and gives the file up. False if there is not the memory; the bytes that
  // were not moved stay in the file.
  bool to_memory();

  void fetch(const std::vector<ByteRange>& ranges);        // returns when they are resident and may be written to
  void start_write(const std::vector<ByteRange>& ranges);  // begins to write them to the disk, and waits for nothing
  void release(const std::vector<ByteRange>& ranges);      // returns when they are on the disk and no longer resident
  void drop(const std::vector<ByteRange>& ranges);         // the same, not counted: for what somebody else has touched
  void evict() { release({{0, num_bytes_}}); }

  // Bytes that are resident, as the system counts them, in memory or file.
  int64_t resident_bytes() const { return resident_bytes({0, num_bytes_}); }
  int64_t bytes_in() const { return bytes_in_.load(); }    // so far: came from the file into memory
  int64_t bytes_out() const { return bytes_out_.load(); }  // so far: left memory for the file

 private:
  ByteRange clipped(const ByteRange& range) const;  // to what is in the file
  int64_t resident_bytes(const ByteRange& range) const;
  void open_file();

  const int64_t num_bytes_;  // whole pages
  const std::string folder_;
  BusErrorSentence lost_pages_;
  char* data_ = nullptr;
  int file_ = -1;
  // The bytes before it are in the file, the others in private memory. Between, if a move had to stop halfway.
  std::atomic<int64_t> in_file_{0};
  std::atomic<int64_t> bytes_in_{0};
  std::atomic<int64_t> bytes_out_{0};
};

int64_t page_bytes();  // of this machine

// Blocks of which one page may be made: chunks that begin with a block move several times as fast.
inline constexpr int64_t kBlockBytes = 2 << 20;

bool lies_in_memory(const std::string& folder);  // tmpfs or ramfs

}  // namespace qlora_native::cpu
