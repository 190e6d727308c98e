// The runtime's own checks, compiled into this package by the files beside this one.
#include "include/moec_check.h"

#include <sys/stat.h>

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "../../../../runtime/runner/program_check.h"

namespace {

std::string fault_of(const char* path, const char* backend) {
  const std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(path, "rb"), std::fclose);
  struct stat status = {};
  if (!file || fstat(fileno(file.get()), &status) != 0 || !S_ISREG(status.st_mode)) return "it cannot be read";
  const uint64_t length = static_cast<uint64_t>(status.st_size);
  uint8_t head[64] = {};
  const size_t got = std::fread(head, 1, sizeof head, file.get());
  const uint64_t bytes = program_length(head, got, length);
  if (bytes < 40) return "not an ExecuTorch program";
  std::vector<uint8_t> program(static_cast<size_t>(bytes));
  std::rewind(file.get());
  if (std::fread(program.data(), 1, program.size(), file.get()) != program.size()) return "truncated";
  return program_fault({program.data(), program.size(), length, {}, backend});
}

}  // namespace

extern "C" int32_t moec_check_file(const char* path, const char* backend, char* reason, size_t capacity) {
  std::string fault;
  try {
    fault = path && backend && *backend ? fault_of(path, backend) : "no file or backend was given";
  } catch (const std::exception& error) {
    fault = error.what();
  }
  if (reason && capacity > 0) std::snprintf(reason, capacity, "%s", fault.c_str());
  return fault.empty() ? 0 : -1;
}
