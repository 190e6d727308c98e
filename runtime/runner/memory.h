// Which pages of this process are resident, from the system's own accounts (Linux), no estimates.
#ifndef MOEC_MEMORY_H_
#define MOEC_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <string>

struct ProcessMemory {
  int64_t resident = 0;       // every page the process is charged with
  int64_t anonymous = 0;      // pages without a file: heap, stacks, arenas
  int64_t file_mapped = 0;    // pages of `file` that this process has mapped
  int64_t of_mapping = 0;     // of these, those of one mapping
  int64_t other_files = 0;    // pages of other files: the program, its libraries
};

// Sums /proc/self/smaps; false where there is none. `file` may be empty. mapping, size: one of the file's, if one is asked for.
bool read_process_memory(const std::string& file, ProcessMemory* memory, const void* mapping = nullptr, uint64_t size = 0);

// What counts of this process towards a budget of memory, in bytes, but for the resident pages of one mapping of `file`; -1 if
// the system does not tell.
int64_t resident_besides(const std::string& file, const void* mapping, uint64_t size);

// Pages of [data, data + length) that are in memory, in bytes; -1 if the system does not tell.
int64_t resident_bytes(const void* data, size_t length);

// Pages of `file` in the system's page cache, mapped by anyone or not, in bytes; -1 if the system does not tell.
int64_t cached_bytes(const std::string& file);

// Asks the system to forget the pages of `file`; it keeps those that another process has mapped.
bool forget_cached(const std::string& file);

// The largest resident set of this process so far, bytes; 0 if unknown.
int64_t peak_resident();

#endif  // MOEC_MEMORY_H_
