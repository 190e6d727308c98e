#include "objects.h"

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "../runner/session_file.h"
#include "file_bytes.h"
#include "prefixes.h"

namespace {

constexpr uint64_t kLargestManifest = uint64_t{64} << 20;
constexpr int32_t kReaders = 2;  // threads that read experts under a budget of memory

constexpr uint64_t kSamples = 64, kSampleBytes = 4096;

// The length of a program and parts of it from its beginning to its end: other weights differ there, too.
std::string add_samples(const std::string& program, Xxh64* digest) {
  const std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(program.c_str(), "rb"), std::fclose);
  if (!file || fseeko(file.get(), 0, SEEK_END) != 0) return std::strerror(errno);
  const auto length = static_cast<uint64_t>(ftello(file.get()));
  digest->add(&length, sizeof length);
  std::vector<uint8_t> sample(kSampleBytes);
  for (uint64_t i = 0; i < kSamples; ++i) {
    const uint64_t at = length > kSampleBytes ? (length - kSampleBytes) / (kSamples - 1) * i : 0;
    if (fseeko(file.get(), static_cast<off_t>(at), SEEK_SET) != 0) return std::strerror(errno);
    digest->add(sample.data(), std::fread(sample.data(), 1, sample.size(), file.get()));
  }
  return "";
}

Xxh64 digest_of(const std::string& manifest) {
  std::string fault;
  std::vector<uint8_t> bytes;
  if (!read_file(manifest, kLargestManifest, &bytes, &fault)) throw Fault(manifest + ": " + fault);
  Xxh64 digest;
  digest.add(bytes.data(), bytes.size());
  return digest;
}

// Identifies an artifact in saved sessions: a digest of its manifest, which has the digest of every file, and of parts of its
// program, since an application may have replaced one of the two files alone.
std::string identity_of(Xxh64 digest, const std::string& program) {
  const std::string fault = add_samples(program, &digest);
  if (!fault.empty()) throw Fault(program + ": " + fault);
  char text[32];
  std::snprintf(text, sizeof text, "app-%016" PRIx64, digest.digest());
  return text;
}

}  // namespace

// ------------------------------------------------------------------------------------------------------------- artifact

OpenArtifact::OpenArtifact(const std::string& folder, int32_t threads, int64_t memory_bytes) {
  const Xxh64 manifest = digest_of(folder + "/manifest.json");
  const std::string program = folder + "/model.pte", words = folder + "/text.moec";
  std::string fault;
  std::unique_ptr<TextTables> tables = TextTables::read(words, &fault);
  if (tables) {
    tokenizer_ = std::make_unique<Tokenizer>(std::move(tables));
    fault = tokenizer_->check();
  }
  if (!fault.empty()) throw Fault(words + ": " + fault);
  model_.reset(moec_model_open(program.c_str(), threads));
  const std::string error = moec_model_error(model_.get());
  if (!error.empty()) throw Fault(program + ": " + error);
  if (memory_bytes > 0 && moec_model_limit_memory(model(), memory_bytes, MOEC_EVICT_LRFU, kReaders) != 0)
    throw Fault(program + ": " + moec_model_error(model()));
  identity_ = identity_of(manifest, program);  // a program that is a regular file and was checked
  moec_model_get_info(model(), &info_);
  eos_ids_.resize(static_cast<size_t>(moec_model_eos_ids(model(), nullptr, 0)));
  moec_model_eos_ids(model(), eos_ids_.data(), static_cast<int64_t>(eos_ids_.size()));
}

bool OpenArtifact::ends(int32_t token) const { return std::find(eos_ids_.begin(), eos_ids_.end(), token) != eos_ids_.end(); }

