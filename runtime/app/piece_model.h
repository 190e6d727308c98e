// From a piece of text to tokens: byte-pair encoding, Unigram, WordPiece or words, as the library `tokenizers` computes them.
#ifndef MOEC_PIECE_MODEL_H_
#define MOEC_PIECE_MODEL_H_

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "text_tables.h"

class PieceModel {
 public:
  explicit PieceModel(const TextTables& tables);
  // Appends the ids of a piece in UTF-8; "" or why not.
  std::string encode(std::string_view piece, std::vector<int32_t>* ids) const;
  // The byte that a token of the vocabulary stands for where the model falls back to bytes; -1 for none.
  int byte_of(int32_t id) const;

 private:
  std::vector<int32_t> symbols(std::string_view piece) const;
  bool append_bytes(std::string_view text, std::vector<int32_t>* ids) const;
  void merge(std::string_view piece, std::vector<int32_t>* ids) const;
  std::string best_path(std::string_view piece, std::vector<int32_t>* ids) const;
  std::string longest_first(std::string_view piece, std::vector<int32_t>* ids) const;
  const Merge* find_merge(int32_t left, int32_t right) const;
  int32_t find_token(std::string_view piece) const;
  // Tokens that begin with what has been compared.
  struct Beginnings {
    const uint32_t *low, *high;
    size_t length;
  };
  Beginnings all() const { return {tables_.sorted.data(), tables_.sorted.data() + tables_.sorted.size(), 0}; }
  void narrow(char letter, Beginnings* tokens) const;
  // The token that is no longer than what has been compared; -1 for none.
  int32_t token_of(const Beginnings& tokens) const;

  const TextTables& tables_;
  std::array<int32_t, 256> bytes_{};  // the token of each byte, -1 for none
};

#endif  // MOEC_PIECE_MODEL_H_
