#include "../../../../runtime/runner/xnnpack_check.cpp"
