// The gated projection on CPU (METHOD.md sections 3 and 4).
//
//   P = W0 k + b,  c = B k,  M = ||c||,  out = P + fire * U c
//
// Tokens go through in blocks, so temporaries are [block, d] and [block, r] whatever the length of the input,
// and U is touched for gated tokens only. Large products are ATen's (MKL); the few-token products of bf16 and
// fp16, where the bytes of B are the cost, are read once by the kernel below and accumulated in fp32.
#include "gated_linear.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

// One clone a vector width, chosen at load time. Other compilers and systems take the plain build.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define COACHHOOK_CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define COACHHOOK_CLONES
#endif

namespace coachhook {
namespace {

constexpr int64_t kTokenBlock = 256;  // tokens of one pass over B: enough for GEMM's full rate
constexpr int64_t kRowBlock = 64;     // rows of a 16-bit matrix widened at a time
constexpr int64_t kFewTokens = 16;    // up to here the bytes of the matrix, not the arithmetic, are the cost
constexpr int64_t kChunk = 512;       // elements of a row widened at a time: 2 KiB, stays in L1
constexpr int kLanes = 16;

// Operators below may be called under autocast, which must not recast what accumulates in fp32.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

at::ScalarType accumulator(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

// ------------------------------------------------------------------------------------------------ few-token
// products

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

// x [n, d] in the accumulator's dtype times matrix^T, matrix [r, d] in any dtype: [n, r] in the accumulator's
// dtype.
at::Tensor project(const at::Tensor& x, const at::Tensor& matrix) {
  if (matrix.scalar_type() == x.scalar_type()) return at::mm(x, matrix.t());
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
    c.narrow(1, row, rows).copy_(at::mm(x, matrix.narrow(0, row, rows).to(x.scalar_type()).t()));
  }
  return c;
}

// ------------------------------------------------------------------------------------------------ norms and
// gathering

// ||c_t||, summed in double and in a fixed order.
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

// Rows `index` (ascending) of a matrix; a view where they are consecutive.
at::Tensor gather(const at::Tensor& rows, const std::vector<int64_t>& index) {
  const auto count = static_cast<int64_t>(index.size());
  if (count > 0 && index.back() - index.front() + 1 == count) return rows.narrow(0, index.front(), count);
  return rows.index_select(0, at::tensor(index, at::kLong));
}

// out[tokens[i]] += y[i], rounded once.
void add_rows(const at::Tensor& out, const std::vector<int64_t>& tokens, const at::Tensor& y) {
  const int64_t m = out.size(1), out_stride = out.stride(0), y_stride = y.stride(0);
  const at::Tensor rows = y.stride(1) == 1 ? y : y.contiguous();
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

// ------------------------------------------------------------------------------------------------ the two
// gates

// The sketch's verdict on every token first: what it leaves undecided is then measured together, so that B is
// read once for all of it. Decisions and corrections come block by block, from the c just computed.
template <typename T>
void calibrated(const at::Tensor& out, const at::Tensor& x, const OptionalTensor& U, const at::Tensor& B,
                const at::Tensor& threshold, const OptionalTensor& sketch, const bool* valid, bool* fire) {
  const T tau = threshold.item<T>();
  const at::ScalarType wide = accumulator(B.scalar_type());
  const int64_t total = x.size(0);
  std::vector<T> norms(kTokenBlock);
  std::vector<int64_t> candidates, block, fired, tokens;
  for (int64_t start = 0; start < total; start += kTokenBlock) {
    const int64_t count = std::min(kTokenBlock, total - start);
    if (sketch) row_norms<T>(project(x.narrow(0, start, count).to(wide), *sketch), norms.data());
    for (int64_t t = 0; t < count; ++t) {
      fire[start + t] = false;
      // "not under" rather than "at least": a NaN goes on to the exact norm, like in the one-stage gate.
      if ((!valid || valid[start + t]) && !(sketch && norms[t] < tau)) candidates.push_back(start + t);
    }
  }
  for (auto at = candidates.begin(); at != candidates.end();) {
    const auto end = at + std::min<int64_t>(kTokenBlock, candidates.end() - at);
    block.assign(at, end);
    at = end;
    const at::Tensor c = project(gather(x, block).to(wide), B);
    row_norms<T>(c, norms.data());
    fired.clear();
    tokens.clear();
    for (int64_t i = 0; i < c.size(0); ++i) {
      if (!(norms[i] >= tau)) continue;
      fire[block[i]] = true;
      fired.push_back(i);
      tokens.push_back(block[i]);
    }
    if (fired.empty()) continue;
    const at::Tensor cf = gather(c, fired);
    add_rows(out, tokens, U ? project(cf, *U) : cf);
  }
}

template <typename T>
void all_norms(const at::Tensor& x, const at::Tensor& B, T* norms) {
  for (int64_t start = 0; start < x.size(0); start += kTokenBlock) {
    const int64_t count = std::min(kTokenBlock, x.size(0) - start);
    row_norms<T>(project(x.narrow(0, start, count).to(accumulator(B.scalar_type())), B), norms + start);
  }
}

// Statistics of one sequence merged with what came before (Chan et al.), then its decisions.
template <typename T>
void decide_sequence(const T* norm, const bool* valid, int64_t length, T alpha, T* state, bool* fire, T* z) {
  double count = 0, sum = 0, m2 = 0;
  for (int64_t t = 0; t < length; ++t) {
    if (valid && !valid[t]) continue;
    count += 1;
    sum += norm[t];
  }
  double mean = count > 0 ? sum / count : 0.0;
  for (int64_t t = 0; t < length; ++t) {
    if (valid && !valid[t]) continue;
    m2 += (norm[t] - mean) * (norm[t] - mean);
  }
  const double before = state[0], both = before + count;
  const double shift = mean - state[1], share = both > 0 ? count / both : 0.0;
  mean = state[1] + shift * share;
  m2 = state[2] + m2 + shift * shift * before * share;
  const double std = both >= 2 ? std::sqrt(m2 / (both - 1)) : std::numeric_limits<double>::quiet_NaN();
  for (int64_t t = 0; t < length; ++t) {
    const bool real = !valid || valid[t];
    z[t] = real ? static_cast<T>((norm[t] - mean) / std) : std::numeric_limits<T>::quiet_NaN();
    fire[t] = z[t] >= alpha;
  }
  state[0] = static_cast<T>(both);
  state[1] = static_cast<T>(mean);
  state[2] = static_cast<T>(m2);
}

// Corrects the tokens that fire, block by block.
void correct_fired(const at::Tensor& out, const at::Tensor& x, const OptionalTensor& U, const at::Tensor& B,
                   const bool* fire) {
  std::vector<int64_t> tokens;
  for (int64_t t = 0; t < x.size(0); ++t) {
    if (fire[t]) tokens.push_back(t);
    if (tokens.empty() || (static_cast<int64_t>(tokens.size()) < kTokenBlock && t + 1 < x.size(0))) continue;
    const at::Tensor c = project(gather(x, tokens).to(accumulator(B.scalar_type())), B);
    add_rows(out, tokens, U ? project(c, *U) : c);
    tokens.clear();
  }
}

at::Tensor rows_of(const at::Tensor& t) { return t.reshape({-1, t.size(-1)}); }

void check_delta(const at::Tensor& x, const OptionalTensor& U, const at::Tensor& B) {
  TORCH_CHECK(B.dim() == 2, "B must be [r, d], got ", B.sizes());
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == B.size(1), "x must be [..., ", B.size(1), "] to match B, got ",
              x.sizes());
  TORCH_CHECK(!U || (U->dim() == 2 && U->size(1) == B.size(0)), "U must be [m, ", B.size(0),
              "] to match B, got ", U->sizes());
  TORCH_CHECK(!U || U->scalar_type() == B.scalar_type(), "U and B must share a dtype, got ", U->scalar_type(),
              " and ", B.scalar_type());
}

// Gate and correction in place on `out`, which this file has just made.
std::tuple<at::Tensor, at::Tensor> run(at::Tensor& out, const at::Tensor& x, const OptionalTensor& U,
                                       const at::Tensor& B, const at::Tensor& threshold,
                                       const OptionalTensor& sketch, std::string_view gate,
                                       const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
                                       const OptionalTensor& state) {
  check_delta(x, U, B);
  const int64_t m = U ? U->size(0) : B.size(0);
  TORCH_CHECK(out.dim() == x.dim() && out.size(-1) == m, "out must be [..., ", m, "], got ", out.sizes());
  TORCH_CHECK(threshold.dim() == 0, "threshold must have no dimension, got ", threshold.sizes());
  const auto tokens_shape = x.sizes().slice(0, x.dim() - 1);
  const at::Tensor x2 = rows_of(x), out2 = out.view({-1, m});
  const at::ScalarType wide = accumulator(B.scalar_type());
  at::Tensor fire = at::empty(tokens_shape, x.options().dtype(at::kBool));
  TORCH_CHECK(!mask || mask->numel() == fire.numel(), "mask must cover ", fire.numel(), " tokens, got ",
              mask->sizes());
  if (gate == "calibrated") {
    const at::Tensor valid = mask ? mask->to(at::kBool).contiguous() : at::Tensor();
    const bool* pv = mask ? valid.const_data_ptr<bool>() : nullptr;
    bool* pf = fire.mutable_data_ptr<bool>();
    if (wide == at::kDouble) {
      calibrated<double>(out2, x2, U, B, threshold, sketch, pv, pf);
    } else {
      calibrated<float>(out2, x2, U, B, threshold, sketch, pv, pf);
    }
    return {fire, at::empty({0, 3}, x.options().dtype(wide))};
  }
  TORCH_CHECK(gate == "sequence", "gate must be 'calibrated' or 'sequence', got '", gate, "'");
  at::Tensor norm = delta_norm(x2, B);
  OptionalTensor valid = mask;
  if (cu_seqlens) {
    if (mask) valid = mask->reshape({-1});
  } else {
    const int64_t rows = mask ? mask->size(0)
                         : x.dim() > 2
                             ? c10::multiply_integers(tokens_shape.slice(0, tokens_shape.size() - 1))
                         : state ? state->size(0)
                                 : 1;
    norm = norm.view({rows, rows > 0 ? norm.numel() / rows : 0});
    if (mask) valid = mask->reshape(norm.sizes());
  }
  auto [decision, z, after] = sequence_gate(norm, threshold, valid, cu_seqlens, state);
  fire.copy_(decision.view(tokens_shape));
  correct_fired(out2, x2, U, B, fire.const_data_ptr<bool>());
  return {fire, after};
}

}  // namespace

at::Tensor delta_norm(const at::Tensor& x, const at::Tensor& B) {
  const NoAutocast no_autocast;
  check_delta(x, std::nullopt, B);
  const at::ScalarType wide = accumulator(B.scalar_type());
  at::Tensor norm = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(wide));
  if (wide == at::kDouble) {
    all_norms<double>(rows_of(x), B, norm.mutable_data_ptr<double>());
  } else {
    all_norms<float>(rows_of(x), B, norm.mutable_data_ptr<float>());
  }
  return norm;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> sequence_gate(const at::Tensor& norm, const at::Tensor& alpha,
                                                             const OptionalTensor& mask,
                                                             const OptionalTensor& cu_seqlens,
                                                             const OptionalTensor& state) {
  const NoAutocast no_autocast;
  TORCH_CHECK(norm.dim() == (cu_seqlens ? 1 : 2), "norm must be ", cu_seqlens ? "[total]" : "[S, q]",
              ", got ", norm.sizes());
  TORCH_CHECK(!mask || mask->sizes() == norm.sizes(), "mask must be ", norm.sizes(), ", got ", mask->sizes());
  const at::ScalarType wide = accumulator(norm.scalar_type());
  const at::Tensor values = norm.to(wide).contiguous();
  const int64_t segments = cu_seqlens ? cu_seqlens->size(0) - 1 : norm.size(0);
  TORCH_CHECK(!state || (state->dim() == 2 && state->size(0) == segments && state->size(1) == 3),
              "state must be [", segments, ", 3], got ", state->sizes());
  at::Tensor after = state ? state->to(wide).clone(at::MemoryFormat::Contiguous)
                           : at::zeros({segments, 3}, values.options());
  at::Tensor fire = at::zeros(norm.sizes(), norm.options().dtype(at::kBool));
  at::Tensor z = at::full(norm.sizes(), std::numeric_limits<double>::quiet_NaN(), values.options());
  const at::Tensor valid = mask ? mask->to(at::kBool).contiguous() : at::Tensor();
  const at::Tensor bounds = cu_seqlens ? cu_seqlens->to(at::kLong).contiguous()
                                       : at::arange(segments + 1, at::kLong) * norm.size(-1);
  const auto* edges = bounds.const_data_ptr<int64_t>();
  for (int64_t s = 0; s < segments; ++s) {
    TORCH_CHECK(0 <= edges[s] && edges[s] <= edges[s + 1] && edges[s + 1] <= norm.numel(),
                "cu_seqlens must ascend from 0 to at most ", norm.numel(), ", got ", bounds);
  }
  auto decide = [&]<typename T>(T threshold) {
    const T* pn = values.const_data_ptr<T>();
    const bool* pv = mask ? valid.const_data_ptr<bool>() : nullptr;
    T* pz = z.mutable_data_ptr<T>();
    T* ps = after.mutable_data_ptr<T>();
    bool* pf = fire.mutable_data_ptr<bool>();
    at::parallel_for(0, segments, 64, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        const int64_t at = edges[s];
        decide_sequence<T>(pn + at, pv ? pv + at : nullptr, edges[s + 1] - at, threshold, ps + 3 * s, pf + at,
                           pz + at);
      }
    });
  };
  if (wide == at::kDouble) {
    decide(alpha.item<double>());
  } else {
    decide(alpha.item<float>());
  }
  return {fire, z, after};
}

