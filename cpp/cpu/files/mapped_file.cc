#include "cpu/files/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <vector>

#include "cpu/files/file_store.h"

namespace qlora_native::cpu {

namespace {

constexpr int kPopulateRead = 22;          // include/uapi/asm-generic/mman-common.h of Linux 5.14
constexpr int64_t kReadAhead = 128 << 10;  // bytes: the kernel cuts longer requests off at a limit of its own
constexpr int64_t kPiece = 4 << 20;        // bytes that are mapped while the next ones are read

ByteRange whole_pages(const ByteRange& range, int64_t num_bytes) {
  const int64_t page = page_bytes();
  return {range.begin / page * page, std::min(rounded_up(range.end, page), rounded_up(num_bytes, page))};
}

}  // namespace

MappedFile::MappedFile(const std::string& path)
    : path_(path),
      lost_pages_{"qlora_native: " + path +
                      " can no longer be read: it was cut short, or its disk failed; the last checkpoint is intact.\n",
                  true} {
  const auto fail = [&](const std::string& what) {
    const std::string reason = std::strerror(errno);
    if (file_ >= 0) {
      close(file_);
    }
    throw MappedFileError(path + " cannot be " + what + ": " + reason + ".");
  };
  file_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // of a pipe, it would wait for a writer
  if (file_ < 0 || fstat(file_, &opened_) != 0) {
    fail("opened");
  }
  if (!S_ISREG(opened_.st_mode)) {
    close(file_);
    throw MappedFileError(path + " is a folder, a pipe or a device: expected a regular file.");
  }
  num_bytes_ = opened_.st_size;
  if (num_bytes_ == 0) {
    return;
  }
  // Without a reservation: the pages that are ever written to are few.
  void* const memory =
      mmap(nullptr, static_cast<size_t>(num_bytes_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file_, 0);
  if (memory == MAP_FAILED) {
    fail("mapped");
  }
  data_ = static_cast<char*>(memory);
  lost_pages_.begin = data_;
  lost_pages_.end = data_ + num_bytes_;
  if (!list(lost_pages_)) {
    munmap(data_, static_cast<size_t>(num_bytes_));
    errno = ENOMEM;
    fail("mapped");
  }
}

MappedFile::~MappedFile() {
  unlist(lost_pages_);
  if (data_ != nullptr) {
    munmap(data_, static_cast<size_t>(num_bytes_));
  }
  if (file_ >= 0) {
    close(file_);
  }
}

std::string MappedFile::change() const {
  struct stat now{};
  if (fstat(file_, &now) != 0) {
    return path_ + " can no longer be read: " + std::strerror(errno) + ".";
  }
  if (now.st_size != opened_.st_size) {
    return path_ + " has " + std::to_string(now.st_size) + " bytes and had " + std::to_string(opened_.st_size) +
           " when it was opened: it was changed under this run.";
  }
  if (now.st_mtim.tv_sec != opened_.st_mtim.tv_sec || now.st_mtim.tv_nsec != opened_.st_mtim.tv_nsec) {
    return path_ + " was written to since it was opened, under this run.";
  }
  return {};
}

bool MappedFile::fetch(const ByteRange& range) const {
  const ByteRange pages = whole_pages(range, num_bytes_);
  const auto read_ahead = [&](int64_t begin) {
    const int64_t end = std::min(begin + kPiece, pages.end);
    for (int64_t at = begin; at < end; at += kReadAhead) {
      readahead(file_, at, static_cast<size_t>(std::min(kReadAhead, end - at)));
    }
  };
  read_ahead(pages.begin);
  for (int64_t at = pages.begin; at < pages.end; at += kPiece) {
    read_ahead(at + kPiece);
    const int64_t size = std::min(kPiece, pages.end - at);
    // EINVAL: Linux before 5.14. There the pages are read and not mapped.
    if (madvise(data_ + at, static_cast<size_t>(size), kPopulateRead) != 0 && errno != EINVAL) {
      return false;
    }
  }
  return true;
}

// Bit 61 of a present page's entry: it is the file's. One that was written to is this process's own, or swapped (bit
// 62), and MADV_DONTNEED would forget it. Returns the end of the last of them in the range, 0 for none.
// The list of pages is opened at each call: a forked child that inherits it would read its parent's.
int64_t MappedFile::end_of_private_pages(const ByteRange& range) const {
  const int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  const int64_t page = page_bytes();
  std::array<uint64_t, 2048> entries{};
  int64_t end = 0;
  for (int64_t at = range.begin; at < range.end;) {
    const auto wanted = static_cast<size_t>(std::min<int64_t>((range.end - at) / page, entries.size()));
    const auto offset = static_cast<off_t>(reinterpret_cast<uintptr_t>(data_ + at) / static_cast<uintptr_t>(page) * 8);
    const ssize_t got = pread(pagemap, entries.data(), wanted * 8, offset);
    if (got <= 0) {
      end = range.end;  // unknown
      break;
    }
    for (size_t i = 0; i < static_cast<size_t>(got) / 8; ++i, at += page) {
      const bool is_present = (entries[i] >> 63 & 1) != 0;
      const bool is_swapped = (entries[i] >> 62 & 1) != 0;
      const bool is_of_file = (entries[i] >> 61 & 1) != 0;
      if (is_swapped || (is_present && !is_of_file)) {
        end = at + page;
      }
    }
  }
  if (pagemap >= 0) {
    close(pagemap);
  }
  return end;
}

void MappedFile::release(const ByteRange& range) const {
  const int64_t page = page_bytes();
  ByteRange pages{rounded_up(range.begin, page), range.end / page * page};
  if (pages.size() <= 0) {
    return;
  }
  pages.begin = std::max(pages.begin, end_of_private_pages(pages));  // written to seldom or never: no matter how many
  if (pages.size() > 0) {
    madvise(data_ + pages.begin, static_cast<size_t>(pages.size()), MADV_DONTNEED);
    posix_fadvise(file_, pages.begin, pages.size(), POSIX_FADV_DONTNEED);
  }
}

void MappedFile::read_around(const ByteRange& range, bool allowed) const {
  const ByteRange pages = whole_pages(range, num_bytes_);
  if (pages.size() > 0) {
    madvise(data_ + pages.begin, static_cast<size_t>(pages.size()), allowed ? MADV_NORMAL : MADV_RANDOM);
  }
}

int64_t MappedFile::resident_bytes(const ByteRange& range) const {
  const ByteRange pages = whole_pages(range, num_bytes_);
  const int64_t page = page_bytes();
  std::vector<unsigned char> flags(static_cast<size_t>(std::max<int64_t>(0, pages.size()) / page));
  if (flags.empty() || mincore(data_ + pages.begin, static_cast<size_t>(pages.size()), flags.data()) != 0) {
    return 0;
  }
  return page * std::count_if(flags.begin(), flags.end(), [](unsigned char flag) { return (flag & 1) != 0; });
}

}  // namespace qlora_native::cpu
