// XNNPACK checks a graph's kinds, but neither that constants are as long as their shapes say, nor that a product's width is
// its input's, nor that an external value is an argument of the call. Artifacts delegate linears: other nodes are refused.
#include "xnnpack_check.h"

#include <cstring>
#include <map>

namespace moec_program {

namespace {

enum Type : int16_t { kFloat32 = 1, kInt8 = 3, kInt32 = 5, kChannelInt8 = 6, kChannelInt32 = 7, kChannelInt4 = 8, kDynamicInt8 = 9,
                      kBlockInt4 = 10 };
enum Node : uint8_t { kFullyConnected = 2, kConvert = 18 };
enum Quantization : uint8_t { kPerChannel = 1, kPerTensor, kPerToken, kPerGroup };
constexpr uint32_t kNoId = UINT32_MAX, kMostDims = 6, kMostPorts = 4096, kInput = 1, kOutput = 2;
constexpr uint64_t kMostElements = uint64_t{1} << 36;

struct Tensor {
  int16_t type = 0;
  std::vector<uint32_t> sizes;
  uint64_t elements = 1;
  bool constant = false;
  uint32_t external = kNoId, flags = 0;
  uint32_t row_dims = 0;  // of a dynamically quantized tensor: dimensions of a row
};

uint64_t bytes_of(const Tensor& t) {
  switch (t.type) {
    case kFloat32: case kInt32: case kChannelInt32: return t.elements * 4;
    case kInt8: case kChannelInt8: return t.elements;
    case kChannelInt4: case kBlockInt4: {  // rows of whole bytes
      const uint64_t width = t.sizes.empty() ? 1 : t.sizes.back();
      return width == 0 ? 0 : t.elements / width * ((width + 1) / 2);
    }
    default: throw Damaged("a delegate's constant of a type that has none");
  }
}

class Graph {
 public:
  Graph(const Buffer& buffer, uint64_t region, const Layout& layout)
      : buffer_(buffer), graph_(buffer_, buffer_.follow(0)), region_(region), layout_(layout) {}

  std::vector<DelegatePort> check() {
    const uint32_t externs = graph_.number<uint32_t>(3);
    if (externs > kMostPorts) throw Damaged("a delegate of thousands of inputs");
    constants_ = graph_.vector(8, 4);
    const Vector values = graph_.required(2, 4, "the values of a delegate"), nodes = graph_.required(1, 4, "the nodes of a delegate");
    for (uint32_t i = 0; i < values.size; ++i) value(graph_.element(values, i));
    for (uint32_t i = 0; i < nodes.size; ++i) node(graph_.element(nodes, i));
    return ports(externs);
  }

 private:
  void value(const Table& entry) {
    const uint8_t kind = entry.number<uint8_t>(0);
    if (kind != 1 && kind != 2) throw Damaged("a delegate's value of no known kind");
    const Table outer = entry.table(1, "a delegate's value");
    const Table inner = kind == 1 ? outer : outer.table(0, "a delegate's value");
    Tensor t;
    t.type = inner.number<int16_t>(0);
    const Vector sizes = inner.vector(2, 4);
    if (sizes.size > kMostDims || sizes.size != inner.number<uint32_t>(1)) throw Damaged("a delegate's tensor of impossible rank");
    for (uint32_t i = 0; i < sizes.size; ++i) {
      t.sizes.push_back(sizes.get<uint32_t>(i));
      if (t.sizes.back() == 0 || t.elements > kMostElements / t.sizes.back()) throw Damaged("a delegate's tensor of impossible size");
      t.elements *= t.sizes.back();
    }
    const uint32_t constant = inner.number<uint32_t>(3);
    t.constant = constant != 0;
    t.external = inner.number<uint32_t>(4);
    t.flags = inner.number<uint32_t>(5);
    if (t.flags & ~(kInput | kOutput) || (t.flags == (kInput | kOutput)) || (t.flags != 0) != (t.external != kNoId) ||
        (t.constant && t.flags))
      throw Damaged("a delegate's tensor with impossible flags");
    if (inner.number<int16_t>(7) != 0) throw Damaged("a delegate's tensor of an old format");
    if (t.constant && constant_bytes(constant) < bytes_of(t)) throw Damaged("a delegate's constant outside the file");
    if (kind == 2) quantization(outer, t);
    else if (t.type != kFloat32) throw Damaged("a delegate's tensor without scales");
    if (!tensors_.emplace(inner.number<uint32_t>(6), t).second) throw Damaged("a delegate that defines a value twice");
  }

