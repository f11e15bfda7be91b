// The functions of dccompile/cuda/device.cuh in plain C++, with the same parameters. Fragments of
// matrices are laid out as the PTX manual says ("Matrix Fragments for mma.m16n8k32" and so on).
#pragma once
#include <stdio.h>

#include "cuda.h"

#define DCC static inline

#define CUDART_INF_F __builtin_inff()
#define CUDART_NAN_F __builtin_nanf("")
#define CUDART_INF __builtin_inf()
#define CUDART_NAN __builtin_nan("")

// ---- arithmetic ----

static inline float dcc_mul(float a, float b) { return a * b; }
static inline float dcc_add(float a, float b) { return a + b; }
static inline float dcc_fma(float a, float b, float c) { return fmaf(a, b, c); }
static inline int dcc_rint(float a) { return __float2int_rn(a); }
static inline float dcc_as_float(uint a) { return emu_bits<float>(a); }
static inline uint dcc_as_uint(float a) { return emu_bits<uint>(a); }
static inline float dcc_half_to_float(uint bits) {
  typedef short Halves __attribute__((vector_size(16)));
  return __builtin_ia32_vcvtph2ps(Halves{(short)bits})[0];
}
static inline uint dcc_float_to_half(float a) {
  typedef float Floats __attribute__((vector_size(16)));
  return (ushort)__builtin_ia32_vcvtps2ph(Floats{a}, 0)[0];
}

struct half {
  ushort bits;
  half() = default;
  half(float a) : bits(dcc_float_to_half(a)) {}
  operator float() const { return dcc_half_to_float(bits); }
};
static inline half __float2half_rn(float a) { return half(a); }
static inline int dcc_dp4a_us(uint a, int b, int c) {
  uint s = c;
  for (int i = 0; i < 32; i += 8) s += (int)(uint8_t)(a >> i) * (int8_t)(b >> i);
  return s;
}
static inline int dcc_dp4a_ss(int a, int b, int c) { return __dp4a(a, b, c); }
static inline uint dcc_permute(uint a, uint b, uint order) { return __byte_perm(a, b, order); }

// ---- tensor cores ----

template <class Sum>
struct EmuMma {
  Sum* c;
  const uint *a, *b;
};
// The last lane to come computes for all: word k of row r of a is register r/8 + k/4*2 of lane
// r%8*4 + k%4, word k of column n of b register k/4 of lane n*4 + k%4, and number i of c is in row
// lane/4 + i/2*8, column lane%4*2 + i%2.
template <class Sum, Sum (*dot)(uint, uint, Sum)>
EMU_RAW static void emu_mma(const char* name, Sum* c, const uint* a, const uint* b, int line) {
  EmuMma<Sum> mine = {c, a, b};
  auto all = [](void* const* lanes, unsigned) EMU_RAW {
    const EmuMma<Sum>* const* lane = (const EmuMma<Sum>* const*)lanes;
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++) {
        int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
        Sum sum = lane[l]->c[i];
        for (int k = 0; k < 8; k++)
          sum = dot(lane[row % 8 * 4 + k % 4]->a[row / 8 + k / 4 * 2],
                    lane[column * 4 + k % 4]->b[k / 4], sum);
        lane[l]->c[i] = sum;
      }
  };
  emu::together(name, all, &mine, ~0u, true, line);
}
EMU_RAW static inline int emu_dot_us(uint a, uint b, int c) { return dcc_dp4a_us(a, b, c); }
EMU_RAW static inline int emu_dot_ss(uint a, uint b, int c) { return dcc_dp4a_ss(a, b, c); }
EMU_RAW static inline float emu_dot_f16(uint a, uint b, float c) {
  c += dcc_half_to_float(a & 65535) * dcc_half_to_float(b & 65535);
  return c + dcc_half_to_float(a >> 16) * dcc_half_to_float(b >> 16);
}
EMU_RAW static inline float emu_dot_tf32(uint a, uint b, float c) {
  return c + dcc_as_float(a & 0xffffe000u) * dcc_as_float(b & 0xffffe000u);
}
static inline void dcc_mma_u8s8(int* c, const uint* a, const uint* b, int line = __builtin_LINE()) {
  emu_mma<int, emu_dot_us>("mma", c, a, b, line);
}
static inline void dcc_mma_s8s8(int* c, const uint* a, const uint* b, int line = __builtin_LINE()) {
  emu_mma<int, emu_dot_ss>("mma", c, a, b, line);
}
static inline void dcc_mma_f16(float* c, const uint* a, const uint* b,
                               int line = __builtin_LINE()) {
  emu_mma<float, emu_dot_f16>("mma", c, a, b, line);
}
static inline void dcc_mma_tf32(float* c, const uint* a, const uint* b,
                                int line = __builtin_LINE()) {
  emu_mma<float, emu_dot_tf32>("mma", c, a, b, line);
}

