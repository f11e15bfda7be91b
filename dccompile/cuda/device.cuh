// What generated kernels call: one name for every instruction that C has no word for.
//
// No header is included, so that NVRTC compiles this anywhere; the tests' emulator has a file with
// the same functions in plain C++. Numbers of lanes and words are those of the PTX manual.

#ifdef __CUDACC_RTC__
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#endif
#define uint unsigned int
#define uchar unsigned char
#define ushort unsigned short
#define DCC __device__ __forceinline__
#define CUDART_INF_F __int_as_float(0x7f800000)
#define CUDART_NAN_F __int_as_float(0x7fffffff)
#define CUDART_INF __longlong_as_double(0x7ff0000000000000ll)
#define CUDART_NAN __longlong_as_double(0x7fffffffffffffffll)

// ---- arithmetic: every operation rounds once, nothing is contracted ----

DCC float dcc_mul(float a, float b) { return __fmul_rn(a, b); }
DCC float dcc_add(float a, float b) { return __fadd_rn(a, b); }
DCC float dcc_fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// To the nearest, half to even; saturates, a NaN gives 0.
DCC int dcc_rint(float a) { return __float2int_rn(a); }

DCC float dcc_as_float(uint a) { return __uint_as_float(a); }
DCC uint dcc_as_uint(float a) { return __float_as_uint(a); }

// The number in 16 bits of IEEE half precision, and the nearest such bits.
DCC float dcc_half_to_float(uint bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((ushort)bits));
  return f;
}
DCC uint dcc_float_to_half(float a) {
  ushort h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(a));
  return h;
}

// A number of half precision: kept in 16 bits, computed in float.
struct half {
  ushort bits;
  half() = default;
  DCC half(float a) : bits(dcc_float_to_half(a)) {}
  DCC operator float() const { return dcc_half_to_float(bits); }
};
DCC half __float2half_rn(float a) { return half(a); }

// c + the sum of 4 products of bytes: of u8 and s8, of s8 and s8.
DCC int dcc_dp4a_us(uint a, int b, int c) {
  int d;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
DCC int dcc_dp4a_ss(int a, int b, int c) {
  int d;
  asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// 4 bytes out of the 8 of a (0 to 3) and b (4 to 7), one hexadecimal digit of `order` each.
DCC uint dcc_permute(uint a, uint b, uint order) { return __byte_perm(a, b, order); }

// ---- tensor cores: c += a b for one tile of a warp ----

// m16n8k32: a 4 words, b 2 words, c 4 numbers of each lane.
DCC void dcc_mma_u8s8(int* c, const uint* a, const uint* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DCC void dcc_mma_s8s8(int* c, const uint* a, const uint* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// m16n8k16, pairs of halves in a word, sums in f32.
DCC void dcc_mma_f16(float* c, const uint* a, const uint* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// m16n8k8 of f32 bits of which the tensor core reads the 19 upper ones.
DCC void dcc_mma_tf32(float* c, const uint* a, const uint* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c = a b, as a first step: no register has to be set to 0.
DCC void dcc_mma_tf32_first(float* c, const uint* a, const uint* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.f));
}

// Four f32 as high + low for dcc_mma_tf32, which reads 11 significant bits of each: to 2**-23 of
// their magnitude. high is rounded, so low has 12 bits and a sign. Infinities have a low of 0; from
// 2**128 - 2**116 on, where rounding would give infinity, high is cut off, to 2**-20.
DCC void dcc_split_tf32(uint* high, uint* low, const uint* a) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    high[i] = (a[i] + 0x1000u) & 0xffffe000u;
    low[i] = __float_as_uint(__fsub_rn(__uint_as_float(a[i]), __uint_as_float(high[i])));
  }
  const float most = fmaxf(fmaxf(fabsf(__uint_as_float(a[0])), fabsf(__uint_as_float(a[1]))),
                           fmaxf(fabsf(__uint_as_float(a[2])), fabsf(__uint_as_float(a[3]))));
  if (most < 0x1.ffep127f) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float x = fabsf(__uint_as_float(a[i]));
    if (!(x >= 0x1.ffep127f)) continue;
    high[i] = a[i] & 0xffffe000u;
    low[i] = __float_as_uint(x > 0x1.fffffep127f ? 0.f : __fsub_rn(__uint_as_float(a[i]), __uint_as_float(high[i])));
  }
}

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
DCC void dcc_ldmatrix4(uint* r, const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "l"(__cvta_generic_to_shared(shared))
               : "memory");
}

