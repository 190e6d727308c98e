#include "../../../../runtime/runner/operator_table.cpp"
