// The objects that the ids of moec.h name. Faults are exceptions here; api.h turns them into return values.
#ifndef MOEC_OBJECTS_H_
#define MOEC_OBJECTS_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../include/moec.h"
#include "../runner/moec_runtime.h"
#include "fault.h"
#include "segments.h"
#include "tokenizer.h"
#include "utf8.h"

class PrefixFolder;

struct Object {
  virtual ~Object() = default;
};

// A folder that moec compiled.
class OpenArtifact : public Object {
 public:
  OpenArtifact(const std::string& folder, int32_t threads, int64_t memory_bytes);
  moec_model* model() const { return model_.get(); }
  const moec_model_info& info() const { return info_; }
  const Tokenizer& tokenizer() const { return *tokenizer_; }
  const std::string& identity() const { return identity_; }  // of saved sessions
  bool speculates() const { return info_.exact && info_.rewinds && info_.has_all; }
  bool ends(int32_t token) const;
  const std::vector<int64_t>& stop_tokens() const { return eos_ids_; }

  std::vector<int32_t> tokenize(std::string_view text, int32_t flags) const;
  std::vector<int32_t> chat(const std::vector<ChatMessage>& messages) const;
  // With definitions of tools as JSON, or none; turns may call tools where there are some.
  std::vector<int32_t> chat(std::string_view tools, const std::vector<ChatTurn>& turns) const;
  // What every conversation with this system prompt ("": none) and these tools begins with.
  std::vector<int32_t> system_prompt(std::string_view tools, std::string_view system) const;
  // Special tokens that mark segments of an answer; whether a prompt ends inside a thinking segment.
  std::vector<int32_t> markers(int32_t flags) const;
  bool opens_thinking(const std::vector<int32_t>& prompt) const;
  std::string detokenize(const std::vector<int32_t>& ids, bool special) const;
  // Where beginnings of prompts are kept; nullptr: nowhere.
  std::shared_ptr<PrefixFolder> prefixes() const;
  void set_prefixes(std::shared_ptr<PrefixFolder> folder);

 private:
  struct Close {
    void operator()(moec_model* model) const { moec_model_close(model); }
  };
  std::vector<int32_t> encoded(const std::vector<ChatPart>& parts) const;
  void append_part(std::string_view text, bool as_text, std::vector<int32_t>* ids) const;

  std::unique_ptr<moec_model, Close> model_;
  std::unique_ptr<Tokenizer> tokenizer_;
  moec_model_info info_ = {};
  std::vector<int64_t> eos_ids_;
  std::string identity_;
  mutable std::mutex setting_;
  std::shared_ptr<PrefixFolder> prefixes_;
};

// Takes an answer apart.
class OpenSplitter : public Object {
 public:
  OpenSplitter(const OpenArtifact& artifact, const std::vector<int32_t>& prompt, int32_t flags);
  void push(std::string_view piece);
  void finish();
  const Segment* next();  // nullptr: more text is needed

 private:
  std::mutex busy_;
  std::unique_ptr<Splitter> splitter_;
  std::vector<Segment> found_;
  Segment given_;
  size_t at_ = 0;
  bool ended_ = false;
};

// Tokens with their caches.
class OpenSession : public Object {
 public:
  OpenSession(std::shared_ptr<OpenArtifact> artifact, moec_session* session);
  const OpenArtifact& artifact() const { return *artifact_; }
  std::shared_ptr<OpenSession> fork();
  std::vector<int32_t> tokens();
  void rewind(int64_t position);
  void save(const std::string& path);
  void restore(const std::string& path);
  std::string restored(const std::string& path);  // the same: "" or why not, without the path
  bool holds(const std::vector<int32_t>& ids, size_t count);  // just the first `count` of these
  std::string error() const { return moec_session_error(session_.get()); }

  std::mutex busy;      // held by every use of the session
  uint64_t turn = 0;    // increased by whatever ends the running generation
  int64_t guessed = 0;  // tokens at the end that a generation has drafted and not taken yet
  void settle();        // forgets those
  int64_t position();
  enum class Rows { kNone, kLast, kAll };
  // Appends tokens to the first `start`, which are all that it holds; their logits are written one row after the other. A fault where
  // it has lost tokens since (moec_session_restore).
  void forward(size_t start, const int32_t* ids, size_t count, Rows rows, std::vector<float>* logits);

 private:
  struct Close {
    void operator()(moec_session* session) const { moec_session_close(session); }
  };
  std::shared_ptr<OpenArtifact> artifact_;
  std::unique_ptr<moec_session, Close> session_;
};

#endif  // MOEC_OBJECTS_H_
