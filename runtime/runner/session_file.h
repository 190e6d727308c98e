// A saved session: a header with the digest of everything, the tokens, and the bytes of the states that count.
//
//   8 bytes "moecsess", u32 version 3, u32 zero, 64 bytes the artifact's digest as text padded with zeros,
//   u64 context, u64 tokens, u64 bytes of states, u64 digest, u64 XXH64 of all before it
//   int32 x tokens; the states, part by part, the first `tokens` positions of each
//
// Parts of 32 KiB or more begin where `places_of` says, behind zeros that are no part of the states, so that pages of the file can be
// mapped as the caches of a session. In version 2, which is read as well, every part follows the one before it.
// The digest is XXH64 of the tokens and, behind them, the XXH64 of each 64 KiB of the states (the last may be shorter), which
// threads compute. Little-endian. The digests find damage; whoever forges a file can compute them, so that sizes and ids are checked as well.
#ifndef MOEC_SESSION_FILE_H_
#define MOEC_SESSION_FILE_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "shared_pages.h"

struct SessionState {
  std::string artifact;  // at most 64 bytes
  int64_t context = 0;
  std::vector<int32_t> tokens;
};

// "" or the reason, without the path. The file appears whole or not at all. read: whether what was written is what the parts held;
// asked before it appears.
std::string write_session(const std::string& path, const SessionState& state, const std::vector<SessionBytes>& parts,
                          const std::function<bool()>& read);

class SessionReader {
 public:
  SessionReader() = default;
  SessionReader(const SessionReader&) = delete;
  SessionReader& operator=(const SessionReader&) = delete;
  ~SessionReader();
  // Header and tokens, checked against the file's length and digest; `most` tokens at most.
  std::string open(const std::string& path, int64_t most, SessionState* state);
  uint64_t state_bytes() const { return state_bytes_; }
  // Where the states lie that are to come into `parts`, whose sizes sum up to state_bytes(); "" or the reason.
  std::string place(const std::vector<SessionBytes>& parts);
  // The pages of the file, after place(); nullptr where the process may not keep it open.
  std::shared_ptr<SharedPages> pages(const SessionState& state, const std::vector<SessionBytes>& parts) const;
  // The states but for the range of each part that is mapped already, by all workers; then the digest of all is compared.
  std::string read(const SessionState& state, const std::vector<SessionBytes>& parts,
                   const std::vector<std::pair<size_t, size_t>>& mapped) const;

 private:
  int descriptor_ = -1;
  uint32_t version_ = 0;
  uint64_t length_ = 0, states_at_ = 0, state_bytes_ = 0, digest_ = 0;
  std::vector<uint64_t> places_;
};

// XXH64 with seed 0, as its specification defines it.
class Xxh64 {
 public:
  void add(const void* data, size_t size);
  uint64_t digest() const;

 private:
  uint64_t lanes_[4] = {0x60EA27EEADC0B5D6ull, 0xC2B2AE3D27D4EB4Full, 0, 0x61C8864E7A143579ull};  // P1 + P2, P2, 0, -P1
  uint8_t rest_[32];
  size_t held_ = 0;
  uint64_t total_ = 0;
};

#endif  // MOEC_SESSION_FILE_H_
