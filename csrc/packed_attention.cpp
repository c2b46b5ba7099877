#include "packed_attention.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "exp.h"
#include "simd.h"
#include "transpose.h"

namespace coachhook {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Vectors [count, head, width] of which the last dimension is contiguous.
template <typename T>
struct Heads {
  T* data;
  int64_t row_stride, head_stride;

  T* at(int64_t row, int64_t head) const { return data + row * row_stride + head * head_stride; }
};

// What one query of one head may look at: the prefix of its row, then the row's own tokens.
template <typename T>
struct Seen {
  const T* prefix;
  int64_t prefix_count, prefix_stride;
  const T* own;
  int64_t own_count, own_stride;

  const T* at(int64_t j) const {
    return j < prefix_count ? prefix + j * prefix_stride : own + (j - prefix_count) * own_stride;
  }
};

template <typename T>
struct Problem {
  Heads<const T> q, k, v;
  const at::Tensor &prefix_k, &prefix_v;  // [N, Hk, P, ...], last dimension contiguous
  const int64_t* starts;                  // [N + 1]
  int64_t heads, key_heads, width, value_width, prefix_count;

  int64_t tokens(int64_t n) const { return starts[n + 1] - starts[n]; }
  Seen<T> keys(int64_t n, int64_t head) const { return seen(prefix_k, k, n, head); }
  Seen<T> values(int64_t n, int64_t head) const { return seen(prefix_v, v, n, head); }

 private:
  Seen<T> seen(const at::Tensor& prefix, const Heads<const T>& own, int64_t n, int64_t head) const {
    return {prefix.const_data_ptr<T>() + n * prefix.stride(0) + head * prefix.stride(1),
            prefix_count,
            prefix.stride(2),
            own.at(starts[n], head),
            tokens(n),
            own.row_stride};
  }
};

constexpr int64_t kMostLanes = 16;

constexpr int64_t padded(int64_t count) { return (count + kMostLanes - 1) / kMostLanes * kMostLanes; }

// The columns of what a token may look at, [width, padded(count)], so that a token's products with all of it
// are sums of vectors and nothing is added across one.
template <typename T, int BYTES>
ALWAYS_INLINE void transpose(const Seen<T>& rows, int64_t count, int64_t width, T* columns) {
  using V = typename Vector<T, BYTES>::type;
  constexpr int64_t kLanes = BYTES / sizeof(T);
  const int64_t ld = padded(count), whole = width / kLanes * kLanes;
  for (int64_t j = 0; j < ld; j += kLanes) {
    const T* row[kLanes];
    for (int64_t l = 0; l < kLanes; ++l)
      row[l] = rows.at(std::min(j + l, count - 1));  // behind the last: not read
    for (int64_t i = 0; i < whole; i += kLanes) {
      V square[kLanes];
#pragma GCC unroll 16
      for (int64_t l = 0; l < kLanes; ++l) square[l] = *reinterpret_cast<const V*>(row[l] + i);
      Transpose<T, BYTES>::run(square);
#pragma GCC unroll 16
      for (int64_t l = 0; l < kLanes; ++l) *reinterpret_cast<V*>(columns + (i + l) * ld + j) = square[l];
    }
    for (int64_t i = whole; i < width; ++i) {
      for (int64_t l = 0; l < kLanes; ++l) columns[i * ld + j + l] = row[l][i];
    }
  }
}

// out <- factor * x columns, TILE vectors of it.
template <typename T, int BYTES, int TILE>
ALWAYS_INLINE void products_of(const T* x, int64_t width, const T* columns, int64_t ld, T factor, T* out) {
  using V = typename Vector<T, BYTES>::type;
  constexpr int64_t kLanes = BYTES / sizeof(T);
  V even[TILE] = {}, odd[TILE] = {};  // two sums each, so that fewer wait for themselves
  int64_t i = 0;
  for (; i + 2 <= width; i += 2, columns += 2 * ld) {
    for (int64_t s = 0; s < TILE; ++s) {
      even[s] += *reinterpret_cast<const V*>(columns + s * kLanes) * x[i];
      odd[s] += *reinterpret_cast<const V*>(columns + ld + s * kLanes) * x[i + 1];
    }
  }
  for (int64_t s = 0; s < TILE; ++s) {
    if (i < width) even[s] += *reinterpret_cast<const V*>(columns + s * kLanes) * x[i];
    *reinterpret_cast<V*>(out + s * kLanes) = (even[s] + odd[s]) * factor;
  }
}

// out [padded(count)] <- factor * x columns
template <typename T, int BYTES>
ALWAYS_INLINE void products(const T* x, int64_t width, const T* columns, int64_t count, T factor, T* out) {
  constexpr int64_t kLanes = BYTES / sizeof(T), kTile = 4;
  static_assert(kMostLanes % kLanes == 0);
  const int64_t ld = padded(count);
  int64_t j = 0;
  for (; j + kTile * kLanes <= ld; j += kTile * kLanes) {
    products_of<T, BYTES, kTile>(x, width, columns + j, ld, factor, out + j);
  }
  for (; j + 2 * kLanes <= ld; j += 2 * kLanes) {
    products_of<T, BYTES, 2>(x, width, columns + j, ld, factor, out + j);
  }
  if (j < ld) products_of<T, BYTES, 1>(x, width, columns + j, ld, factor, out + j);
}

// out [width] <- sum of weights[j] rows.at(j), the rows of no weight left out.
template <typename T, int BYTES>
ALWAYS_INLINE void weighted_sum(const T* weights, int64_t count, const Seen<T>& rows, int64_t width, T* out) {
  using V = typename Vector<T, BYTES>::type;
  constexpr int64_t kLanes = BYTES / sizeof(T), kTile = 4;
  int64_t i = 0;
  for (; i + kTile * kLanes <= width; i += kTile * kLanes) {
    V sums[kTile] = {};
    for (int64_t j = 0; j < count; ++j) {
      if (weights[j] == 0) continue;
      const T* row = rows.at(j) + i;
      for (int64_t s = 0; s < kTile; ++s) {
        sums[s] += *reinterpret_cast<const V*>(row + s * kLanes) * weights[j];
      }
    }
    for (int64_t s = 0; s < kTile; ++s) *reinterpret_cast<V*>(out + i + s * kLanes) = sums[s];
  }
  for (; i < width; ++i) {
    T sum = 0;
    for (int64_t j = 0; j < count; ++j) {
      if (weights[j] != 0) sum += weights[j] * rows.at(j)[i];
    }
    out[i] = sum;
  }
}

// to += factor from
template <typename T>
ALWAYS_INLINE void add(T* to, const T* from, T factor, int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) to[i] += factor * from[i];
}

