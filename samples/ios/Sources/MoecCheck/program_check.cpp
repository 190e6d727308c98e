#include "../../../../runtime/runner/program_check.cpp"
