// What glibc 2.28 and the libstdc++ of GCC 8 do not have and newer headers call: linked into each file of a portable build,
// and visible in it alone.
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <new>

#define MOEC_HERE __attribute__((visibility("hidden")))

extern "C" {

// glibc 2.33 made functions of these; they were macros around others. The kernel's struct stat is the C library's on both
// processors.
MOEC_HERE int stat(const char* path, struct stat* status) noexcept {
  return static_cast<int>(syscall(SYS_newfstatat, AT_FDCWD, path, status, 0));
}

MOEC_HERE int lstat(const char* path, struct stat* status) noexcept {
  return static_cast<int>(syscall(SYS_newfstatat, AT_FDCWD, path, status, AT_SYMLINK_NOFOLLOW));
}

MOEC_HERE int fstat(int file, struct stat* status) noexcept {
  return static_cast<int>(syscall(SYS_newfstatat, file, "", status, AT_EMPTY_PATH));
}

// glibc 2.32: whether there is one thread only, in which case std::shared_ptr counts without atomics. 0 is always right.
MOEC_HERE extern char __libc_single_threaded;
char __libc_single_threaded = 0;

}  // extern "C"

namespace std {

// GCC 11: `new T[n]` with an n that is no size
MOEC_HERE void __throw_bad_array_new_length() { throw bad_array_new_length(); }

}  // namespace std
