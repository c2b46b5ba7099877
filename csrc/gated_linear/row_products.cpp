#include "gated_linear/row_products.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>

#include "common/simd.h"

namespace coachhook {
namespace {

constexpr int64_t kOneDnnRows = 4;  // fp32: below, MKL's matrix-vector product reads the matrix as fast
constexpr int64_t kRowBlock = 64;   // rows of a 16-bit matrix widened at a time
constexpr int64_t kFewTokens = 16;  // up to here the bytes of the matrix, not the arithmetic, are the cost
constexpr int64_t kChunk = 512;     // elements of a row widened at a time: 2 KiB, stays in L1
constexpr int kLanes = 16;

inline float widen_bf16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

inline float widen_fp16(uint16_t bits) {
  // The exponent is shifted by a multiplication, which makes subnormals right too; infinity and NaN keep
  // theirs.
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu) << 13;
  const uint32_t special = magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0u;
  const float value = std::bit_cast<float>(magnitude) * std::bit_cast<float>(0x77800000u);  // 2^112
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | special |
                              static_cast<uint32_t>(bits & 0x8000u) << 16);
}

// c[t] = <row, x_t> for `tokens` rows of x (stride d). Lanes are added in a fixed order.
COACHHOOK_CLONES void dot_row(const uint16_t* row, bool is_bf16, const float* x, int64_t tokens, int64_t d,
                              float* c, int64_t c_stride) {
  float wide[kChunk];
  float sums[kFewTokens][kLanes] = {};
  for (int64_t start = 0; start < d; start += kChunk) {
    const int64_t length = std::min(kChunk, d - start);
    if (is_bf16) {
      for (int64_t i = 0; i < length; ++i) wide[i] = widen_bf16(row[start + i]);
    } else {
      for (int64_t i = 0; i < length; ++i) wide[i] = widen_fp16(row[start + i]);
    }
    const int64_t whole = length / kLanes * kLanes;
    for (int64_t t = 0; t < tokens; ++t) {
      const float* xt = x + t * d + start;
      float lanes[kLanes];
      for (int l = 0; l < kLanes; ++l) lanes[l] = sums[t][l];
      for (int64_t i = 0; i < whole; i += kLanes) {
        for (int l = 0; l < kLanes; ++l) lanes[l] += wide[i + l] * xt[i + l];
      }
      for (int64_t i = whole; i < length; ++i) lanes[i - whole] += wide[i] * xt[i];
      for (int l = 0; l < kLanes; ++l) sums[t][l] = lanes[l];
    }
  }
  for (int64_t t = 0; t < tokens; ++t) {
    float sum = 0;
    for (int l = 0; l < kLanes; ++l) sum += sums[t][l];
    c[t * c_stride] = sum;
  }
}

// x matrixᵀ. at::mm gives fp32 to MKL, which on other makers' processors stays with AVX2, at half of oneDNN's
// rate (docs/experiments/onednn.md). The operator is torch's own, called by name: no header declares it.
at::Tensor product(const at::Tensor& x, const at::Tensor& matrix) {
  static const auto linear = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  const bool dense = matrix.is_contiguous() || matrix.t().is_contiguous();  // else oneDNN is very slow
  if (x.scalar_type() != at::kFloat || x.size(0) < kOneDnnRows || !dense || matrix.numel() == 0 || !linear ||
      !at::globalContext().hasMKLDNN() || !at::globalContext().userEnabledMkldnn()) {
    return at::mm(x, matrix.t());
  }
  torch::jit::Stack stack;
  torch::jit::push(stack, x, matrix, c10::IValue(), "none", c10::List<std::optional<at::Scalar>>(),
                   std::optional<std::string>(""));
  linear->callBoxed(stack);
  return std::move(stack.front()).toTensor();
}

}  // namespace

at::Tensor project(const at::Tensor& x, const at::Tensor& matrix) {
  if (matrix.scalar_type() == x.scalar_type()) return product(x, matrix);
  const int64_t n = x.size(0), d = x.size(1), r = matrix.size(0);
  at::Tensor c = at::empty({n, r}, x.options());
  const bool is_bf16 = matrix.scalar_type() == at::kBFloat16;
  if (n <= kFewTokens && (is_bf16 || matrix.scalar_type() == at::kHalf) && matrix.stride(1) == 1) {
    const at::Tensor tokens = x.contiguous();
    const float* px = tokens.const_data_ptr<float>();
    const auto* pm = static_cast<const uint16_t*>(matrix.const_data_ptr());
    float* pc = c.mutable_data_ptr<float>();
    const int64_t stride = matrix.stride(0);
    const int64_t grain = std::max<int64_t>(1, 65536 / (d * n + 1));
    at::parallel_for(0, r, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) dot_row(pm + row * stride, is_bf16, px, n, d, pc + row, r);
    });
    return c;
  }
  for (int64_t row = 0; row < r; row += kRowBlock) {
    const int64_t rows = std::min(kRowBlock, r - row);
    c.narrow(1, row, rows).copy_(product(x, matrix.narrow(0, row, rows).to(x.scalar_type())));
  }
  return c;
}

template <typename T>
void row_norms(const at::Tensor& c, T* norms) {
  const at::Tensor rows = c.contiguous();
  const T* data = rows.const_data_ptr<T>();
  const int64_t r = c.size(1);
  at::parallel_for(0, c.size(0), std::max<int64_t>(1, 32768 / (r + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      double sum[4] = {};
      int64_t i = 0;
      for (; i + 4 <= r; i += 4) {
        for (int l = 0; l < 4; ++l) {
          const double value = data[t * r + i + l];
          sum[l] += value * value;
        }
      }
      for (; i < r; ++i) sum[0] += static_cast<double>(data[t * r + i]) * data[t * r + i];
      norms[t] = static_cast<T>(std::sqrt((sum[0] + sum[1]) + (sum[2] + sum[3])));
    }
  });
}

at::Tensor gather(const at::Tensor& rows, const std::vector<int64_t>& index) {
  const auto count = static_cast<int64_t>(index.size());
  if (count > 0 && index.back() - index.front() + 1 == count) return rows.narrow(0, index.front(), count);
  return rows.index_select(0, at::tensor(index, at::kLong));
}

void add_rows(const at::Tensor& out, const std::vector<int64_t>& tokens, const at::Tensor& y) {
  const at::Tensor rows = y.stride(1) == 1 ? y : y.contiguous();
  const int64_t m = out.size(1), out_stride = out.stride(0), y_stride = rows.stride(0);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, out.scalar_type(), "coachhook_add_rows", [&] {
    using Wide = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    scalar_t* destination = out.mutable_data_ptr<scalar_t>();
    auto add = [&](const auto* source) {
      at::parallel_for(0, static_cast<int64_t>(tokens.size()), std::max<int64_t>(1, 32768 / m),
                       [&](int64_t begin, int64_t end) {
                         for (int64_t i = begin; i < end; ++i) {
                           scalar_t* to = destination + tokens[i] * out_stride;
                           const auto* from = source + i * y_stride;
                           for (int64_t j = 0; j < m; ++j) {
                             to[j] =
                                 static_cast<scalar_t>(static_cast<Wide>(to[j]) + static_cast<Wide>(from[j]));
                           }
                         }
                       });
    };
    if (rows.scalar_type() == at::kDouble) {
      add(rows.const_data_ptr<double>());
    } else {
      add(rows.const_data_ptr<float>());
    }
  });
}

template void row_norms<float>(const at::Tensor& c, float* norms);
template void row_norms<double>(const at::Tensor& c, double* norms);

}  // namespace coachhook
