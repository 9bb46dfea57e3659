// FileStore on systems other than Linux: private memory only.
#include <cstring>
#include <new>
#include <utility>

#include "cpu/files/file_store.h"

namespace qlora_native::cpu {

bool lies_in_memory(const std::string&) { return false; }

int64_t page_bytes() { return 16 << 10; }  // macOS's on arm64, and a multiple of the others'

FileStore::FileStore(int64_t num_bytes, std::string folder, bool in_file)
    : num_bytes_(rounded_up(num_bytes, page_bytes())), folder_(std::move(folder)) {
  if (in_file) {
    open_file();
  }
  if (num_bytes_ > 0) {
    const auto bytes = static_cast<size_t>(num_bytes_);
    data_ = static_cast<char*>(::operator new(bytes, std::align_val_t{kBlockBytes}));
    std::memset(data_, 0, bytes);
  }
}

FileStore::~FileStore() { ::operator delete(data_, std::align_val_t{kBlockBytes}); }

void FileStore::open_file() {
  throw PageFileError("The page file in " + folder_ +
                      " cannot be made: this system's build has private memory only, page files need Linux.");
}

void FileStore::to_file() { open_file(); }
bool FileStore::to_memory() { return true; }
void FileStore::fetch(const std::vector<ByteRange>&) {}
void FileStore::start_write(const std::vector<ByteRange>&) {}
void FileStore::release(const std::vector<ByteRange>&) {}
void FileStore::drop(const std::vector<ByteRange>&) {}
int64_t FileStore::resident_bytes(const ByteRange& range) const { return range.size(); }

}  // namespace qlora_native::cpu
