// The gated projection on CPU (docs/method.md sections 3 and 4).
//
//   P = W0 k + b,  c = B k,  M = ||c||,  out = P + fire * U c
//
// Tokens go through in blocks, so temporaries are [block, d] and [block, r] whatever the length of the input,
// and U is touched for gated tokens only.
#include "gated_linear/gated_linear.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "gated_linear/row_products.h"

namespace coachhook {
namespace {

constexpr int64_t kTokenBlock = 256;  // tokens of one pass over B: enough for GEMM's full rate

// Operators below may be called under autocast, which must not recast what accumulates in fp32.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

// What ||Delta k|| is compared with, for the tokens of one block: tau, or tau ||k||. A key of zeros gets the
// smallest positive number and does not fire.
template <typename T>
void limits_of(const at::Tensor& rows, T tau, bool relative, T* limits) {
  if (!relative) {
    std::fill_n(limits, rows.size(0), tau);
    return;
  }
  row_norms<T>(rows, limits);
  for (int64_t t = 0; t < rows.size(0); ++t)
    limits[t] = std::max(tau * limits[t], std::numeric_limits<T>::min());
}

// The sketch's verdict on every token first: what it leaves undecided is then measured together, so that B is
// read once for all of it. Decisions and corrections come block by block, from the c just computed.
template <typename T>
void calibrated(const at::Tensor& out, const at::Tensor& x, const OptionalTensor& U, const at::Tensor& B,
                T tau, bool relative, const OptionalTensor& sketch, const bool* valid, bool* fire) {
  const at::ScalarType wide = accumulator(B.scalar_type());
  const int64_t total = x.size(0);
  std::vector<T> norms(kTokenBlock), limits(kTokenBlock);
  std::vector<int64_t> candidates, block, fired, tokens;
  for (int64_t start = 0; start < total; start += kTokenBlock) {
    const int64_t count = std::min(kTokenBlock, total - start);
    if (sketch) {
      const at::Tensor rows = x.narrow(0, start, count).to(wide);
      row_norms<T>(project(rows, *sketch), norms.data());
      limits_of(rows, tau, relative, limits.data());
    }
    for (int64_t t = 0; t < count; ++t) {
      fire[start + t] = false;
      // "not under" rather than "at least": a NaN goes on to the exact norm, like in the one-stage gate.
      if ((!valid || valid[start + t]) && !(sketch && norms[t] < limits[t])) candidates.push_back(start + t);
    }
  }
  for (auto at = candidates.begin(); at != candidates.end();) {
    const auto end = at + std::min<int64_t>(kTokenBlock, candidates.end() - at);
    block.assign(at, end);
    at = end;
    const at::Tensor rows = gather(x, block).to(wide);
    const at::Tensor c = project(rows, B);
    row_norms<T>(c, norms.data());
    limits_of(rows, tau, relative, limits.data());
    fired.clear();
    tokens.clear();
    for (int64_t i = 0; i < c.size(0); ++i) {
      if (!(norms[i] >= limits[i])) continue;
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
  TORCH_CHECK(at::isFloatingType(B.scalar_type()), "B must hold real numbers, got ", B.scalar_type());
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == B.size(1), "x must be [..., ", B.size(1), "] to match B, got ",
              x.sizes());
  TORCH_CHECK(!U || (U->dim() == 2 && U->size(1) == B.size(0)), "U must be [m, ", B.size(0),
              "] to match B, got ", U->sizes());
  TORCH_CHECK(!U || U->scalar_type() == B.scalar_type(), "U and B must share a dtype, got ", U->scalar_type(),
              " and ", B.scalar_type());
}

void check_out(const at::Tensor& out, const at::Tensor& x, int64_t m) {
  TORCH_CHECK(out.dim() == x.dim() && out.size(-1) == m &&
                  out.sizes().slice(0, out.dim() - 1) == x.sizes().slice(0, x.dim() - 1),
              "out must be [..., ", m, "] with the tokens of x ", x.sizes(), ", got ", out.sizes());
}

// Gate and correction in place on `out`, which this file has just made.
std::tuple<at::Tensor, at::Tensor> run(at::Tensor& out, const at::Tensor& x, const OptionalTensor& U,
                                       const at::Tensor& B, const at::Tensor& threshold,
                                       const OptionalTensor& sketch, std::string_view gate,
                                       const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
                                       const OptionalTensor& state) {
  check_delta(x, U, B);
  const int64_t m = U ? U->size(0) : B.size(0);
  check_out(out, x, m);
  TORCH_CHECK(!sketch || (sketch->dim() == 2 && sketch->size(0) > 0 && sketch->size(1) == B.size(1)),
              "sketch must be [s, ", B.size(1), "] to match B, with rows, got ", sketch->sizes());
  TORCH_CHECK(!sketch || sketch->scalar_type() == B.scalar_type(), "sketch and B must share a dtype, got ",
              sketch->scalar_type(), " and ", B.scalar_type());
  const auto tokens_shape = x.sizes().slice(0, x.dim() - 1);
  TORCH_CHECK_VALUE(threshold.dim() == 0, "threshold must have no dimension, got ", threshold.sizes());
  const at::Tensor x2 = rows_of(x), out2 = out.view({-1, m});
  const at::ScalarType wide = accumulator(B.scalar_type());
  at::Tensor fire = at::empty(tokens_shape, x.options().dtype(at::kBool));
  TORCH_CHECK(!mask || mask->numel() == fire.numel(), "mask must cover ", fire.numel(), " tokens, got ",
              mask->sizes());
  const bool relative = gate == "relative";
  if (relative || gate == "calibrated") {
    const at::Tensor valid = mask ? mask->to(at::kBool).contiguous() : at::Tensor();
    const bool* pv = mask ? valid.const_data_ptr<bool>() : nullptr;
    bool* pf = fire.mutable_data_ptr<bool>();
    if (wide == at::kDouble) {
      calibrated(out2, x2, U, B, threshold.item<double>(), relative, sketch, pv, pf);
    } else {
      calibrated(out2, x2, U, B, threshold.item<float>(), relative, sketch, pv, pf);
    }
    return {fire, at::empty({0, 3}, x.options().dtype(wide))};
  }
  TORCH_CHECK_VALUE(gate == "sequence", "gate must be 'calibrated', 'relative' or 'sequence', got '", gate,
                    "'");
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
  check_out(out, x, m);
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