std::vector<int32_t> OpenArtifact::tokenize(std::string_view text, int32_t flags) const {
  const TextTables& tables = tokenizer_->tables();
  std::vector<int32_t> ids;
  if (!(flags & MOEC_APP_PLAIN)) ids = tables.before;
  const std::string fault = tokenizer_->encode(text, flags & MOEC_APP_AS_TEXT, &ids);
  if (!fault.empty()) throw Fault(fault);
  if (!(flags & MOEC_APP_PLAIN)) ids.insert(ids.end(), tables.behind.begin(), tables.behind.end());
  return ids;
}

std::string OpenArtifact::detokenize(const std::vector<int32_t>& ids, bool special) const {
  TextDecoder decoder(*tokenizer_, special);
  std::string text;
  for (const int32_t id : ids) text += decoder.push(id);
  return text + decoder.finish();
}

std::vector<int32_t> OpenArtifact::markers(int32_t flags) const {
  const AnswerForm& form = tokenizer_->tables().answers;
  std::vector<int32_t> found;
  if (flags & MOEC_APP_SEGMENTS) found = form.markers;
  if (flags & MOEC_APP_TOOLS) found.insert(found.end(), form.call_markers.begin(), form.call_markers.end());
  return found;
}

bool OpenArtifact::opens_thinking(const std::vector<int32_t>& prompt) const {
  constexpr size_t kTokens = 64;  // the end of a prompt that is looked at
  constexpr std::string_view kThink = "<think>";
  const std::vector<int32_t> last(prompt.size() > kTokens ? prompt.end() - kTokens : prompt.begin(), prompt.end());
  const std::string text = detokenize(last, true);
  const std::string_view words = stripped_text(text);
  return words.size() >= kThink.size() && words.substr(words.size() - kThink.size()) == kThink;
}

// Appends a part that follows other text. It is encoded after a newline, whose ids are dropped, as in assistant/assistant.py:
// some tokenizers change the beginning of a text.
void OpenArtifact::append_part(std::string_view text, bool as_text, std::vector<int32_t>* ids) const {
  const int32_t flags = MOEC_APP_PLAIN | (as_text ? MOEC_APP_AS_TEXT : 0);
  if (text.empty()) return;
  if (!ids->empty()) {
    const std::vector<int32_t> line = tokenize("\n", MOEC_APP_PLAIN), found = tokenize("\n" + std::string(text), flags);
    if (found.size() >= line.size() && std::equal(line.begin(), line.end(), found.begin())) {
      ids->insert(ids->end(), found.begin() + static_cast<std::ptrdiff_t>(line.size()), found.end());
      return;
    }
  }
  const std::vector<int32_t> found = tokenize(text, flags);
  ids->insert(ids->end(), found.begin(), found.end());
}

std::vector<int32_t> OpenArtifact::chat(const std::vector<ChatMessage>& messages) const {
  const auto& form = tokenizer_->tables().chat;
  if (!form) throw Fault("the model has no chat template of regular form");
  std::vector<ChatPart> parts;
  const std::string fault = form->render(messages, &parts);
  if (!fault.empty()) throw Fault(fault);
  return encoded(parts);
}

std::vector<int32_t> OpenArtifact::chat(std::string_view tools, const std::vector<ChatTurn>& turns) const {
  const std::vector<Json> definitions = tools.empty() ? std::vector<Json>() : tool_definitions(tools);
  if (definitions.empty()) {
    std::vector<ChatMessage> messages;
    for (const ChatTurn& turn : turns) {
      if (turn.role == "tool" || !turn.calls.empty())
        throw Fault("turns[" + std::to_string(messages.size()) + "]: calls and what tools answer need the tools");
      messages.push_back({turn.role, turn.content});
    }
    return chat(messages);
  }
  const TextTables& tables = tokenizer_->tables();
  if (!tables.chat) throw Fault("the model has no chat template of regular form");
  if (!tables.tools) throw Fault("tools: the artifact is older than their form; compile it again");
  if (!tables.tools->missing().empty()) throw Fault("tools: not with this model's chat template, since " + tables.tools->missing());
  return encoded(tables.tools->render(definitions, turns));
}