static inline void dcc_mma_tf32_first(float* c, const uint* a, const uint* b,
                                      int line = __builtin_LINE()) {
  for (int i = 0; i < 4; i++) c[i] = 0;
  dcc_mma_tf32(c, a, b, line);
}
static inline void dcc_split_tf32(uint* high, uint* low, const uint* a) {
  for (int i = 0; i < 4; i++) {
    float x = fabsf(dcc_as_float(a[i]));
    high[i] = x >= 0x1.ffep127f ? a[i] & 0xffffe000u : (a[i] + 0x1000u) & 0xffffe000u;
    low[i] = x == CUDART_INF_F ? 0 : dcc_as_uint(dcc_as_float(a[i]) - dcc_as_float(high[i]));
  }
}

struct EmuMatrix {
  uint* r;
  const void* row;
};
EMU_RAW static inline void dcc_ldmatrix4(uint* r, const void* shared, int line = __builtin_LINE()) {
  EmuMatrix mine = {r, shared};
  auto all = [](void* const* lanes, unsigned) EMU_RAW {
    for (int l = 0; l < 32; l++) {
      emu::select_lane(l);
      emu::touch(((EmuMatrix*)lanes[l])->row, 16, emu::READ, 's', 16);
    }
    for (int l = 0; l < 32; l++)
      for (int m = 0; m < 4; m++) {
        const uint* row = (const uint*)((EmuMatrix*)lanes[m * 8 + l / 4])->row;
        ((EmuMatrix*)lanes[l])->r[m] = row[l % 4];
      }
  };
  emu::together("ldmatrix", all, &mine, ~0u, true, line);
}

// ---- lanes ----

