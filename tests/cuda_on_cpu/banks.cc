#include "cuda_on_cpu/banks.h"

#include <algorithm>
#include <array>
#include <map>
#include <utility>

#include "cuda_on_cpu/block.h"
#include "cuda_on_cpu/report.h"
#include "cuda_on_cpu/shared_memory.h"

namespace cuemu {
namespace {

constexpr size_t kBanks = 32;
constexpr size_t kWord = 4;

struct WarpAccess {
  std::array<size_t, kLanes> offsets;  // in the arena
  uint32_t lanes;
  size_t num_bytes;
};

// An instruction as one warp has executed it.
struct Executed {
  Where where;
  std::array<uint32_t, kLanes> times;
  std::vector<WarpAccess> accesses;
};

std::map<std::pair<uint64_t, int>, Executed> executed;  // by instruction and warp
std::map<uint64_t, std::pair<Where, BankCount>> counts;

// What a thread accessed last.
struct Last {
  Executed* instruction;
  uint32_t time;
  size_t begin, end;
};

std::array<Last, kMostThreads> lasts{};

// The members of a vector that the host's compiler reads or writes one by one: neighbors in memory and in the code.
bool is_rest_of(const Last& last, size_t offset, size_t num_bytes, Where where) {
  constexpr uintptr_t kNear = 128;  // bytes of code
  const size_t whole = offset + num_bytes - last.begin;
  const uintptr_t begun = last.instruction->where.address();
  return where.is_instruction() && last.instruction->where.is_instruction() && offset == last.end &&
         last.begin % 16 + whole <= 16 && last.begin % (whole > 8 ? 16 : 8) == 0 && where.address() > begun &&
         where.address() - begun < kNear;
}

uint64_t passes_of(const WarpAccess& access, int begin, int end) {
  std::array<std::vector<size_t>, kBanks> words;
  for (int lane = begin; lane < end; ++lane) {
    if ((access.lanes >> lane & 1) != 0) {
      const size_t offset = access.offsets[static_cast<size_t>(lane)];
      for (size_t word = offset / kWord; word <= (offset + access.num_bytes - 1) / kWord; ++word) {
        std::vector<size_t>& met = words[word % kBanks];
        if (std::find(met.begin(), met.end(), word) == met.end()) {
          met.push_back(word);
        }
      }
    }
  }
  size_t most = 0;
  for (const std::vector<size_t>& met : words) {
    most = std::max(most, met.size());
  }
  return most;
}

void add(const WarpAccess& access, BankCount& count) {
  const int lanes = access.num_bytes <= 4 ? 32 : access.num_bytes <= 8 ? 16 : 8;
  ++count.accesses;
  for (int begin = 0; begin < kLanes; begin += lanes) {
    const uint64_t passes = passes_of(access, begin, begin + lanes);
    count.passes += passes;
    count.least += passes > 0 ? 1 : 0;
  }
}

}  // namespace

void note_bank_now(const void* address, size_t num_bytes, Where where) {
  if (self == nullptr) {
    return;
  }
  const size_t offset = arena_offset(address);
  Last& last = lasts[static_cast<size_t>(self->linear)];
  if (last.instruction != nullptr && is_rest_of(last, offset, num_bytes, where)) {
    WarpAccess& access = last.instruction->accesses[last.time];
    last.end = offset + num_bytes;
    access.num_bytes = std::max(access.num_bytes, last.end - last.begin);
    return;
  }
  Executed& instruction = executed.try_emplace({where.word(), self->warp}, Executed{where, {}, {}}).first->second;
  const uint32_t time = instruction.times[static_cast<size_t>(self->lane)]++;
  if (time == instruction.accesses.size()) {
    instruction.accesses.push_back({{}, 0, num_bytes});
  }
  WarpAccess& access = instruction.accesses[time];
  access.offsets[static_cast<size_t>(self->lane)] = offset;
  access.lanes |= 1u << self->lane;
  last = {&instruction, time, offset, offset + num_bytes};
}

void count_banks() {
  for (const auto& [key, instruction] : executed) {
    BankCount& count = counts.try_emplace(key.first, instruction.where, BankCount{}).first->second.second;
    for (const WarpAccess& access : instruction.accesses) {
      add(access, count);
    }
  }
  executed.clear();
  lasts.fill({});
}

std::vector<BankCount> take_bank_counts() {
  std::vector<BankCount> all;
  for (auto& [word, count] : counts) {
    all.push_back(count.second);
    all.back().where = words(count.first);
  }
  counts.clear();
  std::sort(all.begin(), all.end(),
            [](const BankCount& a, const BankCount& b) { return a.passes - a.least > b.passes - b.least; });
  return all;
}

}  // namespace cuemu