std::vector<int32_t> OpenArtifact::system_prompt(std::string_view tools, std::string_view system) const {
  std::vector<ChatTurn> turns;
  if (!system.empty()) turns.push_back({"system", system, {}});
  turns.push_back({"user", "a", {}});
  const size_t asked = turns.size() - 1;
  std::vector<int32_t> found = chat(tools, turns);
  const auto shorten = [&] {
    std::vector<int32_t> other;
    try {
      other = chat(tools, turns);
    } catch (const Fault&) {
      return;  // no conversation of this model
    }
    found.erase(std::mismatch(found.begin(), found.end(), other.begin(), other.end()).first, found.end());
  };
  // what conversations of all kinds have in common: another question, more turns, calls
  turns[asked].content = "1";
  shorten();
  turns.push_back({"assistant", "b", {}});
  turns.push_back({"user", "c", {}});
  shorten();
  const std::vector<Json> definitions = tools.empty() ? std::vector<Json>() : tool_definitions(tools);
  if (!definitions.empty()) {
    turns.resize(asked + 1);
    turns.push_back({"assistant", "", {{definitions[0].find("function")->find("name")->text, "{}"}}});
    turns.push_back({"tool", "d", {}});
    shorten();
  }
  // text before a special token is encoded by itself, whatever follows
  constexpr size_t kMostGivenUp = 16;
  for (size_t end = found.size(); end > 0 && end + kMostGivenUp >= found.size(); --end) {
    if (!tokenizer_->is_special(found[end - 1])) continue;
    found.resize(end);
    return found;
  }
  // other text may be cut into tokens that reach into the question, each kind of which is tried
  std::vector<std::string> questions = {"", "\n", "\n\n", "  ", "\t", "\xC3\xA9", "\xCC\x81", "\xE6\x97\xA5", "\xF0\x9F\x99\x82"};
  for (char c = ' '; c < 127; ++c) questions.emplace_back(1, c);
  turns.resize(asked + 1);
  for (const std::string& question : questions) {
    turns[asked].content = question;
    shorten();
  }
  return found;
}

std::shared_ptr<PrefixFolder> OpenArtifact::prefixes() const {
  const std::lock_guard<std::mutex> lock(setting_);
  return prefixes_;
}

void OpenArtifact::set_prefixes(std::shared_ptr<PrefixFolder> folder) {
  const std::lock_guard<std::mutex> lock(setting_);
  prefixes_ = std::move(folder);
}

std::vector<int32_t> OpenArtifact::encoded(const std::vector<ChatPart>& parts) const {
  // special tokens that are spelled out in a content are text: each is encoded by itself
  std::vector<ChatPart> pieces = {{"", false}};
  bool markers = false;
  for (const ChatPart& part : parts) {
    std::vector<ChatPart> split = {{part.text, false}};
    for (const std::string& marker : part.content ? tokenizer_->special() : std::vector<std::string>()) {
      std::vector<ChatPart> finer;
      for (const ChatPart& piece : split) {
        size_t begin = 0;
        for (size_t at; !piece.content && (at = piece.text.find(marker, begin)) != std::string::npos; begin = at + marker.size()) {
          finer.push_back({piece.text.substr(begin, at - begin), false});
          finer.push_back({marker, true});
          markers = true;
        }
        finer.push_back({piece.text.substr(begin), piece.content});
      }
      split.swap(finer);
    }
    for (const ChatPart& piece : split) {
      if (piece.content || pieces.back().content) {
        pieces.push_back(piece);
      } else {
        pieces.back().text += piece.text;
      }
    }
  }
  if (!markers) return tokenize(pieces[0].text, MOEC_APP_PLAIN);
  std::vector<int32_t> ids;
  for (const ChatPart& piece : pieces) append_part(piece.text, piece.content, &ids);
  return ids;
}

// ------------------------------------------------------------------------------------------------------------- splitter

