// core/page_plan.h: what must hold of every plan and every walk, on random forms; and one plan written out by hand.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "core/page_plan.h"
#include "oracle.h"

using namespace qlora_native;

namespace {

struct Array {
  int64_t begin;  // bytes
  int64_t bytes_each;
  int64_t elements_each;
};

// The arrays of a tensor, from the form alone.
std::vector<Array> arrays(const StateForm& form, const StatePlace& place) {
  std::vector<Array> found = {{place.exp_avg, form.coded ? 1 : 4, 1}};
  if (form.moments == 2) {
    found.push_back({place.exp_avg_sq, form.coded ? 1 : 4, 1});
  }
  if (form.coded) {
    found.push_back({place.exp_avg_absmax, 4, 256});
  }
  if (form.coded && form.moments == 2) {
    found.push_back({place.exp_avg_sq_absmax, 4, 256});
  }
  return found;
}

int64_t bytes_to(const Array& array, int64_t element) {
  return (element + array.elements_each - 1) / array.elements_each * array.bytes_each;
}

// By brute force, unit by unit of 64 bytes: who owns it.
void check_plan(const std::vector<StateForm>& forms, int64_t page_bytes, int64_t chunk_bytes, int64_t block_bytes) {
  const PagePlan plan = plan_pages(forms, page_bytes, chunk_bytes, block_bytes);
  CHECK(plan.num_bytes % page_bytes == 0, "%ld bytes", static_cast<long>(plan.num_bytes));
  CHECK(plan.places.size() == forms.size(), "%zu places", plan.places.size());
  std::vector<int> owners(static_cast<size_t>(plan.num_bytes / 64));
  for (size_t t = 0; t < forms.size(); ++t) {
    CHECK((plan.places[t].exp_avg_sq == kNoPlace) == (forms[t].moments == 1), "tensor %zu", t);
    CHECK((plan.places[t].exp_avg_absmax == kNoPlace) == !forms[t].coded, "tensor %zu", t);
    CHECK((plan.places[t].exp_avg_sq_absmax == kNoPlace) == !(forms[t].coded && forms[t].moments == 2), "%zu", t);
    for (const Array& array : arrays(forms[t], plan.places[t])) {
      const int64_t end = array.begin + bytes_to(array, forms[t].numel);
      CHECK(array.begin % 64 == 0 && array.begin >= 0 && end <= plan.num_bytes, "tensor %zu", t);
      for (int64_t at = array.begin; at < end && end <= plan.num_bytes; at += 64) {
        CHECK(owners[static_cast<size_t>(at / 64)]++ == 0, "two arrays at byte %ld", static_cast<long>(at));
      }
    }
  }
  // Parts cover every element once, in order.
  std::vector<int64_t> covered(forms.size());
  int64_t tensor = 0;
  for (const StatePart& part : plan.parts) {
    CHECK(part.tensor >= tensor && part.begin < part.end && part.begin % kNormChunk == 0, "tensor %ld",
          static_cast<long>(part.tensor));
    tensor = part.tensor;
    CHECK(part.begin == covered[static_cast<size_t>(tensor)], "a gap in tensor %ld", static_cast<long>(tensor));
    covered[static_cast<size_t>(tensor)] = part.end;
  }
  for (size_t t = 0; t < forms.size(); ++t) {
    CHECK(covered[t] == forms[t].numel, "tensor %zu", t);
  }
  // Every page belongs to one chunk, and the bytes of a chunk's parts lie in its pages.
  std::vector<int64_t> chunk_of(static_cast<size_t>(plan.num_bytes / page_bytes), -1);
  int64_t next_part = 0;
  for (size_t c = 0; c < plan.chunks.size(); ++c) {
    const PageChunk& chunk = plan.chunks[c];
    CHECK(chunk.first_part == next_part && chunk.last_part > next_part, "chunk %zu", c);
    next_part = chunk.last_part;
    int64_t bytes = 0;
    int64_t last_end = -1;
    for (const ByteRange& range : chunk.ranges) {
      CHECK(range.begin % page_bytes == 0 && range.end % page_bytes == 0 && range.size() > 0, "chunk %zu", c);
      CHECK(range.begin > last_end && range.end <= plan.num_bytes, "chunk %zu", c);
      last_end = range.end;
      bytes += range.size();
      for (int64_t page = range.begin / page_bytes; page < range.end / page_bytes; ++page) {
        int64_t& owner = chunk_of[static_cast<size_t>(page)];
        CHECK(owner == -1, "page %ld is of chunks %ld and %zu", static_cast<long>(page), static_cast<long>(owner), c);
        owner = static_cast<int64_t>(c);
      }
    }
    CHECK(bytes == chunk.num_bytes, "chunk %zu", c);
    bool smallest = chunk.last_part - chunk.first_part == 1;
    for (int64_t p = chunk.first_part; p < chunk.last_part; ++p) {
      const StatePart& part = plan.parts[static_cast<size_t>(p)];
      const auto t = static_cast<size_t>(part.tensor);
      for (const Array& array : arrays(forms[t], plan.places[t])) {
        const int64_t begin = array.begin + bytes_to(array, part.begin);
        const int64_t end = array.begin + bytes_to(array, part.end);
        for (int64_t page = begin / page_bytes; page <= (end - 1) / page_bytes; ++page) {
          CHECK(chunk_of[static_cast<size_t>(page)] == static_cast<int64_t>(c), "tensor %zu: a page elsewhere", t);
        }
      }
      const int64_t least =
          std::max({kNormChunk, forms[t].coded ? page_bytes * 64 : 0, block_bytes / (forms[t].coded ? 1 : 4)});
      smallest = smallest && part.end - part.begin <= least;
    }
    CHECK(bytes <= std::max(page_bytes, chunk_bytes) || smallest, "chunk %zu has %ld bytes", c,
          static_cast<long>(bytes));
  }
  CHECK(next_part == static_cast<int64_t>(plan.parts.size()), "%ld parts", static_cast<long>(next_part));
  const int64_t gaps = std::count(chunk_of.begin(), chunk_of.end(), -1) * page_bytes;
  CHECK(block_bytes > page_bytes || gaps == 0, "a page of no chunk");
  CHECK(gaps <= block_bytes * static_cast<int64_t>(plan.chunks.size() + forms.size()), "gaps of %ld bytes",
        static_cast<long>(gaps));
  for (const PageChunk& chunk : plan.chunks) {
    CHECK(chunk.ranges[0].begin % block_bytes == 0, "a chunk begins at %ld", static_cast<long>(chunk.ranges[0].begin));
  }
}

int64_t below(oracle::Random& random, int64_t end) { return static_cast<int64_t>(random.bits()) % end; }

TEST(page_plan_covers_everything_once) {
  oracle::Random random(11);
  for (int round = 0; round < 200; ++round) {
    std::vector<StateForm> forms;
    for (int64_t t = below(random, 9); t > 0; --t) {
      const int64_t scale = int64_t{1} << below(random, 21);
      forms.push_back({below(random, scale + 1), 1 + random.byte() % 2, random.byte() % 2 == 0});
    }
    const int64_t page_bytes = round % 3 == 0 ? 1 << 16 : 4096;
    check_plan(forms, page_bytes, page_bytes * (1 + below(random, 300)), page_bytes);
    check_plan(forms, page_bytes, page_bytes * (1 + below(random, 300)), page_bytes << (random.byte() % 10));
  }
}

TEST(page_plan_of_known_sizes) {
  // Three tensors that share a chunk, then one that is cut: 3 * 64 KiB of two floats an element, in chunks of 64 KiB.
  const PagePlan plan = plan_pages({{10, 2, false}, {0, 2, false}, {300, 1, true}, {24576, 2, false}}, 4096, 65536);
  CHECK(plan.places[0].exp_avg == 0 && plan.places[0].exp_avg_sq == 64, "tensor 0");
  CHECK(plan.places[2].exp_avg == 128 && plan.places[2].exp_avg_absmax == 448, "tensor 2");
  CHECK(plan.places[3].exp_avg == 4096 && plan.places[3].exp_avg_sq == 4096 + 98304, "tensor 3");
  CHECK(plan.num_bytes == 4096 + 2 * 98304, "%ld bytes", static_cast<long>(plan.num_bytes));
  CHECK(plan.chunks.size() == 4 && plan.chunks[0].num_bytes == 4096, "%zu chunks", plan.chunks.size());
  CHECK(plan.parts.size() == 5 && plan.parts[3].begin == 8192 && plan.parts[3].end == 16384, "parts");
  const std::vector<ByteRange>& ranges = plan.chunks[2].ranges;
  CHECK(ranges.size() == 2 && ranges[0].begin == 4096 + 32768 && ranges[1].begin == 4096 + 98304 + 32768 &&
            ranges[0].size() == 32768 && ranges[1].size() == 32768,
        "ranges");
  CHECK(plan_pages({}, 4096, 65536).num_bytes == 0, "an empty plan");
}

TEST(page_plan_beyond_31_bits) {
  const PagePlan plan = plan_pages({{int64_t{3} << 31, 2, false}, {int64_t{5} << 31, 2, true}}, 4096, 16 << 20);
  CHECK(plan.parts.back().end == int64_t{5} << 31, "elements");
  CHECK(plan.num_bytes == 8 * (int64_t{3} << 31) + 2 * (int64_t{5} << 31) / 64 * 65, "bytes");
}

// One actor moves pages in order, another updates in order. Whatever their speeds, by the rules of PageWalk, the most
// that can be resident is what the moves in order give: a fetch never waits for an update that comes after it.
void check_walk(const std::vector<int64_t>& sizes, const std::vector<bool>& wanted, std::vector<bool> resident,
                int64_t budget, int64_t look_ahead) {
  const PageWalk walk = plan_walk(sizes, wanted, resident, budget, look_ahead);
  const std::vector<bool> before = resident;
  std::vector<int> fetched(sizes.size());
  std::vector<int> updated(sizes.size());
  std::vector<int> released(sizes.size());
  int64_t bytes = 0;
  for (size_t c = 0; c < sizes.size(); ++c) {
    bytes += resident[c] ? sizes[c] : 0;
  }
  for (const PageMove& move : walk.moves) {
    const auto c = static_cast<size_t>(move.chunk);
    if (move.action == PageAction::kFetch) {
      CHECK(!resident[c] && ++fetched[c] == 1, "chunk %zu is fetched again", c);
      resident[c] = true;
      bytes += sizes[c];
      CHECK(bytes <= budget, "%ld bytes, budget %ld", static_cast<long>(bytes), static_cast<long>(budget));
    } else if (move.action == PageAction::kUpdate) {
      CHECK(resident[c] && ++updated[c] == 1, "chunk %zu", c);
    } else {
      CHECK(resident[c] && ++released[c] == 1 && (updated[c] == 1 || !wanted[c]), "chunk %zu", c);
      CHECK(move.chunk >= walk.num_pinned, "chunk %zu is pinned", c);
      resident[c] = false;
      bytes -= sizes[c];
    }
  }
  int64_t total = 0;
  for (size_t c = 0; c < sizes.size(); ++c) {
    total += sizes[c];
    CHECK(updated[c] == (wanted[c] ? 1 : 0), "chunk %zu: %d updates", c, updated[c]);
    const bool stays = static_cast<int64_t>(c) < walk.num_pinned;
    CHECK(resident[c] == (stays && (before[c] || wanted[c])), "chunk %zu afterwards", c);
    CHECK(fetched[c] == (wanted[c] && !before[c] ? 1 : 0), "chunk %zu: %d fetches", c, fetched[c]);
  }
  CHECK(bytes <= budget, "%ld bytes stay", static_cast<long>(bytes));
  CHECK(total > budget || walk.num_pinned == static_cast<int64_t>(sizes.size()), "all fit, but some move");
}

TEST(page_walk_stays_within_the_budget) {
  oracle::Random random(12);
  for (int round = 0; round < 3000; ++round) {
    std::vector<int64_t> sizes(static_cast<size_t>(below(random, 30)));
    std::vector<bool> wanted;
    std::vector<bool> resident;
    int64_t total = 1;
    int64_t largest = 1;
    for (int64_t& size : sizes) {
      size = 4096 * (1 + below(random, round % 2 == 0 ? 1 : 100));
      total += size;
      largest = std::max(largest, size);
      wanted.push_back(random.byte() % 8 != 0);
      resident.push_back(random.byte() % 8 == 0);
    }
    const int64_t budget = largest + below(random, total + total / 4);
    check_walk(sizes, wanted, resident, budget, 1 + below(random, 4));
    check_walk(sizes, wanted, std::vector<bool>(sizes.size(), true), budget, 1 + below(random, 4));
    check_walk(sizes, wanted, std::vector<bool>(sizes.size(), false), budget, 1 + below(random, 4));
  }
}

TEST(page_walk_of_equal_chunks) {
  // Ten chunks, five may be resident: one ahead, one in use, one being written, so two stay for ever.
  const std::vector<bool> all(10, true);
  const PageWalk walk = plan_walk(std::vector<int64_t>(10, 4096), all, std::vector<bool>(10, false), 5 * 4096, 1);
  CHECK(walk.num_pinned == 2, "%ld pinned", static_cast<long>(walk.num_pinned));
  CHECK(walk.moves.size() == 10 + 10 + 8, "%zu moves", walk.moves.size());
  const auto is = [&](size_t i, PageAction action, int64_t chunk) {
    CHECK(walk.moves[i].action == action && walk.moves[i].chunk == chunk, "move %zu", i);
  };
  is(0, PageAction::kFetch, 2);
  is(1, PageAction::kFetch, 3);
  is(2, PageAction::kUpdate, 2);
  is(3, PageAction::kFetch, 4);
  is(4, PageAction::kUpdate, 3);
  is(5, PageAction::kRelease, 2);
  is(6, PageAction::kFetch, 5);
  is(7, PageAction::kUpdate, 4);
  is(8, PageAction::kRelease, 3);
  is(9, PageAction::kFetch, 6);
  is(10, PageAction::kFetch, 0);  // one of those that stay, once in four
  is(11, PageAction::kUpdate, 0);
  is(12, PageAction::kUpdate, 5);
}

TEST(page_plans_refuse_in_words) {
  const auto refused = [](const auto& plan, const char* words) {
    try {
      plan();
    } catch (const std::invalid_argument& error) {
      return std::strstr(error.what(), words) != nullptr;
    }
    return false;
  };
  CHECK(refused([] { plan_pages({}, 100, 4096); }, "page_bytes is 100, block_bytes 100: expected powers of two"),
        "page_bytes");
  CHECK(refused([] { plan_walk({8192}, {true}, {false}, 4096, 1); },
                "the residency budget is 4096 bytes: expected at least the largest chunk, 8192"),
        "budget");
}

}  // namespace
