// The sweep of any other device, over ATen's products. A step is a group of panels: their transformations are
// computed together (panel_rotations.h), looked at once by the host, and then applied to the rows below,
// panel after panel. That one look a group is the only time that the host waits.
#include <ATen/ATen.h>

#include <algorithm>

#include "solver/factor_sweep.h"
#include "solver/panel_rotations.h"
#include "solver/small_matrices.h"

namespace coachhook {
namespace {

constexpr int64_t kMostPanels = 24;
constexpr int64_t kRoom = 1 << 20;
constexpr int64_t kPart = 512;  // rows

// Panels of a group: as many as leave the sweep's memory under d^2 / 8 numbers, or their own under kRoom.
int64_t group_size(int64_t d, int64_t n) {
  const int64_t room = std::max(d * d / 8 - d * (kPanel + 4 * n), kRoom);
  const int64_t size = kPanel + n;
  int64_t panels = 1;
  while (panels < kMostPanels &&
         4 * size * size * (panels + 1) + 3 * kPanel * n * (panels + 1) * (panels + 1) / 2 <= room) {
    ++panels;
  }
  return panels;
}

class PortableSweep final : public FactorSweep {
 public:
  explicit PortableSweep(const SweepBuffers& buffers)
      : b_(buffers), panels_(Panel::count(b_.d)), group_(group_size(b_.d, b_.n)) {
    const at::TensorOptions index = b_.factor.options().dtype(at::kLong);
    const at::Tensor places = at::tril_indices(kPanel, kPanel, 0, index);
    places_ = places[0] * kPanel + places[1];
    count_ = at::arange(packed_size(kPanel), index);
    const at::Tensor columns = at::arange(0, b_.d, kPanel, index);
    begins_ = columns.mul(2 * b_.d + 1 - columns).floor_divide_(2).unsqueeze_(1);
    if (b_.keys.defined()) rows_ = at::empty({b_.d, kPanel + b_.n}, b_.factor.options());
  }

  int64_t steps() const override { return (panels_ + group_ - 1) / group_; }

  bool rotate(Mode mode, int64_t step) override {
    inverted_ = -1;
    const int64_t first = step * group_, count = std::min(group_, panels_ - first);
    const at::Tensor D = triangles(first, count), W = keys_of(first, count);
    if (mode == Mode::kUndo) {
      undo(first, D, rotations(W.to(at::kDouble), /*removes=*/false).Q.to(D.scalar_type()));
      return true;
    }
    const bool removes = mode == Mode::kDowndate;
    const Chain found = chain(substituted(first, D, W).to(at::kDouble), removes);
    const Rotations made = rotations(found.X, removes);
    if (!found.good.logical_and(made.good).item<bool>()) return false;
    if (b_.rhs.defined()) collect(first, made.Q, found.P);
    apply(removes, first, D, made.Q.to(D.scalar_type()), made.left.to(D.scalar_type()), found.X);
    return true;
  }

  void forward(int64_t index) override {
    const Panel p(b_.d, index);
    const at::Tensor x = right_side(p.first, p.width);
    x.copy_(at::mm(inverse(index, p.width), x));
    if (p.below > 0) right_side(p.first + p.width, p.below).addmm_(rect(p, p.below), x, 1, /*alpha=*/-1);
  }

  void backward(int64_t index) override {
    const Panel p(b_.d, index);
    const at::Tensor x = right_side(p.first, p.width);
    // The long sum in parts, since a product of so few columns would leave most of a GPU without work.
    const int64_t parts = p.below / kPart, rest = p.below - parts * kPart;
    if (rest > 0) x.addmm_(rect(p, rest).t(), right_side(p.first + p.width, rest), 1, /*alpha=*/-1);
    at::Tensor y;
    if (parts > 0) {
      const at::Tensor rows = rect(p, p.below).narrow(0, rest, parts * kPart).view({parts, kPart, p.width});
      const at::Tensor below = right_side(p.first + p.width + rest, parts * kPart);
      y = x.sub(at::bmm(rows.transpose(1, 2), below.unflatten(0, {parts, kPart})).sum(0));
    } else {
      y = x.clone();
    }
    at::Tensor result = x;
    at::mm_out(result, inverse(index, p.width).t(), y);
  }

