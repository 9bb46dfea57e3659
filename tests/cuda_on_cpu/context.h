// Errors that stay. On a device a kernel's error comes late, from the next call that waits, and then every call of the
// context gives it, until the device is reset. Here that is a mode; without it (as at the start) the launch itself
// gives the error and later ones run, so that one test may look at many defects.
#pragma once

#include <cuda_runtime_api.h>

namespace cuemu {

void set_sticky_errors(bool sticky);  // and every context is sound again

// What a call of the runtime for the current device must give at once; cudaSuccess while the context is sound.
cudaError_t standing_error();

// What a launch or copy on a device ended with. Gives what the launch's caller gets.
cudaError_t keep_error(int ordinal, cudaError_t error);

// Something has waited for the current device: from now on its error stands. Gives `error` if there is none.
cudaError_t surface_error(cudaError_t error);

bool is_broken(int ordinal);  // nothing runs there any more
void reset_context(int ordinal);

}  // namespace cuemu
