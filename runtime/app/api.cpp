#include "api.h"

#include <map>
#include <mutex>
#include <utility>

namespace {

constexpr int64_t kMostText = int64_t{64} << 20;  // bytes of a text

thread_local std::string last_error;

struct Registry {
  std::mutex mutex;
  std::map<int64_t, std::shared_ptr<Object>> objects;
  int64_t last = 0;
};

Registry& registry() {
  static auto* made = new Registry;  // never destroyed: threads may still call while the process ends
  return *made;
}

}  // namespace

int64_t register_object(std::shared_ptr<Object> object) {
  Registry& all = registry();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.objects.emplace(++all.last, std::move(object));
  return all.last;
}

std::shared_ptr<Object> registered(int64_t id) {
  Registry& all = registry();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.objects.find(id);
  return found == all.objects.end() ? nullptr : found->second;
}

bool unregister(int64_t id) {
  Registry& all = registry();
  std::shared_ptr<Object> object;  // declared first, so that it is destroyed without the lock
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.objects.find(id);
  if (found == all.objects.end()) return false;
  object = std::move(found->second);
  all.objects.erase(found);
  return true;
}

void clear_error() { last_error.clear(); }
const char* kept_error() { return last_error.c_str(); }

// At most 500 bytes, of whole characters.
void keep_error(const char* what) {
  Characters characters;  // for names of files that are not UTF-8: the reason stands behind them
  std::string text = characters.push(what);
  text += characters.finish();
  if (text.size() > 500) text.resize(500);
  for (char& c : text)
    if (static_cast<unsigned char>(c) < 32 || c == 127) c = ' ';
  text.resize(valid_utf8(text));
  last_error = text.empty() ? "failed" : text;
}

std::string text_of(const char* text, int64_t bytes, const char* name) {
  if (!text) throw Fault(std::string(name) + ": NULL");
  const size_t size = bytes < 0 ? strnlen(text, static_cast<size_t>(kMostText) + 1) : static_cast<size_t>(bytes);
  if (size > static_cast<size_t>(kMostText)) throw Fault(std::string(name) + ": more than 64 MB");
  return std::string(text, size);
}

std::vector<int32_t> ids_of(const int32_t* ids, int64_t count) {
  if (count < 0 || (count > 0 && !ids)) throw Fault("no ids, or a negative count");
  return std::vector<int32_t>(ids, ids + count);
}
