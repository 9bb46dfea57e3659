// Pages of this process that tell when they are touched: closed ones fault, and a handler of SIGSEGV asks whose they
// are. The processor's own pages, of 4096 bytes; the last one of a range is meant as a whole.
//
// A system call that is given a closed page (write(2) of it, say) fails with EFAULT and is not felt.
#pragma once

#include <cstddef>

namespace cuemu {

void close_pages(void* begin, size_t num_bytes);  // to all access
void open_pages(void* begin, size_t num_bytes);   // to reads and writes

// Takes addresses that were just given back, closed, so that nothing else comes to lie there. False if it is too late.
bool reserve_pages(void* begin, size_t num_bytes);

// From now on `feels` is asked about every address that faults, by the thread that touched it; true: the access is
// tried again. Else whoever handled the signal before is called.
void feel_touches(bool (*feels)(void* address));

}  // namespace cuemu
