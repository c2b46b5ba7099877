#include "transformer/packed_attention.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include "common/simd.h"
#include "transformer/attend_row.h"

namespace coachhook {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

#define COACHHOOK_ENTRY(ISA, TARGET, BYTES, ACCUMULATORS)                                               \
  template <typename T>                                                                                 \
  TARGET void forward_##ISA(const Problem<T>& p, const Mask<T>& mask, T scale, int64_t n, int64_t head, \
                            T* out, T* weights, int64_t ld, Scratch<T>& scratch) {                      \
    attend<T, BYTES>(p, mask, scale, n, head, out, weights, ld, scratch);                               \
  }                                                                                                     \
  template <typename T>                                                                                 \
  TARGET void backward_##ISA(const Problem<T>& p, T scale, int64_t n, int64_t head,                     \
                             const Heads<const T>& grad, const T* weights, int64_t ld,                  \
                             const Gradients<T>& to, Scratch<T>& scratch) {                             \
    attend_backward<T, BYTES>(p, scale, n, head, grad, weights, ld, to, scratch);                       \
  }

COACHHOOK_EACH_ISA(COACHHOOK_ENTRY)

at::Tensor rows_of(const at::Tensor& tensor) {
  return tensor.stride(-1) == 1 || tensor.size(-1) <= 1 ? tensor : tensor.contiguous();
}

template <typename T>
Heads<const T> heads_of(const at::Tensor& tensor) {
  return {tensor.const_data_ptr<T>(), tensor.stride(0), tensor.stride(1)};
}

void check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& prefix_k,
           const at::Tensor& prefix_v, const at::Tensor& cu_seqlens) {
  TORCH_CHECK_VALUE(q.dim() == 3 && k.dim() == 3 && v.dim() == 3 && k.size(0) == q.size(0) &&
                        v.size(0) == q.size(0) && k.size(2) == q.size(2) && v.size(1) == k.size(1) &&
                        k.size(1) > 0 && q.size(1) % k.size(1) == 0,
                    "q, k and v must be [S, H, D], [S, Hk, D] and [S, Hk, Dv] with H a multiple of Hk, got ",
                    q.sizes(), ", ", k.sizes(), " and ", v.sizes());
  TORCH_CHECK_VALUE(cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0 && cu_seqlens.scalar_type() == at::kLong,
                    "cu_seqlens must be [N + 1] int64, got ", cu_seqlens.sizes(), " ",
                    cu_seqlens.scalar_type());
  const int64_t rows = cu_seqlens.size(0) - 1, columns = prefix_k.dim() == 4 ? prefix_k.size(2) : 0;
  TORCH_CHECK_VALUE(prefix_k.sizes() == at::IntArrayRef({rows, k.size(1), columns, k.size(2)}) &&
                        prefix_v.sizes() == at::IntArrayRef({rows, k.size(1), columns, v.size(2)}),
                    "prefix_k and prefix_v must be [N, Hk, P, D] and [N, Hk, P, Dv] of ", rows, " rows, got ",
                    prefix_k.sizes(), " and ", prefix_v.sizes());
  TORCH_CHECK_TYPE(q.scalar_type() == at::kFloat || q.scalar_type() == at::kDouble,
                   "q must be fp32 or fp64, got ", q.scalar_type());
  for (const at::Tensor& other : {k, v, prefix_k, prefix_v}) {
    TORCH_CHECK_TYPE(other.scalar_type() == q.scalar_type(),
                     "q, k, v and the prefixes must have one dtype, got ", q.scalar_type(), " and ",
                     other.scalar_type());
  }
}

// cu_seqlens from 0 to `total`, rows of at most `most` tokens.
void check_starts(const at::Tensor& cu_seqlens, int64_t total, int64_t most) {
  const int64_t* starts = cu_seqlens.const_data_ptr<int64_t>();
  const int64_t rows = cu_seqlens.size(0) - 1;
  bool good = starts[0] == 0 && starts[rows] == total;
  for (int64_t n = 0; n < rows && good; ++n) {
    good = starts[n + 1] >= starts[n] && starts[n + 1] - starts[n] <= most;
  }
  TORCH_CHECK_VALUE(good, "cu_seqlens must rise from 0 to the ", total,
                    " tokens, at most max_seqlen = ", most, " at a time, got ", cu_seqlens);
}

template <typename T>
Problem<T> problem(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& prefix_k,
                   const at::Tensor& prefix_v, const at::Tensor& cu_seqlens) {
  return {heads_of<T>(q), heads_of<T>(k),  heads_of<T>(v),
          prefix_k,       prefix_v,        cu_seqlens.const_data_ptr<int64_t>(),
          q.size(1),      k.size(1),       q.size(2),
          v.size(2),      prefix_k.size(2)};
}

