// The panel steps on the CPU: the panel's triangle on the calling thread, everything below it in tasks of a
// few rows that the threads take as they come free. A row's result does not depend on who computed it, so
// neither do the bits.
#include <ATen/Parallel.h>

#include <atomic>
#include <vector>

#include "factor_sweep.h"
#include "micro_gemm.h"

namespace coachhook {
namespace {

// Under this much work a parallel region costs more than it saves.
constexpr double kParallelFlops = 1e6;

template <typename Task>
void run_tasks(int64_t count, double flops, const Task& task) {
  const int64_t workers = std::min<int64_t>(at::get_num_threads(), count);
  if (workers < 2 || flops < kParallelFlops || at::in_parallel_region()) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t i = next++; i < count; i = next++) task(i);
    }
  });
}

template <typename T>
class CpuSweep final : public FactorSweep {
 public:
  explicit CpuSweep(const SweepBuffers& b)
      : buffers_(b),
        L_(b.factor.data_ptr<T>()),
        K_(b.keys.defined() ? b.keys.data_ptr<T>() : nullptr),
        X_(b.rhs.defined() ? b.rhs.data_ptr<T>() : nullptr),
        D_(kPanel * kPanel) {}

  bool rotate(Mode mode, int64_t index) override {
    const Panel p(buffers_.d, index);
    const int64_t ld = buffers_.ld;
    PanelReflectors<T> reflectors(p.padded, buffers_.n, ld);
    unpack_triangle(L_ + p.triangle, D_.data(), p.width, p.padded);
    if (!transform_panel(mode, D_.data(), p.padded, K_ + p.first * ld, reflectors)) return false;
    pack_triangle(D_.data(), L_ + p.triangle, p.width, p.padded);

    const int64_t step = rows_per_task<T>(ld);
    const int64_t tasks = (p.below + step - 1) / step;
    const bool collect = X_ != nullptr && mode != Mode::kUndo;
    const int64_t more = collect ? (buffers_.n + step - 1) / step : 0;
    const double flops = 4.0 * (p.below + (collect ? buffers_.n : 0)) * p.width * buffers_.n;
    run_tasks(tasks + more, flops, [&](int64_t task) {
      if (task < tasks) {
        const int64_t row = task * step;
        reflectors.apply_all(mode, L_ + p.rect + row * p.width, p.width, 1,
                             K_ + (p.first + p.width + row) * ld, std::min(step, p.below - row));
      } else {
        const int64_t row = (task - tasks) * step;  // a row of the identity is a column of rhs
        reflectors.apply_all(mode, X_ + p.first * ld + row, 1, ld, K_ + (buffers_.padded + row) * ld,
                             std::min(step, buffers_.n - row));
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
    const int64_t step = rows_per_task<T>(ld);
    run_tasks((p.below + step - 1) / step, 2.0 * p.below * p.width * ld, [&](int64_t task) {
      const int64_t row = task * step;
      micro_gemm<T>().sub(X_ + (p.first + p.width + row) * ld, ld, std::min(step, p.below - row), ld,
                          L_ + p.rect + row * p.width, p.width, 1, p.width, x, ld);
    });
  }

  void backward(int64_t index) override {
    const Panel p(buffers_.d, index);
    const int64_t ld = buffers_.ld;
    T* x = X_ + p.first * ld;
    unpack_triangle(L_ + p.triangle, D_.data(), p.width, p.padded);
    solve_lower_transposed(D_.data(), p.padded, x, ld);
    // this panel's rows in each panel to the left: every task has its own rows of rhs, so there is nothing to
    // reduce
    run_tasks(index, 2.0 * p.first * p.width * ld, [&](int64_t task) {
      const Panel left(buffers_.d, task);
      const T* rows = L_ + left.rect + (p.first - left.first - left.width) * left.width;
      micro_gemm<T>().sub(X_ + left.first * ld, ld, left.width, ld, rows, 1, left.width, p.width, x, ld);
    });
  }

 private:
  SweepBuffers buffers_;
  T* L_;
  T* K_;
  T* X_;
  std::vector<T> D_;
};

}  // namespace

std::unique_ptr<FactorSweep> make_cpu_sweep(const SweepBuffers& buffers) {
  if (buffers.factor.scalar_type() == at::kDouble) return std::make_unique<CpuSweep<double>>(buffers);
  return std::make_unique<CpuSweep<float>>(buffers);
}

}  // namespace coachhook
