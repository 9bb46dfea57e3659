// Where the states of an optimizer lie in one arena, how the arena is cut into chunks that move as a whole, and in what
// order a step brings them in, updates them and sends them away. Sizes alone decide; both page stores, of the CPU and
// of CUDA, follow it.
//
// A chunk is a run of parts, a part a range of the elements of one tensor. No page belongs to two chunks, so that a
// step moves a page at most once each way. A part begins at a multiple of kNormChunk elements, so that neither a block
// of an 8-bit state nor a chunk of a CUDA kernel is ever cut.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/layout.h"
#include "core/optim.h"
#include "core/state_code.h"

namespace qlora_native {

// The form of one tensor's states: `moments` arrays of numel floats, or of numel codes with an absmax a block.
struct StateForm {
  int64_t numel;
  int moments;  // 1 or 2
  bool coded;
};

inline constexpr int64_t kNoPlace = -1;
inline constexpr int64_t kPlaceAlignment = 64;  // bytes

// Offsets in bytes from the start of the arena; kNoPlace for what the form does not have.
struct StatePlace {
  int64_t exp_avg = kNoPlace;            // [numel] float, or int8_t codes
  int64_t exp_avg_sq = kNoPlace;         // [numel] float, or uint8_t codes
  int64_t exp_avg_absmax = kNoPlace;     // [ceil(numel / kStateBlock)] float
  int64_t exp_avg_sq_absmax = kNoPlace;  // [ceil(numel / kStateBlock)] float
};

struct StatePart {
  int64_t tensor;
  int64_t begin;  // elements
  int64_t end;
};

struct ByteRange {
  int64_t begin;
  int64_t end;

  int64_t size() const { return end - begin; }
};

struct PageChunk {
  int64_t first_part;             // of PagePlan::parts
  int64_t last_part;              // exclusive
  std::vector<ByteRange> ranges;  // whole pages, in order, apart from each other
  int64_t num_bytes;              // of the ranges
};

struct PagePlan {
  int64_t page_bytes = 0;
  int64_t num_bytes = 0;           // of the arena, whole pages; those of no chunk are gaps
  std::vector<StatePlace> places;  // of each tensor
  std::vector<StatePart> parts;    // in the order of the tensors and of their elements
  std::vector<PageChunk> chunks;   // in the order of the parts; together all parts
};

namespace detail {

// One of the arrays of a tensor's states: `bytes` for every `elements` elements of the parameter.
struct StateArray {
  int64_t StatePlace::* place;
  int64_t bytes;
  int64_t elements;

  int64_t bytes_of(int64_t numel) const { return bytes * ceil_div(numel, elements); }
};

inline std::vector<StateArray> arrays_of(const StateForm& form) {
  const int64_t bytes = form.coded ? 1 : 4;
  std::vector<StateArray> arrays = {{&StatePlace::exp_avg, bytes, 1}};
  if (form.moments == 2) {
    arrays.push_back({&StatePlace::exp_avg_sq, bytes, 1});
  }
  if (form.coded) {
    arrays.push_back({&StatePlace::exp_avg_absmax, 4, kStateBlock});
    if (form.moments == 2) {
      arrays.push_back({&StatePlace::exp_avg_sq_absmax, 4, kStateBlock});
    }
  }
  return arrays;
}

// Elements between two places where a tensor may be cut: whole pages of each of its arrays, whole blocks of the large
// ones.
inline int64_t cut_unit(const StateForm& form, int64_t page_bytes, int64_t block_bytes) {
  return std::max({kNormChunk, block_bytes / (form.coded ? 1 : 4), form.coded ? page_bytes / 4 * kStateBlock : 0});
}

class PagePlanner {
 public:
  PagePlanner(int64_t page_bytes, int64_t chunk_bytes, int64_t block_bytes)
      : chunk_bytes_(chunk_bytes), block_bytes_(block_bytes) {
    plan_.page_bytes = page_bytes;
  }

  void add(const StateForm& form) {
    const std::vector<StateArray> arrays = arrays_of(form);
    int64_t bytes = 0;
    for (const StateArray& array : arrays) {
      bytes += rounded_up(array.bytes_of(form.numel), kPlaceAlignment);
    }
    if (bytes <= chunk_bytes_) {
      add_whole(form, arrays, bytes);
    } else {
      add_cut(form, arrays);
    }
  }

