#include "session_file.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <memory>
#include <random>

#include "core/parallel.h"
#include "file_io.h"

namespace {

constexpr char kMagic[] = "moecsess";
constexpr uint32_t kVersion = 3, kUnplaced = 2;  // of the file; of one whose parts follow each other
constexpr size_t kPiece = size_t{1} << 16;  // of the states, digested by itself: stays in a processor's cache

struct Header {
  char magic[8];
  uint32_t version, zero;
  char artifact[64];
  uint64_t context, tokens, state_bytes, digest, header_digest;
};
static_assert(sizeof(Header) == 120, "the header has no holes");

constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87ull, kPrime2 = 0xC2B2AE3D27D4EB4Full, kPrime3 = 0x165667B19E3779F9ull,
                   kPrime4 = 0x85EBCA77C2B2AE63ull, kPrime5 = 0x27D4EB2F165667C5ull;

uint64_t rotate(uint64_t value, int bits) { return value << bits | value >> (64 - bits); }

template <typename T>
T load(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof value);  // little endian, as all machines this runs on
  return value;
}

uint64_t mix(uint64_t lane, uint64_t word) { return rotate(lane + word * kPrime2, 31) * kPrime1; }

uint64_t header_digest(const Header& header) {
  Xxh64 hash;
  hash.add(&header, sizeof header - sizeof header.header_digest);
  return hash.digest();
}

std::string system_fault(const char* what) { return std::string(what) + ": " + std::strerror(errno); }

// The states one after another, cut into pieces.
class Pieces {
 public:
  explicit Pieces(const std::vector<SessionBytes>& parts) : parts_(parts) {
    for (const SessionBytes& part : parts) {
      begins_.push_back(bytes_);
      bytes_ += part.size;
    }
  }
  uint64_t bytes() const { return bytes_; }
  size_t count() const { return static_cast<size_t>((bytes_ + kPiece - 1) / kPiece); }
  // The digest of piece `number` of the memory that use(part, from, to) gives for each range of a part's bytes that it covers;
  // nothing more is read once that is nullptr.
  template <typename Use>
  uint64_t digest(size_t number, Use use) const {
    uint64_t at = uint64_t{number} * kPiece;
    const uint64_t end = std::min<uint64_t>(at + kPiece, bytes_);
    size_t i = static_cast<size_t>(std::upper_bound(begins_.begin(), begins_.end(), at) - begins_.begin()) - 1;
    Xxh64 hash;
    for (; at < end; ++i) {  // a part may be empty
      const uint64_t within = at - begins_[i];
      const size_t size = static_cast<size_t>(std::min<uint64_t>(parts_[i].size - within, end - at));
      if (size == 0) continue;
      const uint8_t* const data = use(i, static_cast<size_t>(within), static_cast<size_t>(within) + size);
      if (!data) break;
      hash.add(data, size);
      at += size;
    }
    return hash.digest();
  }

 private:
  const std::vector<SessionBytes>& parts_;
  std::vector<uint64_t> begins_;
  uint64_t bytes_ = 0;
};

// The digest of tokens and states, by all workers; memory(worker, part, from, to) as above.
template <typename Memory>
uint64_t digest_of(const std::vector<int32_t>& tokens, const Pieces& pieces, Memory memory) {
  std::vector<uint64_t> digests(pieces.count());
  moec::for_each_unit(moec::workers(), static_cast<int64_t>(digests.size()), [&](int32_t worker, int64_t i) {
    digests[static_cast<size_t>(i)] = pieces.digest(
        static_cast<size_t>(i), [&](size_t part, size_t from, size_t to) { return memory(worker, part, from, to); });
  });
  Xxh64 hash;
  hash.add(tokens.data(), tokens.size() * sizeof(int32_t));
  hash.add(digests.data(), digests.size() * sizeof(uint64_t));
  return hash.digest();
}

// Has the system give the pages of a range at once: taken one by one, as they are written, they cost more than the reading.
void populate(uint8_t* data, size_t size) {
#ifdef MADV_POPULATE_WRITE
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / page * page;
  madvise(reinterpret_cast<void*>(begin), reinterpret_cast<uintptr_t>(data) + size - begin, MADV_POPULATE_WRITE);
#else
  (void)data, (void)size;
#endif
}

// Opens a regular file; a pipe that nobody writes does not block.
int open_regular(const std::string& path, std::string* fault) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
  struct stat status;
  if (descriptor < 0) {
    *fault = system_fault("cannot be read");
  } else if (fstat(descriptor, &status) != 0 || !S_ISREG(status.st_mode)) {
    *fault = "is not a regular file";
    close(descriptor);
    return -1;
  }
  return descriptor;
}

// Why the file at `path` may not be replaced: it exists and is not a session that moec saved. Else "".
std::string foreign(const std::string& path) {
  struct stat status;
  if (lstat(path.c_str(), &status) != 0) return "";
  std::string fault;
  const int descriptor = S_ISREG(status.st_mode) ? open_regular(path, &fault) : -1;
  char magic[8] = {};
  const bool ours = descriptor >= 0 && read_all(descriptor, magic, sizeof magic, 0) && std::memcmp(magic, kMagic, 8) == 0;
  if (descriptor >= 0) close(descriptor);
  return ours ? "" : "exists and is not a session that moec saved";
}

