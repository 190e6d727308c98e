// Checks the structure of a .pte before ExecuTorch opens it.
#ifndef MOEC_CHECK_H_
#define MOEC_CHECK_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// 0 if the program is sound, else -1 and why, one line of at most `capacity` bytes with its end. `backend`: the delegate that
// the file may use; what it computes inside is the backend's to check.
int32_t moec_check_file(const char* path, const char* backend, char* reason, size_t capacity);

#ifdef __cplusplus
}
#endif

#endif  // MOEC_CHECK_H_
