// Packing of weights into the kernels' layout, and back.
#include <cinttypes>
#include <cstring>

#include "core/format.h"
#include "core/parallel.h"
#include "core/status.h"

namespace moec {
namespace {

constexpr int64_t kMostElements = int64_t{1} << 31;  // of one dimension

template <typename T>
T load(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

// Codes as a matrix of bytes or nibbles, [rows, columns] as the caller stores them; as unsigned numbers.
struct Codes {
  const uint8_t* data;
  int64_t columns;
  bool nibbles;

  int32_t at(int64_t row, int64_t column) const {
    const int64_t i = row * columns + column;
    return nibbles ? (data[i / 2] >> (i % 2 * 4)) & 0xF : data[i];
  }
};

// What turns a nibble of the caller's into a packed one and back: two's complement into q + 8; positions in a table stay.
uint8_t flip_of(const Format& format) { return format.kind == MOEC_INT4 ? 8 : 0; }

// Code q of [row, column] to its place inside a packed matrix, row in the block.
void put(uint8_t* block, const Format& format, int64_t row, int64_t column, int32_t q) {
  uint8_t* const unit = block + column / kUnit * format.unit_bytes();
  const int64_t half = column % kUnit / 4, i = column % 4;
  if (format.kind == MOEC_INT8) {
    unit[64 * half + 4 * row + i] = uint8_t(q);
    return;
  }
  if (format.kind == MOEC_NL3) {
    const int64_t b = 4 * row + i, low = 4 * half + 2 * (b / 32), third = 4 * half + b / 16;
    unit[b % 32] = uint8_t((unit[b % 32] & ~(3 << low)) | (q & 3) << low);
    unit[32 + b % 16] = uint8_t((unit[32 + b % 16] & ~(1 << third)) | (q >> 2 & 1) << third);
    return;
  }
  uint8_t& byte = unit[4 * row + i];
  q ^= flip_of(format);
  byte = half ? uint8_t((byte & 0x0F) | q << 4) : uint8_t((byte & 0xF0) | q);
}

int32_t get(const uint8_t* block, const Format& format, int64_t row, int64_t column) {
  return code_in_unit(format.kind, block + column / kUnit * format.unit_bytes(), row, column % kUnit) ^ flip_of(format);
}

// A whole unit of nibbles, 16 rows x 8 inputs, a byte of the source at a time.
void pack_unit(const Codes& source, uint8_t flip, bool axis_out, int64_t n, int64_t k, uint8_t* unit) {
  const auto join = [flip](uint8_t low, uint8_t high) {  // two codes of each byte: the even ones, the odd ones
    return uint16_t(((low & 15) | (high & 15) << 4) | ((low >> 4) | (high & 0xF0)) << 8) ^ 0x1111 * flip;
  };
  if (axis_out) {  // a byte of the source holds two rows of one input
    for (int64_t i = 0; i < 4; ++i) {
      const uint8_t* const low = source.data + ((k + i) * source.columns + n) / 2;
      const uint8_t* const high = low + 2 * source.columns;
      for (int64_t c = 0; c < 8; ++c) {
        const uint16_t both = uint16_t(join(low[c], high[c]));
        unit[8 * c + i] = uint8_t(both);
        unit[8 * c + 4 + i] = uint8_t(both >> 8);
      }
    }
    return;
  }
  for (int64_t row = 0; row < kBlockRows; ++row) {  // a byte of the source holds two inputs of one row
    const uint8_t* const b = source.data + ((n + row) * source.columns + k) / 2;
    const uint16_t first = uint16_t(join(b[0], b[2])), second = uint16_t(join(b[1], b[3]));
    unit[4 * row] = uint8_t(first);
    unit[4 * row + 1] = uint8_t(first >> 8);
    unit[4 * row + 2] = uint8_t(second);
    unit[4 * row + 3] = uint8_t(second >> 8);
  }
}

// A unit of nibbles as one of nl3.
void squeeze_unit(const uint8_t* nibbles, uint8_t* unit) {
  for (int64_t j = 0; j < 32; ++j) unit[j] = uint8_t((nibbles[j] & 0x33) | (nibbles[32 + j] & 0x33) << 2);
  for (int64_t j = 0; j < 16; ++j) {
    const auto third = [&](int64_t part) { return (nibbles[16 * part + j] >> 2 & 0x11) << part; };
    unit[32 + j] = uint8_t(third(0) | third(1) | third(2) | third(3));
  }
}

void pack_quantized(const Matrix& m, const uint8_t* codes, const uint8_t* scales, uint8_t* packed) {
  const Format& f = m.format;
  const Codes source{codes, f.axis_out ? m.n : m.k, is_nibble(f.kind)};
  // in every place that no weight fills: a code of zero, or of IQ4_NL, which has none, of 1, of NL3 0; no output depends on it
  std::memset(packed, f.kind == MOEC_INT4 || f.kind == MOEC_IQ4_NL ? 0x88 : 0, size_t(m.blocks() * m.block_bytes()));
  for (int64_t block = 0; block < m.blocks(); ++block) {
    uint8_t* const out = packed + block * m.block_bytes();
    if (is_nibble(f.kind) && (block + 1) * kBlockRows <= m.n && m.k % kUnit == 0) {
      for (int64_t k = 0; k < m.k; k += kUnit) {
        uint8_t* const unit = out + k / kUnit * f.unit_bytes();
        uint8_t nibbles[64];
        const bool squeezed = f.kind == MOEC_NL3;
        pack_unit(source, flip_of(f), f.axis_out, block * kBlockRows, k, squeezed ? nibbles : unit);
        if (squeezed) squeeze_unit(nibbles, unit);
      }
      continue;
    }
    for (int64_t row = 0; row < kBlockRows && block * kBlockRows + row < m.n; ++row) {
      const int64_t n = block * kBlockRows + row;
      for (int64_t k = 0; k < m.k; ++k) put(out, f, row, k, f.axis_out ? source.at(k, n) : source.at(n, k));
    }
  }
  const int64_t size = f.scale_bytes(), groups = m.groups();
  uint8_t* const out = packed + m.blocks() * m.block_bytes();
  if (f.axis_out) {
    std::memset(out, 0, size_t(groups * m.padded_k() * size));
    for (int64_t k = 0; k < m.k; ++k) {
      for (int64_t g = 0; g < groups; ++g) {
        std::memcpy(out + (g * m.padded_k() + k) * size, scales + (k * groups + g) * size, size_t(size));
      }
    }
    return;
  }
  std::memset(out, 0, size_t(m.blocks() * groups * kBlockRows * size));
  for (int64_t n = 0; n < m.n; ++n) {
    const int64_t block = n / kBlockRows, row = n % kBlockRows;
    for (int64_t g = 0; g < groups; ++g) {
      std::memcpy(out + ((block * groups + g) * kBlockRows + row) * size, scales + (n * groups + g) * size, size_t(size));
    }
  }
}

void unpack_quantized(const Matrix& m, uint8_t* codes, uint8_t* scales) {
  const Format& f = m.format;
  const int64_t rows = f.axis_out ? m.k : m.n, columns = f.axis_out ? m.n : m.k;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t n = f.axis_out ? column : row, k = f.axis_out ? row : column;
      const int32_t q = get(m.codes(n / kBlockRows), f, n % kBlockRows, k);
      const int64_t i = row * columns + column;
      if (f.kind == MOEC_INT8) {
        codes[i] = uint8_t(q);
      } else {
        codes[i / 2] = uint8_t(i % 2 ? (codes[i / 2] & 0x0F) | q << 4 : q);
      }
    }
  }
  const int64_t size = f.scale_bytes(), groups = m.groups();
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t g = 0; g < groups; ++g) {
      const uint8_t* const from =
          f.axis_out ? m.group_scales(g) + row * size
                     : m.block_scales(row / kBlockRows) + (g * kBlockRows + row % kBlockRows) * size;
      std::memcpy(scales + (row * groups + g) * size, from, size_t(size));
    }
  }
}

