// A square of a matrix, as many rows as a vector has lanes, transposed in registers.
#pragma once

#include <cstddef>
#include <utility>

#include "common/simd.h"

namespace coachhook {

// The rows of a block of as many columns change places with its columns.
template <typename T, int BYTES>
struct Transpose {
  using vec = typename Vector<T, BYTES>::type;
  static constexpr int LANES = BYTES / sizeof(T);

  template <int H, std::size_t... I>
  static ALWAYS_INLINE void exchange(vec& a, vec& b, std::index_sequence<I...>) {
    const vec low = __builtin_shufflevector(a, b, ((I & H) ? LANES + I - H : I)...);
    b = __builtin_shufflevector(a, b, ((I & H) ? LANES + I : I + H)...);
    a = low;
  }

  template <int H = LANES / 2>
  static ALWAYS_INLINE void run(vec (&t)[LANES]) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
      if (!(i & H)) exchange<H>(t[i], t[i + H], std::make_index_sequence<LANES>());
    }
    if constexpr (H > 1) run<H / 2>(t);
  }
};

}  // namespace coachhook
