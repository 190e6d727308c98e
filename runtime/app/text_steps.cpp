#include "text_steps.h"

#include <algorithm>
#include <tuple>
#include <utility>

namespace {

constexpr int kMostNested = 16;  // lookaheads inside each other
// Most steps of an expression on a text; those of known families take about ten per character.
constexpr uint64_t kSteps = 10'000, kStepsPerCharacter = 512;
constexpr size_t kLargest = size_t{256} << 20;  // code points of a text after a step

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

std::string TextSteps::apply(const Step& step, Pieces* pieces) const {
  if (step.kind == kPrefix) {
    prefix(step, pieces);
    return "";
  }
  if (step.kind == kCompose) {
    if (!tables_.normal) return "damaged: no tables of normal form C";
    pieces->codes = tables_.normal->composed(pieces->codes);
    pieces->ends = {pieces->codes.size()};  // only whole texts are normalized
    return "";
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
      if (step.kind == kCut || step.kind == kCutBefore) cut();
      if (step.kind == kReplace) {
        const std::vector<uint32_t>& word = tables_.words[static_cast<size_t>(step.word)];
        kept.insert(kept.end(), word.begin(), word.end());
        if (kept.size() > kLargest) return "the tokenizer makes a text of more than 256 million characters of this one";
      } else {
        keep(at, static_cast<size_t>(stop));
      }
      if (step.kind != kReplace && step.kind != kCutBefore) cut();
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
