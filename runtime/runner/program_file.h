// `ProgramFile`, the DataLoader through which ExecuTorch reads a .pte; `check` runs program_check.h on it. The program
// and the payloads of delegates are copied into memory, so that what was checked cannot change afterwards; weights stay
// in the mapped file, where experts that no token selects are never read, and are not checked.
#ifndef MOEC_PROGRAM_FILE_H_
#define MOEC_PROGRAM_FILE_H_

#include <executorch/runtime/core/data_loader.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "mapped_file.h"
#include "program_check.h"

class ProgramFile final : public executorch::runtime::DataLoader {
 public:
  // nullptr and the reason if the file is not a program, or does not hold what its header announces.
  static std::unique_ptr<ProgramFile> open(const std::string& path, std::string* fault);

  // "" if the program may be run (program_check.h); what it holds is then in `facts`.
  std::string check();
  const ProgramFacts& facts() const { return facts_; }
  const MappedFile& mapped() const { return *file_; }
  uint64_t bytes() const { return file_->size(); }
  // Whether the file has lost pages that were in use: numbers since then mean nothing.
  bool truncated() const { return file_->truncated(); }

  executorch::runtime::Result<executorch::runtime::FreeableBuffer> load(size_t offset, size_t size,
                                                                        const SegmentInfo& info) const override;
  executorch::runtime::Result<size_t> size() const override { return static_cast<size_t>(file_->size()); }
  executorch::runtime::Error load_into(size_t offset, size_t size, const SegmentInfo& info, void* buffer) const override;

 private:
  struct Free {
    void operator()(void* data) const;
  };
  using Owned = std::unique_ptr<void, Free>;

  explicit ProgramFile(std::unique_ptr<MappedFile> file) : file_(std::move(file)) {}
  bool read_program(std::string* fault);
  const uint8_t* owned(uint64_t offset, uint64_t size) const;

  std::unique_ptr<MappedFile> file_;
  uint64_t program_bytes_ = 0;
  ProgramFacts facts_;
  mutable std::mutex mutex_;
  mutable std::map<std::pair<uint64_t, uint64_t>, Owned> parts_;  // by offset and length
};

#endif  // MOEC_PROGRAM_FILE_H_
