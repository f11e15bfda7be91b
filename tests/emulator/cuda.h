// The language of CUDA for g++: what generated kernels use besides C++, each as the CUDA
// Programming Guide defines it.
#pragma once
#include <float.h>
#include <limits.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "simt.h"

// Not compiled with checks: these report what they touch themselves.
#define EMU_RAW __attribute__((no_sanitize("thread", "undefined")))

#define __global__
#define __device__ static
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __constant__ static const
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define warpSize 32

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;

// ---- vectors: CUDA aligns those of 2 and 4 elements to their size, up to 16 bytes ----

#define EMU_VECTORS(T, name, align2, align4)                                \
  struct name##1 { T x; };                                                  \
  struct alignas(align2) name##2 { T x, y; };                               \
  struct name##3 { T x, y, z; };                                            \
  struct alignas(align4) name##4 { T x, y, z, w; };                         \
  static inline name##1 make_##name##1(T x) { return {x}; }                 \
  static inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  static inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  static inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
#define uint3 emu_uint3  // that of threadIdx is there already
EMU_VECTORS(signed char, char, 2, 4)
EMU_VECTORS(unsigned char, uchar, 2, 4)
EMU_VECTORS(short, short, 4, 8)
EMU_VECTORS(unsigned short, ushort, 4, 8)
EMU_VECTORS(int, int, 8, 16)
EMU_VECTORS(unsigned, uint, 8, 16)
EMU_VECTORS(float, float, 8, 16)
EMU_VECTORS(long long, longlong, 16, 16)
EMU_VECTORS(unsigned long long, ulonglong, 16, 16)
EMU_VECTORS(double, double, 16, 16)
#undef uint3

// ---- arithmetic ----

