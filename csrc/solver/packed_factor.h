// How a lower triangular d x d factor lies in d (d + 1) / 2 elements, in panels of kPanel columns. A panel is
// its own triangle, packed row by row, then the rows below it as an ordinary row-major [rows, width] block:
// the blocks that carry the work are plain strided matrices and a run of rows is one run of memory.
// coachhook_fast/ops/reference/cholesky.py defines the same layout in Python.
#pragma once

#include <algorithm>
#include <cstdint>

namespace coachhook {

constexpr int64_t kPanel = 128;  // columns of a panel: part of the format
constexpr int64_t kBlock = 16;   // columns whose rotations are applied as one block reflector

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

inline int64_t packed_size(int64_t d) { return d * (d + 1) / 2; }

// One panel of a packed factor of size d.
struct Panel {
  int64_t first;     // its first column
  int64_t width;     // kPanel, less in the last one
  int64_t padded;    // width rounded up to kBlock
  int64_t below;     // rows below its triangle
  int64_t triangle;  // offset of the packed triangle
  int64_t rect;      // offset of the [below, width] block

  Panel(int64_t d, int64_t index)
      : first(index * kPanel),
        width(std::min(kPanel, d - first)),
        padded(round_up(width, kBlock)),
        below(d - first - width),
        triangle(packed_size(d) - packed_size(d - first)),
        rect(triangle + packed_size(width)) {}

  static int64_t count(int64_t d) { return (d + kPanel - 1) / kPanel; }
};

}  // namespace coachhook
