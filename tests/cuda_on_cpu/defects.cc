#include "cuda_on_cpu/defects.h"

#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <string_view>

namespace cuemu {
namespace {

enum : int { kRight = 0, kWrong = 10, kReported = 11 };

// Runs in a child with its stderr in a pipe. Gives the exit status, or kReported if a sanitizer or a signal ended it.
int run_apart(const std::function<bool()>& run, std::string& report) {
  std::fflush(nullptr);
  std::array<int, 2> ends{};
  if (pipe(ends.data()) != 0) {
    std::perror("pipe");
    return kRight;
  }
  const pid_t child = fork();
  if (child == 0) {
    close(ends[0]);
    dup2(ends[1], 2);
    const bool right = run();
    const bool silent = take_reports().empty();
    _exit(!silent ? kReported : right ? kRight : kWrong);
  }
  close(ends[1]);
  std::array<char, 4096> buffer;
  for (ssize_t got = 0; (got = read(ends[0], buffer.data(), buffer.size())) > 0;) {
    report.append(buffer.data(), static_cast<size_t>(got));
  }
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && (WEXITSTATUS(status) == kRight || WEXITSTATUS(status) == kWrong) ? WEXITSTATUS(status)
                                                                                               : kReported;
}

const char* name_of_seen(Seen seen) {
  switch (seen) {
    case Seen::kNever:
      return "nothing";
    case Seen::kAsWrong:
      return "a wrong result or a report in some schedule";
    case Seen::kSometimes:
      return "a report in some schedule";
    case Seen::kAlways:
      return "a report in every schedule";
  }
  return "";
}

bool is_as_wanted(Seen wanted, const Tried& tried) {
  switch (wanted) {
    case Seen::kNever:
      return tried.reported == 0 && tried.wrong == 0;
    case Seen::kAsWrong:
      return tried.reported + tried.wrong > 0;
    case Seen::kSometimes:
      return tried.reported > 0;
    case Seen::kAlways:
      return tried.reported == tried.runs;
  }
  return false;
}

}  // namespace

Tried try_kernel(const std::function<bool()>& run) {
  Tried tried;
  for (const Schedule& schedule : all_schedules()) {
    set_schedule(schedule);
    std::string report;
    const int outcome = run_apart(run, report);
    ++tried.runs;
    tried.wrong += outcome == kWrong;
    tried.reported += outcome == kReported;
    if (outcome == kReported && tried.first_report.empty()) {
      tried.first_report = report;
    }
  }
  set_schedule({});
  return tried;
}

void check_defect(const Defect& defect, const char* build_name) {
  const std::string_view build = build_name;
  const Seen wanted = build == "plain" ? defect.plain : build == "race" ? defect.race : defect.asan;
  const Tried tried = try_kernel(defect.run);
  CHECK(is_as_wanted(wanted, tried), "%s: expected %s; of %d schedules %d gave a report and %d a wrong result; %s",
        defect.name, name_of_seen(wanted), tried.runs, tried.reported, tried.wrong, tried.first_report.c_str());
  const bool must_say = wanted == Seen::kSometimes || wanted == Seen::kAlways;
  CHECK(!must_say || build == "asan" || tried.first_report.find(defect.words) != std::string::npos,
        "%s: expected '%s' in the report: %s", defect.name, defect.words, tried.first_report.c_str());
  if (std::getenv("CUEMU_VERBOSE") != nullptr) {
    const std::string line = tried.first_report.substr(0, tried.first_report.find('\n'));
    std::printf("  %-34s %d reports, %d wrong of %d: %s\n", defect.name, tried.reported, tried.wrong, tried.runs,
                line.c_str());
  }
}

void check_sound(const char* name, bool (*run)()) {
  const Tried tried = try_kernel(run);
  CHECK(tried.reported == 0 && tried.wrong == 0,
        "%s has no defect, but %d schedules gave a report and %d a wrong one: %s", name, tried.reported, tried.wrong,
        tried.first_report.c_str());
}

}  // namespace cuemu