// ---- lanes ----

// The value of the lane whose number differs in the bits of `mask`; all 32 lanes must call it.
DCC int dcc_shuffle_xor(int value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DCC float dcc_shuffle_xor_f32(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Of groups of `width` lanes, by all 32 lanes at once: the value of lane `lane` of the group, the
// sum, least and largest of all its lanes; and the sum of all lanes up to this one.
DCC uint dcc_shuffle(uint value, int lane, int width) {
  return __shfl_sync(0xffffffffu, value, lane, width);
}
DCC int64_t dcc_lanes_sum(int64_t v, int width) {
  for (int i = width / 2; i; i /= 2) v += __shfl_xor_sync(0xffffffffu, v, i);
  return v;
}
DCC int64_t dcc_lanes_min(int64_t v, int width) {
  for (int i = width / 2; i; i /= 2) {
    const int64_t other = __shfl_xor_sync(0xffffffffu, v, i);
    v = other < v ? other : v;
  }
  return v;
}
DCC int64_t dcc_lanes_max(int64_t v, int width) {
  for (int i = width / 2; i; i /= 2) {
    const int64_t other = __shfl_xor_sync(0xffffffffu, v, i);
    v = other > v ? other : v;
  }
  return v;
}
DCC int64_t dcc_lanes_scan(int64_t v) {
  for (int i = 1; i < 32; i *= 2) {
    const int64_t before = __shfl_up_sync(0xffffffffu, v, i);
    if ((int)(threadIdx.x & 31) >= i) v += before;
  }
  return v;
}

// ---- memory ----

// Starts a copy of 16 (or 4) bytes to shared memory, aligned so; of them only the first `bytes`
// are read, the others become 0. `commit` ends a group, `wait` leaves N groups under way.
DCC void dcc_copy16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "l"(__cvta_generic_to_shared(shared)), "l"(global), "r"(bytes) : "memory");
}
DCC void dcc_copy4(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
               :: "l"(__cvta_generic_to_shared(shared)), "l"(global), "r"(bytes) : "memory");
}
// The same of 16, 8 or 4 bytes, by way of L1, if `inside` is not 0; otherwise `fill` is stored.
DCC void dcc_fetch16(void* shared, const void* global, int inside, uint fill) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.s32 p, %2, 0;\n"
      "@p cp.async.ca.shared.global [%0], [%1], 16;\n"
      "@!p st.shared.v4.u32 [%0], {%3, %3, %3, %3};\n}"
      :: "l"(__cvta_generic_to_shared(shared)), "l"(global), "r"(inside), "r"(fill) : "memory");
}
DCC void dcc_fetch8(void* shared, const void* global, int inside, uint fill) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.s32 p, %2, 0;\n"
      "@p cp.async.ca.shared.global [%0], [%1], 8;\n"
      "@!p st.shared.v2.u32 [%0], {%3, %3};\n}"
      :: "l"(__cvta_generic_to_shared(shared)), "l"(global), "r"(inside), "r"(fill) : "memory");
}
DCC void dcc_fetch4(void* shared, const void* global, int inside, uint fill) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.s32 p, %2, 0;\n"
      "@p cp.async.ca.shared.global [%0], [%1], 4;\n"
      "@!p st.shared.u32 [%0], %3;\n}"
      :: "l"(__cvta_generic_to_shared(shared)), "l"(global), "r"(inside), "r"(fill) : "memory");
}
// A word to shared memory from 0 to 4 bytes of any alignment, the rest of it those of `fill`.
DCC void dcc_gather4(void* shared, const void* global, int count, uint fill) {
  const unsigned char* p = (const unsigned char*)global;
  uint word = fill;
  if (count > 0) word = __byte_perm(word, __ldg(p), 0x3214);
  if (count > 1) word = __byte_perm(word, __ldg(p + 1), 0x3240);
  if (count > 2) word = __byte_perm(word, __ldg(p + 2), 0x3410);
  if (count > 3) word = __byte_perm(word, __ldg(p + 3), 0x4210);
  *(uint*)shared = word;
}
DCC void dcc_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
DCC void dcc_wait0() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }
DCC void dcc_wait1() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }
DCC void dcc_wait2() { asm volatile("cp.async.wait_group 2;" ::: "memory"); }
DCC void dcc_wait3() { asm volatile("cp.async.wait_group 3;" ::: "memory"); }

