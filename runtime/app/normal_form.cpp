#include "normal_form.h"

#include <algorithm>
#include <tuple>

#include "table_reader.h"

namespace {

// Hangul syllables are composed of their letters by arithmetic (Unicode 3.12).
constexpr uint32_t kSyllable = 0xAC00, kLead = 0x1100, kVowel = 0x1161, kTail = 0x11A7;
constexpr uint32_t kLeads = 19, kVowels = 21, kTails = 28;

}  // namespace

bool NormalForm::read(TableReader& part) {
  const auto whole = part.number<uint32_t>(), classes = part.number<uint32_t>(), pairs = part.number<uint32_t>();
  decompositions_ = part.numbers<Decomposition>(whole);
  classes_ = part.numbers<Class>(classes);
  pairs_ = part.numbers<Pair>(pairs);
  const auto fits = [](uint32_t code) { return code <= 0x10FFFF; };
  for (const Decomposition& entry : decompositions_)
    if (!std::all_of(entry.parts.begin(), entry.parts.end(), fits)) return false;
  for (const Pair& entry : pairs_)
    if (!fits(entry.sum)) return false;
  return part.ok();
}

void NormalForm::decompose(uint32_t code, std::vector<uint32_t>* found) const {
  if (code >= kSyllable && code < kSyllable + kLeads * kVowels * kTails) {
    const uint32_t index = code - kSyllable;
    found->push_back(kLead + index / (kVowels * kTails));
    found->push_back(kVowel + index / kTails % kVowels);
    if (index % kTails != 0) found->push_back(kTail + index % kTails);
    return;
  }
  const auto less = [](const Decomposition& entry, uint32_t wanted) { return entry.code < wanted; };
  const auto at = std::lower_bound(decompositions_.begin(), decompositions_.end(), code, less);
  if (at == decompositions_.end() || at->code != code) return found->push_back(code);
  for (const uint32_t part : at->parts)
    if (part != 0) found->push_back(part);
}

uint32_t NormalForm::combining(uint32_t code) const {
  const auto less = [](uint32_t wanted, const Class& entry) { return wanted < entry.first; };
  const auto at = std::upper_bound(classes_.begin(), classes_.end(), code, less);
  return at != classes_.begin() && code <= std::prev(at)->last ? std::prev(at)->combining : 0;
}

uint32_t NormalForm::sum(uint32_t first, uint32_t second) const {
  if (first >= kLead && first < kLead + kLeads && second >= kVowel && second < kVowel + kVowels)
    return kSyllable + ((first - kLead) * kVowels + second - kVowel) * kTails;
  const bool open = first >= kSyllable && first < kSyllable + kLeads * kVowels * kTails && (first - kSyllable) % kTails == 0;
  if (open && second > kTail && second < kTail + kTails) return first + second - kTail;
  const auto wanted = std::make_tuple(first, second);
  const auto less = [](const Pair& entry, const std::tuple<uint32_t, uint32_t>& to) { return std::tie(entry.first, entry.second) < to; };
  const auto at = std::lower_bound(pairs_.begin(), pairs_.end(), wanted, less);
  return at != pairs_.end() && std::tie(at->first, at->second) == wanted ? at->sum : 0;
}

std::vector<uint32_t> NormalForm::decomposed(const std::vector<uint32_t>& codes) const {
  std::vector<uint32_t> classes;
  return ordered(codes, &classes);
}

// Decomposed, the marks after each character in order; and the class of each.
std::vector<uint32_t> NormalForm::ordered(const std::vector<uint32_t>& codes, std::vector<uint32_t>* of) const {
  std::vector<uint32_t> found;
  found.reserve(codes.size());
  for (const uint32_t code : codes) decompose(code, &found);
  std::vector<uint32_t>& classes = *of;
  classes.resize(found.size());
  std::transform(found.begin(), found.end(), classes.begin(), [&](uint32_t code) { return combining(code); });
  for (size_t begin = 0; begin < found.size();) {  // sort the marks after a starter by class, equal ones in order
    size_t end = begin + 1;
    if (classes[begin] != 0) {
      std::vector<std::pair<uint32_t, uint32_t>> marks = {{classes[begin], found[begin]}};
      for (; end < found.size() && classes[end] != 0; ++end) marks.emplace_back(classes[end], found[end]);
      std::stable_sort(marks.begin(), marks.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
      for (size_t i = 0; i < marks.size(); ++i) std::tie(classes[begin + i], found[begin + i]) = marks[i];
    }
    begin = end;
  }
  return found;
}

std::vector<uint32_t> NormalForm::composed(const std::vector<uint32_t>& codes) const {
  std::vector<uint32_t> classes, found = ordered(codes, &classes);
  size_t kept = 0, starter = found.size();
  uint32_t last = 0;  // class of the last mark kept after the starter
  for (size_t at = 0; at < found.size(); ++at) {
    const bool blocked = starter == found.size() || (kept > starter + 1 && last >= classes[at]);
    const uint32_t made = blocked ? 0 : sum(found[starter], found[at]);
    if (made != 0) {
      found[starter] = made;
      continue;
    }
    if (classes[at] == 0) starter = kept;
    last = classes[at];
    found[kept++] = found[at];
  }
  found.resize(kept);
  return found;
}
