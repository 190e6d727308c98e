#include "program_file.h"

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>

using executorch::runtime::Error;
using executorch::runtime::FreeableBuffer;
using executorch::runtime::Result;

namespace {

constexpr size_t kHead = 64, kAlignment = 64;

uint64_t little_endian(const uint8_t* p, int bytes) {
  uint64_t value = 0;
  for (int i = bytes - 1; i >= 0; --i) value = value << 8 | p[i];
  return value;
}

// What the header announces beyond the end of the file, in one line; "" if nothing.
std::string missing(const uint8_t* head, uint64_t length) {
  if (std::memcmp(head + 8, "eh00", 4) != 0) return "";  // no extended header: everything is inside the flatbuffer
  const uint64_t program = little_endian(head + 16, 8), base = little_endian(head + 24, 8);
  // the size of the segments stands behind the first 32 bytes of the header since version 1.1 of the format
  const uint64_t segments = little_endian(head + 12, 4) >= 32 ? little_endian(head + 32, 8) : 0;
  if (program <= length && base <= length && segments <= length - base) return "";
  const uint64_t end = segments > UINT64_MAX - base ? UINT64_MAX : program > base + segments ? program : base + segments;
  char text[128];
  std::snprintf(text, sizeof text, "truncated: %" PRIu64 " bytes, its header announces %" PRIu64, length, end);
  return text;
}

}  // namespace

void ProgramFile::Free::operator()(void* data) const { std::free(data); }

std::unique_ptr<ProgramFile> ProgramFile::open(const std::string& path, std::string* fault) {
  std::unique_ptr<MappedFile> mapped = MappedFile::open(path, fault);
  if (!mapped) return nullptr;
  std::unique_ptr<ProgramFile> file(new ProgramFile(std::move(mapped)));
  return file->read_program(fault) ? std::move(file) : nullptr;
}

bool ProgramFile::read_program(std::string* fault) {
  uint8_t head[kHead] = {};
  const uint64_t length = file_->size();
  if (length < 40 || !file_->read(0, length < kHead ? length : kHead, head) || std::memcmp(head + 4, "ET", 2) != 0) {
    *fault = "not an ExecuTorch program";
    return false;
  }
  *fault = missing(head, length);
  if (!fault->empty()) return false;
  program_bytes_ = program_length(head, kHead, length);
  if (program_bytes_ < 40 || !owned(0, program_bytes_)) *fault = "damaged, or written by another version of ExecuTorch";
  return fault->empty();
}

std::string ProgramFile::check() {
  ProgramView view = {owned(0, program_bytes_), program_bytes_, file_->size(), {}, {}};
  view.segment = [this](uint64_t offset, uint64_t size) { return owned(offset, size); };
  return program_fault(view, &facts_);
}

// A part of the file in memory of our own, read once. nullptr where it cannot be read whole.
const uint8_t* ProgramFile::owned(uint64_t offset, uint64_t size) const {
  std::lock_guard<std::mutex> lock(mutex_);
  Owned& part = parts_[{offset, size}];
  if (!part) {
    Owned fresh(std::aligned_alloc(kAlignment, (size + kAlignment) / kAlignment * kAlignment));
    if (!fresh || !file_->read(offset, size, fresh.get())) return nullptr;
    part = std::move(fresh);
  }
  return static_cast<const uint8_t*>(part.get());
}

Result<FreeableBuffer> ProgramFile::load(size_t offset, size_t size, const SegmentInfo& info) const {
  if (offset > file_->size() || size > file_->size() - offset) return Error::InvalidArgument;
  if (info.segment_type == SegmentInfo::Type::Constant) return FreeableBuffer(file_->data() + offset, size, nullptr);
  // the header is read again, but must be the one that the program was checked with
  const uint8_t* program = offset == 0 && size <= program_bytes_ ? owned(0, program_bytes_) : nullptr;
  const uint8_t* data = program ? program : owned(offset, size);
  if (!data) return Error::AccessFailed;
  return FreeableBuffer(data, size, nullptr);
}

Error ProgramFile::load_into(size_t offset, size_t size, const SegmentInfo&, void* buffer) const {
  return file_->read(offset, size, buffer) ? Error::Ok : Error::AccessFailed;
}
