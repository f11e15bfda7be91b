// Settings, devices and contexts of the stand-in for libcuda.so.1, see driver.h.
#include "driver.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace emu {

Driver driver;

namespace {

thread_local std::vector<Context*> context_stack;

int setting(const char* name, int otherwise) {
  const char* text = getenv(name);
  return text && *text ? atoi(text) : otherwise;
}

// The name as programs write it.
std::string plain(const std::string& name) {
  size_t end = name.rfind("_v2");
  return end == std::string::npos ? name : name.substr(0, end);
}

void read_failures() {
  const char* given = getenv("EMU_FAIL");
  std::string text = given ? given : "";
  for (size_t at = 0; at < text.size();) {
    size_t end = text.find(',', at);
    if (end == std::string::npos) end = text.size();
    char name[100];
    int number, result;
    if (sscanf(text.substr(at, end - at).c_str(), "%99[^:]:%d:%d", name, &number, &result) == 3)
      driver.failures[plain(name)][number] = result;
    at = end + 1;
  }
}

const std::map<int, const char*> kNames = {
    {0, "CUDA_SUCCESS"},
    {1, "CUDA_ERROR_INVALID_VALUE"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY"},
    {3, "CUDA_ERROR_NOT_INITIALIZED"},
    {100, "CUDA_ERROR_NO_DEVICE"},
    {101, "CUDA_ERROR_INVALID_DEVICE"},
    {200, "CUDA_ERROR_INVALID_IMAGE"},
    {201, "CUDA_ERROR_INVALID_CONTEXT"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"},
    {400, "CUDA_ERROR_INVALID_HANDLE"},
    {500, "CUDA_ERROR_NOT_FOUND"},
    {600, "CUDA_ERROR_NOT_READY"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"},
    {702, "CUDA_ERROR_LAUNCH_TIMEOUT"},
    {716, "CUDA_ERROR_MISALIGNED_ADDRESS"},
    {719, "CUDA_ERROR_LAUNCH_FAILED"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
    {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"},
    {999, "CUDA_ERROR_UNKNOWN"},
};

}  // namespace

Call::Call(const char* name, bool needs_context) : lock(driver.mutex), result(0) {
  if (!driver.ready) {
    result = NOT_INITIALIZED;
    return;
  }
  int number = ++driver.calls[plain(name)];
  auto of_name = driver.failures.find(plain(name));
  if (driver.broken)
    result = driver.broken;
  else if (of_name != driver.failures.end() && of_name->second.count(number))
    result = breaks(of_name->second[number]);
  else if (needs_context && !current())
    result = INVALID_CONTEXT;
}

int breaks(int result) {
  for (int sticky : {214, 220, 226, 700, 702, 710, 714, 715, 716, 717, 718, 719})
    if (result == sticky && !driver.broken) driver.broken = result;
  return result;
}

Context* current() { return context_stack.empty() ? nullptr : context_stack.back(); }

int most_shared() {
  if (driver.arch == 80) return 163 << 10;
  return driver.arch == 90 || driver.arch == 100 ? 227 << 10 : 99 << 10;
}

}  // namespace emu

using namespace emu;

API cuInit(unsigned flags) {
  std::lock_guard<std::recursive_mutex> lock(driver.mutex);
  if (flags) return INVALID_VALUE;
  if (driver.ready) return driver.broken;
  driver.devices = setting("EMU_DEVICES", 1);
  driver.arch = setting("EMU_ARCH", 80);
  driver.version = setting("EMU_DRIVER", 13000);
  driver.late = setting("EMU_LATE", 0);
  driver.memory = (size_t)setting("EMU_MEMORY", 4096) << 20;
  read_failures();
  if (driver.failures["cuInit"].count(1)) return driver.failures["cuInit"][1];
  if (driver.devices == 0) return NO_DEVICE;
  for (int i = 0; i < 16; i++) driver.contexts[i].device = i;
  driver.ready = true;
  return SUCCESS;
}

API cuDriverGetVersion(int* version) {
  *version = setting("EMU_DRIVER", 13000);
  return SUCCESS;
}

API cuGetErrorName(int result, const char** text) {
  auto found = kNames.find(result);
  *text = found == kNames.end() ? nullptr : found->second;
  return *text ? SUCCESS : INVALID_VALUE;
}

API cuGetErrorString(int result, const char** text) { return cuGetErrorName(result, text); }

// ---- devices ----

API cuDeviceGetCount(int* count) {
  BEGIN_ANYWHERE();
  *count = driver.devices;
  return SUCCESS;
}

API cuDeviceGet(int* device, int number) {
  BEGIN_ANYWHERE();
  *device = number;
  return number >= 0 && number < driver.devices ? SUCCESS : INVALID_DEVICE;
}

API cuDeviceGetName(char* name, int size, int device) {
  BEGIN_ANYWHERE();
  snprintf(name, size, "Emulated GPU sm_%d", driver.arch);
  return device >= 0 && device < driver.devices ? SUCCESS : INVALID_DEVICE;
}

API cuDeviceTotalMem_v2(size_t* bytes, int) {
  BEGIN_ANYWHERE();
  *bytes = driver.memory;
  return SUCCESS;
}

API cuDeviceGetUuid_v2(char* uuid, int device) {
  BEGIN_ANYWHERE();
  memset(uuid, 0, 16);
  memcpy(uuid, "emulated", 8);
  uuid[15] = device;
  return SUCCESS;
}

API cuDeviceGetAttribute(int* value, int attribute, int device) {
  BEGIN_ANYWHERE();
  if (device < 0 || device >= driver.devices) return INVALID_DEVICE;
  int shared = most_shared();
  const std::map<int, int> known = {
      {1, 1024},  // threads of a block, together and in x, y, z
      {2, 1024},
      {3, 1024},
      {4, 64},
      {5, 0x7fffffff},
      {6, 65535},
      {7, 65535},      // blocks of a grid
      {8, 48 << 10},   // static shared memory
      {10, 32},        // lanes
      {12, 65536},     // registers of a block
      {13, 1410000},   // kHz
      {16, 108},       // multiprocessors
      {19, 1},         // maps memory of the host
      {31, 1},         // kernels side by side
      {38, 40 << 20},  // bytes of L2
      {39, 2048},      // threads of a multiprocessor
      {40, 2},         // copy engines
      {41, 1},         // unified addresses
      {75, driver.arch / 10},
      {76, driver.arch % 10},
      {81, shared + 1024},
      {97, shared},
      {115, 1},  // memory pools
  };
  auto found = known.find(attribute);
  *value = found == known.end() ? 0 : found->second;
  return attribute > 0 && attribute < 200 ? SUCCESS : INVALID_VALUE;
}

// ---- contexts ----

API cuDevicePrimaryCtxRetain(Context** context, int device) {
  BEGIN_ANYWHERE();
  if (device < 0 || device >= driver.devices) return INVALID_DEVICE;
  *context = &driver.contexts[device];
  (*context)->retained++;
  return SUCCESS;
}

API cuDevicePrimaryCtxRelease_v2(int device) {
  BEGIN_ANYWHERE();
  if (device < 0 || device >= driver.devices) return INVALID_DEVICE;
  if (!driver.contexts[device].retained) return INVALID_CONTEXT;
  driver.contexts[device].retained--;
  return SUCCESS;
}

API cuDevicePrimaryCtxReset_v2(int device) {
  BEGIN_ANYWHERE();
  return device >= 0 && device < driver.devices ? SUCCESS : INVALID_DEVICE;
}

API cuCtxGetCurrent(Context** context) {
  BEGIN_ANYWHERE();
  *context = current();
  return SUCCESS;
}

API cuCtxSetCurrent(Context* context) {
  BEGIN_ANYWHERE();
  if (!context_stack.empty()) context_stack.pop_back();
  if (context) context_stack.push_back(context);
  return SUCCESS;
}

API cuCtxPushCurrent_v2(Context* context) {
  BEGIN_ANYWHERE();
  if (!context) return INVALID_CONTEXT;
  context_stack.push_back(context);
  return SUCCESS;
}

// Also on a broken device: what was pushed can be taken back.
API cuCtxPopCurrent_v2(Context** context) {
  if (context_stack.empty()) return INVALID_CONTEXT;
  if (context) *context = context_stack.back();
  context_stack.pop_back();
  return SUCCESS;
}

API cuCtxGetDevice(int* device) {
  BEGIN();
  *device = current()->device;
  return SUCCESS;
}

API cuCtxSynchronize() {
  BEGIN();
  if (forbidden_in_capture()) return CAPTURE_UNSUPPORTED;
  return drain_all();
}

API cuGetProcAddress_v2(const char* name, void** function, int, uint64_t, int* status) {
  Dl_info info;
  dladdr((void*)&cuInit, &info);
  void* library = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  *function = nullptr;
  for (const char* suffix : {"_v2", ""})
    if (library && !*function) *function = dlsym(library, (std::string(name) + suffix).c_str());
  if (status) *status = *function ? 0 : 1;
  return *function ? SUCCESS : NOT_FOUND;
}
API cuGetProcAddress(const char* name, void** function, int version, uint64_t flags) {
  return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}