 private:
  at::Tensor rect(const Panel& p, int64_t rows) const {  // the first rows below a triangle
    return b_.factor.narrow(0, p.rect, rows * p.width).view({rows, p.width});
  }

  at::Tensor right_side(int64_t row, int64_t rows) const {
    return b_.rhs.narrow(0, row, rows).narrow(1, 0, b_.n);
  }

  at::Tensor keys(int64_t row, int64_t rows) const { return b_.keys.narrow(0, row, rows).narrow(1, 0, b_.n); }

  at::Tensor identity_rows() const { return keys(b_.padded, b_.n); }

  // Columns that some panels have: fewer than kPanel each only where the factor ends.
  int64_t columns(int64_t first, int64_t count) const {
    return std::min(b_.d, (first + count) * kPanel) - first * kPanel;
  }

  // [count, kPanel, n], a copy; zero past the factor's end.
  at::Tensor keys_of(int64_t first, int64_t count) const {
    const at::Tensor padded = at::zeros({count * kPanel, b_.n}, b_.keys.options());
    const int64_t rows = columns(first, count);
    padded.narrow(0, 0, rows).copy_(keys(first * kPanel, rows));
    return padded.view({count, kPanel, b_.n});
  }

  void set_keys(int64_t first, const at::Tensor& blocks) const {
    const int64_t rows = columns(first, blocks.size(0));
    keys(first * kPanel, rows).copy_(blocks.reshape({-1, b_.n}).narrow(0, 0, rows));
  }

  // [count, kPanel, kPanel]; the last panel's, where it is smaller, is continued by an identity.
  at::Tensor triangles(int64_t first, int64_t count) const {
    const at::Tensor places = begins_.narrow(0, first, count) + count_;
    const at::Tensor identity = at::eye(kPanel, b_.factor.options()).view(-1).index_select(0, places_);
    const at::Tensor inside = places.lt(b_.factor.size(0));
    const at::Tensor found = b_.factor.take(places.clamp_max(b_.factor.size(0) - 1));
    const at::Tensor D = at::zeros({count, kPanel * kPanel}, b_.factor.options());
    return D.index_copy_(1, places_, at::where(inside, found, identity)).view({count, kPanel, kPanel});
  }

  void set_triangles(int64_t first, const at::Tensor& D) const {
    const at::Tensor packed = D.reshape({-1, kPanel * kPanel}).index_select(1, places_);
    const Panel last(b_.d, first + D.size(0) - 1);
    const int64_t whole = D.size(0) - (last.width < kPanel ? 1 : 0);
    const at::Tensor places = (begins_.narrow(0, first, whole) + count_).view(-1);
    b_.factor.index_copy_(0, places, packed.narrow(0, 0, whole).view(-1));
    if (last.width < kPanel) {
      const int64_t size = packed_size(last.width);
      b_.factor.narrow(0, last.triangle, size).copy_(packed[whole].narrow(0, 0, size));
    }
  }

  // Y = L^-1 W of the group's own part of L; W is used up.
  at::Tensor substituted(int64_t first, const at::Tensor& D, const at::Tensor& W) const {
    const int64_t count = D.size(0), end = first * kPanel + columns(first, count);
    const at::Tensor inverses = invert_lower(D);
    const at::Tensor flat = W.view({count * kPanel, b_.n});
    const at::Tensor Y = at::empty_like(W);
    for (int64_t i = 0; i < count; ++i) {
      const Panel p(b_.d, first + i);
      at::Tensor y = Y[i];
      at::mm_out(y, inverses[i], W[i]);
      const int64_t rows = end - p.first - p.width;
      if (rows > 0) flat.narrow(0, (i + 1) * kPanel, rows).addmm_(rect(p, rows), y, 1, /*alpha=*/-1);
    }
    return Y;
  }

