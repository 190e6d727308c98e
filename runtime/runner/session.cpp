// Sequences over one model: the part of moec_runtime.h that is about sessions.
#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <shared_mutex>
#include <string>
#include <vector>

#include "caches.h"
#include "model.h"
#include "moec_runtime.h"
#include "session_file.h"

using moec_runtime::guarded;
using moec_runtime::pools;
using moec_runtime::text;
using moec_runtime::Watch;

struct moec_session {
  moec_model* model = nullptr;
  std::string error;
  Caches caches;
  bool counted = false;         // in the model's sessions: it is open
  std::vector<int32_t> tokens;  // ids fit 32 bits: read_constants has checked the vocabulary
};

namespace {

int64_t position_of(const moec_session& session) { return static_cast<int64_t>(session.tokens.size()); }

// Runs `body` alone on the model; its failure becomes the session's. opening: of a session that is not open yet.
template <typename Body>
int32_t alone(moec_session* session, Body body, bool opening = false) {
  if (!session) return -1;
  moec_model* model = session->model;
  if (!model) return -1;
  std::lock_guard<std::mutex> lock(model->busy);
  model->error.clear();
  const bool ok = guarded(model, [&] { return opening || session->counted ? body() : model->fail("the session is not open"); });
  session->error = model->error;
  return ok ? 0 : -1;
}

// Whether the file whose pages the session uses is as it was; else the session holds no tokens any more.
bool whole(moec_session* session) {
  Caches& caches = session->caches;
  if (!caches.damaged && !(caches.base && caches.base->changed())) return true;
  const bool none = session->tokens.empty();
  session->tokens.clear();
  session->model->seats.clear(&caches);
  return none ||
         session->model->fail("the file that the session was restored from was changed while it is in use, and its tokens are lost");
}

bool can_start(const moec_session& session, int64_t start) {
  const int64_t position = position_of(session);
  if (start < 0 || start > position)
    return session.model->fail(text("position %" PRId64 ": the session holds %" PRId64 " tokens", start, position));
  if (start == position || start == 0 || session.model->info.rewinds) return true;
  return session.model->fail("the model's states cannot go back to an earlier position, or its program does not say that they can");
}

bool restore(moec_session* session, const char* path, const char* artifact) {
  moec_model* model = session->model;
  SessionState state;
  SessionReader reader;
  std::string fault = reader.open(path, model->info.context, &state);
  if (!fault.empty()) return model->fail(fault);
  if (state.artifact != artifact) return model->fail("was saved with another artifact");
  for (const int32_t id : state.tokens)
    if (id < 0 || id >= model->info.vocab_size) return model->fail(text("damaged: token id %d is not in the vocabulary", id));
  const int64_t position = static_cast<int64_t>(state.tokens.size());
  if (state.context != model->info.context || reader.state_bytes() != model->seats.bytes_at(position))
    return model->fail("damaged: its states are not those of this model");
  if (session->tokens.empty()) model->seats.clear(&session->caches);  // it may have held some before
  std::shared_lock<std::shared_mutex> keep(pools);  // as in a forward: the file is read by the model's threads
  struct Beside {  // the file's states, beside the session's own
    moec_model* model;
    ~Beside() { model->count_session(0); }
  } const beside{model};
  const auto both = static_cast<int64_t>(model->seats.bytes_at(session->caches.reached) + reader.state_bytes());
  if (!model->hold_beside(both - model->session_bytes()))
    return model->fail("the memory budget has no room for the file's caches beside those of the session, which are given up only "
                       "when all of the file is read: restore into a new session or one that was reset");
  Caches fresh;  // the session stays as it was until all of it is there
  if (!model->seats.reserve(&fresh)) return model->fail("no address space for the caches");
  const std::vector<SessionBytes> parts = model->seats.bytes_of(fresh, position);
  fault = reader.place(parts);
  if (!fault.empty()) return model->fail(fault);
  Seats::Mapped mapped(parts.size());
  if (auto pages = reader.pages(state, parts)) mapped = model->seats.map(&fresh, std::move(pages), position);
  const SharedUse use(model->seats, fresh);
  fault = reader.read(state, parts, mapped);
  if (!fault.empty() || use.lost()) return model->fail(fault.empty() ? "truncated while it was read" : fault);
  fresh.reached = position;
  model->seats.leave(&session->caches);
  session->caches.swap(fresh);
  session->tokens.swap(state.tokens);
  return true;
}

}  // namespace

moec_session* moec_session_open(moec_model* model) {
  auto* session = new (std::nothrow) moec_session;
  if (!session || !model) return session;
  session->model = model;
  ++model->owners;
  const auto open = [&] {
    if (!model->module) return model->fail("the model is not open");
    if (!model->no_sessions.empty()) return model->fail(model->no_sessions);
    if (!model->seats.reserve(&session->caches)) return model->fail("no address space for the caches");
    return session->counted = model->count_session(1);
  };
  alone(session, open, true);
  return session;
}

