// text.moec: a tokenizer, the form of conversations and what the model recommends, as assistant/native_text.py writes them.
//
//   8 bytes "moectext", u32 version 2 or 3, u32 parts, u32 size of the file, u32 CRC-32 of what follows
//   for each part: 4 bytes name, u32 zero, u64 offset, u64 size; then the parts, at multiples of 8
//
//   INFO  i32 tokens, i32 kind of the model, i32 unknown token (-1: none), i32 flags of the model, i32 which of SETS has the
//         characters of words (-1: none)
//   OFFS  u32 x (tokens + 1): where each begins in TEXT     TEXT  the bytes of the tokens
//   SORT  u32: ids of tokens that pieces can become, sorted by their bytes
//   MERG  u32 x 4: left, right, rank, result; sorted        SCOR  f64: of Unigram, by id
//   ADDS  added tokens: i32 id, i32 flags, the text that is looked for, the token's own
//   CODE  i32 x 3: instructions of expressions (assistant/split_program.py), over SETS, u32: where the pairs of each set
//         begin in RANG, u32 x 2: first and last code point
//   CHNG  i32 x 4: kind, where in CODE, which of WORD, when: how a text is changed; STEP then cuts it, in the same form
//   WORD  texts that are inserted                           NORM  empty, or the tables of the normal forms (normal_form.h)
//   AROU  i32 count before, count behind, ids: the tokens around every text
//   DECO  i32 x 4: whether bytes of tokens are the text, whether some tokens are bytes, spaces that are taken off the
//         beginning, whether the first token loses its marks; the mark, and what replaces it; i32 what stands between tokens,
//         i32 whether the spaces of English are cleaned up; what continues a word
//   SEGM  i32 whether the template has channels, whether it thinks, format of calls (-1: none); u32 counts and ids of special
//         tokens that mark thinking or channels, and calls
//   PROV  texts with their ids and the text that these give     ROLE, SAMP  chat_form.h, SamplingDefaults
//   TOOL  tool_form.h; files of older versions have none
//   PIEC  i32 characters of the longest word of WordPiece; what its tokens within words begin with
//   MAPS  u32 how many, tables of characters; CLUS  clusters of characters (character_map.h)
//
// Version 3 has a model, a step or an added token that version 2 has not; parts that version 2 lacks may be missing.
//
// Little-endian. The file is not trusted: every index is checked when it is read.
#ifndef MOEC_TEXT_TABLES_H_
#define MOEC_TEXT_TABLES_H_

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "character_map.h"
#include "chat_form.h"
#include "normal_form.h"
#include "tool_form.h"

struct Merge {
  uint32_t left, right, rank, made;
};

struct CodeRange {
  uint32_t first, last;
};

struct Instruction {
  int32_t op, a, b;
};

enum : int32_t { kChar, kSplit, kJump, kMatch, kLook, kAtomic };

struct Step {
  int32_t kind, begin, word, when;
};

enum : int32_t {
  kCut, kCutDrop, kPrefix, kCutBefore, kCutAfter, kReplace, kCompose, kMapped, kDecompose, kSurround, kStrip, kCutRemove
};
enum : int32_t { kAlways, kUnlessThere, kAtTheStart };  // when, of kPrefix
constexpr int32_t kByClusters = 1;                      // of kMapped, whose word is which of the maps
constexpr int32_t kAtBegin = 1, kAtEnd = 2;             // of kStrip

struct AddedToken {
  int32_t id = 0, flags = 0;
  std::string text, own;
};

constexpr int32_t kSpecial = 1, kNormalized = 2, kTakesLeft = 4, kTakesRight = 8, kSingleWord = 16;

enum : int32_t { kByteLevel, kCharacters, kUnigram, kWordPiece, kWordLevel };
constexpr int32_t kWholePieces = 1, kByteFallback = 2, kFuseUnknown = 4;

// How tokens become text; assistant/native_vocabulary.py has the same.
enum : int32_t { kJoined, kSpaced, kWords };  // tokens follow each other; with spaces between; but for those within a word
struct DecoderForm {
  bool byte_level = true, byte_fallback = false, drop = false;
  int32_t strip = 0, between = kJoined;
  bool cleanup = false;
  std::string mark, space, prefix;
};

// How answers are taken apart (segments.h).
struct AnswerForm {
  bool channels = false, thinks = false;
  int32_t calls = -1;
  std::vector<int32_t> markers, call_markers;  // special tokens
};

struct Proof {
  std::string text;
  std::vector<int32_t> ids;
  std::string shown;
};

struct SamplingDefaults {
  double temperature = 0, top_k = 0, top_p = 1, min_p = 0, repeat_penalty = 1;
};

struct TextTables {
  int32_t kind = kByteLevel, unknown = -1, flags = 0, word_set = -1, longest_word = 0;
  std::string within_word;
  std::vector<uint32_t> offsets;
  std::string texts;
  std::vector<uint32_t> sorted;
  std::vector<Merge> merges;
  std::vector<double> scores;
  double lowest_score = 0;
  std::vector<CodeRange> ranges;
  std::vector<uint32_t> sets;
  std::vector<std::array<uint64_t, 2>> ascii;  // which of the first 128 code points are in each set
  std::vector<Instruction> code;
  std::vector<std::vector<uint32_t>> words;  // code points
  std::vector<Step> changes, cuts;
  DecoderForm decoder;
  AnswerForm answers;
  std::vector<AddedToken> added;
  std::vector<int32_t> before, behind;
  std::vector<Proof> proofs;
  std::optional<NormalForm> normal;
  std::vector<CharacterMap> maps;
  Clusters clusters;
  std::optional<ChatForm> chat;
  std::optional<ToolForm> tools;
  SamplingDefaults sampling;

  int64_t count() const { return static_cast<int64_t>(offsets.size()) - 1; }
  std::string_view text(int64_t id) const {
    const size_t at = static_cast<size_t>(id);
    return std::string_view(texts).substr(offsets[at], offsets[at + 1] - offsets[at]);
  }

  // nullptr and the reason, without the path.
  static std::unique_ptr<TextTables> read(const std::string& path, std::string* fault);
};

#endif  // MOEC_TEXT_TABLES_H_
