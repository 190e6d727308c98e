// Unicode's normal forms C and D (UAX 15) by tables: decompose, order marks, compose.
#ifndef MOEC_NORMAL_FORM_H_
#define MOEC_NORMAL_FORM_H_

#include <array>
#include <cstdint>
#include <vector>

class TableReader;

class NormalForm {
 public:
  bool read(TableReader& part);
  std::vector<uint32_t> composed(const std::vector<uint32_t>& codes) const;
  std::vector<uint32_t> decomposed(const std::vector<uint32_t>& codes) const;

 private:
  struct Decomposition {
    uint32_t code;
    std::array<uint32_t, 4> parts;  // zeros behind the last
  };
  struct Class {
    uint32_t first, last, combining;
  };
  struct Pair {
    uint32_t first, second, sum;
  };
  std::vector<uint32_t> ordered(const std::vector<uint32_t>& codes, std::vector<uint32_t>* classes) const;
  void decompose(uint32_t code, std::vector<uint32_t>* found) const;
  uint32_t combining(uint32_t code) const;
  uint32_t sum(uint32_t first, uint32_t second) const;  // 0: none

  std::vector<Decomposition> decompositions_;
  std::vector<Class> classes_;
  std::vector<Pair> pairs_;
};

#endif  // MOEC_NORMAL_FORM_H_
