#include "solver/cholesky.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include <cmath>
#include <limits>
#include <vector>

#include "common/micro_gemm.h"
#include "solver/factor_sweep.h"
#include "solver/factorise.h"

namespace coachhook {
namespace {

// Above this n / d, refactorising is cheaper than rotating. Measured, docs/experiments/solver-choices.md.
constexpr double kRefactorRatio = 0.8;

InterruptCheck interrupt_check = nullptr;
bool always_portable = false;

std::exception_ptr interrupted() { return interrupt_check != nullptr ? interrupt_check() : nullptr; }

// ---- arguments
// -----------------------------------------------------------------------------------------------------------

int64_t dimension(const at::Tensor& packed, const char* name) {
  TORCH_CHECK_TYPE(packed.scalar_type() == at::kDouble || packed.scalar_type() == at::kFloat, name,
                   " must be float64 or float32, got ", packed.scalar_type());
  TORCH_CHECK_VALUE(packed.dim() >= 1, name, " must be [*, d (d + 1) / 2], got ", packed.sizes());
  const int64_t size = packed.size(-1);
  const auto d = static_cast<int64_t>((std::sqrt(8.0 * static_cast<double>(size) + 1) - 1) / 2 + 0.5);
  TORCH_CHECK_VALUE(d >= 1 && packed_size(d) == size, name,
                    " must hold d (d + 1) / 2 elements for some d, got ", packed.sizes());
  TORCH_CHECK_VALUE(packed.is_contiguous(), name, " must be contiguous, got strides ", packed.strides());
  return d;
}

void check_finite(const at::Tensor& x, const char* name) {
  // one pass; its overflow is refused too, since the squares go into the factor
  const double norm = at::linalg_vector_norm(x).item<double>();
  TORCH_CHECK_VALUE(std::isfinite(norm), name, " must be finite, got a norm of ", norm);
}

struct Arguments {
  int64_t d, n, batch;
  at::Tensor L;  // [batch, d (d + 1) / 2], a view
  at::Tensor K;  // [batch, d, n]
};

Arguments check(const at::Tensor& L, const at::Tensor& K) {
  const int64_t d = dimension(L, "L");
  TORCH_CHECK_TYPE(K.scalar_type() == L.scalar_type(), "K must have L's type ", L.scalar_type(), ", got ",
                   K.scalar_type());
  TORCH_CHECK_VALUE(K.device() == L.device(), "K must be on L's device ", L.device(), ", got ", K.device());
  TORCH_CHECK_VALUE(K.dim() == L.dim() + 1 && K.size(-2) == d &&
                        K.sizes().slice(0, L.dim() - 1) == L.sizes().slice(0, L.dim() - 1),
                    "K must be [*, d, n] for L [*, d (d + 1) / 2] of ", L.sizes(), " (d = ", d, "), got ",
                    K.sizes());
  const int64_t n = K.size(-1);
  const int64_t batch = L.numel() / L.size(-1);
  Arguments a{d, n, batch, L.detach().view({batch, L.size(-1)}), K.detach().reshape({batch, d, n})};
  if (batch == 0) return a;
  const at::Tensor places = at::empty({d}, at::kLong);
  for (int64_t row = 0; row < d; ++row) {
    const int64_t r = row % kPanel;
    places.data_ptr<int64_t>()[row] = Panel(d, row / kPanel).triangle + r * (r + 3) / 2;
  }
  const at::Tensor diagonal = a.L.index_select(1, places.to(L.device()));
  const at::Tensor good = diagonal.gt(0).logical_and(diagonal.isfinite());
  if (!good.all().item<bool>()) {
    const int64_t at_index = good.view(-1).logical_not().nonzero().view(-1)[0].item<int64_t>();
    TORCH_CHECK_VALUE(false, "L must have a positive diagonal, got ",
                      diagonal.view(-1)[at_index].item<double>(), " in row ", at_index % d, " of factor ",
                      at_index / d);
  }
  if (n > 0) check_finite(a.K, "K");
  return a;
}

// ---- sweeps
// --------------------------------------------------------------------------------------------------------------

SweepBuffers make_buffers(const Arguments& a, int64_t item, bool keys, bool rhs) {
  const bool is_double = a.L.scalar_type() == at::kDouble;
  SweepBuffers b;
  b.factor = a.L.select(0, item);
  b.d = a.d;
  b.n = a.n;
  b.padded = round_up(a.d, kBlock);
  b.ld = round_up(a.n, is_double ? micro_gemm<double>().lanes : micro_gemm<float>().lanes);
  const at::Tensor K = a.K.select(0, item);
  if (keys) {
    b.keys = at::zeros({b.padded + (rhs ? a.n : 0), b.ld}, a.K.options());
    b.keys.narrow(0, 0, a.d).narrow(1, 0, a.n).copy_(K);
    if (rhs) b.keys.narrow(0, b.padded, a.n).narrow(1, 0, a.n).fill_diagonal_(1);
  }
  if (rhs) {
    b.rhs = at::zeros({b.padded, b.ld}, a.K.options());
    if (!keys) b.rhs.narrow(0, 0, a.d).narrow(1, 0, a.n).copy_(K);
  }
  return b;
}

std::unique_ptr<FactorSweep> make_sweep(const SweepBuffers& b) {
  return b.factor.is_cpu() && !always_portable ? make_cpu_sweep(b) : make_portable_sweep(b);
}

at::Tensor columns(const SweepBuffers& b, const at::Tensor& padded) {
  return padded.narrow(0, 0, b.d).narrow(1, 0, b.n);
}

void forward(FactorSweep& sweep, int64_t panels) {
  sweep.run([&] {
    for (int64_t i = 0; i < panels; ++i) {
      stop_if_interrupted();
      sweep.forward(i);
    }
  });
}

void backward(FactorSweep& sweep, int64_t panels) {
  sweep.run([&] {
    for (int64_t i = panels - 1; i >= 0; --i) {
      stop_if_interrupted();
      sweep.backward(i);
    }
  });
}

// Adds keys in the first `steps` steps without looking at interrupts: the way back from a downdate.
void restore_downdated(const Arguments& a, int64_t item, int64_t steps) {
  const SweepBuffers b = make_buffers(a, item, /*keys=*/true, /*rhs=*/false);
  const auto sweep = make_sweep(b);
  sweep->run([&] {
    for (int64_t i = 0; i < steps; ++i) {
      TORCH_CHECK(
          sweep->rotate(Mode::kUpdate, i), "factor ", item,
          " is lost: an interrupted removal of keys could not be taken back; make it anew from its keys");
    }
  });
}

// s = diag(K^T C^-1 K) from the rows of the identity: with P what they became, P P^T = S^-1, S = I + Y^T Y,
// and rhs = Z with Z^T Z = I - S^-1, so that Y^T Y = S Z^T Z. No difference of nearly equal numbers at either
// end of the scale.
at::Tensor leverage_of(const SweepBuffers& b) {
  const at::Tensor P = b.keys.narrow(0, b.padded, b.n).narrow(1, 0, b.n);
  const at::Tensor Z = columns(b, b.rhs);
  const at::Tensor inverse = at::linalg_inv(P);
  return at::mm(inverse.t(), inverse).mul_(at::mm(Z.t(), Z)).sum(1);
}

struct Solution {
  at::Tensor X, s;
};

Solution empty_solution(const at::Tensor& K) {
  return {at::empty(K.sizes(), K.options()), at::empty(K.select(-2, 0).sizes(), K.options())};
}

struct NotPossible {};

// One sweep over each factor, and with `solution` the back substitutions; false when they have to be made
// anew. L is left as it came then, and if anything throws.
bool update_all(const Arguments& a, Solution* solution) {
  std::vector<SweepBuffers> buffers;
  std::vector<std::unique_ptr<FactorSweep>> sweeps;
  for (int64_t item = 0; item < a.batch; ++item) {  // all memory before the first write
    buffers.push_back(make_buffers(a, item, /*keys=*/true, /*rhs=*/solution != nullptr));
    sweeps.push_back(make_sweep(buffers.back()));
  }
  const int64_t steps = sweeps[0]->steps();
  int64_t item = 0, done = 0;  // steps of `item`
  auto restore = [&] {
    for (; item >= 0; --item, done = steps) {
      if (item == a.batch) continue;
      sweeps[item]->run([&] {
        while (--done >= 0) sweeps[item]->rotate(Mode::kUndo, done);
      });
    }
  };
  try {
    for (; item < a.batch; ++item, done = 0) {
      sweeps[item]->run([&] {
        for (; done < steps; ++done) {
          stop_if_interrupted();
          if (!sweeps[item]->rotate(Mode::kUpdate, done)) throw NotPossible{};
        }
      });
    }
    for (int64_t i = 0; solution != nullptr && i < a.batch; ++i) {
      const SweepBuffers& b = buffers[i];
      solution->s.view({a.batch, a.n}).select(0, i).copy_(leverage_of(b));
      backward(*sweeps[i], Panel::count(a.d));
      solution->X.view({a.batch, a.d, a.n}).select(0, i).copy_(columns(b, b.rhs));
    }
    stop_if_interrupted();
  } catch (const NotPossible&) {
    restore();
    return false;
  } catch (...) {
    restore();
    throw;
  }
  return true;
}

// ---- refactorisation
// -----------------------------------------------------------------------------------------------------

// The factors of C + K K^T, in memory of their own: less than K's at this n.
at::Tensor refactored(const Arguments& a) {
  at::Tensor result = a.L.clone();
  for (int64_t item = 0; item < a.batch; ++item) {
    multiply_in_place(result.select(0, item), a.K.select(0, item), a.d);
    const int64_t bad = factor_in_place(result.select(0, item), a.d);
    TORCH_CHECK_VALUE(bad == 0, "C + K K^T of factor ", item, " is not positive definite in ",
                      a.L.scalar_type(), ": its leading minor of order ", bad, " is not");
  }
  return result;
}

// s from C's factors, and X from those of C + K K^T: of so many keys I + K^T C^-1 K, which has more rows, has
// a part that is nearly I beside the keys' leverages, and loses digits.
void solve_all(const Arguments& a, const at::Tensor& after, Solution& solution) {
  const int64_t panels = Panel::count(a.d);
  Arguments last = a;
  last.L = after;
  for (int64_t item = 0; item < a.batch; ++item) {
    const SweepBuffers before = make_buffers(a, item, /*keys=*/false, /*rhs=*/true);
    forward(*make_sweep(before), panels);
    solution.s.view({a.batch, a.n}).select(0, item).copy_(columns(before, before.rhs).square().sum(0));
    const SweepBuffers b = make_buffers(last, item, /*keys=*/false, /*rhs=*/true);
    const auto sweep = make_sweep(b);
    forward(*sweep, panels);
    backward(*sweep, panels);
    solution.X.view({a.batch, a.d, a.n}).select(0, item).copy_(columns(b, b.rhs));
  }
}

bool refactor_is_cheaper(const Arguments& a) {
  return static_cast<double>(a.n) > kRefactorRatio * static_cast<double>(a.d);
}

}  // namespace

void stop_if_interrupted() {
  if (auto error = interrupted()) std::rethrow_exception(error);
}

void set_interrupt_check(InterruptCheck check) { interrupt_check = check; }

void set_portable(bool portable) { always_portable = portable; }

at::Tensor chol_factor(const at::Tensor& C) {
  c10::OptionalDeviceGuard guard(at::device_of(C));
  const int64_t d = dimension(C, "C");
  at::Tensor result = C.detach().clone();
  if (C.numel() == 0) return result;
  check_finite(C, "C");
  const at::Tensor flat = result.view({-1, C.size(-1)});
  for (int64_t item = 0; item < flat.size(0); ++item) {
    const int64_t bad = factor_in_place(flat.select(0, item), d);
    TORCH_CHECK_VALUE(bad == 0, "C must be positive definite, but the leading minor of order ", bad,
                      " of matrix ", item, " is not");
  }
  return result;
}

std::tuple<at::Tensor, at::Tensor> chol_solve(const at::Tensor& L, const at::Tensor& K) {
  c10::OptionalDeviceGuard guard(at::device_of(L));
  const Arguments a = check(L, K);
  Solution solution = empty_solution(K);
  const auto& [X, s] = solution;
  if (K.numel() == 0) return {X, s};
  if (refactor_is_cheaper(a)) {
    solve_all(a, refactored(a), solution);
    return {X, s};
  }
  const at::Tensor X_flat = X.view({a.batch, a.d, a.n}), s_flat = s.view({a.batch, a.n});
  for (int64_t item = 0; item < a.batch; ++item) {
    const SweepBuffers b = make_buffers(a, item, /*keys=*/false, /*rhs=*/true);
    const auto sweep = make_sweep(b);
    forward(*sweep, Panel::count(a.d));
    const at::Tensor Y = columns(b, b.rhs);
    const at::Tensor gram = at::mm(Y.t(), Y);
    s_flat.select(0, item).copy_(at::diagonal(gram));
    const auto [S, info] = at::linalg_cholesky_ex(at::eye(a.n, gram.options()).add_(gram));
    TORCH_CHECK_VALUE(info.item<int64_t>() == 0, "I + K^T C^-1 K of factor ", item,
                      " is not positive definite in ", a.L.scalar_type(),
                      ": its keys are too strong, or too much alike, for its digits");
    Y.copy_(at::cholesky_solve(Y.t(), S).t());
    backward(*sweep, Panel::count(a.d));
    X_flat.select(0, item).copy_(Y);
  }
  return {X, s};
}

void chol_update(at::Tensor& L, const at::Tensor& K) {
  c10::OptionalDeviceGuard guard(at::device_of(L));
  const Arguments a = check(L, K);
  if (K.numel() == 0) return;
  if (refactor_is_cheaper(a) || !update_all(a, nullptr)) a.L.copy_(refactored(a));
}

std::tuple<at::Tensor, at::Tensor> chol_solve_update(at::Tensor& L, const at::Tensor& K) {
  c10::OptionalDeviceGuard guard(at::device_of(L));
  const Arguments a = check(L, K);
  Solution solution = empty_solution(K);
  if (K.numel() == 0) return {solution.X, solution.s};
  if (refactor_is_cheaper(a)) {
    const at::Tensor after = refactored(a);
    solve_all(a, after, solution);
    a.L.copy_(after);
  } else if (!update_all(a, &solution)) {
    std::tie(solution.X, solution.s) = chol_solve(L, K);
    a.L.copy_(refactored(a));
  }
  return {solution.X, solution.s};
}

void chol_downdate(at::Tensor& L, const at::Tensor& K) {
  c10::OptionalDeviceGuard guard(at::device_of(L));
  const Arguments a = check(L, K);
  if (K.numel() == 0) return;
  const int64_t panels = Panel::count(a.d);
  const double epsilon = a.L.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                                          : std::numeric_limits<float>::epsilon();
  const char* refusal =
      "C - K K^T must stay positive definite, but removing these keys leaves a smallest pivot of ";
  for (int64_t item = 0; item < a.batch; ++item) {  // I - Y^T Y decides, before anything is written
    const SweepBuffers b = make_buffers(a, item, /*keys=*/false, /*rhs=*/true);
    const auto sweep = make_sweep(b);
    forward(*sweep, panels);
    const at::Tensor Y = columns(b, b.rhs);
    auto [factor, info] = at::linalg_cholesky_ex(at::eye(a.n, Y.options()).addmm_(Y.t(), Y, 1, -1));
    const double pivot = info.item<int64_t>() == 0 ? at::diagonal(factor).square().min().item<double>() : 0;
    TORCH_CHECK_VALUE(pivot > 8 * static_cast<double>(a.n) * epsilon, refusal, pivot, " (of 1) in factor ",
                      item);
  }
  std::vector<std::unique_ptr<FactorSweep>> sweeps;
  for (int64_t item = 0; item < a.batch; ++item)
    sweeps.push_back(make_sweep(make_buffers(a, item, /*keys=*/true, /*rhs=*/false)));
  const int64_t steps = sweeps[0]->steps();
  int64_t item = 0, done = 0;
  try {
    for (; item < a.batch; ++item, done = 0) {
      sweeps[item]->run([&] {
        for (; done < steps; ++done) {
          stop_if_interrupted();
          const bool possible = sweeps[item]->rotate(Mode::kDowndate, done);
          TORCH_CHECK_VALUE(possible, refusal, "0 (of 1) in factor ", item);
        }
      });
    }
    stop_if_interrupted();
  } catch (...) {
    for (; item >= 0; --item, done = steps) {
      if (item < a.batch) restore_downdated(a, item, done);
    }
    throw;
  }
}

}  // namespace coachhook