  PagePlan finish() {
    close();
    plan_.num_bytes = end_;
    return std::move(plan_);
  }

 private:
  // Beside others in one chunk.
  void add_whole(const StateForm& form, const std::vector<StateArray>& arrays, int64_t bytes) {
    if (end_ + bytes - start_ > chunk_bytes_) {
      close();
    }
    if (start_ == end_) {
      start_ = end_ = rounded_up(end_, block_bytes_);
    }
    StatePlace& place = plan_.places.emplace_back();
    for (const StateArray& array : arrays) {
      place.*array.place = end_;
      end_ += rounded_up(array.bytes_of(form.numel), kPlaceAlignment);
    }
    if (form.numel > 0) {
      plan_.parts.push_back({tensor(), 0, form.numel});
    }
  }

  // Each array from a page or a block on, in chunks of about the same size.
  void add_cut(const StateForm& form, const std::vector<StateArray>& arrays) {
    close();
    StatePlace& place = plan_.places.emplace_back();
    const int64_t unit = cut_unit(form, plan_.page_bytes, block_bytes_);
    int64_t unit_bytes = 0;
    for (const StateArray& array : arrays) {
      end_ = rounded_up(end_, array.elements == 1 ? block_bytes_ : plan_.page_bytes);
      place.*array.place = end_;
      end_ += rounded_up(array.bytes_of(form.numel), plan_.page_bytes);
      unit_bytes += array.bytes_of(unit);
    }
    const int64_t units = ceil_div(form.numel, unit);
    const int64_t count = ceil_div(units, std::max<int64_t>(1, chunk_bytes_ / unit_bytes));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t begin = units * i / count * unit;
      const int64_t end = std::min(form.numel, units * (i + 1) / count * unit);
      std::vector<ByteRange> ranges;
      for (const StateArray& array : arrays) {
        const int64_t start = place.*array.place;
        append(ranges, {start + array.bytes_of(begin), start + rounded_up(array.bytes_of(end), plan_.page_bytes)});
      }
      plan_.parts.push_back({tensor(), begin, end});
      push_chunk(std::move(ranges));
    }
    start_ = end_;
  }

  // Ends the chunk of whole tensors, and its last page.
  void close() {
    end_ = rounded_up(end_, plan_.page_bytes);
    if (end_ > start_) {
      push_chunk({{start_, end_}});
      start_ = end_;
    }
  }

  void push_chunk(std::vector<ByteRange> ranges) {
    int64_t bytes = 0;
    for (const ByteRange& range : ranges) {
      bytes += range.size();
    }
    const int64_t first = plan_.chunks.empty() ? 0 : plan_.chunks.back().last_part;
    plan_.chunks.push_back({first, static_cast<int64_t>(plan_.parts.size()), std::move(ranges), bytes});
  }

  static void append(std::vector<ByteRange>& ranges, ByteRange range) {
    if (!ranges.empty() && ranges.back().end == range.begin) {
      ranges.back().end = range.end;
    } else {
      ranges.push_back(range);
    }
  }

  int64_t tensor() const { return static_cast<int64_t>(plan_.places.size()) - 1; }

  PagePlan plan_;
  int64_t chunk_bytes_;
  int64_t block_bytes_;
  int64_t start_ = 0;  // of the chunk of whole tensors that is being filled
  int64_t end_ = 0;    // of what has a place
};

}  // namespace detail

// Plans the arena of tensors of these forms, in this order. Chunks hold at most chunk_bytes, or what least a tensor can
// be cut into, if that is more. Where they begin in an array, absmaxes aside, they begin with a block of block_bytes:
// larger pages, if the machine has such. Both sizes are powers of two; page_bytes is at least 64, block_bytes at least
// page_bytes.
inline PagePlan plan_pages(const std::vector<StateForm>& forms, int64_t page_bytes, int64_t chunk_bytes,
                           int64_t block_bytes) {
  const auto fits = [](int64_t value, int64_t least) { return value >= least && (value & (value - 1)) == 0; };
  if (!fits(page_bytes, kPlaceAlignment) || !fits(block_bytes, page_bytes)) {
    throw std::invalid_argument("page_bytes is " + std::to_string(page_bytes) + ", block_bytes " +
                                std::to_string(block_bytes) + ": expected powers of two, the first at least " +
                                std::to_string(kPlaceAlignment) + ", the second at least the first.");
  }
  detail::PagePlanner planner(page_bytes, std::max(page_bytes, chunk_bytes / page_bytes * page_bytes), block_bytes);
  for (const StateForm& form : forms) {
    planner.add(form);
  }
  return planner.finish();
}