std::string folder_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
}

constexpr char kUnfinished[] = ".moec-part-";
constexpr time_t kAbandoned = 3600;  // seconds without a write, after which nobody is writing a file any more

// Removes what earlier saves to `path` left where their process was killed.
void remove_abandoned(const std::string& path) {
  const std::string folder = folder_of(path), begin = path.substr(path.rfind('/') + 1) + kUnfinished;
  const std::unique_ptr<DIR, int (*)(DIR*)> entries(opendir(folder.c_str()), closedir);
  while (const dirent* entry = entries ? readdir(entries.get()) : nullptr) {
    struct stat status;
    if (std::strncmp(entry->d_name, begin.c_str(), begin.size()) != 0) continue;
    const std::string left = folder + "/" + entry->d_name;
    if (lstat(left.c_str(), &status) == 0 && S_ISREG(status.st_mode) && time(nullptr) - status.st_mtime > kAbandoned) unlink(left.c_str());
  }
}

void flush_folder(const std::string& path) {
  const std::string folder = folder_of(path);
  const int descriptor = ::open(folder.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) return;
  fsync(descriptor);  // some file systems have no fsync of folders
  close(descriptor);
}

}  // namespace

void Xxh64::add(const void* data, size_t size) {
  const auto* at = static_cast<const uint8_t*>(data);
  total_ += size;
  if (held_ > 0) {
    const size_t taken = std::min(size, sizeof rest_ - held_);
    std::memcpy(rest_ + held_, at, taken);
    held_ += taken;
    at += taken;
    size -= taken;
    if (held_ < sizeof rest_) return;
    for (int i = 0; i < 4; ++i) lanes_[i] = mix(lanes_[i], load<uint64_t>(rest_ + 8 * i));
    held_ = 0;
  }
  uint64_t a = lanes_[0], b = lanes_[1], c = lanes_[2], d = lanes_[3];
  for (; size >= 32; size -= 32, at += 32) {
    a = mix(a, load<uint64_t>(at));
    b = mix(b, load<uint64_t>(at + 8));
    c = mix(c, load<uint64_t>(at + 16));
    d = mix(d, load<uint64_t>(at + 24));
  }
  lanes_[0] = a, lanes_[1] = b, lanes_[2] = c, lanes_[3] = d;
  if (size > 0) std::memcpy(rest_, at, size);
  held_ = size;
}

uint64_t Xxh64::digest() const {
  uint64_t hash = kPrime5;
  if (total_ >= 32) {
    hash = rotate(lanes_[0], 1) + rotate(lanes_[1], 7) + rotate(lanes_[2], 12) + rotate(lanes_[3], 18);
    for (const uint64_t lane : lanes_) hash = (hash ^ mix(0, lane)) * kPrime1 + kPrime4;
  }
  hash += total_;
  const uint8_t *at = rest_, *end = rest_ + held_;
  for (; end - at >= 8; at += 8) hash = rotate(hash ^ mix(0, load<uint64_t>(at)), 27) * kPrime1 + kPrime4;
  if (end - at >= 4) {
    hash = rotate(hash ^ load<uint32_t>(at) * kPrime1, 23) * kPrime2 + kPrime3;
    at += 4;
  }
  for (; at < end; ++at) hash = rotate(hash ^ *at * kPrime5, 11) * kPrime1;
  hash = (hash ^ hash >> 33) * kPrime2;
  hash = (hash ^ hash >> 29) * kPrime3;
  return hash ^ hash >> 32;
}

