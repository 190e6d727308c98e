#include "model_draft.h"

#include <algorithm>
#include <mutex>
#include <utility>

ModelDraft::ModelDraft(std::shared_ptr<OpenSession> session, const OpenSession& of) : session_(std::move(session)) {
  const TextTables &own = session_->artifact().tokenizer().tables(), &wanted = of.artifact().tokenizer().tables();
  if (session_.get() == &of) throw Fault("draft: the session itself");
  if (session_->artifact().info().vocab_size != of.artifact().info().vocab_size || own.offsets != wanted.offsets || own.texts != wanted.texts)
    throw Fault("draft: its tokens are others; draft with a model of the same tokenizer");
  if (!session_->artifact().info().rewinds) throw Fault("draft: its states do not go back to an earlier position; take another model");
}

std::vector<int32_t> ModelDraft::draft(const std::vector<int32_t>& tokens, size_t most, const std::atomic<bool>& cancelled) {
  // two generations may draft for each other: neither waits while it holds its own session
  const std::unique_lock<std::mutex> lock(session_->busy, std::try_to_lock);
  const moec_model_info& info = session_->artifact().info();
  if (!lock.owns_lock() || most == 0 || static_cast<int64_t>(tokens.size() + most) > info.context) return {};
  const std::vector<int32_t> held = session_->tokens();
  size_t same = 0;
  while (same < std::min(held.size(), tokens.size() - 1) && held[same] == tokens[same]) ++same;
  session_->rewind(static_cast<int64_t>(same));
  std::vector<float> logits;
  const auto step = static_cast<size_t>(info.max_tokens);
  for (size_t begin = same; begin < tokens.size(); begin += step) {
    if (cancelled) return {};
    const size_t count = std::min(step, tokens.size() - begin);
    const bool last = begin + count == tokens.size();
    session_->forward(begin, tokens.data() + begin, count, last ? OpenSession::Rows::kLast : OpenSession::Rows::kNone, &logits);
  }
  std::vector<int32_t> found;
  for (;;) {
    found.push_back(static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin()));
    if (found.size() == most) return found;
    session_->forward(tokens.size() + found.size() - 1, &found.back(), 1, OpenSession::Rows::kLast, &logits);
  }
}