// 16, 8 or 4 bytes, aligned so, that no kernel writes meanwhile; `once`: kept out of L1.
DCC void dcc_load16(uint* r, const void* p) {
  asm("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "l"(p));
}
DCC void dcc_load16_once(uint* r, const void* p) {
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "l"(p));
}
DCC void dcc_load8(uint* r, const void* p) {
  asm("ld.global.nc.v2.u32 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "l"(p));
}
DCC uint dcc_load4(const void* p) {
  uint r;
  asm("ld.global.nc.u32 %0, [%1];" : "=r"(r) : "l"(p));
  return r;
}
// 4 bytes at any address; of them only the first `bytes` are read, the others are 0.
DCC uint dcc_load4_part(const void* p, int bytes) {
  uint r = 0;
  for (int i = 0; i < 4; ++i) {
    if (i < bytes) r |= (uint)__ldg((const uchar*)p + i) << (8 * i);
  }
  return r;
}
// 16, 8 or 4 bytes where `valid` is not 0, elsewhere nothing is read and every word is `other`.
DCC void dcc_load16_if(uint* r, const void* p, int valid, uint other) {
  asm("{\n .reg .pred q;\n setp.ne.s32 q, %5, 0;\n"
      " mov.b32 %0, %6;\n mov.b32 %1, %6;\n mov.b32 %2, %6;\n mov.b32 %3, %6;\n"
      " @q ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];\n}"
      : "=&r"(r[0]), "=&r"(r[1]), "=&r"(r[2]), "=&r"(r[3]) : "l"(p), "r"(valid), "r"(other));
}
DCC void dcc_load8_if(uint* r, const void* p, int valid, uint other) {
  asm("{\n .reg .pred q;\n setp.ne.s32 q, %3, 0;\n"
      " mov.b32 %0, %4;\n mov.b32 %1, %4;\n @q ld.global.nc.v2.u32 {%0,%1}, [%2];\n}"
      : "=&r"(r[0]), "=&r"(r[1]) : "l"(p), "r"(valid), "r"(other));
}
DCC void dcc_load4_if(uint* r, const void* p, int valid, uint other) {
  asm("{\n .reg .pred q;\n setp.ne.s32 q, %2, 0;\n"
      " mov.b32 %0, %3;\n @q ld.global.nc.u32 %0, [%1];\n}"
      : "=&r"(r[0]) : "l"(p), "r"(valid), "r"(other));
}
// The same for 2 and 1 bytes, and 16 that are kept out of L1.
DCC void dcc_load16_once_if(uint* r, const void* p, int valid, uint other) {
  r[0] = r[1] = r[2] = r[3] = other;
  asm("{.reg .pred q; setp.ne.s32 q, %5, 0;\n\t"
      "@q ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];}"
      : "+r"(r[0]), "+r"(r[1]), "+r"(r[2]), "+r"(r[3]) : "l"(p), "r"(valid));
}
DCC void dcc_load2_if(uint* r, const void* p, int valid, uint other) {
  r[0] = other;
  asm("{.reg .pred q; setp.ne.s32 q, %2, 0; @q ld.global.nc.u16 %0, [%1];}"
      : "+r"(r[0]) : "l"(p), "r"(valid));
}
DCC void dcc_load1_if(uint* r, const void* p, int valid, uint other) {
  r[0] = other;
  asm("{.reg .pred q; setp.ne.s32 q, %2, 0; @q ld.global.nc.u8 %0, [%1];}"
      : "+r"(r[0]) : "l"(p), "r"(valid));
}
DCC void dcc_store16(void* p, const uint* r) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};"
               :: "l"(p), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
