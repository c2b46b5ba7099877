// Every op of the extension: TORCH_LIBRARY_IMPL registrations (the schemas are defined in
// coachhook_fast/ops/*.py, in one place that works without a compiler) and the pybind11 module
// `coachhook_fast._C` with what Python must know of the build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <exception>
#include <string>

#include "solver/cholesky.h"
#include "transformer/block_parts.h"
#ifdef COACHHOOK_CUDA
#include "cuda/delta_product.h"
#include "cuda/delta_product_cuda.h"
#include "cuda/gated_linear_cuda.h"
#include "cuda/replay.h"
#endif
#include "common/micro_gemm.h"
#include "gated_linear/gated_linear.h"
#include "solver/packed_factor.h"
#include "transformer/packed_attention.h"

namespace py = pybind11;

namespace {

// coachhook_fast/ops/_library.py looks for these words in the file before it loads it: the libraries of
// another minor version of torch may lack a symbol, or have it with another meaning.
constexpr char kBuiltFor[] = "coachhook built for torch " COACHHOOK_TORCH_VERSION;

py::dict build_info() {
  py::dict info;
  info["version"] = COACHHOOK_VERSION;
  info["torch"] = kBuiltFor + sizeof("coachhook built for torch ") - 1;
  info["compiler"] = __VERSION__;
  info["openmp"] =
#ifdef _OPENMP
      _OPENMP;
#else
      0;
#endif
  info["cuda"] =
#ifdef COACHHOOK_CUDA
      COACHHOOK_CUDA;
#else
      "";
#endif
  info["isa"] = coachhook::micro_gemm<double>().isa;
  info["panel"] = coachhook::kPanel;
  return info;
}

// Python's pending signals, looked at between blocks of a long operation (torch runs ops without the GIL).
std::exception_ptr pending_signal() {
  py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() == 0) return nullptr;
  return std::make_exception_ptr(py::error_already_set());
}

void register_cholesky(torch::Library& m) {
  m.impl("chol_factor", &coachhook::chol_factor);
  m.impl("chol_solve", &coachhook::chol_solve);
  m.impl("chol_update", &coachhook::chol_update);
  m.impl("chol_solve_update", &coachhook::chol_solve_update);
  m.impl("chol_downdate", &coachhook::chol_downdate);
}

}  // namespace

TORCH_LIBRARY_IMPL(coachhook, CPU, m) {
  register_cholesky(m);
  m.impl("delta_norm", &coachhook::delta_norm);
  m.impl("sequence_gate", &coachhook::sequence_gate);
  m.impl("correct", &coachhook::correct);
  m.impl("gated_delta", &coachhook::gated_delta);
  m.impl("gated_linear", &coachhook::gated_linear);
  m.impl("rms_norm", &coachhook::rms_norm);
  m.impl("rms_norm_backward", &coachhook::rms_norm_backward);
  m.impl("silu_product", &coachhook::silu_product);
  m.impl("silu_product_backward", &coachhook::silu_product_backward);
  m.impl("rotary", &coachhook::rotary);
  m.impl("packed_attention", &coachhook::packed_attention);
  m.impl("packed_attention_backward", &coachhook::packed_attention_backward);
}

// The factor's sweep is written over ATen for every other device.
TORCH_LIBRARY_IMPL(coachhook, CUDA, m) {
  register_cholesky(m);
#ifdef COACHHOOK_CUDA
  m.impl("delta_product", &coachhook::delta_product_cuda);
  m.impl("gated_delta", &coachhook::gated_delta_cuda);
  m.impl("gated_linear", &coachhook::gated_linear_cuda);
#endif
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "coachhook-fast's C++ operators; importing it registers them with torch";
  coachhook::set_interrupt_check(&pending_signal);
  m.def("set_portable", &coachhook::set_portable,
        "run the solver's device-generic path on CPU tensors too (tests)");
  m.def("build_info", &build_info, "version, torch, compiler and OpenMP of this build");
#ifdef COACHHOOK_CUDA
  m.def("has_delta_product", &coachhook::has_delta_product, "whether the current GPU runs ops.delta_product");
  m.def("awaits_launches", &coachhook::awaits_launches,
        "whether this thread's call of an operator is the first of its kind");
  m.def("keep_launches", &coachhook::keep_launches, "what that call has launched, for those that follow");
#endif
}
