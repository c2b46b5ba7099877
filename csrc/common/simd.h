// Vectors of a width that the processor at hand decides. The templates carry no target of their own: they are
// inlined into entry points that do, one for each instruction set, and one of those is chosen at run time.
#pragma once

#include <cstdint>

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

// ENTRY(suffix, attribute of its functions, bytes of a vector, accumulators: as many as the register file
// holds beside one row of an operand and a broadcast) for every instruction set; COACHHOOK_WIDEST(name, T,
// ...) is the one of name_<suffix><T, ...> for this processor.
#if defined(__x86_64__)
#define COACHHOOK_EACH_ISA(ENTRY)                          \
  ENTRY(generic, , 16, 8)                                  \
  ENTRY(avx2, __attribute__((target("avx2,fma"))), 32, 12) \
  ENTRY(avx512, __attribute__((target("avx512f,fma"))), 64, 24)
#define COACHHOOK_WIDEST(NAME, ...)                          \
  (widest_isa() == Isa::kAvx512 ? NAME##_avx512<__VA_ARGS__> \
   : widest_isa() == Isa::kAvx2 ? NAME##_avx2<__VA_ARGS__>   \
                                : NAME##_generic<__VA_ARGS__>)
#else
#define COACHHOOK_EACH_ISA(ENTRY) ENTRY(generic, , 16, 8)
#define COACHHOOK_WIDEST(NAME, ...) NAME##_generic<__VA_ARGS__>
#endif

enum class Isa { kGeneric, kAvx2, kAvx512 };

// The widest that this processor runs.
inline Isa widest_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kGeneric;
}

inline const char* name_of(Isa isa) {
  return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "generic";
}

inline int64_t vector_bytes(Isa isa) { return isa == Isa::kAvx512 ? 64 : isa == Isa::kAvx2 ? 32 : 16; }

}  // namespace coachhook