DCC void dcc_store8(void* p, const uint* r) {
  asm volatile("st.global.v2.u32 [%0], {%1,%2};" :: "l"(p), "r"(r[0]), "r"(r[1]) : "memory");
}
DCC void dcc_store4(void* p, uint r) {
  asm volatile("st.global.u32 [%0], %1;" :: "l"(p), "r"(r) : "memory");
}

// 16, 8, 4 or 2 bytes, aligned so, between memory and registers of any type.
template <class T, class S> DCC void dcc_take16(T* r, const S* p) {
  const uint4 v = *(const uint4*)p;
  memcpy(r, &v, 16);
}
template <class T, class S> DCC void dcc_take8(T* r, const S* p) {
  const uint2 v = *(const uint2*)p;
  memcpy(r, &v, 8);
}
template <class T, class S> DCC void dcc_take4(T* r, const S* p) {
  const uint v = *(const uint*)p;
  memcpy(r, &v, 4);
}
template <class T, class S> DCC void dcc_take2(T* r, const S* p) {
  const ushort v = *(const ushort*)p;
  memcpy(r, &v, 2);
}
template <class T, class S> DCC void dcc_put16(T* p, const S* r) {
  uint4 v;
  memcpy(&v, r, 16);
  *(uint4*)p = v;
}
template <class T, class S> DCC void dcc_put8(T* p, const S* r) {
  uint2 v;
  memcpy(&v, r, 8);
  *(uint2*)p = v;
}
template <class T, class S> DCC void dcc_put4(T* p, const S* r) {
  uint v;
  memcpy(&v, r, 4);
  *(uint*)p = v;
}
template <class T, class S> DCC void dcc_put2(T* p, const S* r) {
  ushort v;
  memcpy(&v, r, 2);
  *(ushort*)p = v;
}

// ---- errors ----

#ifdef DCC_REPORTS
// What a kernel found wrong with its input, for the host to raise: the first finding stays.
struct dcc_finding {
  int taken;
  int length;  // bytes of `name`
  long long values[4];
  char text[320];
  char name[128];
};
extern "C" __device__ dcc_finding* dcc_status = 0;

// In the text, `%` stands for the next of the values, `$` for the name.
__device__ __noinline__ void dcc_report(const char* text, long long v0, long long v1, long long v2,
                                        long long v3, const void* name, int length) {
  dcc_finding* f = dcc_status;
  if (atomicCAS(&f->taken, 0, 1) != 0) return;
  f->values[0] = v0;
  f->values[1] = v1;
  f->values[2] = v2;
  f->values[3] = v3;
  int i = 0;
  for (; i < 319 && text[i]; ++i) f->text[i] = text[i];
  f->text[i] = 0;
  f->length = length < 128 ? length : 128;
  for (i = 0; i < f->length; ++i) f->name[i] = ((const char*)name)[i];
  __threadfence_system();
}

