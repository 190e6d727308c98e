// To be preloaded (LD_PRELOAD): direct reads take as long as a storage of MOEC_STORAGE bytes a second would, one after the
// other. Control groups limit the average over tenths of a second, and let what is read within one pass at the device's rate.
#define _GNU_SOURCE
#include <assert.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static_assert(sizeof(off_t) == sizeof(off64_t), "off_t has 64 bits");

typedef ssize_t (*Read)(int, void*, size_t, off_t);
typedef ssize_t (*ReadParts)(int, const struct iovec*, int, off_t, int);

static Read read_as_ever;
static ReadParts read_parts_as_ever;
static double ns_per_byte;
static _Atomic int64_t storage_free_ns;  // when the storage has done all it was asked for

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

__attribute__((constructor)) static void begin(void) {
  const char* text = getenv("MOEC_STORAGE");
  const double rate = text ? atof(text) : 0.0;
  ns_per_byte = rate > 0.0 ? 1e9 / rate : 0.0;
  read_as_ever = (Read)dlsym(RTLD_NEXT, "pread");
  read_parts_as_ever = (ReadParts)dlsym(RTLD_NEXT, "preadv2");
}

// When a read of `bytes` that is asked for now will be done.
static int64_t promised(size_t bytes) {
  const int64_t now = now_ns(), takes = (int64_t)((double)bytes * ns_per_byte);
  int64_t free = storage_free_ns, done;
  do done = (free > now ? free : now) + takes;
  while (!atomic_compare_exchange_weak(&storage_free_ns, &free, done));
  return done;
}

static void wait_until(int64_t done) {
  const struct timespec end = {done / 1000000000, done % 1000000000};
  prctl(PR_SET_TIMERSLACK, 1);  // else a sleep is 50 microseconds late
  while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &end, NULL) == EINTR) continue;
}

static int paced(int descriptor) {
  const int flags = ns_per_byte > 0.0 ? fcntl(descriptor, F_GETFL) : 0;
  return flags > 0 && (flags & O_DIRECT);
}

ssize_t pread(int descriptor, void* out, size_t size, off_t offset) {
  if (!paced(descriptor)) return read_as_ever(descriptor, out, size, offset);
  const int64_t done = promised(size);
  const ssize_t got = read_as_ever(descriptor, out, size, offset);
  wait_until(done);
  return got;
}

ssize_t preadv2(int descriptor, const struct iovec* parts, int count, off_t offset, int flags) {
  if (!paced(descriptor)) return read_parts_as_ever(descriptor, parts, count, offset, flags);
  size_t size = 0;
  for (int i = 0; i < count; ++i) size += parts[i].iov_len;
  const int64_t done = promised(size);
  const ssize_t got = read_parts_as_ever(descriptor, parts, count, offset, flags);
  wait_until(done);
  return got;
}

ssize_t pread64(int descriptor, void* out, size_t size, off64_t offset) { return pread(descriptor, out, size, offset); }

ssize_t preadv64v2(int descriptor, const struct iovec* parts, int count, off64_t offset, int flags) {
  return preadv2(descriptor, parts, count, offset, flags);
}

ssize_t preadv(int descriptor, const struct iovec* parts, int count, off_t offset) {
  return preadv2(descriptor, parts, count, offset, 0);
}

ssize_t preadv64(int descriptor, const struct iovec* parts, int count, off64_t offset) {
  return preadv2(descriptor, parts, count, offset, 0);
}
