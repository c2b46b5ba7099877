// A block reflector of block_reflector.h on rows of [A K]: the inner loop of every update and removal.
#pragma once

#include <cstdint>

namespace coachhook {

// Blocks of kBlock columns that follow each other; each is applied as
//     M = A N + K R,   A <- M - A,   K <- K - M S.
template <typename T>
struct BlockReflectors {
  int64_t n, ld;
  const T* N;  // [blocks, kBlock, kBlock]
  const T* R;  // [blocks, n, kBlock]
  const T* S;  // [blocks, kBlock, ld]
};

// Blocks first, first + step, ... (`count` of them), one after the other; block i on columns i * kBlock of A
// [rows, *], with K [rows, ld]. `upper`: every N is an upper triangle. `soon` [soon_count] is what the caller
// will read next; it is asked for meanwhile.
template <typename T>
using ReflectFunction = void (*)(const BlockReflectors<T>& b, int64_t first, int64_t step, int64_t count,
                                 bool upper, T* A, int64_t row_stride, T* K, int64_t rows, const T* soon,
                                 int64_t soon_count);

// The widest version that this processor runs; chosen once.
template <typename T>
ReflectFunction<T> reflect_rows();

}  // namespace coachhook
