// A stand-in for NVIDIA's driver, libcuda.so.1, whose devices are emulated: state and helpers.
//
// Read at cuInit: EMU_DEVICES (how many, 1), EMU_ARCH (80), EMU_DRIVER (its version, 13000),
// EMU_MEMORY (MiB of a device, 4096), EMU_FAIL ("cuLaunchKernel:3:719": the third call of it gives
// 719; several with commas), EMU_LATE (1: work waits in its stream until somebody needs it done).
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "simt.h"

#define API extern "C" __attribute__((visibility("default"))) int

namespace emu {

// CUresult.
enum Result {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  NOT_INITIALIZED = 3,
  NO_DEVICE = 100,
  INVALID_DEVICE = 101,
  INVALID_IMAGE = 200,
  INVALID_CONTEXT = 201,
  NO_BINARY_FOR_GPU = 209,
  UNSUPPORTED_PTX_VERSION = 222,
  INVALID_HANDLE = 400,
  NOT_FOUND = 500,
  NOT_READY = 600,
  ILLEGAL_ADDRESS = 700,
  CAPTURE_UNSUPPORTED = 900,
  CAPTURE_INVALIDATED = 901
};

typedef std::function<int()> Work;

struct Context {
  int device;
  int retained;
};

// What was captured of a stream.
struct Graph {
  std::vector<Work> work;
};

struct Stream {
  std::deque<Work> queue;
  uint64_t queued = 0, done = 0;
  Graph* capture = nullptr;
  bool relaxed = false;  // capture mode: others may call anything meanwhile
  bool spoilt = false;   // by a call that no capture allows
};

struct Event {
  bool timed;
  Stream* stream = nullptr;  // where it was recorded last
  uint64_t place = 0;
  uint64_t nanoseconds = 0;
};

struct Block {
  size_t bytes;
  int device;  // -1: pinned memory of the host
};

struct Module {
  void* library;
  int (*launch)(Launch*);
  std::string path;
};

struct Function {
  Module* module;
  const Kernel* kernel;
  int dynamic_shared = 48 << 10;  // that it may have
};

struct Driver {
  std::recursive_mutex mutex;
  bool ready = false;
  int devices, arch, version, late;
  size_t memory;
  std::map<int, size_t> used;             // bytes of each device
  std::map<uintptr_t, Block> blocks;      // live allocations by address
  std::map<uintptr_t, size_t> variables;  // of modules, as far as somebody asked for them
  std::map<std::string, int> calls;       // so far, by name
  std::map<std::string, std::map<int, int>> failures;  // name -> number of the call -> result
  int broken = 0;                                      // every call gives this from now on
  Context contexts[16] = {};
  Stream legacy;
  std::map<Stream*, bool> streams;
  int objects = 0;  // live modules, streams, events, graphs
};
extern Driver driver;

// Locks, counts the call, and says whether it may go on: otherwise returns its result.
struct Call {
  std::lock_guard<std::recursive_mutex> lock;
  int result;
  Call(const char* name, bool needs_context);
};
#define BEGIN_WITH(needs_context)          \
  emu::Call call(__func__, needs_context); \
  if (call.result) return call.result
#define BEGIN() BEGIN_WITH(true)
#define BEGIN_ANYWHERE() BEGIN_WITH(false)

Context* current();
int most_shared();       // bytes that one block may have
int breaks(int result);  // the result; from now on that of every call, if it is such a one

Stream* stream_of(void* handle);
int submit(void* stream, Work work);  // does it now or later, or captures it
int drain(Stream* stream, uint64_t until = ~0ull);
int drain_all();
bool forbidden_in_capture();  // whether some capture forbids what waits; it is spoilt then

// The allocation that has these bytes, or null; the message names what is wrong with them.
const std::pair<const uintptr_t, Block>* block_of(uintptr_t p, size_t bytes);
bool on_device(uintptr_t p);
int check_device_memory(const char* what, uintptr_t p, size_t bytes);
std::vector<Range> all_memory(int device, std::deque<std::string>& names);

}  // namespace emu
