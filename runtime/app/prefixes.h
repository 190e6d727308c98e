// Beginnings of prompts that were computed before: sessions saved in a folder, found by the tokens that they hold.
//
// A file is named IDENTITY-COUNT-DIGEST.session, or IDENTITY-COUNT-DIGEST.NAME.session: the artifact, the number of its tokens, a
// digest of them, and the name that it was kept under. A search reads no file but the one that it restores.
// assistant/prefixes.py is the same for Python's sessions, whose names are others.
#ifndef MOEC_PREFIXES_H_
#define MOEC_PREFIXES_H_

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

class OpenSession;

class PrefixFolder {
 public:
  static constexpr size_t kMostUnnamed = 64;  // files; the one that was used longest ago goes first
  static constexpr size_t kLongestName = 64;

  // The folder is created if it is missing. A Fault if it cannot be used.
  PrefixFolder(std::string folder, const std::string& identity);
  // Restores the longest known prefix of `ids` that is longer than the `held` ids that the session has, and has `most` ids at most.
  // Returns how many of the first ids it has then. What cannot be used is told, and removed if it is damaged.
  size_t restore(OpenSession* session, const std::vector<int32_t>& ids, size_t held, size_t most);
  // Saves what a session holds, unless that is kept already; under a name in place of what had it. A Fault if that cannot be done.
  void keep(OpenSession* session, const std::string& name);
  // Whether there was a prefix of this name.
  bool forget(const std::string& name);
  int64_t tokens_of(const std::string& name);  // 0: there is none
  std::string told();  // why the last prefix was not used that should have been

  // A Fault for what is no name: 1 to 64 letters of ASCII, digits, '.', '_', '-'.
  static void check_name(std::string_view name);

 private:
  struct File {
    std::string file, digest, name;  // its name in the folder; the digest in it; "": no name
    int64_t count = 0;
  };
  std::string path_of(const std::string& file) const { return folder_ + "/" + file; }
  bool read(const std::string& file, File* found) const;
  std::vector<File> files() const;  // the longest first
  void tell(const std::string& what);
  void remove(const File& file, const std::string& why);
  void remove_oldest() const;

  std::string folder_, identity_;
  std::mutex changing_, telling_;  // within this process: of the files, of `told_`
  std::string told_;
};

#endif  // MOEC_PREFIXES_H_
