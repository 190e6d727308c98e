// A saved session: a header with the digest of everything, the tokens, and the bytes of the states that count.
//
//   8 bytes "moecsess", u32 version 2, u32 zero, 64 bytes the artifact's digest as text padded with zeros,
//   u64 context, u64 tokens, u64 bytes of states, u64 digest, u64 XXH64 of all before it
//   int32 x tokens; the states, part by part, the first `tokens` positions of each
//
// The digest is XXH64 of the tokens and, behind them, the XXH64 of each 64 KiB of the states (the last may be shorter), which
// threads compute. Little-endian. The digests find damage; whoever forges a file can compute them, so that sizes and ids are checked as well.
#ifndef MOEC_SESSION_FILE_H_
#define MOEC_SESSION_FILE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

struct SessionBytes {
  uint8_t* data;
  size_t size;
};

struct SessionState {
  std::string artifact;  // at most 64 bytes
  int64_t context = 0;
  std::vector<int32_t> tokens;
};

// "" or the reason, without the path. The file appears whole or not at all.
std::string write_session(const std::string& path, const SessionState& state, const std::vector<SessionBytes>& parts);

class SessionReader {
 public:
  SessionReader() = default;
  SessionReader(const SessionReader&) = delete;
  SessionReader& operator=(const SessionReader&) = delete;
  ~SessionReader();
  // Header and tokens, checked against the file's length and digest; `most` tokens at most.
  std::string open(const std::string& path, int64_t most, SessionState* state);
  uint64_t state_bytes() const { return state_bytes_; }
  // The states, into memory whose sizes sum up to state_bytes(), by all workers; then the digest is compared.
  std::string read(const SessionState& state, const std::vector<SessionBytes>& parts);

 private:
  int descriptor_ = -1;
  uint64_t states_at_ = 0, state_bytes_ = 0, digest_ = 0;
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
