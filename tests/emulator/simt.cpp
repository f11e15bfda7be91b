// A multiprocessor: runs the blocks of a launch one after another, their threads as fibers.
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#define EMU_INDEX
#include "guard.h"
#include "multiprocessor.h"

extern "C" void emu_switch(void** from, void* to);
asm(R"(
.text
.hidden emu_switch
.globl emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

namespace emu {

Multiprocessor mp;
volatile bool in_fiber;

namespace {

void* scheduler;  // its stack pointer while a fiber runs
bool failed;
const Kernel* kernel;
uint64_t random_state;

Thread& me() { return mp.thread[mp.running]; }

void wait(State state, int line) {
  if (__builtin_frame_address(0) < mp.stacks + mp.running * kStack)
    fail("over %zu bytes of local memory", kStack);
  me().state = state;
  me().line = line;
  emu_switch(&me().stack_pointer, scheduler);
}

void fiber() {
  kernel->call(mp.launch->args);
  wait(LEFT, 0);
  __builtin_unreachable();
}

// Runs a thread until it waits.
void resume(unsigned number) {
  mp.running = number;
  threadIdx = me().index;
  in_fiber = true;
  emu_switch(&scheduler, me().stack_pointer);
  in_fiber = false;
}

unsigned random_below(unsigned n) {
  random_state ^= random_state << 13, random_state ^= random_state >> 7,
      random_state ^= random_state << 17;
  return random_state % n;
}

// The numbers below n in the order of this launch.
void ordered(unsigned* numbers, unsigned n) {
  unsigned order = mp.launch->order;
  for (unsigned i = 0; i < n; i++) numbers[i] = order == 1 ? n - 1 - i : i;
  for (unsigned i = n; order > 1 && i > 1; i--) {
    unsigned j = random_below(i), kept = numbers[i - 1];
    numbers[i - 1] = numbers[j], numbers[j] = kept;
  }
}

unsigned first_of_warp() { return mp.running & ~31u; }
unsigned lanes_of_warp(unsigned first) {
  return mp.threads - first < 32 ? (1u << (mp.threads - first)) - 1 : ~0u;
}

const char* describe(const Thread& t, char* text, size_t size) {
  if (t.state == LEFT)
    snprintf(text, size, "has left the kernel");
  else if (t.state == AT_BARRIER)
    snprintf(text, size, "waits in __syncthreads of line %d", t.line);
  else
    snprintf(text, size, "waits in %s of line %d with the mask %#x", t.name, t.line, t.mask);
  return text;
}

// Nothing of the warp can run: lanes that asked for the active ones go on, other waits are errors.
// Returns whether any goes on.
bool wake(unsigned first) {
  unsigned active = 0;
  int line = -1;
  for (unsigned l = 0; l < 32 && first + l < mp.threads; l++) {
    Thread& t = mp.thread[first + l];
    if (t.state != AT_ACTIVE_MASK || (line >= 0 && t.line != line)) continue;
    line = t.line;
    active |= 1u << l;
  }
  for (unsigned l = 0; l < 32; l++)
    if (active >> l & 1) mp.thread[first + l].mask = active, mp.thread[first + l].state = READY;
  if (active) return true;
  for (unsigned l = 0; l < 32 && first + l < mp.threads; l++) {
    Thread& t = mp.thread[first + l];
    if (t.state != IN_WARP) continue;
    for (unsigned o = 0; o < 32 && first + o < mp.threads; o++) {
      Thread& other = mp.thread[first + o];
      bool same = other.state == IN_WARP && other.name == t.name && other.mask == t.mask;
      if (!(t.mask >> o & 1) || (same && other.line == t.line)) continue;
      char text[160];
      mp.running = first + l;
      note("%s of line %d with the mask %#x waits for lane %u, which %s", t.name, t.line, t.mask, o,
           describe(other, text, sizeof text));
      return false;
    }
  }
  return false;
}

void run_warp(unsigned first) {
  unsigned lanes[32], n = mp.threads - first < 32 ? mp.threads - first : 32;
  do {
    for (bool ran = true; ran;) {
      ran = false;
      ordered(lanes, n);
      for (unsigned i = 0; i < n; i++) {
        if (mp.thread[first + lanes[i]].state != READY) continue;
        resume(first + lanes[i]);
        if (failed) return;
        ran = true;
      }
    }
  } while (wake(first));
}

void start(unsigned number, void (*entry)()) {
  Thread& t = mp.thread[number];
  const uint3& d = blockDim;
  t = Thread{};
  t.index = {number % d.x, number / d.x % d.y, number / (d.x * d.y)};
  void** top = (void**)(mp.stacks + (number + 1) * kStack - 64);
  *--top = nullptr;  // the return address of `entry`, which never returns
  *--top = (void*)entry;
  t.stack_pointer = top - 6;  // what emu_switch pops
  memset(t.stack_pointer, 0, 6 * sizeof(void*));
}

// All threads that are left wait for the barrier: is it one barrier?
bool barrier_holds() {
  Thread* at = nullptr;
  char text[160];
  for (unsigned i = 0; i < mp.threads; i++)
    if (mp.thread[i].state == AT_BARRIER && !at) at = &mp.thread[i], mp.running = i;
  for (unsigned i = 0; at && i < mp.threads; i++) {
    const Thread& t = mp.thread[i];
    if (t.state == AT_BARRIER && t.line == at->line) continue;
    note("__syncthreads of line %d waits for thread (%u,%u,%u), which %s", at->line, t.index.x,
         t.index.y, t.index.z, describe(t, text, sizeof text));
    return false;
  }
  return at;
}

void run_block() {
  for (unsigned i = 0; i < mp.threads; i++) start(i, fiber);
  memset(mp.warp_time, 0, sizeof mp.warp_time);
  mp.block_epoch = ++mp.epoch;
  block_begin();
  unsigned warps[kMaxThreads / 32];
  do {
    ordered(warps, mp.warps);
    for (unsigned w = 0; w < mp.warps; w++) {
      run_warp(warps[w] * 32);
      if (failed) return;
    }
    if (!barrier_holds()) return;
    mp.epoch++;
    for (unsigned i = 0; i < mp.threads; i++) mp.thread[i].state = READY;
  } while (true);
}

// ---- launches ----

bool allowed() {
  const unsigned *g = mp.launch->grid, *b = mp.launch->block;
  uint64_t threads = (uint64_t)b[0] * b[1] * b[2];
  for (const Kernel* k = emu_kernels; k->name; k++)
    if (!strcmp(k->name, mp.launch->kernel)) kernel = k;
  if (!kernel)
    note("no such kernel");
  else if (!g[0] || !g[1] || !g[2] || g[0] > 0x7fffffff || g[1] > 65535 || g[2] > 65535)
    note("a grid of (%u,%u,%u) blocks: at least 1 each, at most 2147483647, 65535, 65535", g[0],
         g[1], g[2]);
  else if (!threads || b[0] > 1024 || b[1] > 1024 || b[2] > 64 || threads > kMaxThreads)
    note("a block of (%u,%u,%u) threads: at most 1024, 1024, 64, and 1024 together", b[0], b[1],
         b[2]);
  else if (threads > kernel->threads)
    note("a block of %u threads, compiled for %u", (unsigned)threads, kernel->threads);
  else if (mp.launch->dynamic_shared > mp.launch->shared)
    note("%u bytes of shared memory, a block may have %u", mp.launch->dynamic_shared,
         mp.launch->shared);
  return !failed;
}

void prepare() {
  if (mp.stacks) return;
  const int private_memory = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  mp.stacks =
      (char*)mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE, private_memory, -1, 0);
  mp.copy = (Copy(*)[kMaxCopies])mmap(nullptr, kMaxThreads * sizeof *mp.copy,
                                      PROT_READ | PROT_WRITE, private_memory, -1, 0);
}

}  // namespace

void note(const char* format, ...) {
  if (failed) return;
  failed = true;
  Launch& launch = *mp.launch;
  const uint3 &b = blockIdx, &t = me().index;
  int n = snprintf(launch.message, launch.message_size,
                   "%s, block (%u,%u,%u), thread (%u,%u,%u): ", launch.kernel, b.x, b.y, b.z, t.x,
                   t.y, t.z);
  va_list values;
  va_start(values, format);
  if (n < (int)launch.message_size)
    vsnprintf(launch.message + n, launch.message_size - n, format, values);
  va_end(values);
  extern char start_of_library __asm__("__ehdr_start") __attribute__((visibility("hidden")));
  launch.where = me().where ? (uintptr_t)me().where - (uintptr_t)&start_of_library : 0;
}

void fail(const char* format, ...) {
  in_fiber = false;
  char text[512];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof text, format, values);
  va_end(values);
  note("%s", text);
  void* unused;
  emu_switch(&unused, scheduler);
  __builtin_unreachable();
}