inline PagePlan plan_pages(const std::vector<StateForm>& forms, int64_t page_bytes, int64_t chunk_bytes) {
  return plan_pages(forms, page_bytes, chunk_bytes, page_bytes);
}

enum class PageAction : int { kFetch, kUpdate, kRelease };

struct PageMove {
  PageAction action;
  int64_t chunk;
};

// The order of one step. Who moves pages does the fetches and releases one after the other; who updates waits for the
// fetch of a chunk, and its release waits for the update. Then the bytes that are resident stay within the budget
// however fast either is.
struct PageWalk {
  int64_t num_pinned = 0;       // chunks before it stay resident for ever
  std::vector<PageMove> moves;  // of a chunk: at most one fetch, one update and one release, in this order
};

// Plans a step over chunks of these sizes in bytes. `wanted` marks those that have something to update, `resident`
// which are there already; what is there beyond the budget goes first. `look_ahead` chunks, at least 1, are fetched
// before their turn, as far as the budget allows. Where it allows it too, a chunk is released one turn later than it
// could be, so that it can be written while another is read. std::invalid_argument if the budget is less than the
// largest chunk.
inline PageWalk plan_walk(const std::vector<int64_t>& sizes,  // [chunks]
                          const std::vector<bool>& wanted,    // [chunks]
                          const std::vector<bool>& resident,  // [chunks]
                          int64_t budget_bytes, int64_t look_ahead) {
  const size_t count = sizes.size();
  int64_t total = 0;
  int64_t largest = 0;
  for (const int64_t bytes : sizes) {
    total += bytes;
    largest = std::max(largest, bytes);
  }
  if (largest > budget_bytes) {
    throw std::invalid_argument("the residency budget is " + std::to_string(budget_bytes) +
                                " bytes: expected at least the largest chunk, " + std::to_string(largest) + ".");
  }
  int64_t window = 0;  // chunks that may be resident beside those that stay
  size_t pinned = count;
  if (total > budget_bytes) {
    window = std::min(look_ahead + 2, budget_bytes / largest);
    pinned = 0;
    for (int64_t bytes = window * largest; bytes + sizes[pinned] <= budget_bytes; ++pinned) {
      bytes += sizes[pinned];
    }
  }
  PageWalk walk;
  walk.num_pinned = static_cast<int64_t>(pinned);
  const auto push = [&](PageAction action, size_t chunk) {
    walk.moves.push_back({action, static_cast<int64_t>(chunk)});
  };
  std::vector<size_t> moving;
  for (size_t chunk = pinned; chunk < count; ++chunk) {
    if (resident[chunk]) {
      if (wanted[chunk]) {
        push(PageAction::kUpdate, chunk);
      }
      push(PageAction::kRelease, chunk);
    } else if (wanted[chunk]) {
      moving.push_back(chunk);
    }
  }
  const int64_t lag = window > 2 ? 1 : 0;
  const int64_t ahead = std::max<int64_t>(window - 1 - lag, 0);
  const auto moves = static_cast<int64_t>(moving.size());
  const auto push_moving = [&](PageAction action, int64_t i) {
    if (i >= 0 && i < moves) {
      push(action, moving[static_cast<size_t>(i)]);
    }
  };
  for (int64_t i = 0; i < ahead; ++i) {
    push_moving(PageAction::kFetch, i);
  }
  std::vector<size_t> staying;
  for (size_t chunk = 0; chunk < pinned; ++chunk) {
    if (wanted[chunk]) {
      staying.push_back(chunk);
    }
  }
  // Those that stay are spread among the others, so that there is always something to update while pages move.
  size_t next = 0;
  for (int64_t i = 0; i <= moves + lag; ++i) {
    push_moving(PageAction::kRelease, i - 1 - lag);
    push_moving(PageAction::kFetch, i + ahead);
    const size_t share = i + 1 < moves ? staying.size() * static_cast<size_t>(i + 1) / moving.size() : staying.size();
    for (; next < share; ++next) {
      if (!resident[staying[next]]) {
        push(PageAction::kFetch, staying[next]);
      }
      push(PageAction::kUpdate, staying[next]);
    }
    push_moving(PageAction::kUpdate, i);
  }
  return walk;
}

}  // namespace qlora_native