// Declared here because <math.h> takes longer to compile than a kernel.
#define EMU_MATH1(name)                     \
  extern "C" double name(double) noexcept;  \
  extern "C" float name##f(float) noexcept; \
  static inline float name(float x) { return name##f(x); }
#define EMU_MATH2(name)                            \
  extern "C" double name(double, double) noexcept; \
  extern "C" float name##f(float, float) noexcept; \
  static inline float name(float x, float y) { return name##f(x, y); }
EMU_MATH1(acos)
EMU_MATH1(acosh) EMU_MATH1(asin) EMU_MATH1(asinh) EMU_MATH1(atan) EMU_MATH1(atanh) EMU_MATH1(cbrt)
    EMU_MATH1(ceil) EMU_MATH1(cos) EMU_MATH1(cosh) EMU_MATH1(erf) EMU_MATH1(erfc) EMU_MATH1(exp)
        EMU_MATH1(exp2) EMU_MATH1(exp10) EMU_MATH1(expm1) EMU_MATH1(fabs) EMU_MATH1(floor)
            EMU_MATH1(lgamma) EMU_MATH1(log) EMU_MATH1(log10) EMU_MATH1(log1p) EMU_MATH1(log2)
                EMU_MATH1(nearbyint) EMU_MATH1(rint) EMU_MATH1(round) EMU_MATH1(sin) EMU_MATH1(sinh)
                    EMU_MATH1(sqrt) EMU_MATH1(tan) EMU_MATH1(tanh) EMU_MATH1(tgamma)
                        EMU_MATH1(trunc) EMU_MATH2(atan2) EMU_MATH2(copysign) EMU_MATH2(fdim)
                            EMU_MATH2(fmax) EMU_MATH2(fmin) EMU_MATH2(fmod) EMU_MATH2(hypot)
                                EMU_MATH2(nextafter) EMU_MATH2(pow)
                                    EMU_MATH2(remainder) extern "C" float fmaf(float, float,
                                                                               float) noexcept;
extern "C" double fma(double, double, double) noexcept;
extern "C" float ldexpf(float, int) noexcept;
extern "C" double ldexp(double, int) noexcept;
extern "C" int abs(int) noexcept __attribute__((const));
extern "C" long long llabs(long long) noexcept __attribute__((const));

static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline double rsqrt(double x) { return 1.0 / sqrt(x); }
static inline float __expf(float x) { return expf(x); }
static inline float __exp10f(float x) { return exp10f(x); }
static inline float __logf(float x) { return logf(x); }
static inline float __log2f(float x) { return log2f(x); }
static inline float __log10f(float x) { return log10f(x); }
static inline float __powf(float x, float y) { return powf(x, y); }
static inline float __sinf(float x) { return sinf(x); }
static inline float __cosf(float x) { return cosf(x); }
static inline float __tanf(float x) { return tanf(x); }
static inline float __fdividef(float x, float y) { return x / y; }
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __fmul_rn(float x, float y) { return x * y; }
static inline float __fadd_rn(float x, float y) { return x + y; }
static inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
template <class T>
static inline bool isnan(T x) {
  return x != x;
}
template <class T>
static inline bool isinf(T x) {
  return __builtin_isinf(x);
}
template <class T>
static inline bool isfinite(T x) {
  return __builtin_isfinite(x);
}
template <class T>
static inline bool signbit(T x) {
  return __builtin_signbit(x);
}

// Of the arithmetic types alone; with a NaN and a number the number, as fmaxf.
#define EMU_MAX(T)                                        \
  static inline T max(T a, T b) { return a > b ? a : b; } \
  static inline T min(T a, T b) { return a < b ? a : b; }
EMU_MAX(int)
EMU_MAX(unsigned) EMU_MAX(long) EMU_MAX(unsigned long) EMU_MAX(long long)
    EMU_MAX(unsigned long long) static inline float max(float a, float b) {
  return fmaxf(a, b);
}
static inline float min(float a, float b) { return fminf(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }

template <class To, class From>
static inline To emu_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}
static inline float __int_as_float(int x) { return emu_bits<float>(x); }
static inline float __uint_as_float(unsigned x) { return emu_bits<float>(x); }
static inline int __float_as_int(float x) { return emu_bits<int>(x); }
static inline unsigned __float_as_uint(float x) { return emu_bits<unsigned>(x); }
static inline double __longlong_as_double(long long x) { return emu_bits<double>(x); }
static inline long long __double_as_longlong(double x) { return emu_bits<long long>(x); }

// Saturates, a NaN gives 0.
static inline int __float2int_rn(float x) {
  return x != x              ? 0
         : x >= 2147483648.f ? INT_MAX
         : x < -2147483648.f ? INT_MIN
                             : (int)nearbyintf(x);
}
static inline int __float2int_rz(float x) { return __float2int_rn(truncf(x)); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __mulhi(int a, int b) { return (int)((long long)a * b >> 32); }
static inline unsigned __umulhi(unsigned a, unsigned b) {
  return (unsigned)((uint64_t)a * b >> 32);
}
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned order) {
  uint64_t bytes = (uint64_t)b << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) r |= (unsigned)(bytes >> 8 * (order >> 4 * i & 7) & 255) << 8 * i;
  return r;
}
static inline int __dp4a(int a, int b, int c) {
  unsigned s = c;
  for (int i = 0; i < 32; i += 8) s += (int)(int8_t)(a >> i) * (int8_t)(b >> i);
  return s;
}

// ---- threads ----

static inline void __syncthreads(int line = __builtin_LINE()) { emu::barrier(line); }
static inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  emu::warp_barrier(mask, line);
}
static inline unsigned __activemask(int line = __builtin_LINE()) { return emu::active_mask(line); }
static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline void __threadfence_system() {}

