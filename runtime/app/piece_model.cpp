#include "piece_model.h"

#include <algorithm>
#include <cstdio>
#include <queue>
#include <tuple>
#include <utility>

#include "utf8.h"

namespace {

constexpr double kUnknownPenalty = 10;  // an unknown character costs as much more than the worst token
// Most tokens' beginnings that are compared; those of known vocabularies take less than 100 per byte.
constexpr uint64_t kSteps = 10'000, kStepsPerByte = 512;
constexpr char kTooManySteps[] = "the tokenizer's vocabulary takes too many steps on this text";
constexpr char kNoUnknown[] = "the tokenizer has no token for a word of this text, and none for unknown ones";

}  // namespace

PieceModel::PieceModel(const TextTables& tables) : tables_(tables) {
  for (size_t byte = 0; byte < 256; ++byte) {
    const char letter = static_cast<char>(byte);
    char name[8];
    std::snprintf(name, sizeof name, "<0x%02X>", static_cast<unsigned>(byte));
    bytes_[byte] = find_token(tables.kind == kByteLevel ? std::string_view(&letter, 1) : std::string_view(name));
  }
}

int PieceModel::byte_of(int32_t id) const {
  const std::string_view text = tables_.text(id);
  unsigned byte = 0;
  if (text.size() != 6 || text.substr(0, 3) != "<0x" || text[5] != '>') return -1;
  for (const char letter : text.substr(3, 2)) {
    const int digit = hex_digit(letter);
    if (digit < 0) return -1;
    byte = byte * 16 + static_cast<unsigned>(digit);
  }
  return static_cast<int>(byte);
}

std::string PieceModel::encode(std::string_view piece, std::vector<int32_t>* ids) const {
  if (tables_.kind == kUnigram) return best_path(piece, ids);
  if (tables_.kind == kWordPiece) return longest_first(piece, ids);
  if (tables_.kind == kWordLevel) {
    const int32_t found = find_token(piece);
    if (found < 0 && tables_.unknown < 0) return kNoUnknown;
    ids->push_back(found < 0 ? tables_.unknown : found);
    return "";
  }
  merge(piece, ids);
  return "";
}

int32_t PieceModel::find_token(std::string_view piece) const {
  const auto& sorted = tables_.sorted;
  const auto less = [&](uint32_t id, std::string_view wanted) { return tables_.text(id) < wanted; };
  const auto found = std::lower_bound(sorted.begin(), sorted.end(), piece, less);
  return found != sorted.end() && tables_.text(*found) == piece ? static_cast<int32_t>(*found) : -1;
}

void PieceModel::narrow(char letter, Beginnings* tokens) const {
  const int wanted = static_cast<uint8_t>(letter);
  const auto at = [&](uint32_t id) {  // -1 for a token that ends before
    const std::string_view text = tables_.text(id);
    return text.size() <= tokens->length ? -1 : static_cast<int>(static_cast<uint8_t>(text[tokens->length]));
  };
  tokens->low = std::lower_bound(tokens->low, tokens->high, wanted, [&](uint32_t id, int of) { return at(id) < of; });
  tokens->high = std::upper_bound(tokens->low, tokens->high, wanted, [&](int of, uint32_t id) { return of < at(id); });
  ++tokens->length;
}

int32_t PieceModel::token_of(const Beginnings& tokens) const {
  const bool there = tokens.low != tokens.high && tables_.text(*tokens.low).size() == tokens.length;
  return there ? static_cast<int32_t>(*tokens.low) : -1;
}

const Merge* PieceModel::find_merge(int32_t left, int32_t right) const {
  const auto pair = std::make_tuple(static_cast<uint32_t>(left), static_cast<uint32_t>(right));
  const auto less = [](const Merge& m, const std::tuple<uint32_t, uint32_t>& wanted) { return std::tie(m.left, m.right) < wanted; };
  const auto found = std::lower_bound(tables_.merges.begin(), tables_.merges.end(), pair, less);
  const bool there = found != tables_.merges.end() && std::tie(found->left, found->right) == pair;
  return there ? &*found : nullptr;
}

