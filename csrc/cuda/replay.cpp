#include "cuda/replay.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/hash.h>
#include <cuda.h>
#include <dlfcn.h>

#include <mutex>
#include <unordered_map>

namespace coachhook {
namespace {

constexpr size_t kKinds = 4096;     // so many are kept; then all are forgotten
constexpr size_t kArguments = 48;   // of a kernel
constexpr int64_t kAlignment = 16;  // what Triton compiles for

struct Hash {
  size_t operator()(const Kind& kind) const {
    size_t seed = kind.size();
    for (const int64_t number : kind) seed = c10::hash_combine(seed, static_cast<size_t>(number));
    return seed;
  }
};

std::mutex mutex;
std::unordered_map<Kind, std::shared_ptr<const Plan>, Hash> plans;
thread_local std::optional<Kind> awaited;

void keep(std::shared_ptr<const Plan> plan) {
  const std::lock_guard lock(mutex);
  if (plans.size() >= kKinds) plans.clear();
  plans.insert_or_assign(*std::move(awaited), std::move(plan));
  awaited.reset();
}

// The driver's functions: not linked, since a machine without a GPU has no driver.
template <typename F>
F of_driver(const char* name) {
  static void* const driver = dlopen("libcuda.so.1", RTLD_LAZY);
  return driver == nullptr ? nullptr : reinterpret_cast<F>(dlsym(driver, name));
}

// Whether the kernel's parameters are those of the launch, and after them at most two pointers, to scratch of
// Triton's that this kernel does not use.
bool fits(const Launch& launch) {
  static const auto info =
      of_driver<CUresult (*)(CUfunction, size_t, size_t*, size_t*)>("cuFuncGetParamInfo");  // CUDA 12.4 on
  const std::vector<Argument>& arguments = std::get<5>(launch);
  if (info == nullptr || arguments.size() + 2 > kArguments) return false;
  const auto function = reinterpret_cast<CUfunction>(std::get<0>(launch));
  size_t offset = 0, bytes = 0, count = 0;
  while (info(function, count, &offset, &bytes) == CUDA_SUCCESS) {
    const size_t wanted = count < arguments.size() ? std::get<2>(arguments[count]) : sizeof(void*);
    if (bytes != wanted) return false;
    ++count;
  }
  return count >= arguments.size() && count <= arguments.size() + 2;
}

}  // namespace

void describe(Kind& kind, const std::optional<at::Tensor>& tensor) {
  if (!tensor || !tensor->defined()) {
    kind.push_back(-1);
    return;
  }
  const bool is_aligned = reinterpret_cast<uintptr_t>(tensor->const_data_ptr()) % kAlignment == 0;
  kind.insert(kind.end(),
              {tensor->dim(), static_cast<int64_t>(tensor->scalar_type()),
               static_cast<int64_t>(tensor->device().type()), tensor->device().index(), is_aligned});
  kind.insert(kind.end(), tensor->sizes().begin(), tensor->sizes().end());
  kind.insert(kind.end(), tensor->strides().begin(), tensor->strides().end());
}

std::optional<std::shared_ptr<const Plan>> plan_of(const Kind& kind) {
  const std::lock_guard lock(mutex);
  const auto found = plans.find(kind);
  if (found == plans.end()) return std::nullopt;
  return found->second;
}

Awaiting::Awaiting(Kind kind) { awaited = std::move(kind); }

Awaiting::~Awaiting() { awaited.reset(); }

void Awaiting::succeeded() {
  if (awaited) keep(nullptr);
}

bool awaits_launches() { return awaited.has_value(); }

void keep_launches(int64_t after_rows, bool is_overlapped, int64_t scratch_bytes,
                   std::vector<Launch> launches) {
  if (!awaited) return;
  for (const Launch& launch : launches) {
    if (!fits(launch)) return;
  }
  keep(std::make_shared<const Plan>(Plan{after_rows, is_overlapped, scratch_bytes, std::move(launches)}));
}

bool touches(const Launch& launch, Buffer buffer) {
  for (const auto& [where, value, bytes] : std::get<5>(launch)) {
    if (where == buffer) return true;
  }
  return false;
}

void run(const Launch& launch, const Addresses& addresses) {
  static const auto start =
      of_driver<CUresult (*)(const CUlaunchConfig*, CUfunction, void**, void**)>("cuLaunchKernelEx");
  const auto& [function, grid, threads, shared, is_early, arguments] = launch;
  std::array<int64_t, kArguments> values = {};  // little-endian: a shorter number is its first bytes
  std::array<void*, kArguments> pointers;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& [buffer, value, bytes] = arguments[i];
    values[i] = buffer < 0 ? value : reinterpret_cast<int64_t>(addresses[buffer] + value);
  }
  for (size_t i = 0; i < arguments.size() + 2; ++i) pointers[i] = &values[i];
  CUlaunchAttribute attribute = {};
  attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  attribute.value.programmaticStreamSerializationAllowed = 1;
  CUlaunchConfig config = {};
  config.gridDimX = grid[0];
  config.gridDimY = grid[1];
  config.gridDimZ = grid[2];
  config.blockDimX = threads;
  config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = shared;
  config.hStream = c10::cuda::getCurrentCUDAStream();
  config.attrs = &attribute;
  config.numAttrs = is_early ? 1 : 0;
  const CUresult result = start(&config, reinterpret_cast<CUfunction>(function), pointers.data(), nullptr);
  TORCH_CHECK(result == CUDA_SUCCESS, "a recorded kernel could not be launched (CUDA driver error ", result,
              ")");
}

}  // namespace coachhook
