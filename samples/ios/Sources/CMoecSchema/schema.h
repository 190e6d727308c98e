// llguidance.h comes with llguidance's C library: give its folder to the compiler as an import path.
#include "llguidance.h"
#include "../../../../runtime/include/moec.h"
#include "../../../../runtime/include/moec_llguidance.h"
