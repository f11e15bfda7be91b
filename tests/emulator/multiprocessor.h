// What simt.cpp and memory.cpp share: the state of the block that runs.
#pragma once
#include "simt.h"

namespace emu {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStack = 64 << 10;
constexpr int kMaxCopies = 256;  // under way at a time in one thread

enum State : uint8_t { READY, AT_BARRIER, IN_WARP, AT_ACTIVE_MASK, LEFT };

struct Copy {
  char* to;
  const char* from;
  int size, bytes, group;
};

struct Thread {
  void* stack_pointer;
  State state;
  uint3 index;
  const void* where;  // the call in the kernel's code that the thread is in
  int line;           // where it waits, and in which function of the whole warp
  const char* name;
  unsigned mask;
  void* mine;
  int group, first_copy, copies;  // asynchronous copies: group to add to, ring of those under way
};

struct Multiprocessor {
  Launch* launch;
  unsigned threads, warps;
  unsigned running;                           // number of the thread
  unsigned warp_time[kMaxThreads / 32];       // barriers of each warp alone in this block
  uint32_t launch_epoch, block_epoch, epoch;  // barriers of all blocks so far
  Thread thread[kMaxThreads];
  char* stacks;
  Copy (*copy)[kMaxCopies];
};
extern Multiprocessor mp;
extern volatile bool in_fiber;  // which a signal may end

// Notes what is wrong, without leaving: the first note stays.
void note(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Of memory.cpp.
void memory_begin();  // of a launch
void block_begin();
void land(const Copy& copy);
size_t shared_bytes();

}  // namespace emu
