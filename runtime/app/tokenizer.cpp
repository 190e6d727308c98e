#include "tokenizer.h"

#include <algorithm>
#include <utility>

namespace {

// Most bytes compared to find added tokens in a text; those of known families take fewer than ten for each of its bytes.
constexpr uint64_t kAddedSteps = 100'000, kAddedStepsPerByte = 64;

// How many bytes of white space a text begins with.
size_t white_at_begin(std::string_view text) {
  size_t end = 0;
  for (size_t at = 0; at < text.size() && is_white(next_code(text, &at));) end = at;
  return end;
}

// Where the white space at the end of a text begins.
size_t white_at_end(std::string_view text) {
  size_t begin = text.size();
  while (begin > 0) {
    size_t last = begin - 1;
    while (last > 0 && (static_cast<uint8_t>(text[last]) & 0xC0) == 0x80) --last;
    size_t at = last;
    if (!is_white(next_code(text, &at))) break;
    begin = last;
  }
  return begin;
}

// Takes the spaces out of a token of English, as `tokenizers` does: one after the other, everywhere.
void cleanup(std::string* text) {
  constexpr std::array<std::array<std::string_view, 2>, 11> kChanges = {{{" .", "."},
                                                                         {" ?", "?"},
                                                                         {" !", "!"},
                                                                         {" ,", ","},
                                                                         {" ' ", "'"},
                                                                         {" n't", "n't"},
                                                                         {" 'm", "'m"},
                                                                         {" do not", " don't"},
                                                                         {" 's", "'s"},
                                                                         {" 've", "'ve"},
                                                                         {" 're", "'re"}}};
  for (const auto& [from, to] : kChanges)
    for (size_t at = 0; (at = text->find(from, at)) != std::string::npos; at += to.size()) text->replace(at, from.size(), to);
}

}  // namespace

Tokenizer::Tokenizer(std::unique_ptr<TextTables> tables) : tables_(std::move(tables)), steps_(*tables_), model_(*tables_) {
  is_special_.resize(static_cast<size_t>(tables_->count()));
  for (const AddedToken& token : tables_->added) {
    if (token.text.empty() || valid_utf8(token.text) != token.text.size()) continue;
    if (token.flags & kSpecial) {
      is_special_[static_cast<size_t>(token.id)] = 1;
      special_.push_back(token.own);
    }
    added_[token.flags & kNormalized ? 1 : 0][static_cast<uint8_t>(token.text[0])].push_back(&token);
  }
  const auto before = [](const AddedToken* a, const AddedToken* b) { return a->text < b->text; };
  for (auto& stage : added_)
    for (auto& tokens : stage) std::stable_sort(tokens.begin(), tokens.end(), before);
  special_.erase(std::remove(special_.begin(), special_.end(), ""), special_.end());
  std::stable_sort(special_.begin(), special_.end(), [](const auto& a, const auto& b) { return a.size() > b.size(); });
}

std::string Tokenizer::check() const {
  if (tables_->proofs.empty()) return "there is no text to compare";
  for (const Proof& proof : tables_->proofs) {
    std::vector<int32_t> ids;
    const std::string fault = encode(proof.text, false, &ids);
    if (!fault.empty()) return fault;
    if (ids != proof.ids) return "other ids than the model's tokenizer gives for: " + proof.text.substr(0, 60);
    TextDecoder decoder(*this, false);
    std::string shown;
    for (const int32_t id : ids) shown += decoder.push(id);
    shown += decoder.finish();
    if (shown != proof.shown) return "another text than the model's tokenizer gives for the ids of: " + proof.text.substr(0, 60);
  }
  return "";
}

std::string Tokenizer::encode(std::string_view text, bool as_text, std::vector<int32_t>* ids) const {
  const size_t valid = valid_utf8(text);
  if (valid < text.size()) return "the text is not UTF-8 at byte " + std::to_string(valid);
  return encode_added({text, as_text, true}, false, ids);
}

// Whether a letter or another character of words stands beside a part of a text.
bool Tokenizer::within_word(std::string_view text, size_t from, size_t to) const {
  if (tables_->word_set < 0) return false;
  size_t last = from;
  while (last > 0 && (static_cast<uint8_t>(text[--last]) & 0xC0) == 0x80) {
  }
  if (from > 0 && steps_.in_set(tables_->word_set, next_code(text, &last))) return true;
  return to < text.size() && steps_.in_set(tables_->word_set, next_code(text, &to));
}

// The longest added token that a text goes on with at `at`, of equal ones the first; nullptr: none. The tokens that fit so far are
// neighbours in the order of texts. `steps`: what is left of the bytes that may be compared for this text.
const AddedToken* Tokenizer::added_at(std::string_view text, size_t at, bool normalized, uint64_t* steps) const {
  const std::vector<const AddedToken*>& tokens = added_[normalized][static_cast<uint8_t>(text[at])];
  const AddedToken* found = nullptr;
  auto first = tokens.begin(), last = tokens.end();
  for (size_t length = 1; first != last; ++length) {
    if ((*first)->text.size() == length) found = *first;  // the shortest of them, and so the first
    if (at + length >= text.size() || *steps == 0) break;
    --*steps;
    const auto byte = static_cast<uint8_t>(text[at + length]);
    const auto at_least = [&](const AddedToken* token, int wanted) {
      return token->text.size() > length ? static_cast<uint8_t>(token->text[length]) < wanted : true;
    };
    first = std::lower_bound(first, last, int{byte}, at_least);
    last = std::lower_bound(first, last, byte + 1, at_least);
  }
  return found;
}