// [k, n] -> [n, k] for f32, in tiles that stay in cache.
void transpose(const uint8_t* from, int64_t k, int64_t n, uint8_t* to) {
  constexpr int64_t kTile = 32;
  for (int64_t n0 = 0; n0 < n; n0 += kTile) {
    for (int64_t k0 = 0; k0 < k; k0 += kTile) {
      for (int64_t i = n0; i < n0 + kTile && i < n; ++i) {
        for (int64_t j = k0; j < k0 + kTile && j < k; ++j) std::memcpy(to + (i * k + j) * 4, from + (j * n + i) * 4, 4);
      }
    }
  }
}

struct Stack {
  Matrix matrix;
  uint64_t packed = 0, codes = 0, scales = 0;  // bytes of one matrix
};

int32_t measure(int64_t count, int64_t n, int64_t k, int32_t format, uint64_t codes, uint64_t scales, uint64_t packed,
                Stack* stack) {
  if (count < 0 || count > kMostElements) return fail(MOEC_INVALID_ARGUMENT, "count: %" PRId64 " matrices", count);
  const bool transposed = (format & 0xF) == MOEC_F32 && (format & MOEC_AXIS_OUT);
  Format& f = stack->matrix.format;
  MOEC_RETURN_IF_ERROR(decode_format("format", transposed ? format & ~MOEC_AXIS_OUT : format, n, k, &f));
  stack->matrix.n = n;
  stack->matrix.k = k;
  MOEC_RETURN_IF_ERROR(packed_bytes("packed", n, k, f, &stack->packed));
  if (is_nibble(f.kind) && (f.axis_out ? n : k) % 2) {
    return fail(MOEC_INVALID_ARGUMENT, "codes of 4 bits need an even last dimension");
  }
  stack->codes = uint64_t(n) * uint64_t(k) * (f.kind == MOEC_F32 ? 4 : 1) / (is_nibble(f.kind) ? 2 : 1);
  stack->scales =
      f.kind == MOEC_F32 ? 0 : uint64_t(f.axis_out ? k : n) * uint64_t(stack->matrix.groups() * f.scale_bytes());
  const struct {
    const char* name;
    uint64_t given, one;
  } all[] = {{"codes", codes, stack->codes}, {"scales", scales, stack->scales}, {"packed", packed, stack->packed}};
  for (const auto& b : all) {
    uint64_t wanted = 0;
    if (__builtin_mul_overflow(b.one, uint64_t(count), &wanted) || wanted != b.given) {
      return fail(MOEC_WRONG_SIZE, "%s: %" PRIu64 " bytes given, %" PRId64 " x %" PRIu64 " needed", b.name, b.given, count,
                  b.one);
    }
  }
  return MOEC_OK;
}

