#include "text_steps.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "utf8.h"

namespace {

constexpr int kMostNested = 16;  // lookaheads inside each other
// Most steps of an expression on a text; those of known families take about ten per character.
constexpr uint64_t kSteps = 10'000, kStepsPerCharacter = 512;
constexpr size_t kOpen = 10'000, kOpenPerCharacter = 16;  // alternatives that wait to be tried; loops of known families have one
constexpr size_t kLargest = size_t{256} << 20;  // code points of a text after a step
constexpr char kTooLarge[] = "the tokenizer makes a text of more than 256 million characters of this one";

}  // namespace

bool TextSteps::in_set(int32_t set, uint32_t code) const {
  const auto at = static_cast<size_t>(set);
  if (code < 128) return tables_.ascii[at][code / 64] >> (code % 64) & 1;
  const auto begin = tables_.ranges.begin() + tables_.sets[at], end = tables_.ranges.begin() + tables_.sets[at + 1];
  const auto found = std::upper_bound(begin, end, code, [](uint32_t c, const CodeRange& range) { return c < range.first; });
  return found != begin && code <= std::prev(found)->last;
}

struct TextSteps::Matching {
  const std::vector<uint32_t>& codes;
  size_t end;  // of the piece: nothing behind it is matched
  uint64_t steps;
  bool endless = false;
};

// Where a match of the expression that begins at `begin` ends, -1 for none: what a backtracking matcher finds first.
int64_t TextSteps::match(Matching* state, int32_t begin, size_t at, int depth) const {
  if (depth > kMostNested) state->endless = true;
  std::vector<std::pair<int32_t, size_t>> open;  // alternatives, tried when a path fails
  int32_t pc = begin;
  for (;;) {
    if (state->endless || state->steps-- == 0) {
      state->endless = true;
      return -1;
    }
    const Instruction& now = tables_.code[static_cast<size_t>(pc)];
    bool failed = false;
    switch (now.op) {
      case kChar:
        failed = at >= state->end || !in_set(now.a, state->codes[at]);
        ++at;
        ++pc;
        break;
      case kSplit:
        open.emplace_back(now.b, at);
        state->endless = open.size() > kOpen + kOpenPerCharacter * state->codes.size();
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

// Inserts a text before every piece, or before the first one.
void TextSteps::prefix(const Step& step, Pieces* pieces) const {
  const std::vector<uint32_t>& word = tables_.words[static_cast<size_t>(step.word)];
  Pieces made;
  size_t begin = 0;
  for (const size_t end : pieces->ends) {
    const auto from = pieces->codes.begin() + static_cast<std::ptrdiff_t>(begin);
    const auto to = pieces->codes.begin() + static_cast<std::ptrdiff_t>(end);
    const bool there = step.when != kAlways && end - begin >= word.size() && std::equal(word.begin(), word.end(), from);
    const bool elsewhere = step.when == kAtTheStart && !(pieces->at_start && begin == 0);
    if (!there && !elsewhere && begin < end) made.codes.insert(made.codes.end(), word.begin(), word.end());
    made.codes.insert(made.codes.end(), from, to);
    made.ends.push_back(made.codes.size());
    begin = end;
  }
  pieces->codes.swap(made.codes);
  pieces->ends.swap(made.ends);
}

// Characters, or clusters of them, become what a table has for them.
void TextSteps::mapped(const Step& step, std::vector<uint32_t>* codes) const {
  const CharacterMap& map = tables_.maps[static_cast<size_t>(step.word)];
  const uint32_t* text = codes->data();
  const size_t size = codes->size();
  std::vector<uint32_t> made;
  made.reserve(size);
  for (size_t begin = 0; begin < size && made.size() <= kLargest;) {
    const size_t end = step.when == kByClusters ? tables_.clusters.end(*codes, begin) : begin + 1;
    size_t bytes = 0;
    for (size_t at = begin; at < end && bytes <= CharacterMap::kLongest; ++at) bytes += code_size(text[at]);
    const bool whole = end > begin + 1 && bytes <= CharacterMap::kLongest && map.append(text + begin, text + end, &made);
    for (size_t at = begin; !whole && at < end && made.size() <= kLargest; ++at)
      if (!map.append(text + at, text + at + 1, &made)) made.push_back(text[at]);
    begin = end;
  }
  codes->swap(made);
}

// Steps that change a whole text, not pieces of one.
std::string TextSteps::whole(const Step& step, std::vector<uint32_t>* codes) const {
  if (step.kind == kMapped) {
    mapped(step, codes);
  } else if (step.kind == kStrip) {
    const auto black = [](uint32_t code) { return !is_white(code); };
    if (step.when & kAtEnd) codes->erase(std::find_if(codes->rbegin(), codes->rend(), black).base(), codes->end());
    if (step.when & kAtBegin) codes->erase(codes->begin(), std::find_if(codes->begin(), codes->end(), black));
  } else {
    if (!tables_.normal) return "damaged: no tables of normal form C";
    *codes = step.kind == kCompose ? tables_.normal->composed(*codes) : tables_.normal->decomposed(*codes);
  }
  return codes->size() > kLargest ? kTooLarge : "";
}

std::string TextSteps::apply(const Step& step, Pieces* pieces) const {
  if (step.kind == kPrefix) {
    prefix(step, pieces);
    return "";
  }
  if (step.kind == kCompose || step.kind == kMapped || step.kind == kDecompose || step.kind == kStrip) {
    const std::string fault = whole(step, &pieces->codes);
    pieces->ends = {pieces->codes.size()};  // only whole texts are normalized
    return fault;
  }
  const std::vector<uint32_t>& codes = pieces->codes;
  std::vector<uint32_t> kept;
  std::vector<size_t> ends;
  Matching state{codes, 0, kSteps + kStepsPerCharacter * codes.size()};
  const auto keep = [&](size_t from, size_t to) {
    kept.insert(kept.end(), codes.begin() + static_cast<std::ptrdiff_t>(from), codes.begin() + static_cast<std::ptrdiff_t>(to));
  };
  const auto cut = [&] {
    if (kept.size() > (ends.empty() ? 0 : ends.back())) ends.push_back(kept.size());
  };
  const bool inserts = step.kind == kReplace || step.kind == kSurround;
  const auto insert = [&](int32_t word) {
    const std::vector<uint32_t>& codes_of = tables_.words[static_cast<size_t>(word)];
    kept.insert(kept.end(), codes_of.begin(), codes_of.end());
  };
  size_t begin = 0;
  for (const size_t end : pieces->ends) {
    state.end = end;
    for (size_t at = begin; at < end;) {
      const int64_t stop = match(&state, step.begin, at, 0);
      if (state.endless) return "the tokenizer's expressions take too many steps on this text";
      if (stop <= static_cast<int64_t>(at)) {  // no match, or an empty one, which splits nothing
        ++at;
        continue;
      }
      if (step.kind != kCutDrop) keep(begin, at);
      if (step.kind == kCut || step.kind == kCutBefore || step.kind == kCutRemove) cut();
      if (inserts) insert(step.word);
      if (step.kind != kReplace && step.kind != kCutRemove) keep(at, static_cast<size_t>(stop));
      if (step.kind == kSurround) insert(step.word);
      if (kept.size() > kLargest) return kTooLarge;
      if (!inserts && step.kind != kCutBefore) cut();
      begin = at = static_cast<size_t>(stop);
    }
    if (step.kind != kCutDrop) keep(begin, end);
    cut();
    begin = end;
  }
  pieces->codes.swap(kept);
  pieces->ends.swap(ends);
  return "";
}
