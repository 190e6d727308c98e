#include "character_map.h"

#include <algorithm>

#include "table_reader.h"
#include "utf8.h"

namespace {

constexpr uint32_t kLongestText = 64;  // code points that stand for a character; SentencePiece has up to 18
constexpr uint32_t kLastCode = 0x10FFFF, kLineFeed = 10, kReturn = 13, kJoiner = 0x200D;
// Hangul's syllables: those that end in a vowel are at multiples of 28.
constexpr uint32_t kSyllable = 0xAC00, kLastSyllable = 0xD7A3, kTails = 28;
// Classes of characters; assistant/character_map.py has the same.
constexpr uint32_t kJoins = 1, kPrepends = 2, kBreaks = 4, kPictograph = 8, kExtends = 16, kConsonant = 32, kLinker = 64, kConjunct = 128;
constexpr uint32_t kLead = 256, kVowel = 512, kTrail = 1024, kOpenSyllable = 2048, kClosedSyllable = 4096;

// Code points as the bytes of UTF-8, the first the highest: numbers are ordered as the texts are.
uint64_t packed(const uint32_t* begin, const uint32_t* end) {
  uint64_t key = 0;
  uint32_t left = 64;
  const auto put = [&](uint32_t byte) {
    left -= 8;
    key |= static_cast<uint64_t>(byte) << left;
  };
  for (; begin < end && left >= 8 * code_size(*begin); ++begin) {
    const uint32_t code = *begin, size = code_size(code);
    put(size == 1 ? code : (0xF00u >> size & 0xFF) | code >> (6 * (size - 1)));
    for (uint32_t at = size - 1; at-- > 0;) put(0x80 | (code >> (6 * at) & 0x3F));
  }
  return key;
}

// Which bits of a text a key is compared with: those of its bytes, none of which is zero.
uint64_t mask_of(uint64_t key) {
  uint64_t mask = 0;
  for (uint32_t shift = 64; shift > 0 && key >> (shift - 8) & 0xFF; shift -= 8) mask |= uint64_t{0xFF} << (shift - 8);
  return mask;
}

}  // namespace

bool CharacterMap::read(TableReader& part) {
  const auto entries = part.number<uint32_t>(), codes = part.number<uint32_t>();
  entries_ = part.numbers<Entry>(entries);
  texts_ = part.numbers<uint32_t>(codes);
  uint64_t before = 0, mask = ~uint64_t{0};
  for (const Entry& entry : entries_) {
    const uint64_t covered = mask_of(entry.key);
    if (entry.key <= before || (entry.key & mask) == before || (entry.key & ~covered) != 0 || covered << 8 * kLongest != 0) return false;
    if (entry.size > kLongestText || entry.offset > texts_.size() || entry.size > texts_.size() - entry.offset) return false;
    before = entry.key;
    mask = covered;
  }
  for (const uint32_t code : texts_)
    if (code > kLastCode || (code >= 0xD800 && code < 0xE000)) return false;
  return part.ok();
}

bool CharacterMap::append(const uint32_t* begin, const uint32_t* end, std::vector<uint32_t>* found) const {
  const uint64_t key = packed(begin, end);
  const auto less = [](uint64_t wanted, const Entry& entry) { return wanted < entry.key; };
  const auto behind = std::upper_bound(entries_.begin(), entries_.end(), key, less);
  if (behind == entries_.begin()) return false;
  const Entry& entry = *std::prev(behind);
  if ((key & mask_of(entry.key)) != entry.key) return false;
  const auto from = texts_.begin() + entry.offset;
  found->insert(found->end(), from, from + entry.size);
  return true;
}

bool Clusters::read(TableReader& part) {
  ranges_ = part.rest<Range>();
  for (size_t at = 0; at < ranges_.size(); ++at) {
    const Range& range = ranges_[at];
    if (range.first > range.last || range.last > kLastCode || (at > 0 && range.first <= ranges_[at - 1].last)) return false;
  }
  for (uint32_t code = 0; code < ascii_.size(); ++code) {
    ascii_[code] = 0;
    for (const Range& range : ranges_)
      if (code >= range.first && code <= range.last) ascii_[code] = range.flags;
  }
  return part.ok();
}

uint32_t Clusters::flags_of(uint32_t code) const {
  if (code < ascii_.size()) return ascii_[code];
  if (code >= kSyllable && code <= kLastSyllable) return (code - kSyllable) % kTails == 0 ? kOpenSyllable : kClosedSyllable;
  const auto less = [](uint32_t wanted, const Range& range) { return wanted < range.first; };
  const auto behind = std::upper_bound(ranges_.begin(), ranges_.end(), code, less);
  return behind != ranges_.begin() && code <= std::prev(behind)->last ? std::prev(behind)->flags : 0;
}

size_t Clusters::end(const std::vector<uint32_t>& codes, size_t begin) const {
  uint32_t before = flags_of(codes[begin]);
  if (codes[begin] == kReturn && begin + 1 < codes.size() && codes[begin + 1] == kLineFeed) return begin + 2;
  if (before & kBreaks) return begin + 1;
  enum { kNone, kBegun, kReady };  // how far the text is before the second of two pictographs, or of two consonants
  int pictures = before & kPictograph ? kBegun : kNone, consonants = before & kConsonant ? kBegun : kNone;
  size_t at = begin + 1;
  for (; at < codes.size(); ++at) {
    const uint32_t now = flags_of(codes[at]);
    if (now & kBreaks) break;
    const bool syllable = (before & kLead && now & (kLead | kVowel | kOpenSyllable | kClosedSyllable)) ||
                          (before & (kVowel | kOpenSyllable) && now & (kVowel | kTrail)) || (before & (kTrail | kClosedSyllable) && now & kTrail);
    const bool pair = (pictures == kReady && now & kPictograph) || (consonants == kReady && now & kConsonant);
    if (!syllable && !pair && !(now & kJoins) && !(before & kPrepends)) break;
    if (now & kPictograph) {
      pictures = kBegun;
    } else if (pictures != kNone) {
      const bool begun = pictures == kBegun;
      pictures = begun && codes[at] == kJoiner ? kReady : begun && now & kExtends ? kBegun : kNone;
    }
    if (now & kConsonant) {
      consonants = kBegun;
    } else if (consonants != kNone) {
      consonants = now & kLinker ? kReady : now & kConjunct ? consonants : kNone;
    }
    before = now;
  }
  return at;
}
