// Every op of the extension: TORCH_LIBRARY_IMPL registrations (the schemas are defined in coachhook_fast/ops/*.py, in one
// place that works without a compiler) and the pybind11 module `coachhook_fast._C` with what Python must know of the build.
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <string>

#include "gated_linear.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = COACHHOOK_VERSION;
  info["torch"] = COACHHOOK_TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["openmp"] =
#ifdef _OPENMP
      _OPENMP;
#else
      0;
#endif
  return info;
}

}  // namespace

TORCH_LIBRARY_IMPL(coachhook, CPU, m) {
  m.impl("delta_norm", &coachhook::delta_norm);
  m.impl("sequence_gate", &coachhook::sequence_gate);
  m.impl("correct", &coachhook::correct);
  m.impl("gated_delta", &coachhook::gated_delta);
  m.impl("gated_linear", &coachhook::gated_linear);
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "coachhook-fast's C++ operators; importing it registers them with torch";
  m.def("build_info", &build_info, "version, torch, compiler and OpenMP of this build");
}