OpenSplitter::OpenSplitter(const OpenArtifact& artifact, const std::vector<int32_t>& prompt, int32_t flags) {
  const AnswerForm& form = artifact.tokenizer().tables().answers;
  const bool tools = flags & MOEC_APP_TOOLS;
  if (tools && form.calls < 0 && !form.channels) throw Fault("the model's way to write calls of tools is not known");
  if (form.channels) {
    splitter_ = make_channels();
  } else {
    splitter_ = make_segments(tools ? tool_format(form.calls) : nullptr, form.thinks, artifact.opens_thinking(prompt));
  }
}

void OpenSplitter::push(std::string_view piece) {
  const std::lock_guard<std::mutex> lock(busy_);
  if (ended_) throw Fault("the answer has ended");
  splitter_->push(piece, &found_);
}

void OpenSplitter::finish() {
  const std::lock_guard<std::mutex> lock(busy_);
  if (!ended_) splitter_->finish(&found_);
  ended_ = true;
}

const Segment* OpenSplitter::next() {
  const std::lock_guard<std::mutex> lock(busy_);
  if (at_ == found_.size()) return nullptr;
  given_ = std::move(found_[at_++]);
  if (at_ == found_.size()) {
    found_.clear();
    at_ = 0;
  }
  return &given_;
}

// -------------------------------------------------------------------------------------------------------------- session

OpenSession::OpenSession(std::shared_ptr<OpenArtifact> artifact, moec_session* session)
    : artifact_(std::move(artifact)), session_(session) {
  const std::string fault = error();
  if (!fault.empty()) throw Fault(fault);
}

void OpenSession::settle() {
  const int64_t kept = position() - std::exchange(guessed, 0);  // negative: its tokens are lost, as its next call will say
  if (kept >= 0 && kept < position() && moec_session_rewind(session_.get(), kept) != 0) throw Fault(error());
}

std::shared_ptr<OpenSession> OpenSession::fork() {
  settle();
  return std::make_shared<OpenSession>(artifact_, moec_session_fork(session_.get()));
}

int64_t OpenSession::position() { return moec_session_tokens(session_.get(), nullptr, 0); }

std::vector<int32_t> OpenSession::tokens() {
  settle();
  std::vector<int64_t> ids(static_cast<size_t>(position()));
  moec_session_tokens(session_.get(), ids.data(), static_cast<int64_t>(ids.size()));
  return std::vector<int32_t>(ids.begin(), ids.end());
}

void OpenSession::rewind(int64_t position) {
  settle();
  if (moec_session_rewind(session_.get(), position) != 0) throw Fault(error());
  ++turn;
}

void OpenSession::save(const std::string& path) {
  settle();
  if (moec_session_save(session_.get(), path.c_str(), artifact_->identity().c_str()) != 0) throw Fault(path + ": " + error());
}

void OpenSession::restore(const std::string& path) {
  const std::string fault = restored(path);
  if (!fault.empty()) throw Fault(path + ": " + fault);
}

std::string OpenSession::restored(const std::string& path) {
  settle();
  if (moec_session_restore(session_.get(), path.c_str(), artifact_->identity().c_str()) != 0) return error();
  ++turn;
  return "";
}

bool OpenSession::holds(const std::vector<int32_t>& ids, size_t count) {
  const std::vector<int32_t> held = tokens();
  return held.size() == count && std::equal(held.begin(), held.end(), ids.begin());
}

void OpenSession::forward(size_t start, const int32_t* ids, size_t count, Rows rows, std::vector<float>* logits) {
  const std::vector<int64_t> part(ids, ids + count);
  const size_t wanted = rows == Rows::kNone ? 0 : rows == Rows::kLast ? 1 : count;
  if (wanted > 0) logits->resize(wanted * static_cast<size_t>(artifact_->info().vocab_size));
  if (moec_session_forward(session_.get(), part.data(), static_cast<int64_t>(count), static_cast<int64_t>(start), rows == Rows::kAll,
                           wanted > 0 ? logits->data() : nullptr, wanted > 0 ? static_cast<int64_t>(logits->size()) : 0) != 0)
    throw Fault(error());
}
