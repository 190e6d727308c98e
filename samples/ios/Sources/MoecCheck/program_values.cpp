#include "../../../../runtime/runner/program_values.cpp"