thread_local bool float_activations = false;  // operators decode their formats on the thread that calls them

int32_t check_pointer(const char* name, const void* data, uint64_t bytes) {
  return bytes && !data ? fail(MOEC_INVALID_ARGUMENT, "%s: the pointer is null", name) : int32_t(MOEC_OK);
}

}  // namespace

int32_t decode_format(const char* name, int32_t format, int64_t n, int64_t k, Format* out) {
  if (n <= 0 || k <= 0 || n >= kMostElements || k >= kMostElements) {
    return fail(MOEC_INVALID_ARGUMENT, "%s: a matrix of %" PRId64 " x %" PRId64, name, n, k);
  }
  Format f;
  f.kind = format & 0xF;
  f.axis_out = format & MOEC_AXIS_OUT;
  f.int8_activations = format & MOEC_INT8_ACTIVATIONS && !float_activations;
  f.f32_scales = format & MOEC_F32_SCALES;
  f.block_activations = format & MOEC_BLOCK_ACTIVATIONS && f.int8_activations;
  f.group = format >> MOEC_GROUP_SHIFT;
  if (format < 0 || f.kind > MOEC_NL3 ||
      (format & MOEC_BLOCK_ACTIVATIONS && !(format & MOEC_INT8_ACTIVATIONS)) || (f.kind == MOEC_F32 && format != MOEC_F32)) {
    return fail(MOEC_INVALID_ARGUMENT, "%s: %#x is not a weight format", name, unsigned(format));
  }
  if (f.kind != MOEC_F32) {
    const int64_t along = f.axis_out ? n : k;
    if (f.group <= 0 || f.group % 32 || along % f.group) {
      return fail(MOEC_INVALID_ARGUMENT, "%s: groups of %" PRId64 " along %" PRId64 " (a multiple of 32 that divides it is needed)",
                  name, f.group, along);
    }
    // products of what a code stands for and 127 are summed in 32 bits
    const int64_t summed = f.axis_out ? k : f.group, most = int64_t{1} << (largest_of(f.kind) > 16 ? 17 : 20);
    if (f.int8_activations && summed > most) {
      return fail(MOEC_INVALID_ARGUMENT, "%s: sums over %" PRId64 " inputs; with int8 activations the limit is %" PRId64, name,
                  summed, most);
    }
  }
  *out = f;
  return MOEC_OK;
}

int32_t packed_bytes(const char* name, int64_t n, int64_t k, const Format& f, uint64_t* bytes) {
  uint64_t codes = 0, scales = 0;
  bool fits;
  if (f.kind == MOEC_F32) {
    fits = checked_product(n, k, 4, &codes);
  } else {
    const int64_t rows = round_up(n, kBlockRows), padded = round_up(k, kUnit);
    fits = checked_product(rows / kBlockRows, padded / kUnit, f.unit_bytes(), &codes) &&
           (f.axis_out ? checked_product(n / f.group, padded, f.scale_bytes(), &scales)
                       : checked_product(rows, k / f.group, f.scale_bytes(), &scales));
  }
  uint64_t total = 0;
  if (!fits || __builtin_add_overflow(codes, scales, &total) || total > uint64_t(INT64_MAX)) {
    return fail(MOEC_INVALID_ARGUMENT, "%s: a matrix of %" PRId64 " x %" PRId64 " is too large", name, n, k);
  }
  *bytes = total;
  return MOEC_OK;
}