std::string write_session(const std::string& path, const SessionState& state, const std::vector<SessionBytes>& parts,
                          const std::function<bool()>& read) {
  if (const std::string fault = foreign(path); !fault.empty()) return fault;
  Header header = {};
  std::memcpy(header.magic, kMagic, sizeof header.magic);
  header.version = kVersion;
  std::memcpy(header.artifact, state.artifact.data(), std::min(state.artifact.size(), sizeof header.artifact));
  header.context = static_cast<uint64_t>(state.context);
  header.tokens = state.tokens.size();
  const size_t token_bytes = state.tokens.size() * sizeof(int32_t);
  const Pieces pieces(parts);
  header.state_bytes = pieces.bytes();
  header.digest = digest_of(state.tokens, pieces, [&](int32_t, size_t part, size_t from, size_t) { return parts[part].data + from; });
  header.header_digest = header_digest(header);
  remove_abandoned(path);
  char suffix[16];
  std::random_device random;
  std::snprintf(suffix, sizeof suffix, "%08x", static_cast<unsigned>(random()));
  const std::string fresh = path + kUnfinished + suffix;
  const int descriptor = ::open(fresh.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (descriptor < 0) return system_fault("cannot be written");
  const std::vector<uint64_t> places = places_of(parts, sizeof header + token_bytes);
  bool ok = ftruncate(descriptor, static_cast<off_t>(places.back())) == 0 && write_all(descriptor, &header, sizeof header, 0) &&
            write_all(descriptor, state.tokens.data(), token_bytes, sizeof header);
  for (size_t i = 0; i < parts.size(); ++i) ok = ok && write_all(descriptor, parts[i].data, parts[i].size, places[i]);
  ok = ok && fsync(descriptor) == 0;
  std::string fault = ok ? "" : system_fault("cannot be written");
  if (close(descriptor) != 0 && ok) fault = system_fault("cannot be written");
  if (fault.empty() && !read()) fault = "was not read whole";
  if (fault.empty() && std::rename(fresh.c_str(), path.c_str()) != 0) fault = system_fault("cannot be written");
  if (!fault.empty()) {
    unlink(fresh.c_str());
    return fault;
  }
  flush_folder(path);
  return "";
}

namespace {

std::string wrong_length(uint64_t length) { return "damaged: " + std::to_string(length) + " bytes are not what its header announces"; }

}  // namespace

SessionReader::~SessionReader() {
  if (descriptor_ >= 0) close(descriptor_);
}

std::string SessionReader::open(const std::string& path, int64_t most, SessionState* state) {
  std::string fault;
  descriptor_ = open_regular(path, &fault);
  if (descriptor_ < 0) return fault;
  struct stat status;
  if (fstat(descriptor_, &status) != 0) return system_fault("cannot be read");
  Header header;
  if (!read_all(descriptor_, &header, sizeof header, 0) || std::memcmp(header.magic, kMagic, sizeof header.magic) != 0)
    return "is not a session that moec saved";
  if (header.version != kVersion && header.version != kUnplaced)
    return "was saved by another version of moec (format " + std::to_string(header.version) + ")";
  if (header.header_digest != header_digest(header)) return "damaged: its header differs from its digest";
  if (header.tokens > static_cast<uint64_t>(most) || header.context > INT64_MAX)
    return "holds " + std::to_string(header.tokens) + " tokens; the context holds " + std::to_string(most);
  states_at_ = sizeof header + header.tokens * sizeof(int32_t);
  length_ = static_cast<uint64_t>(status.st_size);
  if (length_ < states_at_ || length_ - states_at_ < header.state_bytes) return wrong_length(length_);
  state->artifact.assign(header.artifact, strnlen(header.artifact, sizeof header.artifact));
  state->context = static_cast<int64_t>(header.context);
  state->tokens.resize(header.tokens);
  if (!read_all(descriptor_, state->tokens.data(), header.tokens * sizeof(int32_t), sizeof header)) return "truncated while it was read";
  version_ = header.version;
  state_bytes_ = header.state_bytes;
  digest_ = header.digest;
  return "";
}

std::string SessionReader::place(const std::vector<SessionBytes>& parts) {
  if (version_ == kVersion) {
    places_ = places_of(parts, states_at_);
  } else {
    places_.assign(1, states_at_);
    for (const SessionBytes& part : parts) places_.push_back(places_.back() + part.size);
  }
  return places_.back() == length_ ? "" : wrong_length(length_);
}

std::shared_ptr<SharedPages> SessionReader::pages(const SessionState& state, const std::vector<SessionBytes>& parts) const {
  const int descriptor = fcntl(descriptor_, F_DUPFD_CLOEXEC, 0);
  if (descriptor < 0) return nullptr;
  const auto matches = [digest = digest_, tokens = state.tokens, parts, places = places_](int file) {
    const Pieces pieces(parts);
    std::vector<std::vector<uint8_t>> buffers(static_cast<size_t>(moec::workers()), std::vector<uint8_t>(kPiece));
    return digest == digest_of(tokens, pieces, [&](int32_t worker, size_t part, size_t from, size_t to) -> const uint8_t* {
      uint8_t* const buffer = buffers[static_cast<size_t>(worker)].data();
      return read_all(file, buffer, to - from, places[part] + from) ? buffer : nullptr;
    });
  };
  return std::make_shared<SharedPages>(descriptor, places_, matches);
}

std::string SessionReader::read(const SessionState& state, const std::vector<SessionBytes>& parts,
                                const std::vector<std::pair<size_t, size_t>>& mapped) const {
  const Pieces pieces(parts);
  std::atomic<bool> whole{true};
  const auto fetch = [&](size_t part, size_t from, size_t to) {
    if (from >= to) return;
    populate(parts[part].data + from, to - from);
    if (!read_all(descriptor_, parts[part].data + from, to - from, places_[part] + from)) whole = false;
  };
  const uint64_t digest = digest_of(state.tokens, pieces, [&](int32_t, size_t part, size_t from, size_t to) -> const uint8_t* {
    fetch(part, from, std::min(to, mapped[part].first));
    fetch(part, std::max(from, mapped[part].second), to);
    return whole.load(std::memory_order_relaxed) ? parts[part].data + from : nullptr;
  });
  if (!whole) return "truncated while it was read";
  return digest == digest_ ? "" : "damaged: its contents differ from its digest";
}
