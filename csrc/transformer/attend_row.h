// Attention of one packed row and one head of keys, forward and back. Templates alone, inlined into entry
// points that name an instruction set (simd.h); packed_attention.cpp has those.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "common/exp.h"
#include "common/simd.h"
#include "common/transpose.h"

namespace coachhook {

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
  int64_t own_stride;

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
    return {prefix.const_data_ptr<T>() + n * prefix.stride(0) + head * prefix.stride(1), prefix_count,
            prefix.stride(2), own.at(starts[n], head), own.row_stride};
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
  Mask(const std::optional<at::Tensor>& mask, int64_t prefix_count) : prefix_count_(prefix_count) {
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

}  // namespace coachhook