// Added tokens are found before a text is changed and cut, at each place the longest: first those that match the text as it is,
// then, in the text between them, those that match it normalized. One may take in the white space around it.
std::string Tokenizer::encode_added(const Part& part, bool normalized, std::vector<int32_t>* ids) const {
  const std::string_view text = part.text;
  size_t begin = 0;
  uint64_t steps = kAddedSteps + kAddedStepsPerByte * text.size();
  for (size_t at = 0; at < text.size();) {
    const AddedToken* found = added_at(text, at, normalized, &steps);
    if (steps == 0) return "the tokenizer's added tokens take too long to find in this text";
    if (!found) {
      ++at;
      continue;
    }
    size_t from = at, to = at + found->text.size();
    at = to;
    if (part.as_text && (found->flags & kSpecial)) continue;
    if (found->flags & kSingleWord && within_word(text, from, to)) continue;
    if (found->flags & kTakesLeft) from = std::max(white_at_end(text.substr(0, from)), begin);
    if (found->flags & kTakesRight) to += white_at_begin(text.substr(to));
    if (begin < from) {
      const std::string fault = encode_rest({text.substr(begin, from - begin), part.as_text, part.at_start && begin == 0}, normalized, ids);
      if (!fault.empty()) return fault;
    }
    ids->push_back(found->id);
    begin = to;
  }
  if (begin >= text.size()) return "";
  return encode_rest({text.substr(begin), part.as_text, part.at_start && begin == 0}, normalized, ids);
}

std::string Tokenizer::encode_rest(const Part& part, bool normalized, std::vector<int32_t>* ids) const {
  Pieces pieces;
  pieces.at_start = part.at_start;
  for (size_t at = 0; at < part.text.size();) pieces.codes.push_back(next_code(part.text, &at));
  pieces.ends = {pieces.codes.size()};
  for (const Step& step : normalized ? tables_->cuts : tables_->changes) {
    const std::string fault = steps_.apply(step, &pieces);
    if (!fault.empty()) return fault;
  }
  std::string piece;
  size_t begin = 0;
  for (const size_t end : pieces.ends) {
    piece.clear();
    for (; begin < end; ++begin) append_code(pieces.codes[begin], &piece);
    const std::string fault = normalized ? model_.encode(piece, ids) : encode_added({piece, part.as_text, part.at_start}, true, ids);
    if (!fault.empty()) return fault;
  }
  return "";
}

std::string TextDecoder::push(int32_t id) {
  const TextTables& tables = tokenizer_.tables();
  if (id < 0 || id >= tables.count()) return "";
  if (!special_ && tokenizer_.is_special(id) && std::find(kept_.begin(), kept_.end(), id) == kept_.end()) return "";
  if (tables.decoder.byte_level) return characters_.push(tables.text(id));
  if (tables.decoder.between != kJoined) return characters_.push(spaced(tables.text(id)));
  const int byte = tokenizer_.byte_of(id);
  if (byte >= 0) {
    bytes_ += static_cast<char>(byte);
    begun_ = true;
    return "";
  }
  const DecoderForm& form = tables.decoder;
  const bool drop = form.drop && !begun_;
  begun_ = true;
  std::string text(tables.text(id));
  for (size_t at = 0; !form.mark.empty() && (at = text.find(form.mark, at)) != std::string::npos;) {
    text.replace(at, form.mark.size(), drop ? "" : form.space);
    at += drop ? 0 : form.space.size();
  }
  const std::string before = held();  // evaluated first: both change what is taken off the beginning
  return before + said(text);
}

std::string TextDecoder::finish() {
  std::string text = held();
  text += characters_.finish();
  begun_ = false;
  left_ = tokenizer_.tables().decoder.strip;
  return text;
}

// A token with the space before it, but for one that continues a word.
std::string TextDecoder::spaced(std::string_view token) {
  const DecoderForm& form = tokenizer_.tables().decoder;
  const bool continues = form.between == kWords && token.substr(0, form.prefix.size()) == form.prefix;
  std::string text;
  if (begun_ && !continues) text = " ";
  text += token.substr(begun_ && continues ? form.prefix.size() : 0);
  begun_ = true;
  if (form.cleanup) cleanup(&text);
  return text;
}

// Text as it is written, without spaces at the beginning of all text.
std::string TextDecoder::said(std::string_view text) {
  size_t begin = 0;
  while (left_ > 0 && begin < text.size() && text[begin] == ' ') {
    ++begin;
    --left_;
  }
  if (begin < text.size()) left_ = 0;
  return characters_.push(text.substr(begin));
}

std::string TextDecoder::held() {
  const std::string bytes = std::exchange(bytes_, "");
  if (valid_utf8(bytes) == bytes.size()) return said(bytes);
  std::string text;
  for (size_t i = 0; i < bytes.size(); ++i) text += "\xEF\xBF\xBD";
  return said(text);
}
