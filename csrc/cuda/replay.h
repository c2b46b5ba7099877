// Calls that Python made once, made again without it.
//
// Which of Triton's kernels a call launches, on which grid and with which numbers, depends on its tensors'
// shapes, strides, dtypes and alignment: its kind. The first call of a kind goes through Python, which hands
// over what it launched (coachhook_fast/ops/replayed.py); from then on the same kernels are launched from
// here, with the addresses of the day.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

namespace coachhook {

// What a launch may point into: the fields of Buffers in replayed.py, then scratch of the call's own.
enum Buffer {
  kX,
  kOut,
  kU,
  kB,
  kThreshold,
  kSketch,
  kMask,
  kCuSeqlens,
  kState,
  kFire,
  kAfter,
  kScratch,
  kBuffers
};
using Addresses = std::array<std::byte*, kBuffers>;

// (a Buffer, bytes from its first, 8), or (-1, a number, its bytes)
using Argument = std::tuple<int, int64_t, int>;
// (function, grid, threads, bytes of shared memory, whether it may start early, arguments)
using Launch =
    std::tuple<uintptr_t, std::array<unsigned, 3>, unsigned, unsigned, bool, std::vector<Argument>>;

struct Plan {
  int64_t after_rows;  // of the state that comes out
  bool is_overlapped;  // the base has a stream of its own
  int64_t scratch_bytes;
  std::vector<Launch> launches;
};

// A kind of call, in numbers.
using Kind = std::vector<int64_t>;
void describe(Kind& kind, const std::optional<at::Tensor>& tensor);

// What there is for a kind: nothing if it is new, null if Python must make all its calls.
std::optional<std::shared_ptr<const Plan>> plan_of(const Kind& kind);

// While it lives, Python may keep this thread's launches for a kind.
class Awaiting {
 public:
  explicit Awaiting(Kind kind);
  ~Awaiting();
  Awaiting(const Awaiting&) = delete;
  Awaiting& operator=(const Awaiting&) = delete;

  // The call went well: if nothing was kept, all calls of the kind are Python's.
  void succeeded();
};
bool awaits_launches();
void keep_launches(int64_t after_rows, bool is_overlapped, int64_t scratch_bytes,
                   std::vector<Launch> launches);

bool touches(const Launch& launch, Buffer buffer);
// On the current stream.
void run(const Launch& launch, const Addresses& addresses);

}  // namespace coachhook
