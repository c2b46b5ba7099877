#include "transformer/block_parts.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "common/exp.h"
#include "common/simd.h"

namespace coachhook {
namespace {

constexpr int64_t kGrain = 16384;  // numbers a thread takes at least

template <typename T>
ALWAYS_INLINE T inner(const T* a, const T* b, int64_t m) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < m; ++i) sum += a[i] * b[i];
  return sum;
}

template <typename T>
ALWAYS_INLINE T norm_row(const T* x, const T* weight, int64_t m, T eps, T* y) {
  const T scale = 1 / std::sqrt(inner(x, x, m) / static_cast<T>(m) + eps);
#pragma omp simd
  for (int64_t i = 0; i < m; ++i) y[i] = weight[i] * (x[i] * scale);
  return scale;
}

template <typename T>
ALWAYS_INLINE void norm_row_back(const T* grad, const T* x, const T* weight, int64_t m, T scale, T* of_x) {
#pragma omp simd
  for (int64_t i = 0; i < m; ++i) of_x[i] = grad[i] * weight[i];
  const T along = inner(of_x, x, m) * scale * scale / static_cast<T>(m);
#pragma omp simd
  for (int64_t i = 0; i < m; ++i) of_x[i] = scale * (of_x[i] - along * x[i]);
}

template <typename T>
ALWAYS_INLINE T sigmoid(T x) {
  const T e = exp_of(-std::abs(x));
  return (x < 0 ? e : T(1)) / (1 + e);
}

template <typename T>
ALWAYS_INLINE void silu_run(const T* gate, const T* up, int64_t count, T* y) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) y[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

template <typename T>
ALWAYS_INLINE void silu_run_back(const T* grad, const T* gate, const T* up, int64_t count, T* of_gate,
                                 T* of_up) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const T s = sigmoid(gate[i]), silu = gate[i] * s;
    of_gate[i] = grad[i] * up[i] * (s + silu * (1 - s));
    of_up[i] = grad[i] * silu;
  }
}

// The second half of x turns against the first.
template <typename T>
ALWAYS_INLINE void turn(const T* x, const T* cos, const T* sin, int64_t half, bool back, T* y) {
  const T *c = cos + half, *s = sin + half;
  if (back) {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const T first = x[i], second = x[half + i];
      y[i] = first * cos[i] + second * s[i];
      y[half + i] = second * c[i] - first * sin[i];
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const T first = x[i], second = x[half + i];
      y[i] = first * cos[i] - second * sin[i];
      y[half + i] = second * c[i] + first * s[i];
    }
  }
}

#define COACHHOOK_ENTRY(ISA, TARGET, BYTES, ACCUMULATORS)                                                \
  template <typename T>                                                                                  \
  TARGET T norm_##ISA(const T* x, const T* weight, int64_t m, T eps, T* y) {                             \
    return norm_row(x, weight, m, eps, y);                                                               \
  }                                                                                                      \
  template <typename T>                                                                                  \
  TARGET void norm_back_##ISA(const T* grad, const T* x, const T* weight, int64_t m, T scale, T* of_x) { \
    norm_row_back(grad, x, weight, m, scale, of_x);                                                      \
  }                                                                                                      \
  template <typename T>                                                                                  \
  TARGET void silu_##ISA(const T* gate, const T* up, int64_t count, T* y) {                              \
    silu_run(gate, up, count, y);                                                                        \
  }                                                                                                      \
  template <typename T>                                                                                  \
  TARGET void silu_back_##ISA(const T* grad, const T* gate, const T* up, int64_t count, T* of_gate,      \
                              T* of_up) {                                                                \
    silu_run_back(grad, gate, up, count, of_gate, of_up);                                                \
  }                                                                                                      \
  template <typename T>                                                                                  \
  TARGET void turn_##ISA(const T* x, const T* cos, const T* sin, int64_t half, bool back, T* y) {        \
    turn(x, cos, sin, half, back, y);                                                                    \
  }

COACHHOOK_EACH_ISA(COACHHOOK_ENTRY)

void check_like(const at::Tensor& tensor, const at::Tensor& x, const char* name, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(tensor.sizes() == sizes, name, " must be ", sizes, ", got ", tensor.sizes());
  TORCH_CHECK_TYPE(tensor.scalar_type() == x.scalar_type(), name, " must be ", x.scalar_type(),
                   " as the other arguments are, got ", tensor.scalar_type());
}

void check_dtype(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble, name,
                   " must be fp32 or fp64, got ", tensor.scalar_type());
}

void check_norm(const at::Tensor& x, const at::Tensor& weight) {
  check_dtype(x, "x");
  TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) > 0, "x must be [..., m] with m > 0, got ", x.sizes());
  check_like(weight, x, "weight", {x.size(-1)});
}

// work(begin, end) over `count` rows of `width` numbers.
template <typename Work>
void over_rows(int64_t count, int64_t width, const Work& work) {
  at::parallel_for(0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)), work);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x_in, const at::Tensor& weight_in, double eps) {
  check_norm(x_in, weight_in);
  const at::Tensor x = x_in.contiguous(), weight = weight_in.contiguous();
  at::Tensor y = at::empty(x.sizes(), x.options());
  at::Tensor scale = at::empty(x.sizes().slice(0, x.dim() - 1), x.options());
  const int64_t m = x.size(-1);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "coachhook_rms_norm", [&] {
    static const auto kernel = COACHHOOK_WIDEST(norm, scalar_t);
    const auto *from = x.const_data_ptr<scalar_t>(), *w = weight.const_data_ptr<scalar_t>();
    auto *to = y.mutable_data_ptr<scalar_t>(), *scales = scale.mutable_data_ptr<scalar_t>();
    over_rows(scale.numel(), m, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        scales[row] = kernel(from + row * m, w, m, static_cast<scalar_t>(eps), to + row * m);
      }
    });
  });
  return {y, scale};
}

