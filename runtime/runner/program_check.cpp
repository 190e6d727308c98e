// The program part of a .pte is a flatbuffer: ExecuTorch's schema/program.fbs. ExecuTorch's verifier makes sure that offsets
// stay inside it, and little else. Values, calls and delegates are checked in files of their own.
#include "program_check.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <vector>

#include "program_calls.h"
#include "program_values.h"
#include "xnnpack_check.h"

namespace {

using namespace moec_program;

constexpr uint64_t kLargestProgram = uint64_t{1} << 28;  // a program of a hundred layers takes a few megabytes
constexpr uint64_t kLargestPayload = uint64_t{1} << 32;
constexpr uint64_t kConstantAlignment = 16;  // what ExecuTorch's own compiler gives, and float kernels rely on
constexpr uint32_t kMostMethods = 256;
constexpr int64_t kLargestConstant = 1 << 16;

uint64_t little_endian(const uint8_t* p, int bytes) {
  uint64_t value = 0;
  for (int i = bytes - 1; i >= 0; --i) value = value << 8 | p[i];
  return value;
}

// Products and sums of ExecuTorch's libraries: with other sizes they may add in another order (targets/xnnpack/facts.py).
bool sums_by_library(const std::string& name) {
  static const std::set<std::string> names = {"mm", "bmm", "addmm", "linear", "convolution", "_cdist_forward", "_pdist_forward", "cumsum"};
  const std::string space = "aten::";
  if (name.compare(0, space.size(), space) != 0) return false;
  return names.count(name.substr(space.size(), name.find('.') - space.size())) > 0;
}

class Program {
 public:
  explicit Program(const ProgramView& view)
      : view_(view), buffer_(view.program, view.program_bytes), root_(buffer_, buffer_.follow(0)) {}

  ProgramFacts facts;

  void check() {
    read_layout();
    const Vector plans = root_.required(1, 4, "the list of methods");
    if (plans.size > kMostMethods) throw Damaged("hundreds of methods");
    std::set<std::string> names;
    for (uint32_t i = 0; i < plans.size; ++i) {
      const Table plan = root_.element(plans, i);
      const std::string name = plan.text(0, "the name of a method");
      if (!names.insert(name).second) throw Damaged("two methods of one name");
      if (name != "forward" && name != "forward_all") check_small(plan);
      check_plan(plan);
    }
  }

 private:
  // Segments, constants and named data lie inside the file.
  void read_layout() {
    const bool extended = view_.program_bytes >= 32 && std::memcmp(view_.program + 8, "eh00", 4) == 0;
    const uint64_t base = extended ? little_endian(view_.program + 24, 8) : view_.program_bytes;
    const Vector segments = root_.vector(4, 4);
    for (uint32_t i = 0; i < segments.size; ++i) {
      const Table segment = root_.element(segments, i);
      const uint64_t offset = segment.number<uint64_t>(0), size = segment.number<uint64_t>(1);
      if (base > view_.file_bytes || offset > view_.file_bytes - base || size > view_.file_bytes - base - offset)
        throw Damaged("a segment outside the file");
      layout_.segments.push_back({base + offset, size});
    }
    read_constants();
    if (root_.has(6) && root_.vector(6, 4).size > 0) throw Damaged("initial values of caches, which this runtime does not load");
    const Vector payloads = root_.vector(3, 4);
    for (uint32_t i = 0; i < payloads.size; ++i) {
      const Vector data = root_.element(payloads, i).vector(0, 1);
      layout_.inline_payloads.push_back({data.first, data.size});
    }
    const Vector named = root_.vector(7, 4);
    for (uint32_t i = 0; i < named.size; ++i) {
      const Table entry = root_.element(named, i);
      const uint32_t segment = entry.number<uint32_t>(1);
      if (segment >= layout_.segments.size()) throw Damaged("named data in a segment that is not there");
      if (!layout_.named.emplace(entry.text(0, "the name of data"), layout_.segments[segment]).second)
        throw Damaged("two data of one name");
    }
  }

  void read_constants() {
    if (root_.has(2) && root_.vector(2, 4).size > 1) throw Damaged("constants inside the program, an old format");
    if (!root_.has(5)) return;
    const Table constants = root_.table(5, "the list of constants");
    const Vector offsets = constants.vector(1, 8);
    if (offsets.size == 0) return;
    const uint32_t segment = constants.number<uint32_t>(0);
    if (offsets.size > 1 && segment >= layout_.segments.size()) throw Damaged("constants in a segment that is not there");
    if (offsets.size > 1) layout_.constant_segment = layout_.segments[segment];
    facts.constant_bytes = layout_.constant_segment.bytes;
    for (uint32_t i = 0; i < offsets.size; ++i) {
      const uint64_t offset = offsets.get<uint64_t>(i);
      if (i > 0 && (offset > layout_.segments[segment].bytes || offset % kConstantAlignment != 0 ||
                    layout_.segments[segment].offset % kConstantAlignment != 0))
        throw Damaged("a constant outside the file, or not aligned");
      layout_.constants.push_back(i > 0 ? layout_.segments[segment].bytes - offset : 0);
    }
  }

  // Methods that return constants need no memory; ExecuTorch would allocate what they plan and fill it with zeros.
  void check_small(const Table& plan) {
    const Vector arenas = plan.vector(8, 8);
    for (uint32_t i = 0; i < arenas.size; ++i)
      if (arenas.size > 16 || arenas.get<int64_t>(i) > kLargestConstant) throw Damaged("a constant that takes memory");
  }

