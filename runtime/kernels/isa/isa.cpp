// The table of instruction sets, and which of them serves the operators: MOEC_ISA, or the best of this machine, until
// moec_set_isa names another.
#include "isa/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "core/status.h"
#include "isa/cpu.h"

namespace moec {

#define MOEC_INSTRUCTION_SET(name, needs, attention) \
  const Kernels& name##_kernels();                   \
  const AttentionKernels& attention##_attention();
#include "instruction_sets.inc"
#undef MOEC_INSTRUCTION_SET

namespace {

struct Entry {
  const char* name;
  const char* needs;
  const Kernels& (*kernels)();
  const AttentionKernels& (*attention)();
};

constexpr Entry kCompiled[] = {
#define MOEC_INSTRUCTION_SET(name, needs, attention) {#name, needs, name##_kernels, attention##_attention},
#include "instruction_sets.inc"
#undef MOEC_INSTRUCTION_SET
};

// The sets that this machine can run, the best first. Only their code is ever called.
const std::vector<Isa>& available() {
  static const std::vector<Isa> found = [] {
    std::vector<Isa> isas;
    for (const Entry& e : kCompiled) {
      if (cpu_has(e.needs)) isas.push_back({e.name, e.kernels(), e.attention()});
    }
    return isas;
  }();
  return found;
}

const std::string& names() {
  static const std::string joined = [] {
    std::string s;
    for (const Isa& isa : available()) s += (s.empty() ? "" : ",") + std::string(isa.name);
    return s;
  }();
  return joined;
}

bool means_best(const char* name) { return !name || !*name || std::strcmp(name, "auto") == 0; }

const Isa* find(const char* name) {
  for (const Isa& isa : available()) {
    if (std::strcmp(isa.name, name) == 0) return &isa;
  }
  return nullptr;
}

// *found: the set of that name. `origin` begins the message of a name that this machine cannot serve.
int32_t choose(const char* origin, const char* name, const Isa** found) {
  *found = means_best(name) ? &available().front() : find(name);
  if (*found) return MOEC_OK;
  return fail(MOEC_UNSUPPORTED, "%s%.40s: no such instruction set here; this machine offers %s", origin, name, names().c_str());
}

std::atomic<const Isa*> current{nullptr};

}  // namespace

int32_t select_isa() {
  if (current.load(std::memory_order_acquire)) return MOEC_OK;
  const Isa* found = nullptr;
  MOEC_RETURN_IF_ERROR(choose("MOEC_ISA=", std::getenv("MOEC_ISA"), &found));
  current.store(found, std::memory_order_release);
  return MOEC_OK;
}

const Isa& isa() {
  const Isa* const selected = current.load(std::memory_order_acquire);
  return selected ? *selected : available().back();
}

}  // namespace moec

int32_t moec_set_isa(const char* name) {
  using namespace moec;
  const Isa* found = nullptr;
  const bool best = means_best(name);
  MOEC_RETURN_IF_ERROR(choose(best ? "MOEC_ISA=" : "", best ? std::getenv("MOEC_ISA") : name, &found));
  current.store(found, std::memory_order_release);
  return MOEC_OK;
}

const char* moec_get_isa(void) { return moec::select_isa() == MOEC_OK ? moec::isa().name : ""; }

const char* moec_available_isas(void) { return moec::names().c_str(); }
