// What the ExecuTorch registration adds to the C API of moec_kernel.h.
#ifndef MOEC_OPS_EXECUTORCH_H_
#define MOEC_OPS_EXECUTORCH_H_

#include "moec_kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

// Serve the operators from ExecuTorch's thread pool, as when the library was loaded; moec_set_parallel(NULL, NULL, NULL)
// goes back to the library's own pool. Two pools whose threads spin hinder each other: choose ExecuTorch's when delegates
// (XNNPACK) run between our operators, the library's own, which starts work ten times faster, when they do not.
MOEC_API void moec_use_executorch_threads(void);

#ifdef __cplusplus
}
#endif

#endif  // MOEC_OPS_EXECUTORCH_H_