  void quantization(const Table& outer, Tensor& t) {
    const uint8_t kind = outer.number<uint8_t>(1);
    if (kind < kPerChannel || kind > kPerGroup) throw Damaged("a delegate's scales of no known kind");
    const Table scales = outer.table(2, "a delegate's scales");
    if (kind == kPerTensor) return expect(t, t.type == kInt8 || t.type == kInt32);
    if (kind == kPerToken) {
      t.row_dims = scales.number<uint32_t>(0);
      return expect(t, t.type == kDynamicInt8 && !t.constant && !t.flags && t.row_dims == 1 && !t.sizes.empty());
    }
    if (kind == kPerChannel) {
      const uint32_t channel = scales.number<uint32_t>(1);
      expect(t, t.constant && channel < t.sizes.size() && (t.type == kChannelInt8 || t.type == kChannelInt32 || t.type == kChannelInt4));
      return enough(scales, 2, 4, t.sizes[channel]);
    }
    const int32_t group = scales.number<int32_t>(2);
    expect(t, t.constant && t.type == kBlockInt4 && t.sizes.size() == 2 && scales.number<int32_t>(1) == 0 && group > 0 &&
                  t.sizes[1] % static_cast<uint32_t>(group) == 0);
    const uint64_t count = uint64_t{t.sizes[0]} * (t.sizes[1] / static_cast<uint32_t>(group));
    if (scales.number<uint32_t>(4) != 0 && scales.number<uint32_t>(5) != count) throw Damaged("a delegate's scales of another number");
    enough(scales, 4, 2, count);
  }

  void expect(const Tensor&, bool holds) {
    if (!holds) throw Damaged("a delegate's tensor whose scales do not fit it");
  }

  // `count` scales, in a constant named by field `place` (`width` bytes each), or as floats in the list of field 0.
  void enough(const Table& scales, int place, uint64_t width, uint64_t count) {
    const uint32_t constant = scales.number<uint32_t>(place);
    // ExecuTorch takes the address of the list of channels in either case
    const bool read = constant == 0 || width == 4;
    const Vector list = read ? scales.required(0, 4, "the list of a delegate's scales") : scales.vector(0, 4);
    if (constant != 0 ? constant_bytes(constant) / width < count : list.size != count)
      throw Damaged("a delegate's scales outside the file");
  }

  // Bytes that constant `index` has in the payload or among the named data of the file.
  uint64_t constant_bytes(uint32_t index) {
    if (index >= constants_.size) throw Damaged("a delegate names a constant that is not there");
    const Table entry = graph_.element(constants_, index);
    if (!entry.has(2)) {
      const uint64_t offset = entry.number<uint64_t>(0), size = entry.number<uint64_t>(1);
      if (offset > region_ || size > region_ - offset) throw Damaged("a delegate's constant outside the file");
      return size;
    }
    const auto found = layout_.named.find(entry.text(2, "the name of a delegate's constant"));
    if (found == layout_.named.end()) throw Damaged("a delegate names data that is not there");
    return found->second.bytes;
  }

  const Tensor& tensor(const Table& node, int field) {
    const auto found = tensors_.find(node.number<uint32_t>(field));
    if (found == tensors_.end()) throw Damaged("a delegate's node names a value that is not there");
    return found->second;
  }

  // A value is written once, after those that it is computed from.
  void writes(const Table& node, int field) {
    const Tensor& t = tensor(node, field);
    if (t.constant || (t.flags & kInput) || !written_.emplace(node.number<uint32_t>(field), true).second)
      throw Damaged("a delegate writes a constant, an input, or a value twice");
  }
  void reads(const Table& node, int field) {
    const Tensor& t = tensor(node, field);
    if (!t.constant && !(t.flags & kInput) && !written_.count(node.number<uint32_t>(field)))
      throw Damaged("a delegate reads what it has not written yet");
  }

