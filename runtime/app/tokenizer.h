// Ids of texts and texts of ids, by the tables of a text.moec: byte-level BPE, as the library `tokenizers` computes it.
#ifndef MOEC_TOKENIZER_H_
#define MOEC_TOKENIZER_H_

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "text_tables.h"

class Tokenizer {
 public:
  explicit Tokenizer(std::unique_ptr<TextTables> tables);
  const TextTables& tables() const { return *tables_; }

  // Compares with the ids and texts in the tables: "" or what differs.
  std::string check() const;
  // Appends the ids of a text, without those around it; "" or why not. as_text: special tokens in it are text.
  std::string encode(std::string_view text, bool as_text, std::vector<int32_t>* ids) const;
  // Appends the bytes of a token; none for an id that is not in the vocabulary.
  void decode(int32_t id, bool special, std::string* bytes) const;
  // Texts of special tokens, the longest first.
  const std::vector<std::string>& special() const { return special_; }

 private:
  bool in_set(int32_t set, uint32_t code) const;
  struct Matching;
  int64_t match(Matching* state, int32_t begin, size_t at, int depth) const;
  bool cut(const CutStep& step, std::vector<uint32_t>* codes, std::vector<size_t>* ends) const;
  std::string encode_added(std::string_view text, bool as_text, bool normalized, std::vector<int32_t>* ids) const;
  std::string normal(std::string_view text) const;  // in normal form C
  std::string encode_part(std::string_view text, std::vector<int32_t>* ids) const;
  void merge(std::string_view piece, std::vector<int32_t>* ids) const;
  const Merge* find_merge(int32_t left, int32_t right) const;
  int32_t find_token(std::string_view piece) const;

  std::unique_ptr<TextTables> tables_;
  std::array<int32_t, 256> bytes_{};                              // the token of each byte, -1 for none
  std::array<std::array<std::vector<AddedToken>, 256>, 2> added_;  // not normalized, normalized; by first byte, longest first
  std::vector<uint8_t> is_special_;
  std::vector<std::string> special_;
};

#endif  // MOEC_TOKENIZER_H_