at::Tensor rms_norm_backward(const at::Tensor& grad_in, const at::Tensor& x_in, const at::Tensor& weight_in,
                             const at::Tensor& scale_in) {
  check_norm(x_in, weight_in);
  check_like(grad_in, x_in, "grad", x_in.sizes());
  check_like(scale_in, x_in, "scale", x_in.sizes().slice(0, x_in.dim() - 1));
  const at::Tensor grad = grad_in.contiguous(), x = x_in.contiguous(), weight = weight_in.contiguous();
  const at::Tensor scale = scale_in.contiguous();
  at::Tensor of_x = at::empty(x.sizes(), x.options());
  const int64_t m = x.size(-1);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "coachhook_rms_norm_backward", [&] {
    static const auto kernel = COACHHOOK_WIDEST(norm_back, scalar_t);
    const auto *g = grad.const_data_ptr<scalar_t>(), *from = x.const_data_ptr<scalar_t>();
    const auto *w = weight.const_data_ptr<scalar_t>(), *scales = scale.const_data_ptr<scalar_t>();
    auto* to = of_x.mutable_data_ptr<scalar_t>();
    over_rows(scale.numel(), m, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        kernel(g + row * m, from + row * m, w, m, scales[row], to + row * m);
      }
    });
  });
  return of_x;
}

at::Tensor silu_product(const at::Tensor& gate_in, const at::Tensor& up_in) {
  check_dtype(gate_in, "gate");
  check_like(up_in, gate_in, "up", gate_in.sizes());
  const at::Tensor gate = gate_in.contiguous(), up = up_in.contiguous();
  at::Tensor y = at::empty(gate.sizes(), gate.options());
  AT_DISPATCH_FLOATING_TYPES(gate.scalar_type(), "coachhook_silu_product", [&] {
    static const auto kernel = COACHHOOK_WIDEST(silu, scalar_t);
    const auto *g = gate.const_data_ptr<scalar_t>(), *u = up.const_data_ptr<scalar_t>();
    auto* to = y.mutable_data_ptr<scalar_t>();
    over_rows(gate.numel(), 1,
              [&](int64_t begin, int64_t end) { kernel(g + begin, u + begin, end - begin, to + begin); });
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor> silu_product_backward(const at::Tensor& grad_in, const at::Tensor& gate_in,
                                                         const at::Tensor& up_in) {
  check_dtype(gate_in, "gate");
  check_like(up_in, gate_in, "up", gate_in.sizes());
  check_like(grad_in, gate_in, "grad", gate_in.sizes());
  const at::Tensor grad = grad_in.contiguous(), gate = gate_in.contiguous(), up = up_in.contiguous();
  at::Tensor of_gate = at::empty(gate.sizes(), gate.options()),
             of_up = at::empty(gate.sizes(), gate.options());
  AT_DISPATCH_FLOATING_TYPES(gate.scalar_type(), "coachhook_silu_product_backward", [&] {
    static const auto kernel = COACHHOOK_WIDEST(silu_back, scalar_t);
    const auto *d = grad.const_data_ptr<scalar_t>(), *g = gate.const_data_ptr<scalar_t>();
    const auto* u = up.const_data_ptr<scalar_t>();
    auto *to_gate = of_gate.mutable_data_ptr<scalar_t>(), *to_up = of_up.mutable_data_ptr<scalar_t>();
    over_rows(gate.numel(), 1, [&](int64_t begin, int64_t end) {
      kernel(d + begin, g + begin, u + begin, end - begin, to_gate + begin, to_up + begin);
    });
  });
  return {of_gate, of_up};
}

at::Tensor rotary(const at::Tensor& x_in, const at::Tensor& cos_in, const at::Tensor& sin_in, bool back) {
  check_dtype(x_in, "x");
  TORCH_CHECK_VALUE(x_in.dim() == 4 && x_in.size(3) % 2 == 0, "x must be [B, H, S, D] with an even D, got ",
                    x_in.sizes());
  const int64_t B = x_in.size(0), H = x_in.size(1), S = x_in.size(2), D = x_in.size(3);
  const int64_t angles = cos_in.dim() == 3 && cos_in.size(0) == 1 ? 1 : B;
  check_like(cos_in, x_in, "cos", {angles, S, D});
  check_like(sin_in, x_in, "sin", {angles, S, D});
  const at::Tensor x = x_in.stride(3) == 1 ? x_in : x_in.contiguous();
  const at::Tensor cos = cos_in.contiguous(), sin = sin_in.contiguous();
  at::Tensor y = at::empty({B, S, H, D}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "coachhook_rotary", [&] {
    static const auto kernel = COACHHOOK_WIDEST(turn, scalar_t);
    const auto* from = x.const_data_ptr<scalar_t>();
    const auto *c = cos.const_data_ptr<scalar_t>(), *s = sin.const_data_ptr<scalar_t>();
    auto* to = y.mutable_data_ptr<scalar_t>();
    const int64_t of_batch = x.stride(0), of_head = x.stride(1), of_token = x.stride(2);
    over_rows(B * S, H * D, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        const auto* at = from + token / S * of_batch + token % S * of_token;
        const int64_t angle = token % (angles * S) * D;
        for (int64_t head = 0; head < H; ++head) {
          kernel(at + head * of_head, c + angle, s + angle, D / 2, back, to + (token * H + head) * D);
        }
      }
    });
  });
  return y.transpose(1, 2);
}

}  // namespace coachhook