void moec_session_close(moec_session* session) {
  if (!session) return;
  moec_model* model = session->model;
  if (model) {
    std::lock_guard<std::mutex> lock(model->busy);  // a call that runs ends first
    model->seats.leave(&session->caches);
    if (session->counted) model->count_session(-1);
  }
  delete session;
  moec_model_close(model);
}

const char* moec_session_error(const moec_session* session) {
  return !session ? "out of memory" : session->model ? session->error.c_str() : "no model";
}

int64_t moec_session_tokens(const moec_session* session, int64_t* ids, int64_t capacity) {
  if (!session || !session->model) return 0;
  std::lock_guard<std::mutex> lock(session->model->busy);  // another thread's call may be changing them
  const int64_t count = position_of(*session);
  for (int64_t i = 0; ids && i < std::min(count, capacity); ++i) ids[i] = session->tokens[static_cast<size_t>(i)];
  return count;
}

int32_t moec_session_forward(moec_session* session, const int64_t* ids, int64_t n, int64_t start, int32_t all, float* logits,
                             int64_t capacity) {
  return alone(session, [&] {
    moec_model* model = session->model;
    std::shared_lock<std::shared_mutex> keep(pools);
    if (!ids || (capacity != 0 && !logits)) return model->fail("no buffer");
    Watch watch;
    if (!whole(session) || !can_start(*session, start) || !model->ready(ids, n, start, all != 0, capacity)) return false;
    session->tokens.reserve(static_cast<size_t>(start + n));
    session->tokens.resize(static_cast<size_t>(start));  // also where the call then fails: it may have written behind them
    if (!model->forward(&session->caches, ids, n, start, all != 0, logits, capacity)) {
      if (session->caches.damaged) return whole(session);
      if (!model->info.rewinds) session->tokens.clear();  // states may have gone on: they are those of no tokens
      return false;
    }
    for (int64_t i = 0; i < n; ++i) session->tokens.push_back(static_cast<int32_t>(ids[i]));
    return whole(session);  // what was written to the file meanwhile was read
  });
}

int32_t moec_session_rewind(moec_session* session, int64_t position) {
  return alone(session, [&] {
    if (!can_start(*session, position)) return false;
    session->tokens.resize(static_cast<size_t>(position));
    return true;
  });
}

moec_session* moec_session_fork(moec_session* session) {
  if (!session) return nullptr;
  moec_session* fork = moec_session_open(session->model);
  if (!fork || !fork->error.empty()) return fork;
  alone(fork, [&] {
    if (!session->counted) return fork->model->fail("the session is not open");
    std::shared_lock<std::shared_mutex> keep(pools);  // the model's threads copy
    if (!whole(session)) return false;
    const SharedUse use(fork->model->seats, session->caches);
    // a budget counts the caches of each session whole
    fork->model->seats.fork(&session->caches, &fork->caches, position_of(*session), !fork->model->experts);
    session->caches.damaged |= use.lost();
    if (!whole(session)) return false;
    fork->tokens = session->tokens;
    return true;
  });
  return fork;
}

int32_t moec_session_save(moec_session* session, const char* path, const char* artifact) {
  return alone(session, [&] {
    moec_model* model = session->model;
    SessionState state;
    if (!path || !artifact || std::strlen(artifact) > 64) return model->fail("no path, or no digest of the artifact");
    state.artifact = artifact;
    state.context = model->info.context;
    state.tokens = session->tokens;
    std::shared_lock<std::shared_mutex> keep(pools);
    if (!whole(session)) return false;
    const SharedUse use(model->seats, session->caches);
    const auto read = [&] {
      session->caches.damaged |= use.lost();
      return whole(session);
    };
    const std::string fault = write_session(path, state, model->seats.bytes_of(session->caches, position_of(*session)), read);
    if (!model->error.empty() || fault.empty()) return model->error.empty();
    return read() && model->fail(fault);  // what the system says of memory that it cannot read is no reason
  });
}

int32_t moec_session_restore(moec_session* session, const char* path, const char* artifact) {
  return alone(session, [&] {
    if (!path || !artifact) return session->model->fail("no path, or no digest of the artifact");
    return restore(session, path, artifact);
  });
}

int32_t moec_session_expert_stats(moec_session* session, moec_expert_stats* stats) {
  return session ? moec_model_expert_stats(session->model, stats) : -1;
}

int64_t moec_session_expert_layer_stats(moec_session* session, moec_expert_layer_stats* layers, int64_t capacity) {
  return session ? moec_model_expert_layer_stats(session->model, layers, capacity) : -1;
}