// What a token may look at: added to its scores, -inf where it may not.
template <typename T>
class Mask {
 public:
  Mask(const OptionalTensor& mask, int64_t prefix_count) : prefix_count_(prefix_count) {
    if (!mask) return;
    is_bool_ = mask->scalar_type() == at::kBool;
    data_ = mask->const_data_ptr();
    row_stride_ = mask->size(0) == 1 ? 0 : mask->stride(0);
    head_stride_ = mask->size(1) == 1 ? 0 : mask->stride(1);
    token_stride_ = mask->stride(2);
    stride_ = mask->stride(3);
  }

  // Of token i of row n to its `count` scores, as head `head` sees it.
  void add_to(T* scores, int64_t count, int64_t n, int64_t head, int64_t i) const {
    constexpr T kHidden = -std::numeric_limits<T>::infinity();
    const int64_t place = n * row_stride_ + head * head_stride_ + i * token_stride_;
    if (data_ == nullptr) {
      for (int64_t j = prefix_count_ + i + 1; j < count; ++j) scores[j] = kHidden;
    } else if (is_bool_) {
      const bool* allowed = static_cast<const bool*>(data_) + place;
      for (int64_t j = 0; j < count; ++j) scores[j] = allowed[j * stride_] ? scores[j] : kHidden;
    } else {
      const T* added = static_cast<const T*>(data_) + place;
      for (int64_t j = 0; j < count; ++j) {
        scores[j] = added[j * stride_] == kHidden ? kHidden : scores[j] + added[j * stride_];
      }
    }
  }

 private:
  const void* data_ = nullptr;
  bool is_bool_ = false;
  int64_t prefix_count_, row_stride_ = 0, head_stride_ = 0, token_stride_ = 0, stride_ = 0;
};