// The tokens of a text's bytes; nothing unless there is one for each.
bool PieceModel::append_bytes(std::string_view text, std::vector<int32_t>* ids) const {
  const auto token = [&](char letter) { return bytes_[static_cast<uint8_t>(letter)]; };
  if (!(tables_.flags & kByteFallback)) return false;
  if (std::any_of(text.begin(), text.end(), [&](char letter) { return token(letter) < 0; })) return false;
  for (const char letter : text) ids->push_back(token(letter));
  return true;
}

// What is merged: bytes, or characters. A character that the vocabulary lacks is its bytes or the unknown token, of which
// neighbours may be one; that one comes before the next character that is known.
std::vector<int32_t> PieceModel::symbols(std::string_view piece) const {
  std::vector<int32_t> found;
  found.reserve(piece.size());
  if (tables_.kind == kByteLevel) {
    for (const char letter : piece) {
      const int32_t id = bytes_[static_cast<uint8_t>(letter)];
      if (id >= 0) found.push_back(id);  // a byte that the vocabulary lacks is left out
    }
    return found;
  }
  bool unknown = false;
  for (size_t at = 0; at < piece.size();) {
    const size_t begin = at;
    next_code(piece, &at);
    const std::string_view letter = piece.substr(begin, at - begin);
    const int32_t id = find_token(letter);
    if (id >= 0) {
      if (unknown) found.push_back(tables_.unknown);
      unknown = false;
      found.push_back(id);
      continue;
    }
    if (append_bytes(letter, &found) || tables_.unknown < 0) continue;
    if (unknown && !(tables_.flags & kFuseUnknown)) found.push_back(tables_.unknown);
    unknown = true;
  }
  if (unknown) found.push_back(tables_.unknown);
  return found;
}

// Byte-pair encoding: the neighbours of the lowest rank are merged, the first pair of equals, until no pair can be.
void PieceModel::merge(std::string_view piece, std::vector<int32_t>* ids) const {
  if (tables_.flags & kWholePieces) {
    const int32_t whole = find_token(piece);
    if (whole >= 0) return ids->push_back(whole);
  }
  struct Symbol {
    int32_t id;
    int64_t before, behind;
  };
  std::vector<Symbol> symbols;
  for (const int32_t id : this->symbols(piece)) {
    const auto at = static_cast<int64_t>(symbols.size());
    symbols.push_back({id, at - 1, at + 1});
  }
  if (symbols.empty()) return;
  symbols.back().behind = -1;
  using Candidate = std::tuple<uint32_t, int64_t, uint32_t>;  // rank, place, what it makes
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> candidates;
  const auto consider = [&](int64_t at) {
    if (at < 0 || symbols[static_cast<size_t>(at)].behind < 0) return;
    const Symbol& left = symbols[static_cast<size_t>(at)];
    const Merge* found = find_merge(left.id, symbols[static_cast<size_t>(left.behind)].id);
    if (found) candidates.emplace(found->rank, at, found->made);
  };
  for (size_t at = 0; at < symbols.size(); ++at) consider(static_cast<int64_t>(at));
  while (!candidates.empty()) {
    const auto [rank, at, made] = candidates.top();
    candidates.pop();
    Symbol& left = symbols[static_cast<size_t>(at)];
    if (left.id < 0 || left.behind < 0) continue;
    Symbol& right = symbols[static_cast<size_t>(left.behind)];
    const Merge* found = find_merge(left.id, right.id);
    if (!found || found->rank != rank || found->made != made) continue;  // one of the two was merged meanwhile
    left.id = static_cast<int32_t>(made);
    left.behind = right.behind;
    right.id = -1;
    if (left.behind >= 0) symbols[static_cast<size_t>(left.behind)].before = at;
    consider(at);
    consider(left.before);
  }
  for (int64_t at = 0; at >= 0; at = symbols[static_cast<size_t>(at)].behind) ids->push_back(symbols[static_cast<size_t>(at)].id);
}

