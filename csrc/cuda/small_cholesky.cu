// One block a matrix, the whole matrix in registers, one barrier a column: a column step is bound by latency.
//
// Step j of the Cholesky factorisation subtracts l_i l_k from a_ik for all rows i > j, k > j; the same row
// operations on an identity leave F^-1, whose row i after step j reaches to column j, where the factor is no
// longer needed. So both live in one matrix: with r = (row j of F^-1 | l below j), every entry of a row i > j
// becomes a_ik - l_i r_k, column j itself -l_i r_j. Entries above the diagonal are changed like the others,
// so that none asks on which side it lies, and never read.
#include <cmath>

#include "cuda/small_cholesky.h"

namespace coachhook {
namespace {

constexpr int kDown = 16, kAcross = 32;  // threads; a warp holds one row in kDown
constexpr int kRows = kSmallMatrix / kDown, kColumns = kSmallMatrix / kAcross;

struct Step {
  double column[kSmallMatrix];  // what lies below the pivot, and the pivot
  double row[kSmallMatrix];     // what lies left of it
};

// Steps 16 Q to 16 Q + 15: Q tells at compile time which registers hold their row and column.
template <int Q, bool kFactored>
__device__ void sixteen_steps(double (&a)[kRows][kColumns], Step (&steps)[2], int size, bool& good) {
  constexpr int kHeld = Q * kDown / kAcross;
  const int down = threadIdx.y, across = threadIdx.x;
  for (int q = 0; q < kDown; ++q) {
    const int j = Q * kDown + q;
    if (j >= size) return;
    Step& step = steps[j % 2];  // the other one may still be read
    if (across == j % kAcross) {
#pragma unroll
      for (int i = Q; i < kRows; ++i) step.column[i * kDown + down] = a[i][kHeld];
    }
    if (down == q) {
#pragma unroll
      for (int k = 0; k <= kHeld; ++k) step.row[k * kAcross + across] = a[Q][k];
    }
    __syncthreads();
    const double pivot = step.column[j];
    good = good && pivot > 0 && isfinite(pivot);
    const double scale = kFactored ? 1 / pivot : rsqrt(pivot);
    double r[kColumns];
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const int column = k * kAcross + across;
      if (k > kHeld) {
        r[k] = kFactored ? 0 : step.column[column] * scale;
      } else if (k < kHeld) {
        r[k] = step.row[column] * scale;
      } else {
        const double right = kFactored ? 0 : step.column[column >= j ? column : j];
        r[k] = column == j ? scale : (column < j ? step.row[column] : right) * scale;
      }
    }
#pragma unroll
    for (int i = Q; i < kRows; ++i) {
      const int row = i * kDown + down;
      const double l = step.column[row] * (kFactored ? 1 : scale);
      if (row > j) {
#pragma unroll
        for (int k = 0; k < kColumns; ++k) {
          const bool own = k == kHeld && across == j % kAcross;
          a[i][k] = fma(-l, r[k], own ? 0 : a[i][k]);
        }
      } else if (row == j) {
#pragma unroll
        for (int k = 0; k < kColumns; ++k) {
          if (k * kAcross + across <= j) a[i][k] = r[k];
        }
      }
    }
  }
}

template <bool kFactored>
__global__ void __launch_bounds__(kDown* kAcross, 1)
    small_inverse(const double* matrices, double* inverses, bool* good, int size) {
  __shared__ Step steps[2];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * size * size;
  double a[kRows][kColumns];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const int row = i * kDown + threadIdx.y, column = k * kAcross + threadIdx.x;
      a[i][k] = row < size && column <= row ? matrices[begin + static_cast<int64_t>(row) * size + column] : 0;
    }
  }
  bool fine = true;
  sixteen_steps<0, kFactored>(a, steps, size, fine);
  sixteen_steps<1, kFactored>(a, steps, size, fine);
  sixteen_steps<2, kFactored>(a, steps, size, fine);
  sixteen_steps<3, kFactored>(a, steps, size, fine);
  sixteen_steps<4, kFactored>(a, steps, size, fine);
  sixteen_steps<5, kFactored>(a, steps, size, fine);
  sixteen_steps<6, kFactored>(a, steps, size, fine);
  sixteen_steps<7, kFactored>(a, steps, size, fine);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const int row = i * kDown + threadIdx.y, column = k * kAcross + threadIdx.x;
      if (row < size && column < size) {
        inverses[begin + static_cast<int64_t>(row) * size + column] = column <= row ? a[i][k] : 0;
      }
    }
  }
  if (threadIdx.x == 0 && threadIdx.y == 0) good[blockIdx.x] = fine;
}

}  // namespace

cudaError_t launch_small_inverse(const double* matrices, double* inverses, bool* good, int count, int size,
                                 bool factored, cudaStream_t stream) {
  const dim3 threads(kAcross, kDown);
  if (factored) {
    small_inverse<true><<<count, threads, 0, stream>>>(matrices, inverses, good, size);
  } else {
    small_inverse<false><<<count, threads, 0, stream>>>(matrices, inverses, good, size);
  }
  return cudaGetLastError();
}

}  // namespace coachhook
