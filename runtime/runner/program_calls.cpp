// ExecuTorch's boxed kernels read as many arguments as their schema has, however long the list is, write their results to any
// memory that they are given, and check their inputs before they write, which may change them. So the operator must be known,
// its list as long as its schema, every argument of the schema's kind, and what is written planned memory that no other
// argument of the call uses. Later calls may use the memory again.
#include "program_calls.h"

#include "operator_table.h"

namespace moec_program {

namespace {

constexpr uint32_t kMostCalls = 1u << 20;
constexpr uint64_t kMostArguments = 1u << 22;

// One argument of a schema.
struct Parameter {
  char letter;
  bool optional, written;
  int same;  // the argument that a result is; -1
};

std::vector<Parameter> parameters_of(const char* letters) {
  std::vector<Parameter> out;
  for (const char* p = letters; *p; ++p) {
    if (*p == '=') {
      ++p;
      out.push_back({'=', false, false, *p <= '9' ? *p - '0' : *p - 'a' + 10});
    } else if (*p == '?') {
      out.back().optional = true;
    } else if (*p == '!') {
      out.back().written = true;
    } else {
      out.push_back({*p, false, false, -1});
    }
  }
  return out;
}

struct Operator {
  std::string name;
  std::vector<Parameter> parameters;
};

std::vector<Operator> read_operators(const Table& plan) {
  const Vector entries = plan.vector(6, 4);
  std::vector<Operator> out;
  for (uint32_t i = 0; i < entries.size; ++i) {
    const Table entry = plan.element(entries, i);
    std::string name = entry.text(0, "the name of an operator");
    const std::string overload = entry.has(1) ? entry.text(1, "the name of an operator") : "";
    if (!overload.empty()) name += "." + overload;
    const OperatorEntry* found = find_operator(name.c_str());
    if (!found) throw Damaged("the program uses the operator " + name.substr(0, 80) + ", which this runtime does not have");
    out.push_back({name, parameters_of(found->arguments)});
  }
  return out;
}

bool is_number(Kind kind) { return kind == Kind::kInt || kind == Kind::kDouble || kind == Kind::kBool; }

// Whether a value of `kind` may stand for `letter`.
bool fits(char letter, Kind kind) {
  switch (letter) {
    case 'T': case 'V': return kind == Kind::kTensor;
    case 'i': case 'z': return kind == Kind::kInt;
    case 'd': return kind == Kind::kDouble || kind == Kind::kInt;
    case 'b': return kind == Kind::kBool;
    case 's': case 'a': case 'l': return is_number(kind);
    case 'S': return kind == Kind::kString;
    case 'I': return kind == Kind::kInts;
    case 'D': return kind == Kind::kDoubles;
    case 'B': return kind == Kind::kBools;
    case 'L': return kind == Kind::kTensors;
    case 'O': return kind == Kind::kOptionals || kind == Kind::kTensors;
    case '_': return true;
    default: return false;
  }
}

// The kind of number that an operator leaves in a result of `letter`.
Kind result_kind(char letter, const Arguments& arguments) {
  if (letter == 'i') return Kind::kInt;
  if (letter == 'b') return Kind::kBool;
  if (letter == 'd') return Kind::kDouble;
  if (letter == 'l') {
    const int8_t type = arguments[0]->type;
    return type == 11 ? Kind::kBool : type <= 4 ? Kind::kInt : Kind::kDouble;
  }
  for (size_t i = 0; i + 1 < arguments.size(); ++i)
    if (arguments[i]->kind != Kind::kInt) return Kind::kDouble;
  return Kind::kInt;
}

class Calls {
 public:
  Calls(const Table& plan, std::vector<Value>& values, const DelegateCheck& delegate, const CallSeen& seen)
      : plan_(plan), values_(values), delegate_(delegate), seen_(seen), operators_(read_operators(plan)), delegates_(plan.vector(7, 4).size) {}

  void check() {
    const Vector chains = plan_.required(5, 4, "the instructions of a method");
    if (chains.size == 0) throw Damaged("a method without instructions");
    for (const bool marking : {true, false}) {
      for (uint32_t c = 0; c < chains.size; ++c) {
        const Table chain = plan_.element(chains, c);
        const Vector instructions = chain.required(2, 4, "the instructions of a method");
        if (instructions.size > kMostCalls) throw Damaged("millions of instructions");
        for (uint32_t i = 0; i < instructions.size; ++i) instruction(chain.element(instructions, i), marking);
      }
    }
  }

 private:
  void instruction(const Table& instruction, bool marking) {
    enum : uint8_t { kKernel = 1, kDelegate, kMove, kJumpFalse, kFree };
    const uint8_t kind = instruction.number<uint8_t>(0);
    if (kind >= kMove && kind <= kFree) throw Damaged("control flow, which this runtime does not run");
    if (kind != kKernel && kind != kDelegate) throw Damaged("an instruction of no known kind");
    const Table call = instruction.table(1, "an instruction");
    const std::vector<int32_t> indices = read_arguments(call);
    const int32_t index = call.number<int32_t>(0);
    if (kind == kKernel) {
      if (index < 0 || static_cast<size_t>(index) >= operators_.size()) outside("operator", index, operators_.size());
      const Operator& op = operators_[static_cast<size_t>(index)];
      marking ? mark(op, indices) : kernel(op, indices);
    } else {
      if (index < 0 || static_cast<uint32_t>(index) >= delegates_) outside("delegate", index, delegates_);
      if (!marking) delegated(static_cast<uint32_t>(index), indices);
    }
  }