// WordPiece: the longest token that the word begins with, then the longest of those within words. A word that cannot be taken
// apart so, or is too long, is the unknown token.
std::string PieceModel::longest_first(std::string_view piece, std::vector<int32_t>* ids) const {
  int64_t characters = 0;
  for (size_t at = 0; at < piece.size(); ++characters) next_code(piece, &at);
  const size_t before = ids->size();
  Beginnings within = all();
  for (const char letter : tables_.within_word) narrow(letter, &within);
  uint64_t steps = kSteps + kStepsPerByte * piece.size();
  bool known = characters <= tables_.longest_word;
  for (size_t begin = 0; known && begin < piece.size();) {
    Beginnings tokens = begin == 0 ? all() : within;
    int32_t longest = -1;
    size_t behind = begin;
    for (size_t end = begin; tokens.low != tokens.high && end < piece.size(); ++end) {
      if (steps-- == 0) return kTooManySteps;
      narrow(piece[end], &tokens);
      const int32_t id = token_of(tokens);
      if (id < 0) continue;
      longest = id;
      behind = end + 1;
    }
    known = longest >= 0;
    if (known) ids->push_back(longest);
    begin = behind;
  }
  if (known) return "";
  if (tables_.unknown < 0) return kNoUnknown;
  ids->resize(before);
  ids->push_back(tables_.unknown);
  return "";
}

// Unigram: the tokens with the greatest sum of scores, of equal sums the one that was found first. Neighbouring unknown
// characters are one text, and that text is its bytes where the model falls back to them.
std::string PieceModel::best_path(std::string_view piece, std::vector<int32_t>* ids) const {
  struct Node {
    double score = 0;
    int64_t begin = -1;
    int32_t id = -1;
  };
  std::vector<Node> nodes(piece.size() + 1);
  const auto reach = [&](size_t end, size_t begin, int32_t id, double score) {
    if (nodes[end].begin < 0 || score > nodes[end].score) nodes[end] = {score, static_cast<int64_t>(begin), id};
  };
  uint64_t steps = kSteps + kStepsPerByte * piece.size();
  for (size_t begin = 0; begin < piece.size();) {
    size_t behind = begin;
    next_code(piece, &behind);
    bool known = false;
    Beginnings tokens = all();
    for (size_t end = begin; tokens.low != tokens.high && end < piece.size(); ++end) {
      if (steps-- == 0) return kTooManySteps;
      narrow(piece[end], &tokens);
      const int32_t id = token_of(tokens);
      if (id < 0) continue;
      reach(end + 1, begin, id, tables_.scores[static_cast<size_t>(id)] + nodes[begin].score);
      known = known || end + 1 == behind;
    }
    if (!known) {
      if (tables_.unknown < 0) return "the tokenizer has no token for a character of this text, and none for unknown ones";
      reach(behind, begin, tables_.unknown, tables_.lowest_score - kUnknownPenalty + nodes[begin].score);
    }
    begin = behind;
  }
  std::vector<std::pair<size_t, size_t>> parts;  // from the last to the first
  bool joins = false;
  for (size_t end = piece.size(); end > 0;) {
    const Node& node = nodes[end];
    const auto begin = static_cast<size_t>(node.begin);
    const bool unknown = node.id == tables_.unknown && tables_.unknown >= 0;
    if (unknown && joins) {
      parts.back().first = begin;
    } else {
      parts.emplace_back(begin, end);
    }
    joins = unknown;
    end = begin;
  }
  std::reverse(parts.begin(), parts.end());
  for (const auto& [begin, end] : parts) {
    const std::string_view text = piece.substr(begin, end - begin);
    const int32_t id = find_token(text);
    if (id >= 0) {
      ids->push_back(id);
    } else if (!append_bytes(text, ids)) {
      ids->push_back(tables_.unknown);
    }
  }
  return "";
}
