// What the functions of moec.h share: ids, checked arguments, and faults as values.
#ifndef MOEC_API_H_
#define MOEC_API_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "../include/moec.h"
#include "generation.h"
#include "objects.h"

constexpr int64_t kMostMessages = 10'000, kMostCalls = 1000;

// An id for an object; the object of an id, nullptr for none; whether an id named one, which it does no more.
int64_t register_object(std::shared_ptr<Object> object);
std::shared_ptr<Object> registered(int64_t id);
bool unregister(int64_t id);

// What moec_app_error() says in this thread. One line, whatever a file or its name had in it.
void clear_error();
void keep_error(const char* what);
const char* kept_error();

template <typename T, typename Body>
T guarded(Body body) {
  try {
    clear_error();
    return body();
  } catch (const std::bad_alloc&) {
    keep_error("out of memory");
  } catch (const std::exception& e) {
    keep_error(e.what());
  } catch (...) {
    keep_error("failed");
  }
  return static_cast<T>(-1);
}

template <typename T>
std::shared_ptr<T> named(int64_t id, const char* kind) {
  const auto found = std::dynamic_pointer_cast<T>(registered(id));
  if (!found) throw Fault(std::to_string(id) + " is no open " + kind);
  return found;
}

inline std::shared_ptr<OpenArtifact> artifact_of(int64_t id) { return named<OpenArtifact>(id, "artifact"); }
inline std::shared_ptr<OpenSession> session_of(int64_t id) { return named<OpenSession>(id, "session"); }
inline std::shared_ptr<OpenSplitter> splitter_of(int64_t id) { return named<OpenSplitter>(id, "splitter"); }
inline std::shared_ptr<Generation> generation_of(int64_t id) { return named<Generation>(id, "generation"); }

template <typename T>
void check_size(const T* given, const char* name) {
  if (!given) throw Fault(std::string(name) + ": NULL");
  if (given->size != sizeof(T))
    throw Fault(std::string(name) + ".size is " + std::to_string(given->size) + ", not " + std::to_string(sizeof(T)) +
                ": set it, and compile with the header of this library");
}

// A text of an application: of `bytes` bytes, or up to a zero byte with -1.
std::string text_of(const char* text, int64_t bytes, const char* name);
std::vector<int32_t> ids_of(const int32_t* ids, int64_t count);

template <typename T, typename Found>
int64_t written(const Found& found, T* out, int64_t capacity) {
  if (capacity < 0 || (capacity > 0 && !out)) throw Fault("no buffer, or a negative capacity");
  const auto count = std::min(static_cast<int64_t>(found.size()), capacity);
  if (count > 0) std::copy(found.begin(), found.begin() + count, out);
  return static_cast<int64_t>(found.size());
}

#endif  // MOEC_API_H_