at::Tensor correct(const at::Tensor& out, const at::Tensor& x, const OptionalTensor& U, const at::Tensor& B,
                   const at::Tensor& fire) {
  const NoAutocast no_autocast;
  check_delta(x, U, B);
  const int64_t m = U ? U->size(0) : B.size(0);
  TORCH_CHECK(out.dim() >= 1 && out.size(-1) == m, "out must be [..., ", m, "], got ", out.sizes());
  TORCH_CHECK(fire.numel() * x.size(-1) == x.numel(), "fire must be one a token of x ", x.sizes(), ", got ",
              fire.sizes());
  at::Tensor result = out.clone(at::MemoryFormat::Contiguous);
  const at::Tensor decision = fire.to(at::kBool).contiguous();
  correct_fired(result.view({-1, m}), rows_of(x), U, B, decision.const_data_ptr<bool>());
  return result;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> gated_delta(
    const at::Tensor& out, const at::Tensor& x, const OptionalTensor& U, const at::Tensor& B,
    const at::Tensor& threshold, const OptionalTensor& sketch, std::string_view gate,
    const OptionalTensor& mask, const OptionalTensor& cu_seqlens, const OptionalTensor& state) {
  const NoAutocast no_autocast;
  at::Tensor result = out.clone(at::MemoryFormat::Contiguous);
  auto [fire, after] = run(result, x, U, B, threshold, sketch, gate, mask, cu_seqlens, state);
  return {result, fire, after};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> gated_linear(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& U,
    const at::Tensor& B, const at::Tensor& threshold, const OptionalTensor& sketch, std::string_view gate,
    const OptionalTensor& mask, const OptionalTensor& cu_seqlens, const OptionalTensor& state) {
  const NoAutocast no_autocast;
  at::Tensor result = at::linear(x, weight, bias).contiguous();
  auto [fire, after] = run(result, x, U, B, threshold, sketch, gate, mask, cu_seqlens, state);
  return {result, fire, after};
}

}  // namespace coachhook
