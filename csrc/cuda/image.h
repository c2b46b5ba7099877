// What the module's CUDA code was compiled for, which need not be the GPU that it meets (CUDAARCHS).
#pragma once

namespace coachhook {

// 10 * major + minor of the architecture whose code the current GPU runs (an older one's, where the driver
// had to compile its PTX); 0 where there is none that it could run.
int compiled_for();

}  // namespace coachhook
