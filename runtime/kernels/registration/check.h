// What the ExecuTorch registrations share: the faults of a call, and tensors as the buffers of the C API. Everything is in an
// anonymous namespace.
#ifndef MOEC_REGISTRATION_CHECK_H_
#define MOEC_REGISTRATION_CHECK_H_

#include <executorch/runtime/core/exec_aten/util/dim_order_util.h>
#include <executorch/runtime/core/exec_aten/util/tensor_util.h>
#include <executorch/runtime/kernel/kernel_includes.h>

#include <optional>

#include "moec_kernel.h"

namespace {

using executorch::aten::ArrayRef;
using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;
using OptionalTensor = std::optional<Tensor>;

const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Long: return "int64";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    default: return "another dtype";
  }
}

// Collects the first fault of a call, so that an operator reads as a list of expectations.
class Check {
 public:
  Check(KernelRuntimeContext& context, const char* op) : context_(context), op_(op) {}

  bool tensor(const char* name, const Tensor& t, ScalarType type, ssize_t rank) {
    if (t.scalar_type() != type)
      return fault("%s must be %s, it is %s", name, dtype_name(type), dtype_name(t.scalar_type()));
    if (t.dim() != rank) return fault("%s must have %zd dimensions, it has %zd", name, rank, static_cast<ssize_t>(t.dim()));
    return packed(name, t);
  }

  // any rank of at least `rank`
  bool tensor_from(const char* name, const Tensor& t, ScalarType type, ssize_t rank) {
    if (t.scalar_type() != type)
      return fault("%s must be %s, it is %s", name, dtype_name(type), dtype_name(t.scalar_type()));
    if (t.dim() < rank) return fault("%s must have at least %zd dimensions", name, rank);
    return packed(name, t);
  }

  bool same(const char* what, int64_t a, int64_t b) {
    return a == b ? true : fault("%s: %lld and %lld differ", what, static_cast<long long>(a), static_cast<long long>(b));
  }

  bool resize(Tensor& out, const SizesType* sizes, size_t rank) {
    if (out.scalar_type() != ScalarType::Float) return fault("out must be float32, it is %s", dtype_name(out.scalar_type()));
    if (executorch::runtime::resize_tensor(out, {sizes, rank}) != Error::Ok)
      return fault("out cannot take the size of this call (more tokens than the program was planned for)");
    return packed("out", out);
  }

  bool done(int32_t status) { return status == MOEC_OK ? true : fault("%s", moec_last_error()); }

 private:
  bool packed(const char* name, const Tensor& t) {
    if (executorch::runtime::is_contiguous_dim_order(t.dim_order().data(), t.dim())) return true;
    return fault("%s must be row-major", name);
  }

  template <typename... Args>
  bool fault(const char* format, Args... args) {
    char text[512];
    std::snprintf(text, sizeof text, format, args...);
    ET_LOG(Error, "moec::%s: %s", op_, text);
    context_.fail(Error::InvalidArgument);
    return false;
  }

  KernelRuntimeContext& context_;
  const char* op_;
};

moec_in in(const Tensor& t) { return {t.const_data_ptr(), static_cast<uint64_t>(t.nbytes())}; }
moec_in in(const OptionalTensor& t) { return t.has_value() ? in(*t) : moec_in{nullptr, 0}; }
moec_out out_of(const Tensor& t) { return {t.mutable_data_ptr(), static_cast<uint64_t>(t.nbytes())}; }

// Elements before the last dimension.
int64_t rows_of(const Tensor& t) {
  int64_t rows = 1;
  for (ssize_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return rows;
}

constexpr size_t kMostDims = 8;

// The sizes of `t` with `width` as the last one; false if there are too many.
bool sizes_with_last(const Tensor& t, int64_t width, SizesType (&sizes)[kMostDims]) {
  if (t.dim() < 1 || static_cast<size_t>(t.dim()) > kMostDims) return false;
  for (ssize_t i = 0; i < t.dim(); ++i) sizes[i] = t.size(i);
  sizes[t.dim() - 1] = static_cast<SizesType>(width);
  return true;
}

}  // namespace

#endif  // MOEC_REGISTRATION_CHECK_H_
