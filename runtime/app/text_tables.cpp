#include "text_tables.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <string>

#include "file_bytes.h"
#include "table_reader.h"
#include "tool_calls.h"
#include "utf8.h"

namespace {

constexpr uint64_t kLargest = uint64_t{512} << 20;
constexpr size_t kMostTokens = size_t{1} << 24;
constexpr size_t kMostMaps = 4, kMostWords = 16, kLongestWord = 64, kMostAdded = size_t{1} << 20;
constexpr int32_t kMostStripped = 64;
constexpr size_t kMostSteps = 16, kMostProofs = 1024, kMostProofBytes = size_t{256} << 10;  // limits of what opening costs
constexpr uint32_t kLastCode = 0x10FFFF;

uint32_t crc32(const uint8_t* data, size_t size) {
  static const std::array<uint32_t, 256> table = [] {
    std::array<uint32_t, 256> made{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t value = i;
      for (int bit = 0; bit < 8; ++bit) value = value & 1 ? 0xEDB88320u ^ (value >> 1) : value >> 1;
      made[i] = value;
    }
    return made;
  }();
  uint32_t found = 0xFFFFFFFFu;
  for (size_t i = 0; i < size; ++i) found = table[(found ^ data[i]) & 255] ^ (found >> 8);
  return found ^ 0xFFFFFFFFu;
}

using Parts = std::map<std::string, TableReader>;

bool read_vocabulary(Parts& parts, TextTables* tables) {
  TableReader& info = parts.at("INFO");
  const auto count = static_cast<size_t>(std::max(info.number<int32_t>(), 0));
  tables->kind = info.number<int32_t>();
  tables->unknown = info.number<int32_t>();
  tables->flags = info.number<int32_t>();
  if (!info.at_end()) tables->word_set = info.number<int32_t>();
  tables->offsets = parts.at("OFFS").rest<uint32_t>();
  const std::vector<char> texts = parts.at("TEXT").rest<char>();
  tables->texts.assign(texts.begin(), texts.end());
  tables->sorted = parts.at("SORT").rest<uint32_t>();
  tables->merges = parts.at("MERG").rest<Merge>();
  tables->scores = parts.at("SCOR").rest<double>();
  if (tables->kind < kByteLevel || tables->kind > kWordLevel) return false;
  if (tables->unknown < -1 || tables->unknown >= static_cast<int64_t>(count)) return false;
  if (count < 1 || count > kMostTokens || tables->offsets.size() != count + 1) return false;
  if (tables->offsets.front() != 0 || tables->offsets.back() > tables->texts.size()) return false;
  if (!std::is_sorted(tables->offsets.begin(), tables->offsets.end())) return false;
  for (const uint32_t id : tables->sorted)
    if (id >= count) return false;
  for (const Merge& merge : tables->merges)
    if (merge.left >= count || merge.right >= count || merge.made >= count) return false;
  if (tables->kind == kUnigram) {  // tokens that have no score are added ones: pieces do not become them
    if (tables->scores.empty() || tables->scores.size() > count) return false;
    for (const double score : tables->scores)
      if (!std::isfinite(score)) return false;
    for (const uint32_t id : tables->sorted)
      if (id >= tables->scores.size()) return false;
    tables->lowest_score = *std::min_element(tables->scores.begin(), tables->scores.end());
  }
  if (const auto pieces = parts.find("PIEC"); pieces != parts.end()) {
    tables->longest_word = pieces->second.number<int32_t>();
    tables->within_word = pieces->second.string();
    if (!pieces->second.ok() || tables->within_word.size() > kLongestWord) return false;
  }
  TableReader& added = parts.at("ADDS");
  while (added.ok() && !added.at_end()) {
    AddedToken token;
    token.id = added.number<int32_t>();
    token.flags = added.number<int32_t>();
    token.text = added.string();
    token.own = added.string();
    if (token.id < 0 || static_cast<size_t>(token.id) >= count || tables->added.size() == kMostAdded) return false;
    tables->added.push_back(std::move(token));
  }
  if (!added.ok()) return false;
  return true;
}

bool read_maps(Parts& parts, TextTables* tables) {
  if (const auto part = parts.find("MAPS"); part != parts.end() && !part->second.at_end()) {
    const auto count = part->second.number<uint32_t>();
    if (count > kMostMaps) return false;
    tables->maps.resize(count);
    for (CharacterMap& map : tables->maps)
      if (!map.read(part->second)) return false;
  }
  const auto part = parts.find("CLUS");
  return part == parts.end() || tables->clusters.read(part->second);
}

bool read_cuts(Parts& parts, TextTables* tables) {
  tables->ranges = parts.at("RANG").rest<CodeRange>();
  tables->sets = parts.at("SETS").rest<uint32_t>();
  tables->code = parts.at("CODE").rest<Instruction>();
  tables->changes = parts.at("CHNG").rest<Step>();
  tables->cuts = parts.at("STEP").rest<Step>();
  TableReader& words = parts.at("WORD");
  while (words.ok() && !words.at_end()) {
    const std::string text = words.string();
    if (text.size() > kLongestWord || valid_utf8(text) != text.size() || tables->words.size() == kMostWords) return false;
    tables->words.emplace_back();
    for (size_t at = 0; at < text.size();) tables->words.back().push_back(next_code(text, &at));
  }
  if (!words.ok()) return false;
  if (tables->sets.empty() || tables->sets.back() > tables->ranges.size()) return false;
  if (!std::is_sorted(tables->sets.begin(), tables->sets.end())) return false;
  const auto sets = static_cast<int64_t>(tables->sets.size()) - 1;
  if (tables->word_set < -1 || tables->word_set >= sets) return false;
  const auto size = static_cast<int64_t>(tables->code.size());
  const auto inside = [](int64_t value, int64_t end) { return value >= 0 && value < end; };
  for (const Instruction& at : tables->code) {
    if (at.op < kChar || at.op > kAtomic) return false;
    if (at.op == kChar && !inside(at.a, sets)) return false;
    if ((at.op == kSplit || at.op == kJump || at.op == kAtomic) && !inside(at.a, size)) return false;
    if ((at.op == kSplit || at.op == kLook) && !inside(at.b, size)) return false;
  }
  if (size > 0 && tables->code.back().op != kMatch) return false;  // so that no program runs past the end
  const auto known = [&](const Step& step) {
    if (step.kind < kCut || step.kind > kCutRemove || step.when < 0) return false;
    if (step.when > (step.kind == kStrip ? kAtBegin | kAtEnd : kAtTheStart)) return false;
    if (step.kind == kCompose || step.kind == kDecompose || step.kind == kStrip) return true;
    if (step.kind == kMapped) return inside(step.word, static_cast<int64_t>(tables->maps.size()));
    if (step.kind != kPrefix && !inside(step.begin, size)) return false;
    const bool inserts = step.kind == kPrefix || step.kind == kReplace || step.kind == kSurround;
    return !inserts || inside(step.word, static_cast<int64_t>(tables->words.size()));
  };
  for (const auto& steps : {tables->changes, tables->cuts})
    if (steps.size() > kMostSteps || !std::all_of(steps.begin(), steps.end(), known)) return false;
  tables->ascii.resize(static_cast<size_t>(sets));
  for (size_t set = 0; set < tables->ascii.size(); ++set) {
    tables->ascii[set] = {0, 0};
    for (size_t i = tables->sets[set]; i < tables->sets[set + 1]; ++i) {
      const CodeRange range = tables->ranges[i];
      if (range.last > kLastCode || range.first > range.last) return false;
      for (uint32_t c = range.first; c <= std::min(range.last, 127u); ++c) tables->ascii[set][c / 64] |= uint64_t{1} << (c % 64);
    }
  }
  return true;
}

bool read_around(Parts& parts, TextTables* tables) {
  TableReader& around = parts.at("AROU");
  const auto before = around.number<uint32_t>(), behind = around.number<uint32_t>();
  tables->before = around.numbers<int32_t>(before);
  tables->behind = around.numbers<int32_t>(behind);
  for (const auto& ids : {tables->before, tables->behind})
    for (const int32_t id : ids)
      if (id < 0 || id >= tables->count()) return false;
  TableReader& proofs = parts.at("PROV");
  size_t proof_bytes = 0;
  while (proofs.ok() && !proofs.at_end()) {
    Proof proof;
    proof.text = proofs.string();
    proof.ids = proofs.numbers<int32_t>(proofs.number<uint32_t>());
    proof.shown = proofs.string();
    proof_bytes += proof.text.size();
    if (proof_bytes > kMostProofBytes || tables->proofs.size() == kMostProofs) return false;
    tables->proofs.push_back(std::move(proof));
  }
  TableReader& normal = parts.at("NORM");
  if (!normal.at_end()) {
    tables->normal.emplace();
    if (!tables->normal->read(normal)) return false;
  }
  TableReader& roles = parts.at("ROLE");
  if (!roles.at_end()) {
    tables->chat.emplace();
    if (!tables->chat->read(roles)) return false;
  }
  if (const auto tools = parts.find("TOOL"); tools != parts.end() && !tools->second.at_end()) {
    tables->tools.emplace();
    if (!tables->tools->read(tools->second)) return false;
  }
  tables->sampling = parts.at("SAMP").number<SamplingDefaults>();
  TableReader& decoder = parts.at("DECO");
  tables->decoder.byte_level = decoder.number<int32_t>() != 0;
  tables->decoder.byte_fallback = decoder.number<int32_t>() != 0;
  tables->decoder.strip = decoder.number<int32_t>();
  tables->decoder.drop = decoder.number<int32_t>() != 0;
  tables->decoder.mark = decoder.string();
  tables->decoder.space = decoder.string();
  if (!decoder.at_end()) {
    tables->decoder.between = decoder.number<int32_t>();
    tables->decoder.cleanup = decoder.number<int32_t>() != 0;
    tables->decoder.prefix = decoder.string();
  }
  if (tables->decoder.between < kJoined || tables->decoder.between > kWords || tables->decoder.prefix.size() > kLongestWord) return false;
  if (tables->decoder.strip < 0 || tables->decoder.strip > kMostStripped) return false;
  if (tables->decoder.mark.size() > kLongestWord || tables->decoder.space.size() > kLongestWord) return false;
  TableReader& answers = parts.at("SEGM");
  tables->answers.channels = answers.number<int32_t>() != 0;
  tables->answers.thinks = answers.number<int32_t>() != 0;
  tables->answers.calls = answers.number<int32_t>();
  tables->answers.markers = answers.numbers<int32_t>(answers.number<uint32_t>());
  tables->answers.call_markers = answers.numbers<int32_t>(answers.number<uint32_t>());
  if (tables->answers.calls != -1 && !tool_format(tables->answers.calls)) return false;
  return around.ok() && proofs.ok() && decoder.ok() && answers.ok();
}

}  // namespace

