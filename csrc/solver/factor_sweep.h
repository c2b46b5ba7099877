// What a device does with one panel of a packed factor. cholesky.cpp strings panels together.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>

#include "solver/block_reflector.h"
#include "solver/packed_factor.h"

namespace coachhook {

// The work space of one factor. Rows of `keys`: the running K, then (from `padded`) the n rows that follow
// the rotations of an identity, so that `rhs` collects L'^-1 K. Columns past n and rows past d are zero.
struct SweepBuffers {
  at::Tensor factor;  // [d (d + 1) / 2], changed in place
  at::Tensor keys;    // [padded (+ n), ld]
  at::Tensor rhs;     // [padded, ld], or undefined
  int64_t d, n, padded, ld;
};

class FactorSweep {
 public:
  virtual ~FactorSweep() = default;
  // Runs `body`, which calls the steps below, with whatever helpers the device offers. Exceptions pass
  // through.
  virtual void run(const std::function<void()>& body) { body(); }
  // A rotation goes through the factor in this many steps, of a panel or several.
  virtual int64_t steps() const = 0;
  // Rotates the panels of a step and the rows below them; false, with the factor untouched, when that is not
  // possible: to remove the keys, or to add keys so strong that the factor should be made anew.
  virtual bool rotate(Mode mode, int64_t step) = 0;
  // rhs <- L^-1 rhs, panels in rising order; rhs <- L^-T rhs, in falling order.
  virtual void forward(int64_t index) = 0;
  virtual void backward(int64_t index) = 0;
};

std::unique_ptr<FactorSweep> make_cpu_sweep(const SweepBuffers& buffers);
std::unique_ptr<FactorSweep> make_portable_sweep(const SweepBuffers& buffers);

}  // namespace coachhook
