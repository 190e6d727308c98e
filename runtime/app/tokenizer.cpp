#include "tokenizer.h"

#include <algorithm>
#include <queue>
#include <tuple>
#include <utility>

#include "utf8.h"

namespace {

constexpr int kMostNested = 16;  // lookaheads inside each other
// Most steps of an expression on a text; those of known families take about ten per character.
constexpr uint64_t kSteps = 10'000, kStepsPerCharacter = 512;

}  // namespace

Tokenizer::Tokenizer(std::unique_ptr<TextTables> tables) : tables_(std::move(tables)) {
  for (size_t byte = 0; byte < 256; ++byte) {
    const char letter = static_cast<char>(byte);
    bytes_[byte] = find_token(std::string_view(&letter, 1));
  }
  is_special_.resize(static_cast<size_t>(tables_->count()));
  for (const AddedToken& token : tables_->added) {
    const std::string_view text = tables_->text(token.id);
    if (text.empty()) continue;
    if (token.flags & kSpecial) {
      is_special_[static_cast<size_t>(token.id)] = 1;
      special_.emplace_back(text);
    }
    added_[token.flags & kNormalized ? 1 : 0][static_cast<uint8_t>(text[0])].push_back(token);
  }
  const auto longer = [&](const AddedToken& a, const AddedToken& b) {
    return tables_->text(a.id).size() > tables_->text(b.id).size();
  };
  for (auto& stage : added_)
    for (auto& tokens : stage) std::stable_sort(tokens.begin(), tokens.end(), longer);
  std::stable_sort(special_.begin(), special_.end(), [](const auto& a, const auto& b) { return a.size() > b.size(); });
}

std::string Tokenizer::check() const {
  if (tables_->proofs.empty()) return "there is no text to compare";
  for (const Proof& proof : tables_->proofs) {
    std::vector<int32_t> ids;
    std::string fault = encode(proof.text, false, &ids), bytes;
    if (!fault.empty()) return fault;
    if (ids != proof.ids) return "other ids than the model's tokenizer gives for: " + proof.text.substr(0, 60);
    for (const int32_t id : ids) decode(id, false, &bytes);
    Characters characters;
    std::string shown = characters.push(bytes);
    shown += characters.finish();
    if (shown != proof.shown) return "another text than the model's tokenizer gives for the ids of: " + proof.text.substr(0, 60);
  }
  return "";
}

void Tokenizer::decode(int32_t id, bool special, std::string* bytes) const {
  if (id < 0 || id >= tables_->count()) return;
  if (special || !is_special_[static_cast<size_t>(id)]) *bytes += tables_->text(id);
}

std::string Tokenizer::encode(std::string_view text, bool as_text, std::vector<int32_t>* ids) const {
  const size_t valid = valid_utf8(text);
  if (valid < text.size()) return "the text is not UTF-8 at byte " + std::to_string(valid);
  return encode_added(text, as_text, false, ids);
}

// Added tokens are found before a text is split, at each place the longest: first those that match the text as it is, then, in
// the text between them, those that match it normalized.
std::string Tokenizer::encode_added(std::string_view text, bool as_text, bool normalized, std::vector<int32_t>* ids) const {
  const auto rest = [&](std::string_view part) {
    if (part.empty()) return std::string();
    if (normalized) return encode_part(part, ids);
    return encode_added(tables_->normal ? normal(part) : std::string(part), as_text, true, ids);
  };
  size_t begin = 0;
  for (size_t at = 0; at < text.size();) {
    const AddedToken* found = nullptr;
    for (const AddedToken& token : added_[normalized][static_cast<uint8_t>(text[at])])
      if (text.compare(at, tables_->text(token.id).size(), tables_->text(token.id)) == 0) {
        found = &token;
        break;
      }
    if (!found) {
      ++at;
      continue;
    }
    const size_t end = at + tables_->text(found->id).size();
    if (!(as_text && (found->flags & kSpecial))) {
      std::string fault = rest(text.substr(begin, at - begin));
      if (!fault.empty()) return fault;
      ids->push_back(found->id);
      begin = end;
    }
    at = end;
  }
  return rest(text.substr(begin));
}

std::string Tokenizer::normal(std::string_view text) const {
  std::vector<uint32_t> codes;
  for (size_t at = 0; at < text.size();) codes.push_back(next_code(text, &at));
  std::string found;
  for (const uint32_t code : tables_->normal->composed(codes)) append_code(code, &found);
  return found;
}

std::string Tokenizer::encode_part(std::string_view text, std::vector<int32_t>* ids) const {
  std::vector<uint32_t> codes;
  for (size_t at = 0; at < text.size();) codes.push_back(next_code(text, &at));
  std::vector<size_t> ends = {codes.size()};  // of the pieces, in code points
  for (const CutStep& step : tables_->steps)
    if (!cut(step, &codes, &ends)) return "the tokenizer's expressions take too many steps on this text";
  std::string piece;
  size_t begin = 0;
  for (const size_t end : ends) {
    piece.clear();
    for (; begin < end; ++begin) append_code(codes[begin], &piece);
    merge(piece, ids);
  }
  return "";
}

