// To be preloaded (LD_PRELOAD): reads of experts, which are direct reads, can fail, come late or short, or meet a file that is
// being cut. MOEC_READS, or a call of faulty_reads, says how: "KIND AFTER VALUE", in place of what was said before.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum {
  kNone,
  kFails,       // the read numbered AFTER from now, once
  kFailsOn,     // it and all that follow
  kLate,        // every read from AFTER on, by VALUE microseconds
  kShort,       // every read gives at most VALUE bytes, whole units of 4096
  kCut,         // before the read numbered AFTER the file is cut to VALUE bytes
};

static atomic_int kind;
static atomic_long left, amount, seen;

void faulty_reads(int what, long after, long value) {
  amount = value;
  left = after;
  seen = 0;
  kind = what;
}

long faulty_reads_seen(void) { return seen; }

__attribute__((constructor)) static void begin(void) {
  const char* text = getenv("MOEC_READS");
  int what = 0;
  long after = 0, value = 0;
  if (text && sscanf(text, "%d %ld %ld", &what, &after, &value) == 3) faulty_reads(what, after, value);
}

static void cut(int descriptor, long bytes) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) abort();
  path[length] = '\0';
  if (truncate(path, bytes) != 0) abort();
}

ssize_t pread(int descriptor, void* out, size_t size, off_t offset) {
  static ssize_t (*usual)(int, void*, size_t, off_t);
  if (!usual) usual = (ssize_t(*)(int, void*, size_t, off_t))dlsym(RTLD_NEXT, "pread");
  const int flags = kind == kNone ? 0 : fcntl(descriptor, F_GETFL);
  if (flags <= 0 || !(flags & O_DIRECT)) return usual(descriptor, out, size, offset);
  ++seen;
  const long number = left--;
  switch (kind) {
    case kFails:
    case kFailsOn:
      if (number == 0 || (number < 0 && kind == kFailsOn)) {
        errno = EIO;
        return -1;
      }
      break;
    case kLate:
      if (number <= 0) usleep((useconds_t)amount);
      break;
    case kShort:
      if (size > (size_t)amount) size = (size_t)amount;
      break;
    case kCut:
      if (number == 0) cut(descriptor, amount);
      break;
  }
  return usual(descriptor, out, size, offset);
}
