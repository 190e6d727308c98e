// The objects that the ids of moec.h name. Faults are exceptions here; moec_app.cpp turns them into return values.
#ifndef MOEC_OBJECTS_H_
#define MOEC_OBJECTS_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "../include/moec.h"
#include "../runner/moec_runtime.h"
#include "sampler.h"
#include "stop_strings.h"
#include "tokenizer.h"
#include "utf8.h"

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

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
  bool ends(int32_t token) const;

  std::vector<int32_t> tokenize(std::string_view text, int32_t flags) const;
  std::vector<int32_t> chat(const std::vector<ChatMessage>& messages) const;
  std::string detokenize(const std::vector<int32_t>& ids, bool special) const;

 private:
  struct Close {
    void operator()(moec_model* model) const { moec_model_close(model); }
  };
  void append_part(std::string_view text, bool as_text, std::vector<int32_t>* ids) const;

  std::unique_ptr<moec_model, Close> model_;
  std::unique_ptr<Tokenizer> tokenizer_;
  moec_model_info info_ = {};
  std::vector<int64_t> eos_ids_;
  std::string identity_;
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
  std::string error() const { return moec_session_error(session_.get()); }

  std::mutex busy;      // held by every use of the session
  uint64_t turn = 0;    // increased by whatever ends the running generation
  int64_t position();
  void forward(const std::vector<int32_t>& ids, size_t begin, size_t count, std::vector<float>* logits);

 private:
  struct Close {
    void operator()(moec_session* session) const { moec_session_close(session); }
  };
  std::shared_ptr<OpenArtifact> artifact_;
  std::unique_ptr<moec_session, Close> session_;
};

// An answer as it comes.
class Generation : public Object {
 public:
  Generation(std::shared_ptr<OpenSession> session, std::vector<int32_t> prompt, Sampling sampling, std::vector<std::string> stops,
             int64_t max_new_tokens);
  bool next();  // whether there is a piece
  const std::string& piece() const { return piece_; }
  void cancel() { cancelled_ = true; }
  moec_app_stats stats();

 private:
  bool prefill();
  void step();
  void end(int32_t why);

  std::shared_ptr<OpenSession> session_;
  std::vector<int32_t> prompt_;
  Sampler sampler_;
  Characters characters_;
  StopStrings stops_;
  std::vector<float> logits_;
  std::string piece_, fault_;
  int64_t most_;
  int32_t pending_ = -1;  // a token that was chosen and is not computed yet
  bool begun_ = false;
  uint64_t turn_ = 0;
  std::atomic<bool> cancelled_{false};
  moec_app_stats stats_ = {};
};

#endif  // MOEC_OBJECTS_H_