bool Tokenizer::in_set(int32_t set, uint32_t code) const {
  const auto at = static_cast<size_t>(set);
  if (code < 128) return tables_->ascii[at][code / 64] >> (code % 64) & 1;
  const auto begin = tables_->ranges.begin() + tables_->sets[at], end = tables_->ranges.begin() + tables_->sets[at + 1];
  const auto found = std::upper_bound(begin, end, code, [](uint32_t c, const CodeRange& range) { return c < range.first; });
  return found != begin && code <= std::prev(found)->last;
}

struct Tokenizer::Matching {
  const std::vector<uint32_t>& codes;
  size_t end;  // of the piece: nothing behind it is matched
  uint64_t steps;
  bool endless = false;
};

// Where a match of the expression that begins at `begin` ends, -1 for none: what a backtracking matcher finds first.
int64_t Tokenizer::match(Matching* state, int32_t begin, size_t at, int depth) const {
  if (depth > kMostNested) state->endless = true;
  std::vector<std::pair<int32_t, size_t>> open;  // alternatives, tried when a path fails
  int32_t pc = begin;
  for (;;) {
    if (state->endless || state->steps-- == 0) {
      state->endless = true;
      return -1;
    }
    const Instruction& now = tables_->code[static_cast<size_t>(pc)];
    bool failed = false;
    switch (now.op) {
      case kChar:
        failed = at >= state->end || !in_set(now.a, state->codes[at]);
        ++at;
        ++pc;
        break;
      case kSplit:
        open.emplace_back(now.b, at);
        pc = now.a;
        break;
      case kJump:
        pc = now.a;
        break;
      case kMatch:
        return static_cast<int64_t>(at);
      case kLook:
        failed = (match(state, pc + 1, at, depth + 1) >= 0) == (now.a != 0);
        pc = now.b;
        break;
      default: {  // kAtomic
        const int64_t end = match(state, pc + 1, at, depth + 1);
        failed = end < 0;
        at = failed ? at : static_cast<size_t>(end);
        pc = now.a;
      }
    }
    if (!failed) continue;
    if (open.empty()) return -1;
    std::tie(pc, at) = open.back();
    open.pop_back();
  }
}

// Splits every piece into matches and the text between them; false if an expression takes too many steps.
bool Tokenizer::cut(const CutStep& step, std::vector<uint32_t>* codes, std::vector<size_t>* ends) const {
  std::vector<uint32_t> kept;
  std::vector<size_t> found;
  Matching state{*codes, 0, kSteps + kStepsPerCharacter * codes->size()};
  const auto keep = [&](size_t from, size_t to) {
    if (from == to) return;
    kept.insert(kept.end(), codes->begin() + static_cast<std::ptrdiff_t>(from), codes->begin() + static_cast<std::ptrdiff_t>(to));
    found.push_back(kept.size());
  };
  size_t begin = 0;
  for (const size_t end : *ends) {
    if (step.kind == kPrefixSpace) {
      if (begin < end && (*codes)[begin] != ' ') kept.push_back(' ');
      keep(begin, end);
      begin = end;
      continue;
    }
    state.end = end;
    for (size_t at = begin; at < end;) {
      const int64_t stop = match(&state, step.begin, at, 0);
      if (state.endless) return false;
      if (stop <= static_cast<int64_t>(at)) {  // no match, or an empty one, which splits nothing
        ++at;
        continue;
      }
      if (step.kind == kCut) keep(begin, at);
      keep(at, static_cast<size_t>(stop));
      begin = at = static_cast<size_t>(stop);
    }
    if (step.kind == kCut) keep(begin, end);
    begin = end;
  }
  codes->swap(kept);
  ends->swap(found);
  return true;
}

int32_t Tokenizer::find_token(std::string_view piece) const {
  const auto& sorted = tables_->sorted;
  const auto less = [&](uint32_t id, std::string_view wanted) { return tables_->text(id) < wanted; };
  const auto found = std::lower_bound(sorted.begin(), sorted.end(), piece, less);
  return found != sorted.end() && tables_->text(*found) == piece ? static_cast<int32_t>(*found) : -1;
}

const Merge* Tokenizer::find_merge(int32_t left, int32_t right) const {
  const auto pair = std::make_tuple(static_cast<uint32_t>(left), static_cast<uint32_t>(right));
  const auto less = [](const Merge& m, const std::tuple<uint32_t, uint32_t>& wanted) { return std::tie(m.left, m.right) < wanted; };
  const auto found = std::lower_bound(tables_->merges.begin(), tables_->merges.end(), pair, less);
  const bool there = found != tables_->merges.end() && std::tie(found->left, found->right) == pair;
  return there ? &*found : nullptr;
}

// Byte-pair encoding: the neighbours of the lowest rank are merged, the first pair of equals, until no pair can be.
void Tokenizer::merge(std::string_view piece, std::vector<int32_t>* ids) const {
  if (tables_->whole_pieces) {
    const int32_t whole = find_token(piece);
    if (whole >= 0) return ids->push_back(whole);
  }
  struct Symbol {
    int32_t id;
    int64_t before, behind;
  };
  std::vector<Symbol> symbols;
  symbols.reserve(piece.size());
  for (const char letter : piece) {
    const int32_t id = bytes_[static_cast<uint8_t>(letter)];
    const auto at = static_cast<int64_t>(symbols.size());
    if (id >= 0) symbols.push_back({id, at - 1, at + 1});  // a byte that the vocabulary lacks is left out
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
