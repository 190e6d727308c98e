#include "generation.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "prefixes.h"
#include "scores.h"

namespace {

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

Generation::Generation(std::shared_ptr<OpenSession> session, std::vector<int32_t> prompt, GenerationOptions options)
    : session_(std::move(session)), tokens_(std::move(prompt)), sampler_(std::move(options.sampling), tokens_),
      decoder_(session_->artifact().tokenizer(), false, std::move(options.kept)), stops_(std::move(options.stops)),
      most_(options.max_new_tokens), drop_oldest_(options.drop_oldest), keep_first_(options.keep_first),
      top_scores_(options.top_scores),
      constraint_(options.constraint), speculate_(options.speculate && session_->artifact().speculates()) {
  const moec_model_info& info = session_->artifact().info();
  if (tokens_.empty()) throw Fault("the prompt has no tokens");
  if (drop_oldest_ && keep_first_ >= info.context)
    throw Fault("keep_first: " + std::to_string(keep_first_) + " tokens leave nothing to drop: the context holds " + std::to_string(info.context));
  if (static_cast<int64_t>(tokens_.size()) > info.context && !drop_oldest_)
    throw Fault(std::to_string(tokens_.size()) + " tokens do not fit: the context holds " + std::to_string(info.context));
  for (const int32_t id : tokens_)
    if (id < 0 || id >= info.vocab_size) throw Fault("token " + std::to_string(id) + " is not in the vocabulary");
  if (options.draft) draft_ = std::make_unique<ModelDraft>(std::move(options.draft), *session_);
  const std::lock_guard<std::mutex> lock(session_->busy);
  turn_ = ++session_->turn;
  stats_.prompt_tokens = static_cast<int64_t>(tokens_.size());
  forget_oldest();
}

moec_app_stats Generation::stats() {
  const std::lock_guard<std::mutex> lock(session_->busy);
  return stats_;
}

std::vector<moec_app_score> Generation::scores(int64_t first) {
  const std::lock_guard<std::mutex> lock(session_->busy);
  if (top_scores_ < 0) throw Fault("the generation was begun without top_scores");
  if (first < 0 || first > stats_.new_tokens) throw Fault("token " + std::to_string(first) + " of an answer of " + std::to_string(stats_.new_tokens));
  const int64_t each = 1 + std::min<int64_t>(top_scores_, session_->artifact().info().vocab_size);
  const int64_t begin = std::min(first * each, static_cast<int64_t>(scores_.size()));
  return std::vector<moec_app_score>(scores_.begin() + begin, scores_.end());
}

bool Generation::next() {
  const std::lock_guard<std::mutex> lock(session_->busy);
  text_bytes_ += static_cast<int64_t>(piece_.size());
  piece_.clear();
  if (!fault_.empty()) throw Fault(fault_);
  if (stats_.stopped != MOEC_APP_RUNNING) return false;
  try {
    while (piece_.empty() && stats_.stopped == MOEC_APP_RUNNING) step();
    if (stats_.stopped != MOEC_APP_RUNNING) settle();
  } catch (const std::exception& e) {
    fault_ = e.what();
    stats_.stopped = MOEC_APP_FAILED;
    throw;
  }
  return !piece_.empty();
}

// Makes the session hold the prompt; false if it was cancelled.
bool Generation::prefill() {
  const moec_model_info& info = session_->artifact().info();
  const std::vector<int32_t> held = session_->tokens();
  const size_t useful = most_ == 0 ? tokens_.size() : tokens_.size() - 1;  // logits behind the last token are needed for another one
  size_t same = 0;
  while (same < std::min(held.size(), useful) && held[same] == tokens_[same]) ++same;
  if (same < held.size() && !info.rewinds) same = 0;
  if (const auto prefixes = session_->artifact().prefixes()) same = prefixes->restore(session_.get(), tokens_, same, useful);
  if (static_cast<int64_t>(same) < session_->position()) session_->rewind(static_cast<int64_t>(same));
  turn_ = session_->turn;
  stats_.reused_tokens = static_cast<int64_t>(same);
  return compute(same);
}

// Appends the tokens behind those that the session holds; false if it was cancelled.
bool Generation::compute(size_t held) {
  const auto most = static_cast<size_t>(session_->artifact().info().max_tokens);
  for (size_t begin = held; begin < tokens_.size(); begin += most) {
    if (cancelled_) return false;
    const size_t count = std::min(most, tokens_.size() - begin);
    const bool last = begin + count == tokens_.size();
    session_->forward(begin, tokens_.data() + begin, count, last ? OpenSession::Rows::kLast : OpenSession::Rows::kNone, &logits_);
  }
  return true;
}

// Drops the older half of the tokens that a full context has behind the first ones, as often as it takes for the others to fit.
void Generation::forget_oldest(int64_t room) {
  const int64_t context = session_->artifact().info().context, left = context - keep_first_, half = left - left / 2;
  const int64_t over = static_cast<int64_t>(tokens_.size()) + room - context;
  if (over <= 0) return;
  const int64_t dropped = (over + half - 1) / half * half;
  const auto begin = tokens_.begin() + keep_first_;
  tokens_.erase(begin, begin + dropped);
  stats_.dropped_tokens += dropped;
}

// Of a full context: the tokens that stay are computed anew, so that they have the bits of a session that held nothing else. The
// first ones have them already where a token's do not depend on the others of its call. False if it was cancelled.
bool Generation::make_room() {
  const moec_model_info& info = session_->artifact().info();
  settle();
  forget_oldest(1);
  lookup_ = PromptLookup();
  const int64_t held = info.exact && info.rewinds ? keep_first_ : 0;
  session_->rewind(held);
  turn_ = session_->turn;
  return compute(static_cast<size_t>(held));
}

// Appends a token: the logits after it are in `logits_`.
void Generation::advance(int32_t token) {
  const auto left = static_cast<int64_t>(ahead_.size() - taken_);
  if (left > 0 && session_->guessed == left && ahead_[taken_] == token) {
    --session_->guessed;
    ++taken_;
    ++checked_;
    ++stats_.accepted_tokens;
    tokens_.push_back(token);
    return take_row(taken_);
  }
  settle();
  tokens_.push_back(token);
  if (check_guesses()) return;
  const double began = seconds();
  session_->forward(tokens_.size() - 1, &token, 1, OpenSession::Rows::kLast, &logits_);
  pays_.stepped(seconds() - began);
}

// Computes the last token with a draft of those that follow; false if there is none.
bool Generation::check_guesses() {
  const moec_model_info& info = session_->artifact().info();
  if (!speculate_ || !pays_.now()) return false;
  const int64_t room = std::min(info.context - session_->position(), info.max_tokens) - 1;
  if (room < 1) return false;
  const double began = seconds();
  const size_t most = std::min(length_.value(), static_cast<size_t>(room));
  try {
    ahead_ = draft_ ? draft_->draft(tokens_, most, cancelled_) : lookup_.draft(tokens_, most);
    if (ahead_.empty()) return false;
    std::vector<int32_t> call = {tokens_.back()};
    call.insert(call.end(), ahead_.begin(), ahead_.end());
    session_->forward(tokens_.size() - 1, call.data(), call.size(), OpenSession::Rows::kAll, &rows_);
  } catch (const Fault&) {  // of the small model, or logits that are no numbers behind a wrong draft; what is wrong with the token comes next
    if (session_->position() != static_cast<int64_t>(tokens_.size()) - 1) throw;  // the tokens before it are lost
    ahead_.clear();
    speculate_ = false;
    return false;
  }
  session_->guessed = static_cast<int64_t>(ahead_.size());
  stats_.drafted_tokens += session_->guessed;
  check_seconds_ = seconds() - began;
  checked_ = 1;
  take_row(0);
  return true;
}

void Generation::take_row(size_t row) {
  const auto width = static_cast<std::ptrdiff_t>(session_->artifact().info().vocab_size);
  const auto begin = rows_.begin() + static_cast<std::ptrdiff_t>(row) * width;
  logits_.assign(begin, begin + width);
}

// Ends the last check: its gain is recorded, the session forgets drafts that were not taken.
void Generation::settle() {
  if (checked_ > 0) {
    length_.checked(checked_, ahead_.size(), pays_.steps(check_seconds_));
    pays_.checked(checked_, check_seconds_);
  }
  checked_ = 0;
  taken_ = 0;
  ahead_.clear();
  session_->settle();
}

void Generation::constraint_failed() const {
  const char* why = constraint_->error ? constraint_->error(constraint_->user) : nullptr;
  throw Fault(std::string("the constraint: ") + (why && *why ? why : "failed"));
}

int32_t Generation::choose() {
  if (constraint_) {
    mask_.assign((static_cast<size_t>(session_->artifact().info().vocab_size) + 31) / 32, 0);
    if (constraint_->allowed(constraint_->user, mask_.data(), static_cast<int64_t>(mask_.size())) != 0) constraint_failed();
  }
  const int32_t token = sampler_.take(logits_, mask_);
  if (token < 0) throw Fault(std::string("no token can be chosen: ") + (constraint_ ? "biases and constraint exclude all" : "the biases exclude all"));
  return token;
}

void Generation::step() {
  if (session_->turn != turn_) throw Fault("the session was changed, or went on with another generation");
  const double began = seconds();
  if (!begun_) {
    begun_ = true;
    const bool whole = prefill();
    stats_.prefill_seconds = seconds() - began;
    if (!whole) return end(MOEC_APP_CANCELLED);
  } else if (pending_ >= 0) {
    if (cancelled_) return end(MOEC_APP_CANCELLED);
    if (static_cast<int64_t>(tokens_.size()) >= session_->artifact().info().context && !make_room()) return end(MOEC_APP_CANCELLED);
    advance(pending_);
    stats_.decode_seconds += seconds() - began;
  }
  if (most_ >= 0 && stats_.new_tokens >= most_) return end(MOEC_APP_LENGTH);
  if (cancelled_) return end(MOEC_APP_CANCELLED);
  const int32_t token = choose();
  if (session_->artifact().ends(token)) return end(MOEC_APP_STOP_TOKEN);
  ++stats_.new_tokens;
  pending_ = token;
  const int32_t complete = constraint_ ? constraint_->take(constraint_->user, token) : 0;
  if (complete != 0 && complete != 1) constraint_failed();
  piece_ = stops_.push(decoder_.push(token));
  if (top_scores_ >= 0) append_scores(logits_, token, top_scores_, text_bytes_ + static_cast<int64_t>(piece_.size()), &scores_);
  if (stops_.found()) {
    stats_.stopped = MOEC_APP_STOP_STRING;
  } else if (complete == 1) {
    end(MOEC_APP_COMPLETE);
  } else if (stats_.new_tokens == most_) {
    end(MOEC_APP_LENGTH);
  } else if (static_cast<int64_t>(tokens_.size()) >= session_->artifact().info().context && !drop_oldest_) {
    end(MOEC_APP_CONTEXT);
  }
}

void Generation::end(int32_t why) {
  piece_ += stops_.push(decoder_.finish());
  piece_ += stops_.finish();
  stats_.stopped = stops_.found() ? MOEC_APP_STOP_STRING : why;
}
