// Memory of the stand-in for libcuda.so.1, see driver.h.
//
// A device's memory is in a part of the address space of its own, every allocation between pages
// without access; addresses are never used again, so that one of freed memory is recognised.
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "driver.h"

namespace emu {
namespace {

constexpr size_t kPage = 4096, kSpace = 1ull << 42;
uintptr_t space, space_used;

int allocate(uintptr_t* address, size_t bytes, int device) {
  if (!bytes) return INVALID_VALUE;
  if (driver.used[device] + bytes > driver.memory) return OUT_OF_MEMORY;
  const int kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  if (!space) space = (uintptr_t)mmap(nullptr, kSpace, PROT_NONE, kind, -1, 0);
  size_t room = (bytes + kPage - 1) / kPage * kPage;
  uintptr_t at = space + space_used + kPage;
  if (space_used + room + 2 * kPage > kSpace || mprotect((void*)at, room, PROT_READ | PROT_WRITE))
    return OUT_OF_MEMORY;
  space_used += room + kPage;
  memset((void*)at, 0xA5, bytes < (64 << 20) ? bytes : 0);  // new memory has no value
  driver.used[device] += bytes;
  driver.blocks[at] = {bytes, device};
  *address = at;
  return SUCCESS;
}

int release(uintptr_t address, bool of_device) {
  if (!address) return SUCCESS;
  auto found = driver.blocks.find(address);
  if (found == driver.blocks.end() || (found->second.device >= 0) != of_device) {
    fprintf(stderr, "emulator: free of %p, which is not allocated\n", (void*)address);
    return INVALID_VALUE;
  }
  size_t room = (found->second.bytes + kPage - 1) / kPage * kPage;
  madvise((void*)address, room, MADV_DONTNEED);
  mprotect((void*)address, room, PROT_NONE);
  driver.used[found->second.device] -= found->second.bytes;
  driver.blocks.erase(found);
  return SUCCESS;
}

// Memory of the host is copied when the call is made unless it is pinned.
bool pinned(uintptr_t p) {
  auto block = block_of(p, 1);
  return block && block->second.device < 0;
}

int copy(const char* what, uintptr_t to, uintptr_t from, size_t bytes, void* stream, bool to_device,
         bool from_device) {
  if (to_device)
    if (int result = check_device_memory(what, to, bytes)) return result;
  if (from_device)
    if (int result = check_device_memory(what, from, bytes)) return result;
  return submit(stream, [=] {
    // Again: it may be freed by now.
    if (to_device && check_device_memory(what, to, bytes)) return breaks(ILLEGAL_ADDRESS);
    if (from_device && check_device_memory(what, from, bytes)) return breaks(ILLEGAL_ADDRESS);
    memmove((void*)to, (const void*)from, bytes);
    return (int)SUCCESS;
  });
}

int finish(int result, void* stream) { return result ? result : drain(stream_of(stream)); }

}  // namespace

const std::pair<const uintptr_t, Block>* block_of(uintptr_t p, size_t bytes) {
  auto next = driver.blocks.upper_bound(p);
  if (next == driver.blocks.begin()) return nullptr;
  auto found = std::prev(next);
  return p + bytes <= found->first + found->second.bytes ? &*found : nullptr;
}

bool on_device(uintptr_t p) {
  auto block = block_of(p, 1);
  return driver.variables.count(p) ||
         (block ? block->second.device >= 0 : space && p - space < kSpace);
}

int check_device_memory(const char* what, uintptr_t p, size_t bytes) {
  auto variable = driver.variables.find(p);
  bool of_module = variable != driver.variables.end() && bytes <= variable->second;
  if (!bytes || of_module || block_of(p, bytes)) return SUCCESS;
  fprintf(stderr, "emulator: %s of %zu bytes at %p, which are not allocated\n", what, bytes,
          (void*)p);
  return INVALID_VALUE;
}

std::vector<Range> all_memory(int device, std::deque<std::string>& names) {
  std::vector<Range> ranges;
  for (auto& [address, block] : driver.blocks) {
    if (block.device >= 0 && block.device != device) continue;
    names.push_back("allocation of " + std::to_string(block.bytes) + " bytes");
    ranges.push_back({address, address + block.bytes, names.back().c_str()});
  }
  return ranges;
}

}  // namespace emu

using namespace emu;

// Live allocations, of devices and of pinned memory; other live objects.
API emu_allocations() { return driver.blocks.size(); }
API emu_objects() { return driver.objects; }
// How often a function was called.
API emu_calls(const char* name) { return driver.calls[name]; }

API cuMemAlloc_v2(uintptr_t* address, size_t bytes) {
  BEGIN();
  if (forbidden_in_capture()) return CAPTURE_UNSUPPORTED;
  return allocate(address, bytes, current()->device);
}

API cuMemAllocAsync(uintptr_t* address, size_t bytes, void*) {
  BEGIN();
  return allocate(address, bytes, current()->device);
}

API cuMemFree_v2(uintptr_t address) {
  BEGIN();
  if (forbidden_in_capture()) return CAPTURE_UNSUPPORTED;
  drain_all();  // it waits for all work that may use the memory
  return release(address, true);
}

