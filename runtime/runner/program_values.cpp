#include "program_values.h"

namespace moec_program {

namespace {

constexpr uint64_t kLargestTensor = uint64_t{1} << 40;
constexpr uint64_t kLargestArena = uint64_t{1} << 40;
constexpr uint32_t kMostDims = 16;
constexpr uint64_t kMostItems = uint64_t{1} << 22;

// Bytes of an element, by torch's number of the type: uint8, int8, int16, int32, int64, float16, float32, float64, bool,
// bfloat16. 0: a type that no kernel here computes with.
uint64_t element_bytes(int8_t type) {
  switch (type) {
    case 0: case 1: case 11: return 1;
    case 2: case 5: case 15: return 2;
    case 3: case 6: return 4;
    case 4: case 7: return 8;
    default: return 0;
  }
}

uint64_t read_shape(const Table& tensor, Value& value) {
  const Vector sizes = tensor.required(2, 4, "the sizes of a tensor"), order = tensor.required(3, 1, "the order of a tensor");
  if (sizes.size > kMostDims || order.size != sizes.size) throw Damaged("a tensor of impossible rank");
  uint64_t elements = 1;
  for (uint32_t i = 0; i < sizes.size; ++i) {
    const int32_t size = sizes.get<int32_t>(i);
    if (size < 0 || order.get<uint8_t>(i) != i) throw Damaged("a tensor of a negative size, or not in row-major order");
    value.sizes.push_back(size);
    if (size != 0 && elements > kLargestTensor / static_cast<uint32_t>(size)) throw Damaged("a tensor of impossible size");
    elements *= static_cast<uint32_t>(size);
  }
  return elements;
}

std::vector<uint64_t> read_arenas(const Table& plan) {
  const Vector sizes = plan.vector(8, 8);
  std::vector<uint64_t> arenas;
  uint64_t total = 0;
  for (uint32_t i = 0; i < sizes.size; ++i) {
    const int64_t size = sizes.get<int64_t>(i);
    if (size < 0 || static_cast<uint64_t>(size) > kLargestArena || (i == 0 && size != 0)) throw Damaged("an impossible memory plan");
    arenas.push_back(static_cast<uint64_t>(size));
    total += arenas.back();
  }
  if (total > kLargestArena) throw Damaged("an impossible memory plan");
  return arenas;
}

void read_tensor(const Table& tensor, const std::vector<uint64_t>& arenas, const Layout& layout, Value& value) {
  value.type = tensor.number<int8_t>(0);
  const uint64_t width = element_bytes(value.type);
  if (width == 0) throw Damaged("a tensor of a type that this runtime does not have");
  value.bytes = read_shape(tensor, value) * width;
  if (tensor.number<int32_t>(1) != 0) throw Damaged("a tensor with a storage offset");
  const int8_t dynamism = tensor.number<int8_t>(8);
  if (dynamism != 0 && dynamism != 1) throw Damaged("a tensor without an upper bound");
  value.dynamic = dynamism == 1;
  if (tensor.has(9)) {
    const Table extra = tensor.table(9, "a tensor's place");
    if (extra.number<int8_t>(2) != 0 || extra.number<int8_t>(3) != 0) throw Damaged("a tensor in another file or device");
    if (extra.has(1)) extra.text(1, "the name of a tensor");
  }
  const uint32_t constant = tensor.number<uint32_t>(5);
  Region& memory = value.memory;
  if (tensor.has(6)) {
    if (constant != 0) throw Damaged("a planned tensor with an initial value");
    const Table place = tensor.table(6, "a tensor's place");
    memory.where = Region::kPlanned;
    memory.arena = place.number<uint32_t>(0);
    memory.begin = place.number<uint32_t>(1) | static_cast<uint64_t>(place.number<uint32_t>(2)) << 32;
    if (memory.arena == 0 || memory.arena >= arenas.size() || memory.begin > arenas[memory.arena] ||
        value.bytes > arenas[memory.arena] - memory.begin || memory.begin % width != 0)
      throw Damaged("a tensor outside the memory that was planned");
    memory.end = memory.begin + value.bytes;
  } else if (constant != 0) {
    if (constant >= layout.constants.size() || layout.constants[constant] < value.bytes)
      throw Damaged("a constant outside the file");
    memory.where = Region::kConstant;
    memory.begin = layout.constant_segment.offset + layout.constant_segment.bytes - layout.constants[constant];
    memory.end = memory.begin + value.bytes;
  }
}

void read_items(const Vector& items, size_t width, Layout& layout, Value& value) {
  layout.list_items += items.size;
  if (layout.list_items > kMostItems) throw Damaged("lists of millions of items");
  for (uint32_t i = 0; i < items.size; ++i) {
    const int64_t item = width == 8 ? items.get<int64_t>(i) : items.get<int32_t>(i);
    if (item < -1 || item > INT32_MAX) throw Damaged("a list names a value that is not there");
    value.items.push_back(static_cast<int32_t>(item));
  }
}

void read_value(const Table& entry, const std::vector<uint64_t>& arenas, Layout& layout, Value& value) {
  const uint8_t kind = entry.number<uint8_t>(0);
  if (kind < static_cast<uint8_t>(Kind::kNull) || kind > static_cast<uint8_t>(Kind::kOptionals))
    throw Damaged("a value of no known kind");
  value.kind = static_cast<Kind>(kind);
  if (value.kind == Kind::kNull) return;
  const Table content = entry.table(1, "the content of a value");
  switch (value.kind) {
    case Kind::kInt:
      value.number = content.number<int64_t>(0);
      return;
    case Kind::kTensor:
      return read_tensor(content, arenas, layout, value);
    case Kind::kString:
      content.text(0, "a string");
      return;
    case Kind::kInts:
      return read_items(content.required(0, 8, "a list"), 8, layout, value);
    case Kind::kDoubles:
      content.required(0, 8, "a list");
      return;
    case Kind::kBools:
      content.required(0, 1, "a list");
      return;
    case Kind::kTensors:
    case Kind::kOptionals:
      return read_items(content.required(0, 4, "a list"), 4, layout, value);
    default:
      return;
  }
}

void check_list(const std::vector<Value>& values, const Value& list) {
  const Kind wanted = list.kind == Kind::kInts ? Kind::kInt : Kind::kTensor;
  for (const int32_t item : list.items) {
    if (item == -1 && list.kind == Kind::kOptionals) continue;
    if (item < 0 || static_cast<size_t>(item) >= values.size()) throw Damaged("a list names a value that is not there");
    const Kind kind = values[static_cast<size_t>(item)].kind;
    if (kind != wanted && !(list.kind == Kind::kOptionals && kind == Kind::kNull))
      throw Damaged("a list names a value of another kind");
  }
}

}  // namespace

std::vector<Value> read_values(const Table& plan, Layout& layout) {
  const std::vector<uint64_t> arenas = read_arenas(plan);
  const Vector entries = plan.required(2, 4, "the values of a method");
  std::vector<Value> values(entries.size);
  for (uint32_t i = 0; i < entries.size; ++i) read_value(plan.element(entries, i), arenas, layout, values[i]);
  for (const Value& value : values)
    if (value.kind == Kind::kInts || value.kind == Kind::kTensors || value.kind == Kind::kOptionals) check_list(values, value);
  return values;
}

}  // namespace moec_program