  void check_plan(const Table& plan) {
    if (plan.has(9) && plan.vector(9, 4).size > 0) throw Damaged("memory of another device");
    std::vector<Value> values = read_values(plan, layout_);
    for (const int field : {3, 4}) {
      const Vector ends = plan.vector(field, 4);
      for (uint32_t i = 0; i < ends.size; ++i) {
        const int32_t index = ends.get<int32_t>(i);
        if (index < 0 || static_cast<size_t>(index) >= values.size()) throw Damaged("an input or output that is not there");
        Value& value = values[static_cast<size_t>(index)];
        if (field == 3 && value.kind == Kind::kTensor) {
          if (value.memory.where == Region::kConstant) throw Damaged("an input that is a constant");
          if (value.memory.where == Region::kFresh) value.memory.where = Region::kInput;
        }
      }
    }
    const std::vector<std::vector<DelegatePort>> ports = check_delegates(plan);
    check_calls(plan, values, [&](uint32_t index, const Arguments& arguments) {
      if (!view_.trusted_backend.empty()) return std::vector<bool>(arguments.size(), false);
      return check_ports(ports[index], arguments);
    }, [&](const std::string& name, const Arguments& arguments) {
      if (sums_by_library(name)) facts.exact_calls = false;
      if (name == "moec::fused_moe_packed.out") note_moe(values, arguments);
    });
    const Vector outputs = plan.vector(4, 4);
    for (uint32_t i = 0; i < outputs.size; ++i) {
      const Value& value = values[static_cast<size_t>(outputs.get<int32_t>(i))];
      if (value.kind == Kind::kTensor && value.memory.where != Region::kPlanned && view_.trusted_backend.empty())
        throw Damaged("an output that is a constant, an input, or has no memory");
    }
  }

  // Records a MoE block whose experts are constants of the file; no bytes for the half that is none.
  void note_moe(const std::vector<Value>& values, const Arguments& arguments) {
    enum { kRouter = 2, kW13 = 5, kW2 = 7, kConfig = 12 };
    MoeCall call = {};
    for (const int32_t item : arguments[kConfig]->items) {
      const Value& entry = values[static_cast<size_t>(item)];
      // experts of other sizes than those noted here would be read behind their place in the expert cache
      if (entry.set) throw Damaged("the config of a mixture is written while the program runs");
      call.config.push_back(entry.number);
    }
    for (const int half : {0, 1}) {
      const Value& weights = *arguments[half ? kW2 : kW13];
      if (weights.memory.where != Region::kConstant) continue;
      call.offset[half] = weights.memory.begin;
      call.bytes[half] = weights.bytes;
    }
    call.router_known = true;
    for (int part = 0; part < MoeCall::kRouterParts; ++part) {
      const Value& given = *arguments[static_cast<size_t>(kRouter + part)];
      if (given.kind != Kind::kTensor) continue;  // an optional one that is absent
      if (given.memory.where != Region::kConstant) call.router_known = false;
      if (given.memory.where != Region::kConstant) continue;
      call.router_offset[part] = given.memory.begin;
      call.router_bytes[part] = given.bytes;
    }
    if (call.bytes[0] > 0) facts.moe_calls.push_back(std::move(call));
  }

  std::vector<std::vector<DelegatePort>> check_delegates(const Table& plan) {
    const Vector delegates = plan.required(7, 4, "the delegates of a method");
    std::vector<std::vector<DelegatePort>> ports;
    if (delegates.size > 0) facts.exact_calls = false;
    for (uint32_t i = 0; i < delegates.size; ++i) {
      const Table delegate = plan.element(delegates, i);
      const std::string id = delegate.text(0, "the name of a delegate");
      if (id != (view_.trusted_backend.empty() ? "XnnpackBackend" : view_.trusted_backend))
        throw Damaged("the delegate " + id.substr(0, 80) + ", which this runtime does not have");
      const Vector specs = delegate.vector(2, 4);
      for (uint32_t s = 0; s < specs.size; ++s) {
        const Table spec = delegate.element(specs, s);
        spec.text(0, "an option of a delegate");
        spec.required(1, 1, "an option of a delegate");
      }
      const Table data = delegate.table(1, "the data of a delegate");
      ports.push_back(check_payload(data.number<int8_t>(0), data.number<uint32_t>(1)));
    }
    return ports;
  }

  std::vector<DelegatePort> check_payload(int8_t location, uint32_t index) {
    const auto& parts = location == 1 ? layout_.segments : layout_.inline_payloads;
    if ((location != 0 && location != 1) || index >= parts.size()) throw Damaged("a delegate whose data is not there");
    const Layout::Part part = parts[index];
    if (!view_.trusted_backend.empty()) return {};
    if (part.bytes > kLargestPayload) throw Damaged("a delegate's data of impossible size");
    const uint8_t* data = location == 0 ? buffer_.bytes(part.offset, part.bytes) : view_.segment(part.offset, part.bytes);
    if (!data) throw Damaged("a delegate's data cannot be read");
    return check_xnnpack(data, part.bytes, layout_);
  }

  const ProgramView& view_;
  const Buffer buffer_;
  const Table root_;
  Layout layout_;
};

}  // namespace

uint64_t program_length(const uint8_t* head, size_t bytes, uint64_t file_bytes) {
  if (bytes < 40 || std::memcmp(head + 4, "ET12", 4) != 0) return 0;
  const bool extended = std::memcmp(head + 8, "eh00", 4) == 0;
  return std::min({extended ? little_endian(head + 16, 8) : file_bytes, file_bytes, kLargestProgram});
}

std::string program_fault(const ProgramView& view, ProgramFacts* facts) {
  try {
    Program program(view);
    program.check();
    if (facts) *facts = std::move(program.facts);
  } catch (const Damaged& damage) {
    return damage.what();
  }
  return "";
}