API cuMemFreeAsync(uintptr_t address, void* stream) {
  BEGIN();
  return submit(stream, [=] { return release(address, true); });
}

API cuMemGetInfo_v2(size_t* free, size_t* total) {
  BEGIN();
  *total = driver.memory;
  *free = driver.memory - driver.used[current()->device];
  return SUCCESS;
}

API cuMemGetAddressRange_v2(uintptr_t* base, size_t* bytes, uintptr_t p) {
  BEGIN();
  auto block = block_of(p, 1);
  if (!block) return NOT_FOUND;
  if (base) *base = block->first;
  if (bytes) *bytes = block->second.bytes;
  return SUCCESS;
}

API cuMemHostAlloc(uintptr_t* address, size_t bytes, unsigned) {
  BEGIN();
  return allocate(address, bytes, -1);
}

API cuMemAllocHost_v2(uintptr_t* address, size_t bytes) {
  BEGIN();
  return allocate(address, bytes, -1);
}

API cuMemFreeHost(uintptr_t address) {
  BEGIN();
  drain_all();
  return release(address, false);
}

API cuMemHostGetDevicePointer_v2(uintptr_t* address, uintptr_t host, unsigned) {
  BEGIN();
  *address = host;
  return pinned(host) ? SUCCESS : INVALID_VALUE;
}

API cuPointerGetAttribute(void* value, int attribute, uintptr_t p) {
  BEGIN_ANYWHERE();
  auto block = block_of(p, 1);
  if (!block) return INVALID_VALUE;
  bool device = block->second.device >= 0;
  switch (attribute) {
    case 1:
      *(Context**)value = &driver.contexts[device ? block->second.device : 0];
      break;
    case 2:
      *(unsigned*)value = device ? 2 : 1;
      break;
    case 3:
      *(uintptr_t*)value = p;
      break;
    case 4:
      if (device) return INVALID_VALUE;
      *(uintptr_t*)value = p;
      break;
    case 8:
      *(int*)value = 0;
      break;  // managed memory
    case 9:
      *(int*)value = device ? block->second.device : 0;
      break;
    case 11:
      *(uintptr_t*)value = block->first;
      break;
    case 12:
      *(size_t*)value = block->second.bytes;
      break;
    default:
      return INVALID_VALUE;
  }
  return SUCCESS;
}

// ---- copies ----

API cuMemcpyHtoDAsync_v2(uintptr_t to, uintptr_t from, size_t bytes, void* stream) {
  BEGIN();
  int result = copy(__func__, to, from, bytes, stream, true, false);
  return pinned(from) || stream_of(stream)->capture ? result : finish(result, stream);
}

API cuMemcpyDtoHAsync_v2(uintptr_t to, uintptr_t from, size_t bytes, void* stream) {
  BEGIN();
  int result = copy(__func__, to, from, bytes, stream, false, true);
  return pinned(to) || stream_of(stream)->capture ? result : finish(result, stream);
}

API cuMemcpyDtoDAsync_v2(uintptr_t to, uintptr_t from, size_t bytes, void* stream) {
  BEGIN();
  return copy(__func__, to, from, bytes, stream, true, true);
}

API cuMemcpyAsync(uintptr_t to, uintptr_t from, size_t bytes, void* stream) {
  BEGIN();
  bool there = on_device(to), here = on_device(from);
  int result = copy(__func__, to, from, bytes, stream, there, here);
  bool waits = !stream_of(stream)->capture && ((!there && !pinned(to)) || (!here && !pinned(from)));
  return waits ? finish(result, stream) : result;
}

API cuMemcpyHtoD_v2(uintptr_t to, uintptr_t from, size_t bytes) {
  BEGIN();
  if (forbidden_in_capture()) return CAPTURE_UNSUPPORTED;
  return finish(copy(__func__, to, from, bytes, nullptr, true, false), nullptr);
}

API cuMemcpyDtoH_v2(uintptr_t to, uintptr_t from, size_t bytes) {
  BEGIN();
  if (forbidden_in_capture()) return CAPTURE_UNSUPPORTED;
  return finish(copy(__func__, to, from, bytes, nullptr, false, true), nullptr);
}

API cuMemcpyDtoD_v2(uintptr_t to, uintptr_t from, size_t bytes) {
  BEGIN();
  if (forbidden_in_capture()) return CAPTURE_UNSUPPORTED;
  return copy(__func__, to, from, bytes, nullptr, true, true);
}

API cuMemsetD8Async(uintptr_t to, unsigned char value, size_t bytes, void* stream) {
  BEGIN();
  if (int result = check_device_memory(__func__, to, bytes)) return result;
  return submit(stream, [=] {
    if (check_device_memory("cuMemsetD8Async", to, bytes)) return breaks(ILLEGAL_ADDRESS);
    memset((void*)to, value, bytes);
    return (int)SUCCESS;
  });
}

API cuMemsetD8_v2(uintptr_t to, unsigned char value, size_t bytes) {
  BEGIN();
  if (forbidden_in_capture()) return CAPTURE_UNSUPPORTED;
  return cuMemsetD8Async(to, value, bytes, nullptr);
}
