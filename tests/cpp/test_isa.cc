// The choice is made once a process, at the first call that succeeds; so this runs before the tests, from main.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "check.h"
#include "cpu/isa/isa.h"
#include "isa_of_run.h"

using namespace qlora_native::cpu;

namespace {

bool is_ours(const std::string& name) {
  for (int i = 0; i < kNumIsas; ++i) {
    if (name == isa_name(static_cast<Isa>(i))) {
      return true;
    }
  }
  return name.empty();
}

void set_variable(const std::string& name) {
  if (name.empty()) {
    unsetenv("QLORA_NATIVE_ISA");
  } else {
    setenv("QLORA_NATIVE_ISA", name.c_str(), 1);
  }
}

std::string refusal(const std::string& name) {
  set_variable(name);
  try {
    return std::string("accepted as ") + isa_name(current_isa());
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
}

}  // namespace

bool isa_of_run() {
  const char* variable = std::getenv("QLORA_NATIVE_ISA");
  const std::string wanted = variable == nullptr ? "" : variable;

  for (const char* unknown : {"avx9000", "AVX2", "avx2 ", "avx"}) {
    const std::string sentence = refusal(unknown);
    CHECK(sentence.find("QLORA_NATIVE_ISA is '" + std::string(unknown) + "'") == 0, "%s", sentence.c_str());
    CHECK(sentence.find("offer scalar") != std::string::npos, "%s", sentence.c_str());
  }

  set_variable(wanted);
  try {
    current_isa();
  } catch (const std::invalid_argument& error) {
    if (!is_ours(wanted)) {
      throw;
    }
    std::printf("skipped: %s\n", error.what());
    return false;
  }

  const std::vector<Isa> built = isas_built();
  CHECK(wanted.empty() || wanted == isa_name(current_isa()), "%s, but %s runs", wanted.c_str(),
        isa_name(current_isa()));
  CHECK(built.front() == Isa::kScalar && std::is_sorted(built.begin(), built.end()), "weakest first");
  CHECK(std::count(built.begin(), built.end(), current_isa()) == 1, "%s", isa_name(current_isa()));

  // Decided: a later change of the variable has no say.
  const Isa chosen = current_isa();
  set_variable("avx9000");
  CHECK(current_isa() == chosen, "chosen anew");
  set_variable(wanted);
  return true;
}
