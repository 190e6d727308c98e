#include "../../../../runtime/runner/program_calls.cpp"
