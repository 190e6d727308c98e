#include "prefixes.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <map>
#include <memory>

#include "../runner/session_file.h"
#include "objects.h"

namespace {

constexpr size_t kDigits = 16;  // of a digest, hexadecimal
constexpr std::string_view kEnding = ".session";

bool begins(std::string_view text, std::string_view with) { return text.substr(0, with.size()) == with; }

std::string hex_of(uint64_t value) {
  char text[kDigits + 1];
  std::snprintf(text, sizeof text, "%016" PRIx64, value);
  return text;
}

std::string digest_of(const std::vector<int32_t>& ids, size_t count) {
  Xxh64 hash;
  hash.add(ids.data(), count * sizeof(int32_t));
  return hex_of(hash.digest());
}

bool is_hex(std::string_view text) { return text.find_first_not_of("0123456789abcdef") == std::string_view::npos; }

bool is_name(std::string_view name) {
  return !name.empty() && name.size() <= PrefixFolder::kLongestName &&
         name.find_first_not_of("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-") == std::string_view::npos;
}

// Whether a file that gives this reason when it is restored will never be of use.
bool is_damage(const std::string& reason) {
  for (const std::string_view words : {"damaged", "truncated", "is not a", "was saved with another", "holds "})
    if (begins(reason, words)) return true;
  return false;
}

bool is_no_room(const std::string& reason) {
  return reason.find("has no room") != std::string::npos || reason.find("leaves no room") != std::string::npos;
}

// When a file was written, and when it was last used; 0 where the system does not tell.
struct Times {
  std::pair<int64_t, int64_t> written, used;
};
Times times_of(const std::string& path) {
  struct stat status;
  if (lstat(path.c_str(), &status) != 0) return {};
#ifdef __APPLE__
  const timespec &written = status.st_mtimespec, &used = status.st_atimespec;
#else
  const timespec &written = status.st_mtim, &used = status.st_atim;
#endif
  return {{written.tv_sec, written.tv_nsec}, {used.tv_sec, used.tv_nsec}};
}

// The time of writing stays: sessions learn from it that their file was changed. The folder may be read-only.
void mark_used(const std::string& path) {
  const timespec times[2] = {{0, UTIME_NOW}, {0, UTIME_OMIT}};
  utimensat(AT_FDCWD, path.c_str(), times, 0);
}

void make_folders(const std::string& folder) {
  for (size_t at = 1; at <= folder.size(); ++at)
    if (at == folder.size() || folder[at] == '/') mkdir(folder.substr(0, at).c_str(), 0700);  // opening it tells what failed
}

}  // namespace

PrefixFolder::PrefixFolder(std::string folder, const std::string& identity)
    : folder_(std::move(folder)), identity_(identity.substr(identity.size() - std::min(kDigits, identity.size()))) {
  if (folder_.empty()) throw Fault("folder: empty");
  make_folders(folder_);
  const std::unique_ptr<DIR, int (*)(DIR*)> opened(opendir(folder_.c_str()), closedir);
  if (!opened) throw Fault(folder_ + ": cannot be used for prefixes: " + std::strerror(errno));
}

void PrefixFolder::check_name(std::string_view name) {
  if (!is_name(name)) throw Fault("name: 1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-'");
}

size_t PrefixFolder::restore(OpenSession* session, const std::vector<int32_t>& ids, size_t held, size_t most) {
  std::map<int64_t, std::string> digests;
  for (const File& file : files()) {
    const auto count = static_cast<size_t>(file.count);
    if (count <= held || count > most) continue;
    std::string& digest = digests[file.count];
    if (digest.empty()) digest = digest_of(ids, count);
    if (file.digest != digest) continue;
    const std::string path = path_of(file.file);
    std::string reason = session->restored(path);
    if (is_no_room(reason)) {  // beside what the session holds; in its place there may be
      session->rewind(0);
      reason = session->restored(path);
    }
    if (reason.empty() && session->holds(ids, count)) {
      if (file.name.empty()) mark_used(path);
      return count;
    }
    if (reason.empty()) {
      session->rewind(0);
      remove(file, "holds other tokens than its name says");
    } else if (is_damage(reason)) {
      remove(file, reason);
    } else {
      tell(path + ": is not used: " + reason);
    }
    held = std::min(held, static_cast<size_t>(session->position()));
  }
  return held;
}

