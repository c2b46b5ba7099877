// e^x for x <= 0 in plain arithmetic, so that a loop of it becomes vectors.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "common/simd.h"

namespace coachhook {

// By e^(n ln 2) e^r; within 2 ulp, 0 below -87, NaN stays.
ALWAYS_INLINE float exp_of(float x) {
  constexpr float kLowest = -87.0f, kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float at = std::max(x, kLowest);
  const float n = (at * 1.44269504f + kRound) - kRound;
  const float r = (at - n * 0.693359375f) + n * 2.12194440e-4f;
  float sum = 1.0f / 5040;
  sum = sum * r + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = (sum * r + 0.5f) * r * r + r + 1.0f;
  const auto exponent = std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
  return x < kLowest ? 0.0f : x == x ? sum * exponent : x;
}

ALWAYS_INLINE double exp_of(double x) { return std::exp(x); }

}  // namespace coachhook