// Scores [padded(count)], what they may look at, become weights.
template <typename T>
ALWAYS_INLINE void softmax(T* scores, int64_t count) {
  T largest = -std::numeric_limits<T>::infinity(), sum = 0;
  for (int64_t j = 0; j < count; ++j) largest = std::max(largest, scores[j]);
  if (std::isinf(largest) && largest < 0) largest = 0;  // it may look at nothing
  for (int64_t j = count; j < padded(count); ++j) scores[j] = -std::numeric_limits<T>::infinity();
#pragma omp simd
  for (int64_t j = 0; j < padded(count); ++j) scores[j] = exp_of(scores[j] - largest);
  for (int64_t j = 0; j < count; ++j) sum += scores[j];
  const T factor = sum == 0 ? T(0) : 1 / sum;
  for (int64_t j = 0; j < count; ++j) scores[j] *= factor;
}

// Room for one row and one head of keys: the keys or values by columns, and what one token makes of each.
template <typename T>
struct Scratch {
  std::vector<T> columns, scores;

  void reserve(int64_t width, int64_t count) {
    columns.resize(static_cast<size_t>(width * padded(count)));
    scores.resize(static_cast<size_t>(padded(count)));
  }
};

// One row and one head of keys, for all heads of queries that share it.
template <typename T, int BYTES>
ALWAYS_INLINE void attend(const Problem<T>& p, const Mask<T>& mask, T scale, int64_t n, int64_t key_head,
                          T* out, T* all_weights, int64_t ld, Scratch<T>& scratch) {
  const Seen<T> keys = p.keys(n, key_head), values = p.values(n, key_head);
  const int64_t count = p.prefix_count + p.tokens(n), group = p.heads / p.key_heads;
  if (p.tokens(n) == 0) return;
  scratch.reserve(p.width, count);
  T *columns = scratch.columns.data(), *scores = scratch.scores.data();
  transpose<T, BYTES>(keys, count, p.width, columns);
  for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
    for (int64_t i = 0; i < p.tokens(n); ++i) {
      const int64_t token = p.starts[n] + i;
      products<T, BYTES>(p.q.at(token, head), p.width, columns, count, scale, scores);
      mask.add_to(scores, count, n, head, i);
      softmax(scores, count);
      T* weights = all_weights + (token * p.heads + head) * ld;
      std::copy(scores, scores + count, weights);
      std::fill(weights + count, weights + ld, T(0));
      weighted_sum<T, BYTES>(scores, count, values, p.value_width,
                             out + (token * p.heads + head) * p.value_width);
    }
  }
}

template <typename T>
struct Gradients {
  T *q, *k, *v;  // [S, H, D], [S, Hk, D], [S, Hk, Dv]
};

// The way back.
template <typename T, int BYTES>
ALWAYS_INLINE void attend_backward(const Problem<T>& p, T scale, int64_t n, int64_t key_head,
                                   const Heads<const T>& grad, const T* all_weights, int64_t ld,
                                   const Gradients<T>& to, Scratch<T>& scratch) {
  const Seen<T> keys = p.keys(n, key_head), values = p.values(n, key_head);
  const int64_t tokens = p.tokens(n), group = p.heads / p.key_heads, first = p.starts[n];
  const int64_t count = p.prefix_count + tokens;
  if (tokens == 0) return;
  scratch.reserve(p.value_width, count);
  T *columns = scratch.columns.data(), *of_scores = scratch.scores.data();
  transpose<T, BYTES>(values, count, p.value_width, columns);
  for (int64_t i = 0; i < tokens; ++i) {
    const int64_t row = (first + i) * p.key_heads + key_head;
    std::fill_n(to.k + row * p.width, p.width, T(0));
    std::fill_n(to.v + row * p.value_width, p.value_width, T(0));
  }
  for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t token = first + i;
      const T *query = p.q.at(token, head), *of_out = grad.at(token, head);
      const T* weights = all_weights + (token * p.heads + head) * ld;
      products<T, BYTES>(of_out, p.value_width, columns, count, T(1), of_scores);
      T mean = 0;
      for (int64_t j = 0; j < count; ++j) mean += weights[j] == 0 ? T(0) : weights[j] * of_scores[j];
      for (int64_t j = 0; j < count; ++j) {
        of_scores[j] = weights[j] == 0 ? T(0) : scale * weights[j] * (of_scores[j] - mean);
      }
      weighted_sum<T, BYTES>(of_scores, count, keys, p.width, to.q + (token * p.heads + head) * p.width);
      for (int64_t j = p.prefix_count; j < count; ++j) {
        if (weights[j] == 0) continue;
        const int64_t row = (first + j - p.prefix_count) * p.key_heads + key_head;
        add(to.k + row * p.width, query, of_scores[j], p.width);
        add(to.v + row * p.value_width, of_out, weights[j], p.value_width);
      }
    }
  }
}

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