static inline int dcc_shuffle_xor(int value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
static inline float dcc_shuffle_xor_f32(float value, int mask) {
  return __shfl_xor_sync(~0u, value, mask);
}
static inline uint dcc_shuffle(uint value, int lane, int width) {
  return __shfl_sync(~0u, value, lane, width);
}
static inline int64_t dcc_lanes_sum(int64_t v, int width) {
  for (int i = width / 2; i; i /= 2) v += __shfl_xor_sync(~0u, v, i);
  return v;
}
static inline int64_t dcc_lanes_min(int64_t v, int width) {
  for (int i = width / 2; i; i /= 2) v = min(v, __shfl_xor_sync(~0u, v, i));
  return v;
}
static inline int64_t dcc_lanes_max(int64_t v, int width) {
  for (int i = width / 2; i; i /= 2) v = max(v, __shfl_xor_sync(~0u, v, i));
  return v;
}
static inline int64_t dcc_lanes_scan(int64_t v) {
  for (int i = 1; i < 32; i *= 2) {
    int64_t before = __shfl_up_sync(~0u, v, i);
    if (emu::lane() >= i) v += before;
  }
  return v;
}

// ---- memory ----

static inline void dcc_copy16(void* shared, const void* global, int bytes) {
  emu::copy_start(shared, global, 16, bytes);
}
static inline void dcc_copy4(void* shared, const void* global, int bytes) {
  emu::copy_start(shared, global, 4, bytes);
}
EMU_RAW static inline void emu_fetch(void* shared, const void* global, int bytes, int inside,
                                     uint fill) {
  if (inside) return emu::copy_start(shared, global, bytes, bytes);
  emu::touch(shared, bytes, emu::WRITE, 's', bytes);
  for (int i = 0; i < bytes / 4; i++) ((uint*)shared)[i] = fill;
}
static inline void dcc_fetch16(void* shared, const void* global, int inside, uint fill) {
  emu_fetch(shared, global, 16, inside, fill);
}
static inline void dcc_fetch8(void* shared, const void* global, int inside, uint fill) {
  emu_fetch(shared, global, 8, inside, fill);
}
static inline void dcc_fetch4(void* shared, const void* global, int inside, uint fill) {
  emu_fetch(shared, global, 4, inside, fill);
}
static inline void dcc_commit() { emu::copy_commit(); }
static inline void dcc_wait0() { emu::copy_wait(0); }
static inline void dcc_wait1() { emu::copy_wait(1); }
static inline void dcc_wait2() { emu::copy_wait(2); }
static inline void dcc_wait3() { emu::copy_wait(3); }

// Loads that need memory which this kernel does not write, and stores: of global memory alone.
EMU_RAW static inline void emu_load(void* r, const void* p, int bytes, unsigned align) {
  emu::touch(p, bytes, emu::READ_ONLY, 'g', align);
  memcpy(r, p, bytes);
}
EMU_RAW static inline void emu_load_if(uint* r, const void* p, int bytes, int valid, uint other) {
  for (int i = 0; i * 4 < bytes; i++) r[i] = bytes < 4 && valid ? 0 : other;
  if (valid) emu_load(r, p, bytes, bytes);
}
EMU_RAW static inline void emu_store(void* p, const void* r, int bytes) {
  emu::touch(p, bytes, emu::WRITE, 'g', bytes);
  memcpy(p, r, bytes);
}
EMU_RAW static inline void dcc_gather4(void* shared, const void* global, int count, uint fill) {
  if (count > 0) emu_load(&fill, global, min(count, 4), 1);
  emu::touch(shared, 4, emu::WRITE, 's', 4);
  *(uint*)shared = fill;
}
static inline void dcc_load16(uint* r, const void* p) { emu_load(r, p, 16, 16); }
static inline void dcc_load16_once(uint* r, const void* p) { emu_load(r, p, 16, 16); }
static inline void dcc_load8(uint* r, const void* p) { emu_load(r, p, 8, 8); }
EMU_RAW static inline uint dcc_load4(const void* p) {
  uint r;
  emu_load(&r, p, 4, 4);
  return r;
}
EMU_RAW static inline uint dcc_load4_part(const void* p, int bytes) {
  uint r = 0;
  if (bytes > 0) emu_load(&r, p, min(bytes, 4), 1);
  return r;
}
static inline void dcc_load16_if(uint* r, const void* p, int valid, uint other) {
  emu_load_if(r, p, 16, valid, other);
}
static inline void dcc_load8_if(uint* r, const void* p, int valid, uint other) {
  emu_load_if(r, p, 8, valid, other);
}
static inline void dcc_load4_if(uint* r, const void* p, int valid, uint other) {
  emu_load_if(r, p, 4, valid, other);
}
static inline void dcc_load16_once_if(uint* r, const void* p, int valid, uint other) {
  emu_load_if(r, p, 16, valid, other);
}
static inline void dcc_load2_if(uint* r, const void* p, int valid, uint other) {
  emu_load_if(r, p, 2, valid, other);
}
static inline void dcc_load1_if(uint* r, const void* p, int valid, uint other) {
  emu_load_if(r, p, 1, valid, other);
}
static inline void dcc_store16(void* p, const uint* r) { emu_store(p, r, 16); }
static inline void dcc_store8(void* p, const uint* r) { emu_store(p, r, 8); }
static inline void dcc_store4(void* p, uint r) { emu_store(p, &r, 4); }

// Between memory of any kind and registers.
EMU_RAW static inline void emu_take(void* r, const void* p, int bytes) {
  emu::touch(p, bytes, emu::READ, 0, bytes);
  memcpy(r, p, bytes);
}
EMU_RAW static inline void emu_put(void* p, const void* r, int bytes) {
  emu::touch(p, bytes, emu::WRITE, 0, bytes);
  memcpy(p, r, bytes);
}
template <class T, class S>
static inline void dcc_take16(T* r, const S* p) {
  emu_take(r, p, 16);
}
template <class T, class S>
static inline void dcc_take8(T* r, const S* p) {
  emu_take(r, p, 8);
}
template <class T, class S>
static inline void dcc_take4(T* r, const S* p) {
  emu_take(r, p, 4);
}
template <class T, class S>
static inline void dcc_take2(T* r, const S* p) {
  emu_take(r, p, 2);
}
template <class T, class S>
static inline void dcc_put16(T* p, const S* r) {
  emu_put(p, r, 16);
}
template <class T, class S>
static inline void dcc_put8(T* p, const S* r) {
  emu_put(p, r, 8);
}
template <class T, class S>
static inline void dcc_put4(T* p, const S* r) {
  emu_put(p, r, 4);
}
template <class T, class S>
static inline void dcc_put2(T* p, const S* r) {
  emu_put(p, r, 2);
}

// ---- errors ----

#ifdef DCC_REPORTS  // as in device.cuh: only modules that report have dcc_status
struct dcc_finding {
  int taken, length;
  long long values[4];
  char text[320], name[128];
};
extern "C" {
__attribute__((weak)) dcc_finding* dcc_status = nullptr;
}
EMU_RAW static inline void dcc_report(const char* text, long long v0, long long v1, long long v2,
                                      long long v3, const void* name, int length) {
  dcc_finding* f = dcc_status;
  if (f->taken++) return;
  long long values[4] = {v0, v1, v2, v3};
  memcpy(f->values, values, sizeof values);
  strncpy(f->text, text, sizeof f->text - 1);
  f->length = min(length, 128);
  memcpy(f->name, name, f->length);
}
EMU_RAW static inline void dcc_report8(const char* text, long long v0, long long v1, long long v2,
                                       long long v3, long long v4, long long v5, long long v6,
                                       long long v7, const void* name, int length) {
  dcc_finding* f = dcc_status;
  if (f->taken++) return;
  const long long values[8] = {v0, v1, v2, v3, v4, v5, v6, v7};
  int used = 0, end = 0;
  for (int i = 0; text[i] && end < 319; i++) {
    if (text[i] != '%')
      f->text[end++] = text[i];
    else
      end += snprintf(f->text + end, 320 - end, "%lld", values[used++]);
    end = min(end, 319);
  }
  f->text[end] = 0;
  f->length = min(length, 128);
  memcpy(f->name, name, f->length);
}
#endif
