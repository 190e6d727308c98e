// Ids of texts and texts of ids, by the tables of a text.moec, as the library `tokenizers` gives them.
#ifndef MOEC_TOKENIZER_H_
#define MOEC_TOKENIZER_H_

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "piece_model.h"
#include "text_steps.h"
#include "text_tables.h"
#include "utf8.h"

class Tokenizer {
 public:
  explicit Tokenizer(std::unique_ptr<TextTables> tables);
  const TextTables& tables() const { return *tables_; }

  // Compares with the ids and texts in the tables: "" or what differs.
  std::string check() const;
  // Appends the ids of a text, without those around it; "" or why not. as_text: special tokens in it are text.
  std::string encode(std::string_view text, bool as_text, std::vector<int32_t>* ids) const;
  // Texts of special tokens, the longest first.
  const std::vector<std::string>& special() const { return special_; }
  bool is_special(int32_t id) const { return is_special_[static_cast<size_t>(id)] != 0; }
  // The byte that a token stands for where bytes are tokens beside others; -1 for none.
  int byte_of(int32_t id) const { return tables_->decoder.byte_fallback ? model_.byte_of(id) : -1; }

 private:
  // A part of a text between added tokens.
  struct Part {
    std::string_view text;
    bool as_text, at_start;
  };
  bool within_word(std::string_view text, size_t from, size_t to) const;
  const AddedToken* added_at(std::string_view text, size_t at, bool normalized, uint64_t* steps) const;
  std::string encode_added(const Part& part, bool normalized, std::vector<int32_t>* ids) const;
  std::string encode_rest(const Part& part, bool normalized, std::vector<int32_t>* ids) const;

  std::unique_ptr<TextTables> tables_;
  TextSteps steps_;
  PieceModel model_;
  std::array<std::array<std::vector<const AddedToken*>, 256>, 2> added_;  // not normalized, normalized; by first byte, in order
  std::vector<uint8_t> is_special_;
  std::vector<std::string> special_;
};

// The text of ids as they come, in whole characters. special: special tokens are written out; else only those in `kept`.
//
// Tokens that are bytes are held back until another token follows: if they are not UTF-8 together, each becomes U+FFFD.
class TextDecoder {
 public:
  TextDecoder(const Tokenizer& tokenizer, bool special, std::vector<int32_t> kept = {})
      : tokenizer_(tokenizer), special_(special), kept_(std::move(kept)), left_(tokenizer.tables().decoder.strip) {}
  // What is certain now; an id that is not in the vocabulary is left out.
  std::string push(int32_t id);
  // What was held back; the decoder is as new then.
  std::string finish();

 private:
  std::string said(std::string_view text);
  std::string spaced(std::string_view text);
  std::string held();

  const Tokenizer& tokenizer_;
  bool special_, begun_ = false;
  std::vector<int32_t> kept_;
  int32_t left_;  // spaces that may still be taken off the beginning
  std::string bytes_;
  Characters characters_;
};

#endif  // MOEC_TOKENIZER_H_