int32_t open_matrices(const char* name, int64_t count, int64_t n, int64_t k, int32_t format, moec_in buffer, Matrix* first,
                      uint64_t* stride) {
  Format f;
  MOEC_RETURN_IF_ERROR(decode_format(name, format, n, k, &f));
  uint64_t one = 0, all = 0;
  MOEC_RETURN_IF_ERROR(packed_bytes(name, n, k, f, &one));
  if (count < 0 || __builtin_mul_overflow(one, uint64_t(count), &all) || all != buffer.bytes) {
    return fail(MOEC_WRONG_SIZE, "%s: %" PRIu64 " bytes given, %" PRId64 " x %" PRIu64 " needed for %" PRId64 " x %" PRId64,
                name, buffer.bytes, count, one, n, k);
  }
  MOEC_RETURN_IF_ERROR(check_pointer(name, buffer.data, all));
  if (f.kind == MOEC_F32 && reinterpret_cast<uintptr_t>(buffer.data) % 4) {
    return fail(MOEC_INVALID_ARGUMENT, "%s: f32 weights must be aligned to 4 bytes", name);
  }
  *first = Matrix{f, n, k, static_cast<const uint8_t*>(buffer.data)};
  if (stride) *stride = one;
  return MOEC_OK;
}

}  // namespace moec

using namespace moec;

void moec_set_float_activations(int32_t on) { moec::float_activations = on != 0; }

int32_t moec_packed_bytes(int64_t n, int64_t k, int32_t format, uint64_t* bytes) {
  if (!bytes) return fail(MOEC_INVALID_ARGUMENT, "bytes: the pointer is null");
  Format f;
  MOEC_RETURN_IF_ERROR(decode_format("format", format, n, k, &f));
  return packed_bytes("packed", n, k, f, bytes);
}

int32_t moec_pack(int64_t count, int64_t n, int64_t k, int32_t format, moec_in codes, moec_in scales, moec_out packed) {
  Stack stack;
  MOEC_RETURN_IF_ERROR(measure(count, n, k, format, codes.bytes, scales.bytes, packed.bytes, &stack));
  MOEC_RETURN_IF_ERROR(check_pointer("codes", codes.data, codes.bytes));
  MOEC_RETURN_IF_ERROR(check_pointer("scales", scales.data, scales.bytes));
  MOEC_RETURN_IF_ERROR(check_pointer("packed", packed.data, packed.bytes));
  const auto* from = static_cast<const uint8_t*>(codes.data);
  const auto* from_scales = static_cast<const uint8_t*>(scales.data);
  auto* to = static_cast<uint8_t*>(packed.data);
  if (stack.matrix.format.kind == MOEC_F32 && !(format & MOEC_AXIS_OUT)) {
    if (codes.bytes) std::memcpy(to, from, codes.bytes);
    return MOEC_OK;
  }
  for_each_unit(workers(), count, [&](int32_t, int64_t i) {
    if (stack.matrix.format.kind == MOEC_F32) {
      transpose(from + uint64_t(i) * stack.codes, k, n, to + uint64_t(i) * stack.packed);
    } else {
      pack_quantized(stack.matrix, from + uint64_t(i) * stack.codes, from_scales + uint64_t(i) * stack.scales,
                     to + uint64_t(i) * stack.packed);
    }
  });
  return MOEC_OK;
}

int32_t moec_unpack(int64_t count, int64_t n, int64_t k, int32_t format, moec_in packed, moec_out codes, moec_out scales) {
  Stack stack;
  MOEC_RETURN_IF_ERROR(measure(count, n, k, format, codes.bytes, scales.bytes, packed.bytes, &stack));
  MOEC_RETURN_IF_ERROR(check_pointer("codes", codes.data, codes.bytes));
  MOEC_RETURN_IF_ERROR(check_pointer("scales", scales.data, scales.bytes));
  MOEC_RETURN_IF_ERROR(check_pointer("packed", packed.data, packed.bytes));
  const auto* from = static_cast<const uint8_t*>(packed.data);
  auto* to = static_cast<uint8_t*>(codes.data);
  auto* to_scales = static_cast<uint8_t*>(scales.data);
  for (uint64_t i = 0; i < uint64_t(count); ++i) {
    Matrix m = stack.matrix;
    m.data = from + i * stack.packed;
    if (m.format.kind != MOEC_F32) {
      unpack_quantized(m, to + i * stack.codes, to_scales + i * stack.scales);
    } else if (format & MOEC_AXIS_OUT) {
      transpose(m.data, n, k, to + i * stack.codes);
    } else {
      std::memcpy(to + i * stack.codes, m.data, stack.codes);
    }
  }
  return MOEC_OK;
}
