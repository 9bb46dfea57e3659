#include "cuda/paged_table.h"

namespace qlora_native::cuda {
namespace {

PagedRow row_of_part(const PagePlan& plan, const StateForm& form, const StatePart& part, int64_t page_chunk,
                     int64_t row, const AddressOf& address_of) {
  const StatePlace& place = plan.places[static_cast<size_t>(part.tensor)];
  const auto address = [&](int64_t start, int64_t bytes, int64_t elements) -> uintptr_t {
    const int64_t skipped = bytes * (part.begin / elements);
    return start == kNoPlace ? 0 : address_of(page_chunk, start + skipped) - static_cast<uintptr_t>(skipped);
  };
  const int64_t bytes = form.coded ? 1 : 4;
  return {row, address(place.exp_avg, bytes, 1), address(place.exp_avg_sq, bytes, 1),
          address(place.exp_avg_absmax, 4, kStateBlock), address(place.exp_avg_sq_absmax, 4, kStateBlock)};
}

}  // namespace

PagedTable paged_table(const PagePlan& plan, const std::vector<StateForm>& forms, const std::vector<int64_t>& row_of,
                       const AddressOf& address_of) {
  PagedTable table;
  table.runs.resize(plan.chunks.size());
  for (size_t i = 0; i < plan.chunks.size(); ++i) {
    PagedRun& run = table.runs[i];
    run.first_row = static_cast<int64_t>(table.rows.size());
    run.first_chunk = static_cast<int64_t>(table.chunks.size());
    const auto page_chunk = static_cast<int64_t>(i);
    for (int64_t number = plan.chunks[i].first_part; number < plan.chunks[i].last_part; ++number) {
      const StatePart& part = plan.parts[static_cast<size_t>(number)];
      const auto tensor = static_cast<size_t>(part.tensor);
      if (row_of[tensor] < 0) {
        continue;
      }
      const auto at = static_cast<int32_t>(static_cast<int64_t>(table.rows.size()) - run.first_row);
      table.rows.push_back(row_of_part(plan, forms[tensor], part, page_chunk, row_of[tensor], address_of));
      for (int64_t index = part.begin / kNormChunk; index * kNormChunk < part.end; ++index) {
        table.chunks.push_back({at, static_cast<int32_t>(index)});
      }
    }
    run.num_chunks = static_cast<int64_t>(table.chunks.size()) - run.first_chunk;
  }
  table.first_counted = static_cast<int64_t>(table.rows.size());
  for (const int64_t row : row_of) {
    if (row >= 0) {
      table.rows.push_back({row, 0, 0, 0, 0});
    }
  }
  return table;
}

}  // namespace qlora_native::cuda
