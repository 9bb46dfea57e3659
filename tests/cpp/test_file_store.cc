// cpu/files/file_store.h and cpu/files/paging.h: the bytes stay whatever moves, memory is given up, and nothing is left
// behind.
#include <dirent.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "caller_state.h"
#include "check.h"
#include "cpu/adamw_step.h"
#include "cpu/files/file_store.h"
#include "cpu/files/paging.h"
#include "cpu/files/side_thread.h"
#include "cpu/lion_step.h"
#include "oracle.h"

using namespace qlora_native;
using cpu::FileStore;

namespace {

// A folder of its own in the working directory, or on a disk, which has to be empty again in the end.
class Folder {
 public:
  Folder() { CHECK(mkdtemp(path_.data()) != nullptr, "no folder for the test"); }
  ~Folder() { CHECK(rmdir(path_.c_str()) == 0, "a file is left in %s", path_.c_str()); }
  const std::string& path() const { return path_; }

 private:
  std::string path_ = (cpu::lies_in_memory(".") ? "/var/tmp/page_test-" : "page_test-") + std::string(6, 'X');
};

int64_t entries(const char* folder) {
  int64_t count = 0;
  DIR* listing = opendir(folder);
  while (listing != nullptr && readdir(listing) != nullptr) {
    ++count;
  }
  closedir(listing);
  return count;
}

int64_t open_files() { return entries("/proc/self/fd"); }

std::vector<char> pattern(int64_t bytes) {
  oracle::Random random(3);
  std::vector<char> values(static_cast<size_t>(bytes));
  for (char& value : values) {
    value = static_cast<char>(random.byte());
  }
  return values;
}

constexpr int64_t kBytes = (40 << 20) + 12288;  // more than one piece, and no whole number of them

bool holds(const FileStore& store, const std::vector<char>& bytes) {
  return std::memcmp(store.data(), bytes.data(), bytes.size()) == 0;
}

TEST(file_store_keeps_its_bytes) {
  const Folder folder;
  const std::vector<char> bytes = pattern(kBytes);
  const int64_t files = open_files();
  {
    FileStore store(kBytes, folder.path(), false);
    CHECK(store.num_bytes() == kBytes && store.bytes_in_file() == 0, "a new store");
    CHECK(reinterpret_cast<uintptr_t>(store.data()) % static_cast<uintptr_t>(cpu::kBlockBytes) == 0, "alignment");
    CHECK(std::all_of(store.data(), store.data() + kBytes, [](char byte) { return byte == 0; }), "not zero");
    std::memcpy(store.data(), bytes.data(), bytes.size());
    const char* const place = store.data();
    for (int round = 0; round < 2; ++round) {
      CHECK(store.resident_bytes() == kBytes && open_files() == files, "in memory");
      store.to_file();
      CHECK(store.bytes_in_file() == kBytes && store.resident_bytes() == 0, "%ld bytes are resident in the file",
            static_cast<long>(store.resident_bytes()));
      CHECK(entries(folder.path().c_str()) == 2, "the file has a name");
      CHECK(holds(store, bytes) && store.data() == place, "in the file");
      store.evict();
      CHECK(store.resident_bytes() == 0 && holds(store, bytes), "evicted");
      CHECK(store.to_memory() && store.bytes_in_file() == 0 && holds(store, bytes), "back in memory");
    }
    store.to_file();
    CHECK(open_files() == files + 1, "%ld files", static_cast<long>(open_files() - files));
  }
  CHECK(open_files() == files, "the file stays open");
}

TEST(file_store_moves_what_is_asked) {
  const Folder folder;
  FileStore store(kBytes, folder.path(), true);
  CHECK(store.bytes_in_file() == kBytes && store.resident_bytes() == 0, "a new store in a file");
  const std::vector<ByteRange> some = {{4096, 12288}, {(2 << 20) - 4096, (6 << 20) + 4096}};
  constexpr int64_t kSome = 8192 + (4 << 20) + 8192;
  for (int round = 0; round < 3; ++round) {
    const int64_t in = store.bytes_in();
    const int64_t out = store.bytes_out();
    store.fetch(some);
    CHECK(store.resident_bytes() == kSome, "%ld bytes are resident", static_cast<long>(store.resident_bytes()));
    for (const ByteRange& range : some) {
      std::memset(store.data() + range.begin, round + 1, static_cast<size_t>(range.size()));
    }
    store.start_write(some);
    store.release(some);
    CHECK(store.resident_bytes() == 0, "%ld bytes stay", static_cast<long>(store.resident_bytes()));
    CHECK(store.bytes_in() - in == kSome && store.bytes_out() - out == kSome, "counted wrongly");
  }
  CHECK(store.data()[4095] == 0 && store.data()[4096] == 3 && store.data()[(6 << 20) + 4095] == 3, "bytes");
}

TEST(file_store_may_be_read_while_it_moves) {
  const Folder folder;
  const std::vector<char> bytes = pattern(kBytes);
  FileStore store(kBytes, folder.path(), false);
  std::memcpy(store.data(), bytes.data(), bytes.size());
  std::atomic<bool> ends{false};
  std::atomic<int64_t> wrong{0};
  std::thread reader([&] {
    for (size_t i = 0; !ends; i = (i + 4099) % bytes.size()) {
      wrong += store.data()[i] != bytes[i];
    }
  });
  for (int round = 0; round < 3; ++round) {
    store.to_file();
    store.evict();
    store.to_memory();
  }
  ends = true;
  reader.join();
  CHECK(wrong == 0, "%ld bytes were seen wrong", static_cast<long>(wrong));
}

std::string refusal(int64_t bytes, const std::string& folder) {
  try {
    const FileStore in_file(bytes, folder, true);
  } catch (const cpu::PageFileError& error) {
    return error.what();
  }
  return "none";
}

bool holds_words(const std::string& sentence, const char* words) { return sentence.find(words) != std::string::npos; }

TEST(file_store_refuses_in_words) {
  const Folder folder;
  const int64_t files = open_files();
  CHECK(holds_words(refusal(4096, "/gone"), "The page file in /gone cannot be made: No such file"), "missing folder");
  CHECK(!cpu::lies_in_memory("/dev/shm") ||
            holds_words(refusal(4096, "/dev/shm"), "would lie in memory, since /dev/shm is a tmpfs"),
        "tmpfs");
  CHECK(holds_words(refusal(int64_t{1} << 43, folder.path()), "takes 8796093022208 bytes, and "), "full disk");
  struct rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  const struct rlimit small = {1 << 20, before.rlim_max};
  std::signal(SIGXFSZ, SIG_IGN);
  setrlimit(RLIMIT_FSIZE, &small);
  CHECK(holds_words(refusal(2 << 20, folder.path()), "File too large"), "file size limit");
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, SIG_DFL);
  FileStore store(4096, "/gone", false);
  store.data()[0] = 5;
  bool refused = false;
  try {
    store.to_file();
  } catch (const cpu::PageFileError&) {
    refused = true;
  }
  CHECK(refused && store.bytes_in_file() == 0 && store.data()[0] == 5, "a refused move changed something");
  CHECK(open_files() == files, "a file stays open");
}

