// What is wrong with what an application gave, in one line; api.h turns it into a return value.
#ifndef MOEC_FAULT_H_
#define MOEC_FAULT_H_

#include <stdexcept>

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

#endif  // MOEC_FAULT_H_
