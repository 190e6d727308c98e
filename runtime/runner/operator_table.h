// The operators of this runtime, by name.
#ifndef MOEC_OPERATOR_TABLE_H_
#define MOEC_OPERATOR_TABLE_H_

struct OperatorEntry {
  const char* name;       // "aten::add.out"
  const char* arguments;  // kinds, as operator_table.cpp spells them
};

extern const OperatorEntry kOperators[];  // sorted by name
extern const unsigned kOperatorCount;

// The entry of `name`, nullptr where there is none.
const OperatorEntry* find_operator(const char* name);

#endif  // MOEC_OPERATOR_TABLE_H_
