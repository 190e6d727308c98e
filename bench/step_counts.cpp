// How often each instruction of a program ran, by single steps: step_counts END OUT PROGRAM ARGUMENTS. Counting begins when the
// program traps (int3) and ends at address END (hexadecimal). OUT gets a line "address 1 runs" for each instruction, as
// block_counts.c writes them. Linux on x86-64; any instruction set that the processor has, a microsecond or two per step.
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <unordered_map>

int main(int argc, char** argv) {
  if (argc < 4) return std::fprintf(stderr, "step_counts END OUT PROGRAM ARGUMENTS\n"), 2;
  const uint64_t end = std::strtoull(argv[1], nullptr, 16);
  const pid_t child = fork();
  if (child == 0) {
    ptrace(PTRACE_TRACEME, 0, nullptr, nullptr);
    execv(argv[3], argv + 3);
    _exit(127);
  }
  int status = 0;
  const auto stopped = [&] { return waitpid(child, &status, 0) == child && WIFSTOPPED(status); };
  if (!stopped()) return std::fprintf(stderr, "%s cannot be traced\n", argv[3]), 2;
  ptrace(PTRACE_CONT, child, nullptr, nullptr);
  if (!stopped()) return std::fprintf(stderr, "%s ended before its mark\n", argv[3]), 2;
  std::unordered_map<uint64_t, uint64_t> runs;
  uint64_t previous = 0;
  for (;;) {
    user_regs_struct registers;
    ptrace(PTRACE_GETREGS, child, nullptr, &registers);
    if (registers.rip == end) break;
    runs[registers.rip] += registers.rip != previous;  // a repeated string instruction takes a step for each repetition
    previous = registers.rip;
    ptrace(PTRACE_SINGLESTEP, child, nullptr, nullptr);
    if (!stopped()) return std::fprintf(stderr, "%s ended before address %s\n", argv[3], argv[1]), 2;
  }
  ptrace(PTRACE_KILL, child, nullptr, nullptr);
  FILE* const out = std::fopen(argv[2], "w");
  if (!out) return std::perror(argv[2]), 2;
  for (const auto& [address, count] : runs) {
    std::fprintf(out, "%llx 1 %llu\n", static_cast<unsigned long long>(address), static_cast<unsigned long long>(count));
  }
  return std::fclose(out) == 0 ? 0 : 2;
}
