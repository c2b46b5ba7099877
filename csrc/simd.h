// Vectors of a width that the processor at hand decides. The templates carry no target of their own: they are
// inlined into entry points that do, one for each instruction set, and one of those is chosen at run time.
#pragma once

#define ALWAYS_INLINE inline __attribute__((always_inline))

// For plain loops: one clone a vector width, chosen at load time. Other compilers and systems take the plain
// build.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define COACHHOOK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define COACHHOOK_CLONES
#endif

namespace coachhook {

// BYTES wide vectors of T.
template <typename T, int BYTES>
struct Vector {
  typedef T type __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));
};

enum class Isa { kGeneric, kAvx2, kAvx512 };

// The widest that this processor runs.
inline Isa widest_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kGeneric;
}

}  // namespace coachhook