// The same for as many as 8 values, which are put in the text here; `$` is left in it.
__device__ __noinline__ void dcc_report8(const char* text, long long v0, long long v1,
                                         long long v2, long long v3, long long v4, long long v5,
                                         long long v6, long long v7, const void* name,
                                         int length) {
  dcc_finding* f = dcc_status;
  if (atomicCAS(&f->taken, 0, 1) != 0) return;
  const long long values[8] = {v0, v1, v2, v3, v4, v5, v6, v7};
  int used = 0, end = 0;
  for (int i = 0; text[i]; ++i) {
    char digits[20];
    int count = 0;
    if (text[i] != '%') {
      digits[count++] = text[i];
    } else {
      const long long value = values[used++];
      unsigned long long rest = value < 0 ? 0 - (unsigned long long)value : value;
      if (value < 0 && end < 319) f->text[end++] = '-';
      do {
        digits[count++] = (char)('0' + rest % 10);
        rest /= 10;
      } while (rest);
    }
    while (count && end < 319) f->text[end++] = digits[--count];
  }
  f->text[end] = 0;
  f->length = length < 128 ? length : 128;
  for (int i = 0; i < f->length; ++i) f->name[i] = ((const char*)name)[i];
  __threadfence_system();
}
#endif

// ---- plain C++ by CUDA's own names, which the tests' emulator compiles from here too ----

struct __attribute__((aligned(4))) half2 {
  half x, y;
};
struct __attribute__((aligned(8))) half4 {
  half x, y, z, w;
};
DCC half2 make_half2(half x, half y) {
  half2 r;
  r.x = x, r.y = y;
  return r;
}
DCC half4 make_half4(half x, half y, half z, half w) {
  half4 r;
  r.x = x, r.y = y, r.z = z, r.w = w;
  return r;
}
DCC uint __pack_half2(half x, half y) { return x.bits | (uint)y.bits << 16; }

// Functions of halves: those of float, rounded.
#define DCC_OF_HALF(name, function) DCC half name(half x) { return half(function((float)x)); }
DCC_OF_HALF(__habs, fabsf) DCC_OF_HALF(hsqrt, sqrtf) DCC_OF_HALF(hrsqrt, rsqrtf)
DCC_OF_HALF(hfloor, floorf) DCC_OF_HALF(hceil, ceilf) DCC_OF_HALF(htrunc, truncf)
DCC_OF_HALF(hrint, rintf) DCC_OF_HALF(hnearbyint, nearbyintf) DCC_OF_HALF(hexp, expf)
DCC_OF_HALF(hexp2, exp2f) DCC_OF_HALF(hexp10, exp10f) DCC_OF_HALF(hlog, logf)
DCC_OF_HALF(hlog2, log2f) DCC_OF_HALF(hlog10, log10f) DCC_OF_HALF(hsin, sinf)
DCC_OF_HALF(hcos, cosf) DCC_OF_HALF(htan, tanf) DCC_OF_HALF(hatan, atanf)
DCC_OF_HALF(htanh, tanhf) DCC_OF_HALF(herf, erff)
DCC half hpow(half x, half y) { return half(powf(x, y)); }
DCC half hfmod(half x, half y) { return half(fmodf(x, y)); }

// 16 bytes from any address of a tensor that begins at a multiple of 4 and ends at `end`; only the
// first `bytes` of them count, the others become 0. Words are read whole where the tensor has them.
DCC void dcc_load16_part(uint* r, const void* p, int bytes, const void* end) {
  const int shift = (int)((unsigned long long)p & 3);
  const uchar* words = (const uchar*)p - shift;
  if (bytes > 0 && words + 20 <= (const uchar*)end) {
    uint w[5];
    for (int i = 0; i < 5; ++i) w[i] = dcc_load4(words + 4 * i);
    for (int i = 0; i < 4; ++i) {
      const int left = bytes - 4 * i;
      const uint word = (uint)(((unsigned long long)w[i + 1] << 32 | w[i]) >> (8 * shift));
      r[i] = left >= 4 ? word : left <= 0 ? 0 : word & ((1u << (8 * left)) - 1);
    }
  } else {
    for (int i = 0; i < 4; ++i) r[i] = dcc_load4_part((const uchar*)p + 4 * i, bytes - 4 * i);
  }
}
