// Characters and grapheme clusters that stand for other texts: SentencePiece's table (`Precompiled`), lower case.
#ifndef MOEC_CHARACTER_MAP_H_
#define MOEC_CHARACTER_MAP_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

class TableReader;

// Texts by the bytes that something begins with. No key is the beginning of another.
class CharacterMap {
 public:
  static constexpr size_t kLongest = 5;  // bytes of a key
  // u32 entries and code points; u64 key, its first byte the highest, u32 where its text begins, u32 how long it is; the texts
  bool read(TableReader& part);
  // Appends what stands for code points of at most 8 bytes in UTF-8; false where nothing does.
  bool append(const uint32_t* begin, const uint32_t* end, std::vector<uint32_t>* found) const;

 private:
  struct Entry {
    uint64_t key;
    uint32_t offset, size;
  };
  std::vector<Entry> entries_;  // by key
  std::vector<uint32_t> texts_;
};

// Extended grapheme clusters (Unicode's Annex 29). Pairs of regional indicators are none here: tables are asked only for clusters
// of less than six bytes, and a cluster with a regional indicator is longer in either case, or has that character alone.
class Clusters {
 public:
  // u32 x 3, ascending: first and last code point, flags.
  bool read(TableReader& part);
  // Where the cluster ends that begins at `begin`.
  size_t end(const std::vector<uint32_t>& codes, size_t begin) const;

 private:
  struct Range {
    uint32_t first, last, flags;
  };
  uint32_t flags_of(uint32_t code) const;

  std::vector<Range> ranges_;
  std::array<uint32_t, 128> ascii_{};
};

#endif  // MOEC_CHARACTER_MAP_H_
