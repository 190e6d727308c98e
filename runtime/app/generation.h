// An answer as it comes: sampling, stop strings, speculation. assistant/generate.py and assistant/speculate.py give the same text.
#ifndef MOEC_GENERATION_H_
#define MOEC_GENERATION_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "model_draft.h"
#include "objects.h"
#include "sampler.h"
#include "speculation.h"
#include "stop_strings.h"
#include "utf8.h"

struct GenerationOptions {
  Sampling sampling;
  std::vector<std::string> stops;
  int64_t max_new_tokens = -1;
  bool speculate = false;
  int32_t top_scores = -1;  // -1: no log-probabilities
  bool drop_oldest = false;  // where the context is full
  int64_t keep_first = 0;    // of the tokens, which are never dropped
  std::shared_ptr<OpenSession> draft;  // of a model that drafts; nullptr: drafts are looked up in the text
  std::optional<moec_app_constraint> constraint;
  std::vector<int32_t> kept;  // special tokens that are written out
};

class Generation : public Object {
 public:
  Generation(std::shared_ptr<OpenSession> session, std::vector<int32_t> prompt, GenerationOptions options);
  bool next();  // whether there is a piece
  const std::string& piece() const { return piece_; }
  void cancel() { cancelled_ = true; }
  moec_app_stats stats();
  // Log-probabilities of the tokens from number `first` on: one for the token, those of the likeliest behind it.
  std::vector<moec_app_score> scores(int64_t first);

 private:
  bool prefill();
  bool compute(size_t held);
  void forget_oldest(int64_t room = 0);
  bool make_room();
  void advance(int32_t token);
  bool check_guesses();
  void take_row(size_t row);
  void settle();
  int32_t choose();
  [[noreturn]] void constraint_failed() const;
  void step();
  void end(int32_t why);

  std::shared_ptr<OpenSession> session_;
  std::vector<int32_t> tokens_;  // the prompt and what was appended to it, without what was dropped
  Sampler sampler_;
  TextDecoder decoder_;
  StopStrings stops_;
  std::vector<float> logits_;  // of the last token
  std::string piece_, fault_;
  int64_t most_;
  int64_t text_bytes_ = 0;  // of the pieces before this one
  bool drop_oldest_;
  int64_t keep_first_;
  int32_t top_scores_;
  std::vector<moec_app_score> scores_;
  int32_t pending_ = -1;  // a token that was chosen and is not computed yet
  bool begun_ = false;
  uint64_t turn_ = 0;
  std::atomic<bool> cancelled_{false};
  moec_app_stats stats_ = {};

  std::optional<moec_app_constraint> constraint_;
  std::vector<uint32_t> mask_;  // of tokens that may come next; empty without a constraint

  // speculation
  bool speculate_;
  PromptLookup lookup_;
  std::unique_ptr<ModelDraft> draft_;  // instead of it
  Pays pays_;
  DraftLength length_;
  std::vector<int32_t> ahead_;  // drafted tokens; the session holds those that are not taken, session_->guessed
  std::vector<float> rows_;     // logits after the token that was computed with them and after each of them
  size_t taken_ = 0;            // of `ahead_`
  int64_t checked_ = 0;         // tokens of the last check that counted so far, 0: no check is open
  double check_seconds_ = 0;
};

#endif  // MOEC_GENERATION_H_
