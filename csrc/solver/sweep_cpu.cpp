// The sweep over the panels on the CPU: the panel's triangle on the calling thread, everything below it in
// tasks of a few rows that the threads take as they come free. A row's result does not depend on who computed
// it, so neither do the bits.
#include <algorithm>
#include <vector>

#include "common/micro_gemm.h"
#include "solver/crew.h"
#include "solver/factor_sweep.h"
#include "solver/narrow_rows.h"

namespace coachhook {
namespace {

constexpr int64_t kTaskRows = 4 * kRowGroup;
// Under this much work (some milliseconds) two threads gain less than a busy machine takes from them.
constexpr double kParallelWork = 1.5e8;

template <typename T>
class CpuSweep final : public FactorSweep {
 public:
  explicit CpuSweep(const SweepBuffers& b)
      : buffers_(b),
        L_(b.factor.data_ptr<T>()),
        K_(b.keys.defined() ? b.keys.data_ptr<T>() : nullptr),
        X_(b.rhs.defined() ? b.rhs.data_ptr<T>() : nullptr),
        D_(kPanel * kPanel) {}

  void run(const std::function<void()>& body) override {
    const auto d = static_cast<double>(buffers_.d), n = static_cast<double>(buffers_.n);
    d * d * (2 * n + 24) < kParallelWork ? body() : crew_.run(body);  // flops, and bytes by what they cost
  }

  int64_t steps() const override { return Panel::count(buffers_.d); }

  bool rotate(Mode mode, int64_t index) override {
    // the way back after an interrupt is rare, and leads from the same w's whoever left them
    if (narrow() && mode != Mode::kUndo) return rotate_narrow(mode, index);
    const Panel p(buffers_.d, index);
    const int64_t ld = buffers_.ld;
    PanelReflectors<T> reflectors(p.padded, buffers_.n, ld);
    unpack_triangle(L_ + p.triangle, D_.data(), p.width, p.padded);
    if (!transform_panel(mode, D_.data(), p.padded, K_ + p.first * ld, reflectors)) return false;
    pack_triangle(D_.data(), L_ + p.triangle, p.width, p.padded);

    const int64_t tasks = (p.below + kTaskRows - 1) / kTaskRows;
    const bool collect = X_ != nullptr && mode != Mode::kUndo;
    const int64_t more = collect ? (buffers_.n + kTaskRows - 1) / kTaskRows : 0;
    crew_.share(tasks + more, [&](int64_t task) {
      if (task < tasks) {
        const int64_t row = task * kTaskRows;
        reflectors.apply_all(mode, L_ + p.rect + row * p.width, p.width, K_ + (p.first + p.width + row) * ld,
                             std::min(kTaskRows, p.below - row));
      } else {
        const int64_t row = (task - tasks) * kTaskRows;  // a row of the identity is a column of rhs
        reflectors.apply_columns(X_ + p.first * ld + row, ld, K_ + (buffers_.padded + row) * ld,
                                 std::min(kTaskRows, buffers_.n - row));
      }
    });
    return true;
  }

  void forward(int64_t index) override {
    const Panel p(buffers_.d, index);
    const int64_t ld = buffers_.ld;
    T* x = X_ + p.first * ld;
    unpack_triangle(L_ + p.triangle, D_.data(), p.width, p.padded);
    solve_lower(D_.data(), p.padded, x, ld);
    crew_.share((p.below + kTaskRows - 1) / kTaskRows, [&](int64_t task) {
      const int64_t row = task * kTaskRows;
      const int64_t end = std::min(row + kTaskRows, p.below);
      for (int64_t r = row; r < end; r += kRowGroup) {
        const T* a = L_ + p.rect + r * p.width;
        micro_gemm<T>().sub(X_ + (p.first + p.width + r) * ld, ld, std::min(kRowGroup, end - r), ld, a,
                            p.width, 1, p.width, x, ld, a + kRowGroup * p.width,
                            r + kRowGroup < end ? kRowGroup * p.width : 0);
      }
    });
  }

  void backward(int64_t index) override {
    const Panel p(buffers_.d, index);
    const int64_t ld = buffers_.ld;
    T* x = X_ + p.first * ld;
    if (narrow()) {
      solve_packed_transposed(L_ + p.triangle, p.width, x, ld, buffers_.n);
    } else {
      unpack_triangle(L_ + p.triangle, D_.data(), p.width, p.padded);
      solve_lower_transposed(D_.data(), p.padded, x, ld);
    }
    // this panel's rows in each panel to the left: every task has its own rows of rhs, so there is nothing to
    // reduce
    crew_.share(index, [&](int64_t task) {
      const Panel left(buffers_.d, task);
      const T* rows = L_ + left.rect + (p.first - left.first - left.width) * left.width;
      if (narrow()) return subtract_rows(rows, p.width, x, X_ + left.first * ld, ld, buffers_.n);
      for (int64_t r = 0; r < p.width; r += kRowGroup) {
        const T* a = rows + r * left.width;
        micro_gemm<T>().sub(X_ + left.first * ld, ld, left.width, ld, a, 1, left.width,
                            std::min(kRowGroup, p.width - r), x + r * ld, ld, a + kRowGroup * left.width,
                            r + kRowGroup < p.width ? kRowGroup * left.width : 0);
      }
    });
  }

 private:
  bool narrow() const { return buffers_.n <= kNarrowKeys; }

  bool rotate_narrow(Mode mode, int64_t index) {
    const Panel p(buffers_.d, index);
    const int64_t ld = buffers_.ld;
    T* triangle = L_ + p.triangle;
    std::copy_n(triangle, packed_size(p.width), D_.data());
    NarrowReflectors<T> reflectors(p.width, buffers_.n);
    if (!reflectors.transform_triangle(mode, triangle, p.width, K_ + p.first * ld, ld)) {
      std::copy_n(D_.data(), packed_size(p.width), triangle);
      return false;
    }
    for (int64_t row = 0; X_ != nullptr && row < buffers_.n; ++row) {  // a row of the identity
      reflectors.apply_row(X_ + p.first * ld + row, ld, 0, p.width, K_ + (buffers_.padded + row) * ld);
    }
    // Long runs: what a thread asks the memory for ahead is then mostly its own.
    const int64_t rows = std::max<int64_t>(kTaskRows, p.below / 4 / kTaskRows * kTaskRows);
    crew_.share((p.below + rows - 1) / rows, [&](int64_t task) {
      const int64_t row = task * rows;
      reflectors.apply_rows(L_ + p.rect + row * kPanel, K_ + (p.first + p.width + row) * ld, ld,
                            std::min(rows, p.below - row));
    });
    return true;
  }

  SweepBuffers buffers_;
  T* L_;
  T* K_;
  T* X_;
  std::vector<T> D_;
  Crew crew_;
};

}  // namespace

std::unique_ptr<FactorSweep> make_cpu_sweep(const SweepBuffers& buffers) {
  if (buffers.factor.scalar_type() == at::kDouble) return std::make_unique<CpuSweep<double>>(buffers);
  return std::make_unique<CpuSweep<float>>(buffers);
}

}  // namespace coachhook