  std::vector<int32_t> read_arguments(const Table& call) {
    const Vector list = call.vector(1, 4);
    arguments_ += list.size;
    if (arguments_ > kMostArguments) throw Damaged("millions of arguments");
    std::vector<int32_t> out;
    for (uint32_t i = 0; i < list.size; ++i) {
      out.push_back(list.get<int32_t>(i));
      if (out.back() < 0 || static_cast<size_t>(out.back()) >= values_.size()) outside("value", out.back(), values_.size());
    }
    return out;
  }

  [[noreturn]] void outside(const char* what, int32_t index, size_t count) {
    throw Damaged("an instruction names " + std::string(what) + " " + std::to_string(index) + " of " + std::to_string(count));
  }

  // Remembers which numbers the program sets while it runs.
  void mark(const Operator& op, const std::vector<int32_t>& indices) {
    if (indices.size() != op.parameters.size())
      throw Damaged(op.name + " takes " + std::to_string(op.parameters.size()) + " arguments, it is given " +
                    std::to_string(indices.size()));
    for (size_t i = 0; i < indices.size(); ++i)
      if (op.parameters[i].written) values_[static_cast<size_t>(indices[i])].set = true;
  }

  void kernel(const Operator& op, const std::vector<int32_t>& indices) {
    Arguments arguments;
    for (const int32_t index : indices) arguments.push_back(&values_[static_cast<size_t>(index)]);
    std::vector<bool> written;
    for (size_t i = 0; i < indices.size(); ++i) {
      const Parameter& parameter = op.parameters[i];
      argument(op, parameter, indices, arguments, i);
      written.push_back(parameter.written);
    }
    if (seen_) seen_(op.name, arguments);
    if (op.parameters.back().letter == 'V') return view(arguments);
    memory(op.name, indices, arguments, written, op.parameters);
  }

  void argument(const Operator& op, const Parameter& parameter, const std::vector<int32_t>& indices, const Arguments& arguments,
                size_t i) {
    const Value& value = *arguments[i];
    if (parameter.letter == '=') {
      if (indices[i] != indices[static_cast<size_t>(parameter.same)]) throw Damaged("the result of " + op.name + " is another value");
      return;
    }
    if (value.kind == Kind::kNull && parameter.optional) return;
    if (!fits(parameter.letter, value.kind)) throw Damaged("an argument of " + op.name + " is of another kind");
    if (parameter.letter == 'z' && (value.set || value.number < 1))
      throw Damaged("the divisor of " + op.name + " is not a positive constant");
    if (parameter.written && is_number(value.kind) && value.kind != result_kind(parameter.letter, arguments))
      throw Damaged("the result of " + op.name + " is of another kind");
  }

  // A view's memory is its source's, from here on.
  void view(const Arguments& arguments) {
    const Value& source = *arguments[0];
    Value& out = const_cast<Value&>(*arguments[2]);
    if (source.memory.where == Region::kFresh) throw Damaged("a view of a tensor without memory");
    if (out.bytes > source.bytes || out.type != source.type) throw Damaged("a view that is larger than its source, or of another type");
    const Region& m = out.memory;
    const bool same = m.where == source.memory.where && m.arena == source.memory.arena && m.begin == source.memory.begin;
    if (m.where != Region::kFresh && !same) throw Damaged("a view with memory of its own");
    out.memory = source.memory;
    out.memory.end = out.memory.begin + out.bytes;
  }

  void delegated(uint32_t index, const std::vector<int32_t>& indices) {
    Arguments arguments;
    for (const int32_t i : indices) arguments.push_back(&values_[static_cast<size_t>(i)]);
    memory("a delegate", indices, arguments, delegate_(index, arguments), {});
  }

  // Every tensor has memory; what is written is planned, and shared with no other argument.
  void memory(const std::string& name, const std::vector<int32_t>& indices, const Arguments& arguments,
              const std::vector<bool>& written, const std::vector<Parameter>& parameters) {
    struct Use {
      int32_t value;
      const Region* region;
      bool written;
    };
    std::vector<Use> uses;
    const auto add = [&](int32_t index, bool is_written) {
      const Value& value = values_[static_cast<size_t>(index)];
      if (value.kind != Kind::kTensor) return;
      if (value.memory.where == Region::kFresh) throw Damaged("an argument of " + name + " has no memory");
      if (is_written && value.memory.where != Region::kPlanned) throw Damaged(name + " writes a constant or an input");
      uses.push_back({index, &value.memory, is_written});
    };
    for (size_t i = 0; i < indices.size(); ++i) {
      if (!parameters.empty() && (parameters[i].letter == '=' || parameters[i].letter == '_')) continue;
      add(indices[i], written[i]);
      if (arguments[i]->kind == Kind::kTensors || arguments[i]->kind == Kind::kOptionals)
        for (const int32_t item : arguments[i]->items)
          if (item >= 0) add(item, written[i]);
    }
    for (const Use& out : uses) {
      if (!out.written) continue;
      for (const Use& other : uses)
        if (&other != &out && (other.value == out.value || other.region->overlaps(*out.region)))
          throw Damaged(name + " writes over another of its arguments");
    }
  }

  const Table& plan_;
  std::vector<Value>& values_;
  const DelegateCheck& delegate_;
  const CallSeen& seen_;
  std::vector<Operator> operators_;
  uint32_t delegates_;
  uint64_t arguments_ = 0;
};

}  // namespace

void check_calls(const Table& plan, std::vector<Value>& values, const DelegateCheck& delegate, const CallSeen& seen) {
  Calls(plan, values, delegate, seen).check();
}

}  // namespace moec_program