#define FROM_KERNEL() (me().where = __builtin_return_address(0))

void barrier(int line) {
  FROM_KERNEL();
  wait(AT_BARRIER, line);
}

void together(const char* name, Together all, void* mine, unsigned mask, bool whole, int line) {
  FROM_KERNEL();
  unsigned number = mp.running, first = first_of_warp(), exist = lanes_of_warp(first);
  Thread& t = me();
  t.name = name, t.mask = mask, t.mine = mine, t.line = line;
  if (!(mask >> (number & 31) & 1))
    fail("%s of line %d with the mask %#x, in which lane %u itself is not", name, line, mask,
         number & 31);
  if (whole && exist != ~0u)
    fail("%s of line %d in a warp of %u threads, all 32 take part in it", name, line,
         mp.threads - first);
  void* lanes[32] = {};
  t.state = IN_WARP;
  mask &= exist;
  for (unsigned l = 0; l < 32; l++) {
    if (!(mask >> l & 1)) continue;
    const Thread& other = mp.thread[first + l];
    lanes[l] = other.mine;
    bool here = other.state == IN_WARP && other.name == name && other.mask == t.mask;
    if (here && (!whole || other.line == line)) continue;
    wait(IN_WARP, line);  // until the last one has come
    return;
  }
  if (all) all(lanes, mask);
  mp.running = number;
  for (unsigned l = 0; l < 32; l++)
    if (mask >> l & 1) mp.thread[first + l].state = READY;
}