  // What the rows of the identity give to L'^-1 K, and what becomes of them.
  void collect(int64_t first, const at::Tensor& Q, const at::Tensor& P) const {
    const int64_t count = Q.size(0);
    const at::Tensor before = identity_rows().to(at::kDouble);
    const at::Tensor all = at::matmul(before, P);
    const at::Tensor lower = Q.narrow(1, kPanel, b_.n).narrow(2, 0, kPanel);
    const at::Tensor given = at::bmm(lower.transpose(1, 2), all.narrow(0, 0, count).transpose(1, 2));
    const int64_t rows = columns(first, count);
    right_side(first * kPanel, rows).copy_(given.view({-1, b_.n}).narrow(0, 0, rows));
    identity_rows().copy_(all[count]);
  }

  // Writes the factor. What it takes from here on is less than what the group has given back: nothing that a
  // GPU's allocator would have to ask for.
  void apply(bool removes, int64_t first, const at::Tensor& D, const at::Tensor& Q, const at::Tensor& left,
             const at::Tensor& X) const {
    for (int64_t i = 0; i < D.size(0); ++i) {
      const Panel p(b_.d, first + i);
      if (p.below == 0) break;
      const at::Tensor A = rect(p, p.below), K = keys(p.first + p.width, p.below);
      at::Tensor both = rows_.narrow(0, 0, p.below);
      at::Tensor a = both.narrow(1, 0, kPanel), k = both.narrow(1, kPanel, b_.n);
      if (removes) {
        at::mm_out(a, A, left[i].narrow(0, 0, kPanel)).addmm_(K, left[i].narrow(0, kPanel, b_.n));
        const at::Tensor right = Q[i].narrow(1, kPanel, b_.n);
        at::mm_out(k, a, right.narrow(0, 0, kPanel)).addmm_(K, right.narrow(0, kPanel, b_.n));
      } else {
        at::mm_out(both, A, Q[i].narrow(0, 0, kPanel)).addmm_(K, Q[i].narrow(0, kPanel, b_.n));
      }
      A.copy_(a);
      K.copy_(k);
    }
    const at::Tensor W = keys_of(first, D.size(0));  // the keys that reached each triangle
    set_triangles(first, at::baddbmm(at::bmm(D, left.narrow(1, 0, kPanel)), W, left.narrow(1, kPanel, b_.n)));
    set_keys(first, X);  // for the way back, in place of keys that are rotated to nothing
  }

  void undo(int64_t first, const at::Tensor& D, const at::Tensor& Q) const {
    const at::Tensor back = Q.transpose(1, 2);
    const at::Tensor top = at::bmm(D, back.narrow(1, 0, kPanel));  // [D W]
    for (int64_t i = D.size(0) - 1; i >= 0; --i) {
      const Panel p(b_.d, first + i);
      if (p.below > 0) {
        const at::Tensor A = rect(p, p.below), K = keys(p.first + p.width, p.below);
        at::Tensor both = rows_.narrow(0, 0, p.below);
        at::mm_out(both, A, back[i].narrow(0, 0, kPanel)).addmm_(K, back[i].narrow(0, kPanel, b_.n));
        A.copy_(both.narrow(1, 0, kPanel));
        K.copy_(both.narrow(1, kPanel, b_.n));
      }
      set_keys(first + i, top[i].narrow(1, kPanel, b_.n).unsqueeze(0));
    }
    set_triangles(first, top.narrow(2, 0, kPanel));
  }

  at::Tensor inverse(int64_t index, int64_t width) {  // of a triangle; kMostPanels of them are kept
    if (inverted_ != index / kMostPanels) {
      inverted_ = index / kMostPanels;
      const int64_t first = inverted_ * kMostPanels;
      inverses_ = invert_lower(triangles(first, std::min(kMostPanels, panels_ - first)));
    }
    return inverses_[index % kMostPanels].narrow(0, 0, width).narrow(1, 0, width);
  }

  SweepBuffers b_;
  int64_t panels_, group_;
  at::Tensor places_;  // of a packed triangle's numbers in [kPanel, kPanel]
  at::Tensor count_;   // 0, 1, ... for each of them
  at::Tensor begins_;  // [panels, 1], where the triangles begin in the factor
  at::Tensor rows_;    // [d, kPanel + n], what [A K] become
  at::Tensor inverses_;
  int64_t inverted_ = -1;
};

}  // namespace

std::unique_ptr<FactorSweep> make_portable_sweep(const SweepBuffers& buffers) {
  return std::make_unique<PortableSweep>(buffers);
}

}  // namespace coachhook
