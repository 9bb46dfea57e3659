// Preloaded into a process: counts the calls that change anything below one folder, and at one of them fails, writes
// half, or kills the process. Glibc's own calls (fopen) are not seen. 64-bit Linux.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, COUNT, ONCE, FULL, SHORT, KILL, TORN };  // FULL: from that call on, all that take space. TORN: SHORT + KILL

// Shared with forked children, so that their parent can read it when they are dead.
static struct {
  long calls, length;
  char log[1 << 20];  // a line a call: its name and path
} *seen;
static char folder[4096];
static int how, error;
static long at;

__attribute__((constructor)) static void share(void) {
  seen = mmap(NULL, sizeof *seen, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

void faults_arm(const char* below, int mode, long number, int code) {
  snprintf(folder, sizeof folder, "%s/", below);
  memset(seen, 0, sizeof *seen);
  at = number, error = code, how = mode;
}
const char* faults_log(void) { return seen->log; }

enum { PASS, FAIL, HALF };          // what to do in place of the call
enum { ORDER, SPACE, BYTES };       // what it does: nothing that needs room, something that does, writes of any length

static int strike(const char* call, const char* path, int kind) {
  if (how == OFF || path == NULL || strncmp(path, folder, strlen(folder)) != 0) return PASS;
  const long number = __atomic_add_fetch(&seen->calls, 1, __ATOMIC_SEQ_CST);
  char line[4200];
  const int length = snprintf(line, sizeof line, "%s %s\n", call, path);
  const long place = __atomic_fetch_add(&seen->length, length, __ATOMIC_SEQ_CST);
  if (place + length < (long)sizeof seen->log) memcpy(seen->log + place, line, (size_t)length);
  if (number != at && !(how == FULL && at > 0 && number > at && kind != ORDER)) return PASS;
  if (how == KILL || (how == TORN && kind != BYTES)) kill(getpid(), SIGKILL);
  errno = error;
  return how == ONCE || how == FULL ? FAIL : how != COUNT && kind == BYTES ? HALF : PASS;
}

static int strike_file(const char* call, int file, int kind) {
  char link[64], path[4096];
  const int before = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  const ssize_t length = how == OFF ? -1 : readlink(link, path, sizeof path - 1);
  errno = before;
  if (length < 0) return PASS;
  path[length] = 0;
  return strike(call, path, kind);
}

// The result of writing `count` of anything, of which half may be asked for.
#define WRITE(name, file, count, ...)                          \
  const int outcome = strike_file(#name, file, BYTES);             \
  if (outcome == FAIL) return -1;                              \
  if (outcome == HALF && (count) > 1) (count) /= 2;            \
  const ssize_t written = syscall(__VA_ARGS__);                \
  if (outcome == HALF && how == TORN) kill(getpid(), SIGKILL); \
  return written
#define CALL(outcome, ...)           \
  if ((outcome) == FAIL) return -1;  \
  return (int)syscall(__VA_ARGS__)

ssize_t write(int f, const void* p, size_t n) { WRITE(write, f, n, SYS_write, f, p, n); }
ssize_t pwrite(int f, const void* p, size_t n, off_t o) { WRITE(pwrite, f, n, SYS_pwrite64, f, p, n, o); }
ssize_t pwrite64(int, const void*, size_t, off_t) __attribute__((alias("pwrite")));
ssize_t writev(int f, const struct iovec* v, int n) { WRITE(writev, f, n, SYS_writev, f, v, n); }
ssize_t sendfile(int f, int g, off_t* o, size_t n) { WRITE(sendfile, f, n, SYS_sendfile, f, g, o, n); }
ssize_t sendfile64(int, int, off_t*, size_t) __attribute__((alias("sendfile")));
ssize_t copy_file_range(int g, off_t* a, int f, off_t* b, size_t n, unsigned flags) {
  WRITE(copy_file_range, f, n, SYS_copy_file_range, g, a, f, b, n, flags);
}
int fsync(int f) { return strike_file("fsync", f, ORDER) == FAIL ? -1 : 0; }  // a kill of the process needs no disk
int fdatasync(int f) { return fsync(f); }
int sync_file_range(int f, off_t o, off_t n, unsigned flags) {
  CALL(strike_file("sync_file_range", f, ORDER), SYS_sync_file_range, f, o, n, flags);
}
int close(int f) {
  const int flags = how == OFF ? 0 : fcntl(f, F_GETFL);
  const int struck = flags > 0 && (flags & O_ACCMODE) != O_RDONLY ? strike_file("close", f, ORDER) : PASS;
  const int result = (int)syscall(SYS_close, f);
  if (struck == FAIL) errno = error;
  return struck == FAIL ? -1 : result;
}
int ftruncate(int f, off_t n) { CALL(strike_file("ftruncate", f, SPACE), SYS_ftruncate, f, n); }
int ftruncate64(int, off_t) __attribute__((alias("ftruncate")));
int fallocate(int f, int m, off_t o, off_t n) { CALL(strike_file("fallocate", f, SPACE), SYS_fallocate, f, m, o, n); }
int fallocate64(int, int, off_t, off_t) __attribute__((alias("fallocate")));
int posix_fallocate(int f, off_t o, off_t n) { return fallocate(f, 0, o, n) == 0 ? 0 : errno; }
int posix_fallocate64(int, off_t, off_t) __attribute__((alias("posix_fallocate")));
int fchmod(int f, mode_t m) { CALL(strike_file("fchmod", f, ORDER), SYS_fchmod, f, m); }
int fchmodat(int d, const char* p, mode_t m, int flags) {
  (void)flags;
  CALL(strike("chmod", p, ORDER), SYS_fchmodat, d, p, m);
}
int chmod(const char* p, mode_t m) { return fchmodat(AT_FDCWD, p, m, 0); }
int mkdirat(int d, const char* p, mode_t m) { CALL(strike("mkdir", p, SPACE), SYS_mkdirat, d, p, m); }
int mkdir(const char* p, mode_t m) { return mkdirat(AT_FDCWD, p, m); }
int renameat(int d, const char* p, int e, const char* q) { CALL(strike("rename", q, ORDER), SYS_renameat2, d, p, e, q, 0); }
int rename(const char* p, const char* q) { return renameat(AT_FDCWD, p, AT_FDCWD, q); }
int unlinkat(int d, const char* p, int flags) {
  CALL(d == AT_FDCWD ? strike("unlink", p, 0) : strike_file("unlinkat", d, ORDER), SYS_unlinkat, d, p, flags);
}
int unlink(const char* p) { return unlinkat(AT_FDCWD, p, 0); }
int rmdir(const char* p) { return unlinkat(AT_FDCWD, p, AT_REMOVEDIR); }

int openat(int d, const char* p, int flags, ...) {
  va_list more;
  va_start(more, flags);
  const mode_t mode = va_arg(more, mode_t);
  va_end(more);
  const int writes = (flags & O_ACCMODE) != O_RDONLY || (flags & O_CREAT);
  CALL(writes ? strike("open", p, flags & O_CREAT ? SPACE : ORDER) : PASS, SYS_openat, d, p, flags, mode);
}
#define OPEN(name)                             \
  int name(const char* p, int flags, ...) {    \
    va_list more;                              \
    va_start(more, flags);                     \
    const mode_t mode = va_arg(more, mode_t);  \
    va_end(more);                              \
    return openat(AT_FDCWD, p, flags, mode);   \
  }
OPEN(open)
OPEN(open64)
int openat64(int, const char*, int, ...) __attribute__((alias("openat")));

void* mmap(void* a, size_t n, int protection, int flags, int f, off_t o) {
  const int shared = how != OFF && (flags & MAP_SHARED) && (protection & PROT_WRITE) && f >= 0;
  const int struck = shared ? strike_file("mmap", f, ORDER) : PASS;
  return struck == FAIL ? MAP_FAILED : (void*)syscall(SYS_mmap, a, n, protection, flags, f, o);
}
void* mmap64(void*, size_t, int, int, int, off_t) __attribute__((alias("mmap")));