void PrefixFolder::keep(OpenSession* session, const std::string& name) {
  const std::vector<int32_t> ids = session->tokens();
  if (ids.empty()) throw Fault("the session holds no tokens");
  const std::lock_guard<std::mutex> lock(changing_);
  const std::string begin = identity_ + "-" + std::to_string(ids.size()) + "-" + digest_of(ids, ids.size());
  const std::string file = begin + (name.empty() ? "" : "." + name) + std::string(kEnding);
  if (access(path_of(file).c_str(), F_OK) != 0) {
    session->save(path_of(file));
  } else if (name.empty()) {
    mark_used(path_of(file));
  }
  if (name.empty()) return remove_oldest();
  for (const File& old : files())
    if (old.name == name && old.file != file) unlink(path_of(old.file).c_str());
}

bool PrefixFolder::forget(const std::string& name) {
  const std::lock_guard<std::mutex> lock(changing_);
  bool known = false;
  for (const File& file : files()) {
    if (file.name != name) continue;
    if (unlink(path_of(file.file).c_str()) != 0 && errno != ENOENT)
      throw Fault(path_of(file.file) + ": cannot be removed: " + std::strerror(errno));
    known = true;
  }
  return known;
}

int64_t PrefixFolder::tokens_of(const std::string& name) {
  const File* newest = nullptr;
  const std::vector<File> all = files();
  for (const File& file : all)  // one, unless a process ended while it replaced it
    if (file.name == name && (!newest || times_of(path_of(file.file)).written > times_of(path_of(newest->file)).written)) newest = &file;
  return newest ? newest->count : 0;
}

std::string PrefixFolder::told() {
  const std::lock_guard<std::mutex> lock(telling_);
  return told_;
}

bool PrefixFolder::read(const std::string& file, File* found) const {
  std::string_view rest = file;
  if (rest.size() < kEnding.size() || rest.substr(rest.size() - kEnding.size()) != kEnding) return false;
  rest.remove_suffix(kEnding.size());
  if (!begins(rest, identity_ + "-")) return false;
  rest.remove_prefix(identity_.size() + 1);
  const size_t digits = std::min(rest.find_first_not_of("0123456789"), rest.size());
  if (digits == 0 || digits > 9 || rest.size() < digits + 1 + kDigits || rest[digits] != '-') return false;
  found->count = std::strtoll(std::string(rest.substr(0, digits)).c_str(), nullptr, 10);
  found->digest = rest.substr(digits + 1, kDigits);
  rest.remove_prefix(digits + 1 + kDigits);
  found->file = file;
  found->name.clear();
  if (!rest.empty()) {
    if (rest[0] != '.' || !is_name(rest.substr(1))) return false;
    found->name = rest.substr(1);
  }
  return found->count > 0 && is_hex(found->digest);
}

std::vector<PrefixFolder::File> PrefixFolder::files() const {
  std::vector<File> found;
  const std::unique_ptr<DIR, int (*)(DIR*)> entries(opendir(folder_.c_str()), closedir);
  File file;
  while (const dirent* entry = entries ? readdir(entries.get()) : nullptr)
    if (read(entry->d_name, &file)) found.push_back(file);
  std::sort(found.begin(), found.end(), [](const File& a, const File& b) { return a.count > b.count || (a.count == b.count && a.file < b.file); });
  return found;
}

void PrefixFolder::tell(const std::string& what) {
  const std::lock_guard<std::mutex> lock(telling_);
  told_ = what;
}

void PrefixFolder::remove(const File& file, const std::string& why) {
  const std::string path = path_of(file.file);
  const bool gone = unlink(path.c_str()) == 0 || errno == ENOENT;
  tell(path + ": " + why + (gone ? "; it was removed" : "; it cannot be removed: " + std::string(std::strerror(errno))));
}

void PrefixFolder::remove_oldest() const {
  std::vector<std::pair<std::pair<int64_t, int64_t>, std::string>> unnamed;
  for (const File& file : files())
    if (file.name.empty()) unnamed.emplace_back(times_of(path_of(file.file)).used, file.file);
  std::sort(unnamed.begin(), unnamed.end());
  for (size_t i = 0; i + kMostUnnamed < unnamed.size(); ++i) unlink(path_of(unnamed[i].second).c_str());
}
