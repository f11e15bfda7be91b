// What compiled kernels, the emulated multiprocessor (simt.cpp), its checks (memory.cpp) and those
// who launch kernels share.
//
// A block runs at a time, every thread of it as a fiber of its own that goes on until it reaches a
// barrier, a function of the whole warp, or its end. Kernels compiled with checks report every
// access of theirs before they make it; the first defect found ends the launch.
#pragma once
#include <stddef.h>
#include <stdint.h>

struct uint3 {
  unsigned x, y, z;
};
// Of the running thread. Only the multiprocessor changes them, to the thread they are constants.
#ifndef EMU_INDEX
#define EMU_INDEX extern const
#endif
EMU_INDEX uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emu {

// Memory that kernels may use, 4-byte aligned.
struct Range {
  uintptr_t begin, end;
  const char* name;
};

struct Kernel {
  const char* name;
  void (*call)(void** args);
  unsigned threads;  // of __launch_bounds__
  unsigned params;
  const unsigned* sizes;  // of the parameters, in bytes
};

struct Launch {
  const char* kernel;
  unsigned grid[3], block[3];
  unsigned dynamic_shared;  // bytes
  unsigned shared;          // bytes that one block may have
  unsigned order;           // of a block's threads: 0 forward, 1 reverse, else the seed of a mix
  unsigned seconds;         // of processor time, then it counts as endless
  void** args;
  const Range* ranges;
  size_t range_count;
  char* message;  // takes what is wrong
  size_t message_size;
  uintptr_t where;  // takes the instruction that was wrong, from the start of the library, or 0
};

enum Access { READ, WRITE, ATOMIC, READ_ONLY, COPY };

// Ends the launch with a message; never returns to the thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- called by the functions of CUDA that kernels use ----

void barrier(int line);
// Waits for the lanes in `mask`, the last of which to come runs `all` with what each brought.
// `whole`: the instruction needs all 32 lanes.
typedef void (*Together)(void* const* lanes, unsigned mask);
void together(const char* name, Together all, void* mine, unsigned mask, bool whole, int line);
void warp_barrier(unsigned mask, int line);
unsigned active_mask(int line);
void* shared_array(const char* name, size_t bytes);
void* dynamic_shared();
void select_lane(int lane);  // whose accesses are reported next, inside of a Together
int lane();
void thread_fence();

// Reports an access that the compiler does not see. READ_ONLY: nobody may have written the bytes in
// this launch. `space` is 0, or 's' for shared memory or 'g' for global memory only; `align` bytes.
void touch(const void* p, size_t bytes, Access access, char space = 0, unsigned align = 1);

// cp.async and its groups.
void copy_start(void* shared, const void* global, int size, int bytes);
void copy_commit();
void copy_wait(int groups_left);

// ---- defined by every compiled kernel source ----

extern const bool checked;

}  // namespace emu

extern "C" const emu::Kernel emu_kernels[];  // the last one has no name
extern "C" const int emu_arch;
extern "C" int emu_launch(emu::Launch* launch);