  void node(const Table& entry) {
    const uint8_t kind = entry.number<uint8_t>(0);
    if (kind != kFullyConnected && kind != kConvert) throw Damaged("a delegate with other operators than linears");
    const Table node = entry.table(1, "a delegate's node");
    if (kind == kConvert) return convert(node);
    const Tensor &x = tensor(node, 0), &w = tensor(node, 1), &y = tensor(node, 3);
    reads(node, 0);
    writes(node, 3);
    const bool rows = x.type == kDynamicInt8 || x.type == kFloat32;
    if (node.number<uint32_t>(4) != 0 || x.constant || !rows || !w.constant || w.sizes.size() != 2 || x.sizes.empty() ||
        y.sizes.size() != x.sizes.size() || x.sizes.back() != w.sizes[1] || y.sizes.back() != w.sizes[0] || y.type != kFloat32 ||
        x.elements / x.sizes.back() != y.elements / y.sizes.back())
      throw Damaged("a delegate's linear whose shapes do not fit");
    if (node.number<uint32_t>(2, 0) == kNoId) return;
    const Tensor& bias = tensor(node, 2);
    if (!bias.constant || bias.elements != w.sizes[0] || bias.type != kFloat32) throw Damaged("a delegate's bias that does not fit");
  }

  void convert(const Table& node) {
    reads(node, 0);
    writes(node, 1);
    const Tensor &x = tensor(node, 0), &y = tensor(node, 1);
    if (x.constant || x.type != kFloat32 || y.type != kDynamicInt8 || x.sizes != y.sizes || node.number<uint32_t>(2) != 0)
      throw Damaged("a delegate's conversion that does not fit");
  }

  std::vector<DelegatePort> ports(uint32_t externs) {
    std::vector<DelegatePort> out(externs);
    for (const auto& [id, t] : tensors_) {
      if (!t.flags) continue;
      if (t.external >= externs || out[t.external].used || t.type != kFloat32) throw Damaged("a delegate's input or output that is not there");
      if ((t.flags & kOutput) && !written_.count(id)) throw Damaged("a delegate's output that nothing writes");
      out[t.external] = {(t.flags & kOutput) != 0, true, t.sizes};
    }
    return out;
  }

  const Buffer& buffer_;
  const Table graph_;
  uint64_t region_;
  const Layout& layout_;
  Vector constants_;
  std::map<uint32_t, Tensor> tensors_;
  std::map<uint32_t, bool> written_;
};

}  // namespace

std::vector<DelegatePort> check_xnnpack(const uint8_t* payload, size_t bytes, const Layout& layout) {
  const Buffer whole(payload, bytes);
  if (bytes < 30 || std::memcmp(payload + 4, "XH00", 4) != 0) throw Damaged("a delegate's data of another format");
  const uint64_t graph = whole.at<uint32_t>(10), length = whole.at<uint32_t>(14), data = whole.at<uint32_t>(18);
  const uint64_t region = whole.at<uint64_t>(22);
  if (data > bytes || region > bytes - data || data < graph + length) throw Damaged("a delegate's data outside the file");
  const Buffer flat(whole.bytes(graph, length), length);
  if (length < 8 || (std::memcmp(payload + graph + 4, "XN00", 4) != 0 && std::memcmp(payload + graph + 4, "XN01", 4) != 0))
    throw Damaged("a delegate's data of another format");
  return Graph(flat, region, layout).check();
}

std::vector<bool> check_ports(const std::vector<DelegatePort>& ports, const Arguments& arguments) {
  if (arguments.size() != ports.size()) throw Damaged("a call of a delegate with another number of arguments");
  std::vector<bool> written;
  for (size_t i = 0; i < ports.size(); ++i) {
    const Value& value = *arguments[i];
    const DelegatePort& port = ports[i];
    if (!port.used || value.kind != Kind::kTensor || value.type != 6 || value.sizes.size() != port.sizes.size())
      throw Damaged("a call of a delegate with another kind of argument");
    for (size_t d = 0; d < port.sizes.size(); ++d)
      if (static_cast<uint32_t>(value.sizes[d]) != port.sizes[d]) throw Damaged("a call of a delegate with another shape");
    written.push_back(port.output);
  }
  return written;
}

}  // namespace moec_program