// work(n, key head, scratch) for every pair, over the threads.
template <typename T, typename Work>
void for_each_pair(int64_t rows, int64_t key_heads, const Work& work) {
  at::parallel_for(0, rows * key_heads, 8, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch;
    for (int64_t pair = begin; pair < end; ++pair) work(pair / key_heads, pair % key_heads, scratch);
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> packed_attention(const at::Tensor& q_in, const at::Tensor& k_in,
                                                    const at::Tensor& v_in, const at::Tensor& prefix_k_in,
                                                    const at::Tensor& prefix_v_in, const OptionalTensor& mask,
                                                    const at::Tensor& cu_seqlens_in, int64_t max_seqlen,
                                                    double scale) {
  check(q_in, k_in, v_in, prefix_k_in, prefix_v_in, cu_seqlens_in);
  const at::Tensor q = rows_of(q_in), k = rows_of(k_in), v = rows_of(v_in);
  const at::Tensor prefix_k = rows_of(prefix_k_in), prefix_v = rows_of(prefix_v_in);
  const at::Tensor cu_seqlens = cu_seqlens_in.contiguous();
  check_starts(cu_seqlens, q.size(0), max_seqlen);
  const int64_t rows = cu_seqlens.size(0) - 1, columns = prefix_k.size(2) + max_seqlen;
  if (mask) {
    TORCH_CHECK_VALUE(mask->dim() == 4 && (mask->size(0) == rows || mask->size(0) == 1) &&
                          (mask->size(1) == 1 || mask->size(1) == q.size(1)) && mask->size(2) >= max_seqlen &&
                          mask->size(3) >= columns,
                      "mask must be [N or 1, 1 or H, Q, P + Q] of ", rows, " rows and ", columns,
                      " columns, got ", mask->sizes());
    TORCH_CHECK_TYPE(mask->scalar_type() == at::kBool || mask->scalar_type() == q.scalar_type(),
                     "mask must be bool or ", q.scalar_type(), " as q is, got ", mask->scalar_type());
  }
  at::Tensor out = at::empty({q.size(0), q.size(1), v.size(2)}, q.options());
  at::Tensor weights = at::empty({q.size(0), q.size(1), columns}, q.options());
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "coachhook_packed_attention", [&] {
    const auto p = problem<scalar_t>(q, k, v, prefix_k, prefix_v, cu_seqlens);
    const Mask<scalar_t> hidden(mask, p.prefix_count);
    static const auto kernel = COACHHOOK_WIDEST(forward, scalar_t);
    auto *to = out.mutable_data_ptr<scalar_t>(), *kept = weights.mutable_data_ptr<scalar_t>();
    for_each_pair<scalar_t>(rows, p.key_heads, [&](int64_t n, int64_t head, auto& scratch) {
      kernel(p, hidden, static_cast<scalar_t>(scale), n, head, to, kept, columns, scratch);
    });
  });
  return {out, weights};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> packed_attention_backward(
    const at::Tensor& grad_in, const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
    const at::Tensor& prefix_k_in, const at::Tensor& prefix_v_in, const at::Tensor& weights_in,
    const at::Tensor& cu_seqlens_in, double scale) {
  check(q_in, k_in, v_in, prefix_k_in, prefix_v_in, cu_seqlens_in);
  const at::Tensor q = rows_of(q_in), k = rows_of(k_in), v = rows_of(v_in), grad = rows_of(grad_in);
  const at::Tensor prefix_k = rows_of(prefix_k_in), prefix_v = rows_of(prefix_v_in);
  const at::Tensor weights = weights_in.contiguous(), cu_seqlens = cu_seqlens_in.contiguous();
  TORCH_CHECK_VALUE(weights.dim() == 3 && weights.size(0) == q.size(0) && weights.size(1) == q.size(1) &&
                        weights.size(2) >= prefix_k.size(2),
                    "weights must be [S, H, P + max_seqlen], got ", weights.sizes());
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef({q.size(0), q.size(1), v.size(2)}),
                    "grad must be [S, H, Dv], got ", grad.sizes());
  TORCH_CHECK_TYPE(grad.scalar_type() == q.scalar_type() && weights.scalar_type() == q.scalar_type(),
                   "grad and weights must have the dtype of q, ", q.scalar_type(), ", got ",
                   grad.scalar_type(), " and ", weights.scalar_type());
  check_starts(cu_seqlens, q.size(0), weights.size(2) - prefix_k.size(2));
  at::Tensor of_q = at::empty(q.sizes(), q.options()), of_k = at::empty(k.sizes(), k.options());
  at::Tensor of_v = at::empty(v.sizes(), v.options());
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "coachhook_packed_attention_backward", [&] {
    const auto p = problem<scalar_t>(q, k, v, prefix_k, prefix_v, cu_seqlens);
    static const auto kernel = COACHHOOK_WIDEST(backward, scalar_t);
    const Heads<const scalar_t> of_out = heads_of<scalar_t>(grad);
    const auto* kept = weights.const_data_ptr<scalar_t>();
    const Gradients<scalar_t> to = {of_q.mutable_data_ptr<scalar_t>(), of_k.mutable_data_ptr<scalar_t>(),
                                    of_v.mutable_data_ptr<scalar_t>()};
    for_each_pair<scalar_t>(cu_seqlens.size(0) - 1, p.key_heads, [&](int64_t n, int64_t head, auto& scratch) {
      kernel(p, static_cast<scalar_t>(scale), n, head, of_out, kept, weights.size(2), to, scratch);
    });
  });
  return {of_q, of_k, of_v};
}

}  // namespace coachhook