TEST(file_store_of_nothing) {
  FileStore store(0, "/gone", true);
  store.to_file();
  CHECK(store.to_memory() && store.resident_bytes() == 0, "an empty store");
}

// Two sets of tensors, one with its states in an arena.
struct Steps {
  explicit Steps(const std::vector<StateForm>& forms) {
    oracle::Random random(9);
    for (const StateForm& form : forms) {
      std::vector<float>& values = params.emplace_back();
      std::vector<float>& grad = grads.emplace_back();
      for (int64_t i = 0; i < form.numel; ++i) {
        values.push_back(random.uniform());
        grad.push_back(random.uniform());
      }
      steps.push_back(0.0f);
    }
  }

  std::vector<OptimTensor> at(const std::vector<StateForm>& forms, const PagePlan& plan, char* arena) {
    const auto place = [&](int64_t offset) { return offset == kNoPlace ? nullptr : arena + offset; };
    const auto floats = [&](int64_t offset) { return reinterpret_cast<float*>(place(offset)); };
    std::vector<OptimTensor> list;
    for (size_t t = 0; t < forms.size(); ++t) {
      const StatePlace& at = plan.places[t];
      list.push_back({params[t].data(), grads[t].data(), place(at.exp_avg), place(at.exp_avg_sq),
                      floats(at.exp_avg_absmax), floats(at.exp_avg_sq_absmax), &steps[t], forms[t].numel,
                      Dtype::kFloat32, 0});
    }
    return list;
  }

  std::vector<std::vector<float>> params, grads;
  std::vector<float> steps;
};

