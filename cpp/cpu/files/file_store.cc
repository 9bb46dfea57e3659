#include "cpu/files/file_store.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/statvfs.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <list>
#include <new>
#include <utility>

#include "cpu/files/side_thread.h"

namespace qlora_native::cpu {

namespace {

constexpr int64_t kPiece = 32 << 20;       // bytes that change between memory and file at once
constexpr int64_t kReadAhead = 128 << 10;  // bytes: the kernel cuts longer requests off at a limit of its own

constexpr size_t kTouchers = 4;  // threads that wait for large pages at once

// include/uapi/asm-generic/mman-common.h of Linux 5.14; older C libraries do not know it.
constexpr int kPopulateWrite = 23;

std::string in_words(int error) { return std::strerror(error); }

[[noreturn]] void fail(const std::string& folder, const std::string& what, int error) {
  throw PageFileError("The page file in " + folder + " cannot be " + what + ": " + in_words(error) + ".");
}

// A file without a name in `folder`.
int open_nameless(const std::string& folder) {
  const int file = open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (file >= 0 || (errno != EOPNOTSUPP && errno != EISDIR)) {
    return file;
  }
  std::string path = folder + "/qlora_native-" + std::string(6, 'X');
  const int named = mkostemp(path.data(), O_CLOEXEC);
  if (named >= 0) {
    unlink(path.c_str());
  }
  return named;
}

void write_all(int file, const char* bytes, int64_t count, int64_t offset, const std::string& folder) {
  while (count > 0) {
    const ssize_t written = pwrite(file, bytes, static_cast<size_t>(count), offset);
    if (written < 0 && errno == EINTR) {
      continue;
    }
    if (written <= 0) {
      fail(folder, "written", written < 0 ? errno : EIO);
    }
    bytes += written;
    count -= written;
    offset += written;
  }
}

// Bytes of a file onto the disk, or on their way there. Some file systems offer the whole file only.
int write_back(int file, const ByteRange& range, unsigned flags) {
  if (sync_file_range(file, range.begin, range.size(), flags) == 0) {
    return 0;
  }
  if (errno != EINVAL && errno != ENOSYS && errno != ESPIPE) {
    return -1;
  }
  return flags == SYNC_FILE_RANGE_WRITE ? 0 : fdatasync(file);
}

constexpr int kReadWrite = PROT_READ | PROT_WRITE;

// Addresses that begin with a block, as the file does.
void* reserve_aligned(int64_t bytes) {
  const int64_t more = bytes + kBlockBytes;
  void* const memory = mmap(nullptr, static_cast<size_t>(more), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    return memory;
  }
  char* const begin = static_cast<char*>(memory);
  const auto before = static_cast<size_t>(-reinterpret_cast<intptr_t>(begin) & (kBlockBytes - 1));
  if (before > 0) {
    munmap(begin, before);
  }
  munmap(begin + before + bytes, static_cast<size_t>(kBlockBytes) - before);
  return begin + before;
}

// At `place`, or anywhere.
void* private_memory(int64_t bytes, void* place = nullptr) {
  const int fixed = place == nullptr ? 0 : MAP_FIXED;
  void* const memory = mmap(place, static_cast<size_t>(bytes), kReadWrite, MAP_PRIVATE | MAP_ANONYMOUS | fixed, -1, 0);
  if (memory != MAP_FAILED) {
    madvise(memory, static_cast<size_t>(bytes), MADV_HUGEPAGE);  // where they are not to be had, small ones serve
  }
  return memory;
}

}  // namespace

bool lies_in_memory(const std::string& folder) {
  struct statfs system{};
  return statfs(folder.c_str(), &system) == 0 && (system.f_type == TMPFS_MAGIC || system.f_type == RAMFS_MAGIC);
}

int64_t page_bytes() {
  static const int64_t bytes = sysconf(_SC_PAGESIZE);
  return bytes;
}

FileStore::FileStore(int64_t num_bytes, std::string folder, bool in_file)
    : num_bytes_(rounded_up(num_bytes, page_bytes())),
      folder_(std::move(folder)),
      lost_pages_{"qlora_native: the page file in " + folder_ +
                  " cannot be read or written: its disk fails or is full.\n"} {
  if (num_bytes_ == 0) {
    return;
  }
  if (in_file) {
    open_file();
  }
  const auto bytes = static_cast<size_t>(num_bytes_);
  void* const place = reserve_aligned(num_bytes_);
  void* const memory = place == MAP_FAILED ? place
                       : in_file           ? mmap(place, bytes, kReadWrite, MAP_SHARED | MAP_FIXED, file_, 0)
                                           : private_memory(num_bytes_, place);
  if (memory == MAP_FAILED) {
    if (place != MAP_FAILED) {
      munmap(place, bytes);
    }
    if (file_ >= 0) {
      close(file_);
    }
    throw std::bad_alloc();
  }
  data_ = static_cast<char*>(memory);
  lost_pages_.begin = data_;
  lost_pages_.end = data_ + num_bytes_;
  in_file_ = in_file ? num_bytes_ : 0;
  if (in_file && !list(lost_pages_)) {
    munmap(data_, bytes);
    close(file_);
    throw std::bad_alloc();
  }
}

FileStore::~FileStore() {
  unlist(lost_pages_);
  if (data_ != nullptr) {
    munmap(data_, static_cast<size_t>(num_bytes_));
  }
  if (file_ >= 0) {
    close(file_);
  }
}

void FileStore::open_file() {
  if (lies_in_memory(folder_)) {
    throw PageFileError("The page file would lie in memory, since " + folder_ +
                        " is a tmpfs: name a folder on a disk as page_dir.");
  }
  const int file = open_nameless(folder_);
  if (file < 0) {
    fail(folder_, "made", errno);
  }
  // Some file systems would fill the disk before they say that it is too small.
  struct statvfs system{};
  const bool known = fstatvfs(file, &system) == 0;
  const auto room = static_cast<int64_t>(system.f_bavail * system.f_frsize);
  const int error = known && room < num_bytes_ ? ENOSPC : posix_fallocate(file, 0, num_bytes_);
  if (error != 0) {
    close(file);
    throw PageFileError("The page file in " + folder_ + " takes " + std::to_string(num_bytes_) + " bytes, and " +
                        std::to_string(room) + " are free there (" + in_words(error) +
                        "): make room, or name another folder as page_dir.");
  }
  file_ = file;
}

void FileStore::to_file() {
  if (in_file_ < num_bytes_ && file_ < 0) {
    open_file();
    if (!list(lost_pages_)) {
      close(file_);
      file_ = -1;
      throw std::bad_alloc();
    }
  }
  ByteRange before{0, 0};
  while (in_file_ < num_bytes_) {
    const ByteRange piece{in_file_, std::min(num_bytes_, in_file_ + kPiece)};
    char* const bytes = data_ + piece.begin;
    write_all(file_, bytes, piece.size(), piece.begin, folder_);
    if (mmap(bytes, static_cast<size_t>(piece.size()), kReadWrite, MAP_SHARED | MAP_FIXED, file_, piece.begin) ==
        MAP_FAILED) {
      fail(folder_, "mapped", errno);
    }
    in_file_ = piece.end;
    start_write({piece});
    release({before});  // one piece later, so that it is written while the next one is copied
    before = piece;
  }
  release({before});
}

bool FileStore::to_memory() {
  while (in_file_ > 0) {
    const ByteRange piece{(in_file_ - 1) / kPiece * kPiece, in_file_};
    const auto bytes = static_cast<size_t>(piece.size());
    void* memory = private_memory(piece.size());
    if (memory == MAP_FAILED) {
      return false;
    }
    fetch({piece});
    std::memcpy(memory, data_ + piece.begin, bytes);
    if (mremap(memory, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, data_ + piece.begin) == MAP_FAILED) {
      munmap(memory, bytes);
      return false;
    }
    in_file_ = piece.begin;
  }
  if (file_ >= 0) {
    unlist(lost_pages_);
    close(file_);
    file_ = -1;
  }
  return true;
}

ByteRange FileStore::clipped(const ByteRange& range) const {
  const int64_t end = in_file_;
  return {std::min(range.begin, end), std::min(range.end, end)};
}

// Small pages are read ahead. Of large ones no more is read than is touched, so several threads touch one each.
void FileStore::fetch(const std::vector<ByteRange>& ranges) {
  std::vector<ByteRange> touched;
  for (const ByteRange& whole : ranges) {
    const ByteRange range = clipped(whole);
    if (range.size() == 0) {
      continue;
    }
    bytes_in_ += range.size() - resident_bytes(range);
    ByteRange blocks{rounded_up(range.begin, kBlockBytes), range.end / kBlockBytes * kBlockBytes};
    if (blocks.size() <= 0 || madvise(data_ + blocks.begin, static_cast<size_t>(blocks.size()), MADV_HUGEPAGE) != 0) {
      blocks = {range.end, range.end};
    } else {
      madvise(data_ + blocks.begin, static_cast<size_t>(blocks.size()), MADV_RANDOM);
    }
    for (int64_t at = blocks.begin; at < blocks.end; at += kBlockBytes) {
      touched.push_back({at, at + kBlockBytes});
    }
    for (const ByteRange& edge : {ByteRange{range.begin, blocks.begin}, ByteRange{blocks.end, range.end}}) {
      for (int64_t at = edge.begin; at < edge.end; at += kReadAhead) {
        readahead(file_, at, static_cast<size_t>(std::min(kReadAhead, edge.end - at)));
      }
      if (edge.size() > 0) {
        touched.push_back(edge);
      }
    }
  }
  std::atomic<size_t> next{0};
  std::atomic<int> failed{0};
  const auto touch = [&] {
    for (size_t i = next++; i < touched.size(); i = next++) {
      // EINVAL: Linux before 5.14. There whoever writes first takes the faults.
      if (madvise(data_ + touched[i].begin, static_cast<size_t>(touched[i].size()), kPopulateWrite) != 0 &&
          errno != EINVAL) {
        failed = errno;
      }
    }
  };
  {
    std::list<SideThread> helpers;
    for (size_t i = 1; i < std::min(touched.size(), kTouchers); ++i) {
      helpers.emplace_back(touch);
    }
    touch();
  }
  if (const int error = failed; error != 0) {
    fail(folder_, "read or written", error == EFAULT ? EIO : error);
  }
}

void FileStore::start_write(const std::vector<ByteRange>& ranges) {
  for (const ByteRange& whole : ranges) {
    const ByteRange range = clipped(whole);
    if (range.size() > 0 && write_back(file_, range, SYNC_FILE_RANGE_WRITE) != 0) {
      fail(folder_, "written", errno);
    }
  }
}

void FileStore::release(const std::vector<ByteRange>& ranges) {
  for (const ByteRange& range : ranges) {
    bytes_out_ += resident_bytes(clipped(range));
  }
  drop(ranges);
}

void FileStore::drop(const std::vector<ByteRange>& ranges) {
  constexpr unsigned kThrough = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;
  for (const ByteRange& whole : ranges) {
    const ByteRange range = clipped(whole);
    if (range.size() == 0) {
      continue;
    }
    if (write_back(file_, range, kThrough) != 0) {
      fail(folder_, "written", errno);
    }
    // What is written to in between stays dirty, and therefore resident; nothing is lost. A page that the system holds
    // for a moment is let go at the next try.
    int attempt = 0;
    do {
      madvise(data_ + range.begin, static_cast<size_t>(range.size()), MADV_DONTNEED);
      posix_fadvise(file_, range.begin, range.size(), POSIX_FADV_DONTNEED);
    } while (++attempt < 3 && resident_bytes(range) > 0);
  }
}

int64_t FileStore::resident_bytes(const ByteRange& range) const {
  const int64_t page = page_bytes();
  std::vector<unsigned char> flags(static_cast<size_t>(range.size() / page));
  if (flags.empty() || mincore(data_ + range.begin, static_cast<size_t>(range.size()), flags.data()) != 0) {
    return 0;
  }
  return page * std::count_if(flags.begin(), flags.end(), [](unsigned char flag) { return (flag & 1) != 0; });
}

}  // namespace qlora_native::cpu
