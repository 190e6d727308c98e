// Force-included in every file of a portable build (-DMOEC_PORTABLE=ON, what wheels are made with): where the C library and
// libstdc++ have a symbol in a new and an old version, the reference goes to the old one, which every later release still
// has. What has no old version is in missing.cpp. tools/wheel.py measures what the result needs, and tags the wheel by
// that: a symbol that is not listed yet raises the tag, and `make wheel` says which.
#pragma once

#if defined(__x86_64__)
#define MOEC_OLDEST "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define MOEC_OLDEST "GLIBC_2.17"
#else
#error "a portable build is for x86-64 and aarch64"
#endif
#define MOEC_PIN(symbol, version) __asm__(".symver " #symbol "," #symbol "@" version)

// glibc 2.34: libpthread became part of libc
MOEC_PIN(pthread_create, MOEC_OLDEST);
MOEC_PIN(pthread_detach, MOEC_OLDEST);
MOEC_PIN(pthread_join, MOEC_OLDEST);
MOEC_PIN(pthread_key_create, MOEC_OLDEST);
MOEC_PIN(pthread_mutex_trylock, MOEC_OLDEST);
MOEC_PIN(pthread_once, MOEC_OLDEST);
MOEC_PIN(pthread_rwlock_rdlock, MOEC_OLDEST);
MOEC_PIN(pthread_rwlock_unlock, MOEC_OLDEST);
MOEC_PIN(pthread_rwlock_wrlock, MOEC_OLDEST);
MOEC_PIN(sem_init, MOEC_OLDEST);
MOEC_PIN(sem_post, MOEC_OLDEST);
MOEC_PIN(sem_wait, MOEC_OLDEST);

// glibc 2.29: without the old way to report errors; the values are the same
MOEC_PIN(exp, MOEC_OLDEST);
MOEC_PIN(log, MOEC_OLDEST);
MOEC_PIN(pow, MOEC_OLDEST);

// GCC 12: noexcept
MOEC_PIN(_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE, "GLIBCXX_3.4.11");