// Against the same kernels in one run over memory that malloc gave.
void check_steps(const std::vector<StateForm>& forms, int64_t chunk_bytes, int64_t block_bytes, int64_t budget) {
  const Folder folder;
  const PagePlan plan = plan_pages(forms, cpu::page_bytes(), chunk_bytes, block_bytes);
  const auto store = std::make_shared<FileStore>(plan.num_bytes, folder.path(), true);
  cpu::Pager pager;
  pager.add(store, plan);
  std::vector<int64_t> numbers;
  for (size_t t = 0; t < forms.size(); ++t) {
    numbers.push_back(static_cast<int64_t>(t));
  }
  Steps paged(forms);
  Steps plain(forms);
  std::vector<char> arena(static_cast<size_t>(plan.num_bytes) + 64);
  char* const aligned = arena.data() + (-reinterpret_cast<intptr_t>(arena.data()) & 63);
  std::vector<OptimTensor> paged_list = paged.at(forms, plan, store->data());
  const std::vector<OptimTensor> plain_list = plain.at(forms, plan, aligned);
  const AdamwOptions adamw = {1e-2, 0.9, 0.99, 1e-8, 0.1, true};
  const LionOptions lion = {1e-2, 0.9, 0.99, 0.1};
  const auto count = static_cast<int64_t>(forms.size());
  int64_t most = 0;
  std::atomic<bool> ends{false};
  std::thread watcher([&] {  // what may be asked from any thread
    while (!ends) {
      CHECK(pager.stalls() >= 0 && pager.stall_seconds() >= 0.0 && store->bytes_in_file() == plan.num_bytes &&
                store->resident_bytes() <= plan.num_bytes && store->bytes_in() >= 0 && store->bytes_out() >= 0,
            "statistics");
      std::this_thread::yield();
    }
  });
  for (int step = 0; step < 5; ++step) {
    const Threads threads(1 + step % 2);
    const cpu::UpdateOrder order = [&](const cpu::UpdateParts& update) {
      pager.step(paged_list.data(), numbers.data(), count, budget,
                 [&](const StatePart* parts, int64_t num_parts, int64_t grain) {
                   most = std::max(most, store->resident_bytes());
                   update(parts, num_parts, grain);
                 });
    };
    if (step == 3) {  // somebody reads all states, and what the system reads ahead of it is in memory
      CHECK(std::count(store->data(), store->data() + plan.num_bytes, '\1') >= 0, "reading");
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
    const int64_t in = store->bytes_in();
    const int64_t out = store->bytes_out();
    if (forms[0].moments == 2) {
      cpu::adamw_step(paged_list.data(), count, &adamw, 0.5, order);
      cpu::adamw_step(plain_list.data(), count, &adamw, 0.5);
    } else {
      cpu::lion_step(paged_list.data(), count, &lion, 0.5, order);
      cpu::lion_step(plain_list.data(), count, &lion, 0.5);
    }
    CHECK(store->bytes_in() - in <= plan.num_bytes && store->bytes_out() - out <= plan.num_bytes, "moved twice");
    CHECK(budget < plan.num_bytes || step == 0 || store->bytes_in() == in, "moved for nothing");
    CHECK(budget >= plan.num_bytes || store->bytes_out() > out, "nothing moved");
  }
  ends = true;
  watcher.join();
  CHECK(most <= budget + budget / 10 && store->resident_bytes() <= budget, "%ld bytes, budget %ld",
        static_cast<long>(most), static_cast<long>(budget));
  CHECK(paged.params == plain.params && paged.steps == plain.steps, "parameters, budget %ld",
        static_cast<long>(budget));
  CHECK(std::memcmp(store->data(), aligned, static_cast<size_t>(plan.num_bytes)) == 0, "states, budget %ld",
        static_cast<long>(budget));
}

TEST(paged_steps_give_the_same_bytes) {
  for (const int moments : {1, 2}) {
    for (const bool coded : {false, true}) {
      std::vector<StateForm> forms;
      for (const int64_t numel : {5, 300000, 0, 4096, 1000000, 70, 600000}) {
        forms.push_back({numel, moments, coded && numel >= 4096});
      }
      const int64_t all = plan_pages(forms, cpu::page_bytes(), 1 << 16).num_bytes;
      for (const int64_t budget : {int64_t{1} << 20, all / 2 + (1 << 20), all - 4096, all}) {
        check_steps(forms, 1 << 16, cpu::page_bytes(), budget);
      }
    }
  }
  check_steps({{3000000, 2, false}, {1000, 2, false}}, 4 << 20, cpu::kBlockBytes, 14 << 20);
  check_steps({{9000000, 2, true}}, 8 << 20, cpu::kBlockBytes, 14 << 20);
}

TEST(a_side_thread_takes_no_signals_but_its_own) {
  sigset_t blocked;
  {
    const cpu::SideThread thread([&] { pthread_sigmask(SIG_BLOCK, nullptr, &blocked); });
  }
  CHECK(sigismember(&blocked, SIGINT) == 1, "Ctrl-C can reach it");
  CHECK(sigismember(&blocked, SIGBUS) == 0 && sigismember(&blocked, SIGSEGV) == 0, "its faults reach no handler");
}

TEST(paged_step_tells_that_the_disk_failed) {
  const Folder folder;
  const std::vector<StateForm> forms = {{1000000, 2, false}};
  const PagePlan plan = plan_pages(forms, cpu::page_bytes(), 1 << 18);
  const auto store = std::make_shared<FileStore>(plan.num_bytes, folder.path(), true);
  cpu::Pager pager;
  pager.add(store, plan);
  Steps steps(forms);
  const std::vector<OptimTensor> list = steps.at(forms, plan, store->data());
  const int64_t number = 0;
  int calls = 0;
  bool failed = false;
  try {
    pager.step(list.data(), &number, 1, 1 << 20, [&](const StatePart*, int64_t, int64_t) {
      if (++calls == 3) {
        throw cpu::PageFileError("as if");
      }
    });
  } catch (const cpu::PageFileError&) {
    failed = true;
  }
  CHECK(failed && calls == 3, "%d calls", calls);
}

}  // namespace