std::unique_ptr<TextTables> TextTables::read(const std::string& path, std::string* fault) {
  std::vector<uint8_t> bytes;
  if (!read_file(path, kLargest, &bytes, fault)) return nullptr;
  const auto damaged = [&](const char* what) {
    *fault = what;
    return nullptr;
  };
  if (bytes.size() < 24) return damaged("damaged: an impossible length");
  TableReader head(bytes.data() + 8, 16);
  const auto version = head.number<uint32_t>(), count = head.number<uint32_t>(), size = head.number<uint32_t>();
  const auto digest = head.number<uint32_t>();
  if (std::memcmp(bytes.data(), "moectext", 8) != 0) return damaged("is not a text.moec");
  if (version != 2 && version != 3) return damaged("was written by another version of moec; compile the artifact again");
  if (size != bytes.size() || digest != crc32(bytes.data() + 24, bytes.size() - 24)) return damaged("damaged: its digest differs");
  Parts parts;
  TableReader index(bytes.data() + 24, bytes.size() - 24);
  for (uint32_t i = 0; i < count && index.ok(); ++i) {
    const auto name = index.number<std::array<char, 4>>();
    index.number<uint32_t>();
    const auto offset = index.number<uint64_t>(), length = index.number<uint64_t>();
    if (offset > bytes.size() || length > bytes.size() - offset) return damaged("damaged: a part lies outside");
    parts.emplace(std::string(name.data(), 4), TableReader(bytes.data() + offset, static_cast<size_t>(length)));
  }
  for (const char* name : {"INFO", "OFFS", "TEXT", "SORT", "MERG", "SCOR", "ADDS", "RANG", "SETS", "CODE", "WORD", "CHNG", "STEP", "AROU",
                           "DECO", "SEGM", "NORM", "PROV", "ROLE", "SAMP"})
    if (!parts.count(name)) return damaged("damaged: a part is missing");
  auto tables = std::make_unique<TextTables>();
  if (!read_vocabulary(parts, tables.get())) return damaged("damaged: an impossible vocabulary");
  if (!read_maps(parts, tables.get())) return damaged("damaged: an impossible table of characters");
  if (!read_cuts(parts, tables.get())) return damaged("damaged: impossible expressions");
  if (!read_around(parts, tables.get())) return damaged("damaged: impossible texts");
  return tables;
}
