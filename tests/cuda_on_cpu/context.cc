#include "cuda_on_cpu/context.h"

#include <map>

#include "cuda_on_cpu/device.h"

namespace cuemu {
namespace {

struct Context {
  cudaError_t error = cudaSuccess;  // of the first kernel that failed
  bool stands = false;              // somebody has waited
};

bool is_sticky = false;
std::map<int, Context> contexts;

}  // namespace

void set_sticky_errors(bool sticky) {
  is_sticky = sticky;
  contexts.clear();
}

cudaError_t standing_error() {
  const Context& context = contexts[current_device()];
  return context.stands ? context.error : cudaSuccess;
}

cudaError_t keep_error(int ordinal, cudaError_t error) {
  if (!is_sticky || error == cudaSuccess) {
    return error;
  }
  Context& context = contexts[ordinal];
  context.error = context.error == cudaSuccess ? error : context.error;
  return cudaSuccess;
}

cudaError_t surface_error(cudaError_t error) {
  Context& context = contexts[current_device()];
  context.stands = context.error != cudaSuccess;
  return context.stands ? context.error : error;
}

bool is_broken(int ordinal) { return contexts[ordinal].error != cudaSuccess; }

void reset_context(int ordinal) { contexts.erase(ordinal); }

}  // namespace cuemu