void warp_barrier(unsigned mask, int line) {
  together(
      "__syncwarp", [](void* const*, unsigned) { mp.warp_time[mp.running / 32]++; }, nullptr, mask,
      false, line);
}

unsigned active_mask(int line) {
  FROM_KERNEL();
  me().name = "__activemask";
  wait(AT_ACTIVE_MASK, line);
  return me().mask;
}

void select_lane(int lane) { mp.running = first_of_warp() + lane; }
int lane() { return mp.running & 31; }

void copy_start(void* shared, const void* global, int size, int bytes) {
  FROM_KERNEL();
  if (bytes < 0 || bytes > size) fail("a copy of %d bytes of which %d are read", size, bytes);
  touch(global, bytes, READ, 'g');
  if ((uintptr_t)global % size)
    fail("a copy of %d bytes from an address with offset %d", size,
         (int)((uintptr_t)global % size));
  touch(shared, size, COPY, 's', size);
  Thread& t = me();
  if (t.copies == kMaxCopies) fail("over %d copies under way", kMaxCopies);
  mp.copy[mp.running][(t.first_copy + t.copies++) % kMaxCopies] = {
      (char*)shared, (const char*)global, size, bytes, t.group};
}

void copy_commit() { me().group++; }

void copy_wait(int groups_left) {
  FROM_KERNEL();
  Thread& t = me();
  for (; t.copies; t.copies--) {
    const Copy& copy = mp.copy[mp.running][t.first_copy];
    if (copy.group >= t.group - groups_left) break;
    land(copy);
    t.first_copy = (t.first_copy + 1) % kMaxCopies;
  }
}

}  // namespace emu

// Returns 0, or 1 with a message.
extern "C" int emu_launch(emu::Launch* launch) {
  using namespace emu;
  prepare();
  mp.launch = launch;
  mp.thread[mp.running = 0] = Thread{};
  blockIdx = {};
  kernel = nullptr;
  failed = false;
  launch->where = 0;
  if (!allowed()) return 1;
  const unsigned *g = launch->grid, *b = launch->block;
  gridDim = {g[0], g[1], g[2]}, blockDim = {b[0], b[1], b[2]};
  mp.threads = b[0] * b[1] * b[2], mp.warps = (mp.threads + 31) / 32;
  random_state = 0x9e3779b97f4a7c15u * (launch->order + 1);
  mp.launch_epoch = ++mp.epoch;
  memory_begin();
  Guard guard(launch->seconds);
  for (unsigned z = 0; z < g[2] && !failed; z++)
    for (unsigned y = 0; y < g[1] && !failed; y++)
      for (unsigned x = 0; x < g[0] && !failed; x++) {
        blockIdx = {x, y, z};
        run_block();
        if (shared_bytes() > launch->shared)
          note("%zu bytes of shared memory, a block may have %u", shared_bytes(), launch->shared);
      }
  return failed;
}