// What lanes of a warp exchange: each brings a value and names the lane whose it takes.
struct EmuShuffle {
  uint64_t value, taken;
  int from;
};
template <class T>
EMU_RAW static T emu_shuffle(const char* name, unsigned mask, T value, int from, int line) {
  EmuShuffle mine = {0, 0, from};
  memcpy(&mine.value, &value, sizeof value);
  auto exchange = [](void* const* lanes, unsigned) EMU_RAW {
    for (int l = 0; l < 32; l++) {
      if (!lanes[l]) continue;
      EmuShuffle& to = *(EmuShuffle*)lanes[l];
      void* source = lanes[to.from];
      to.taken = source ? ((EmuShuffle*)source)->value : 0xcbcbcbcbcbcbcbcb;  // undefined
    }
  };
  emu::together(name, exchange, &mine, mask, false, line);
  T result;
  memcpy(&result, &mine.taken, sizeof result);
  return result;
}
// Lanes out of the part of `width` lanes: the own value.
#define EMU_LANE(name, source)                                         \
  template <class T>                                                   \
  static inline T name(unsigned mask, T value, int by, int width = 32, \
                       int line = __builtin_LINE()) {                  \
    int me = emu::lane(), start = me & ~(width - 1), from = source;    \
    if (from < start || from >= start + width) from = me;              \
    return emu_shuffle(#name, mask, value, from, line);                \
  }
EMU_LANE(__shfl_sync, start | (by & (width - 1)))
EMU_LANE(__shfl_up_sync, me - by)
EMU_LANE(__shfl_down_sync, me + by)
EMU_LANE(__shfl_xor_sync, me ^ by)

struct EmuVote {
  bool mine;
  unsigned all;
};
EMU_RAW static inline unsigned __ballot_sync(unsigned mask, int value,
                                             int line = __builtin_LINE()) {
  EmuVote vote = {value != 0, 0};
  auto count = [](void* const* lanes, unsigned) EMU_RAW {
    unsigned all = 0;
    for (int l = 0; l < 32; l++)
      if (lanes[l] && ((EmuVote*)lanes[l])->mine) all |= 1u << l;
    for (int l = 0; l < 32; l++)
      if (lanes[l]) ((EmuVote*)lanes[l])->all = all;
  };
  emu::together("__ballot_sync", count, &vote, mask, false, line);
  return vote.all;
}
static inline int __any_sync(unsigned mask, int value, int line = __builtin_LINE()) {
  return __ballot_sync(mask, value, line) != 0;
}
static inline int __all_sync(unsigned mask, int value, int line = __builtin_LINE()) {
  return __ballot_sync(mask, !value, line) == 0;
}

// ---- memory ----

#define EMU_SHARED(T, name, n) T(&name)[n] = *(T(*)[n])emu::shared_array(#name, sizeof(T[n]))
#define EMU_DYNAMIC_SHARED(T, name) T* const name = (T*)emu::dynamic_shared()

template <class T>
static inline T __ldg(const T* p) {
  emu::touch(p, sizeof(T), emu::READ_ONLY, 'g', alignof(T));
  return *p;
}

template <class T, class Change>
EMU_RAW static T emu_atomic(T* p, Change change) {
  emu::touch(p, sizeof(T), emu::ATOMIC, 0, sizeof(T));
  T old = *p;
  *p = change(old);
  return old;
}
#define EMU_ATOMIC(name, T, next)                                   \
  static inline T name(T* p, T value) {                             \
    return emu_atomic(p, [=](T old) EMU_RAW -> T { return next; }); \
  }
#define EMU_ATOMIC_INTEGER(T)                                                                \
  EMU_ATOMIC(atomicAdd, T, old + value)                                                      \
  EMU_ATOMIC(atomicSub, T, old - value)                                                      \
  EMU_ATOMIC(atomicMax, T, old > value ? old : value)                                        \
  EMU_ATOMIC(atomicMin, T, old < value ? old : value)                                        \
  EMU_ATOMIC(atomicAnd, T, old& value)                                                       \
  EMU_ATOMIC(atomicOr, T, old | value)                                                       \
  EMU_ATOMIC(atomicXor, T, old ^ value)                                                      \
  EMU_ATOMIC(atomicExch, T, (void(old), value))                                              \
  static inline T atomicCAS(T* p, T expected, T value) {                                     \
    return emu_atomic(p, [=](T old) EMU_RAW -> T { return old == expected ? value : old; }); \
  }
EMU_ATOMIC_INTEGER(int)
EMU_ATOMIC_INTEGER(unsigned)
EMU_ATOMIC_INTEGER(unsigned long long)
EMU_ATOMIC(atomicAdd, float, old + value)
EMU_ATOMIC(atomicExch, float, (void(old), value))
EMU_ATOMIC(atomicAdd, double, old + value)
