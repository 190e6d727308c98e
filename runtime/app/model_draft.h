// Drafts by a small model of the same tokenizer, greedily, as assistant/speculate.py's ModelDrafter.
#ifndef MOEC_MODEL_DRAFT_H_
#define MOEC_MODEL_DRAFT_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "objects.h"

class ModelDraft {
 public:
  // Of a session that drafts for another one; a Fault if it cannot.
  ModelDraft(std::shared_ptr<OpenSession> session, const OpenSession& of);
  // At most `most` tokens that may follow `tokens`; none while another thread uses the session, or once `cancelled` is set. A Fault
  // where the small model fails.
  std::vector<int32_t> draft(const std::vector<int32_t>& tokens, size_t most, const std::atomic<bool>& cancelled);

 private:
  std::shared_ptr<OpenSession> session_;
};

#endif  // MOEC_MODEL_DRAFT_H_
