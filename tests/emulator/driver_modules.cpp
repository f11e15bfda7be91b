// Modules and launches of the stand-in for libcuda.so.1, see driver.h.
#include <dlfcn.h>
#include <elf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "driver.h"

using namespace emu;

// ---- modules: libraries that g++ made, from memory; or "PTX", which is their source ----

namespace {

// The library's bytes from what the "PTX" compiler of this toolkit makes of it.
bool compile_ptx(const char* text, std::string& image) {
  const char* compiler = getenv("EMU_NVCC");
  if (!compiler) return false;
  char folder[] = "/tmp/emu-jit-XXXXXX";
  if (!mkdtemp(folder)) return false;
  std::string ptx = std::string(folder) + "/k.ptx", cubin = std::string(folder) + "/k.cubin";
  if (FILE* file = fopen(ptx.c_str(), "w")) {
    fputs(text, file);
    fclose(file);
  }
  std::string arch = "sm_" + std::to_string(driver.arch);
  std::string command =
      std::string(compiler) + " -cubin -arch=" + arch + " " + ptx + " -o " + cubin;
  bool good = system(command.c_str()) == 0;
  if (FILE* file = fopen(cubin.c_str(), "r")) {
    char part[65536];
    for (size_t n; (n = fread(part, 1, sizeof part, file)) > 0;) image.append(part, n);
    fclose(file);
  }
  unlink(ptx.c_str()), unlink(cubin.c_str()), rmdir(folder);
  return good;
}

int load(Module** module, const char* image) {
  std::string made;
  if (!strncmp(image, "//", 2) || strstr(image, ".version")) {
    int arch = 0;
    sscanf(image, "// emulator compute_%d", &arch);
    if (!arch) return INVALID_IMAGE;
    if (arch > driver.arch) return UNSUPPORTED_PTX_VERSION;
    if (!compile_ptx(image, made)) return 218;  // CUDA_ERROR_INVALID_PTX
    image = made.data();
  }
  const Elf64_Ehdr* header = (const Elf64_Ehdr*)image;
  if (memcmp(image, ELFMAG, SELFMAG) || header->e_machine != EM_X86_64) return INVALID_IMAGE;
  size_t size = header->e_shoff + (size_t)header->e_shnum * header->e_shentsize;
  int file = memfd_create("cubin", MFD_CLOEXEC);
  if (file < 0 || write(file, image, size) != (ssize_t)size) return INVALID_IMAGE;
  std::string path = "/proc/self/fd/" + std::to_string(file);
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) fprintf(stderr, "emulator: %s\n", dlerror());
  // Its number stays taken: dlopen knows libraries by name.
  if (!library) return INVALID_IMAGE;
  const int* arch = (const int*)dlsym(library, "emu_arch");
  if (!arch || *arch / 10 != driver.arch / 10 || *arch > driver.arch) {
    dlclose(library);
    close(file);
    return NO_BINARY_FOR_GPU;
  }
  *module = new Module{library, (int (*)(Launch*))dlsym(library, "emu_launch"), path};
  driver.objects++;
  return SUCCESS;
}

}  // namespace

API cuModuleLoadData(Module** module, const void* image) {
  BEGIN();
  return load(module, (const char*)image);
}

API cuModuleLoadDataEx(Module** module, const void* image, unsigned, int*, void**) {
  BEGIN();
  return load(module, (const char*)image);
}

API cuModuleUnload(Module* module) {
  BEGIN();
  drain_all();
  dlclose(module->library);
  close(atoi(strrchr(module->path.c_str(), '/') + 1));
  delete module;
  driver.objects--;
  return SUCCESS;
}

API cuModuleGetFunction(Function** function, Module* module, const char* name) {
  BEGIN();
  const Kernel* kernels = (const Kernel*)dlsym(module->library, "emu_kernels");
  for (const Kernel* k = kernels; k && k->name; k++)
    if (!strcmp(k->name, name)) {
      *function = new Function{module, k};  // as long as the process, like handles of the driver
      return SUCCESS;
    }
  return NOT_FOUND;
}

API cuModuleGetGlobal_v2(void** address, size_t* bytes, Module* module, const char* name) {
  BEGIN();
  void* found = dlsym(module->library, name);
  if (!found) return NOT_FOUND;
  Dl_info info;
  const Elf64_Sym* symbol = nullptr;
  dladdr1(found, &info, (void**)&symbol, RTLD_DL_SYMENT);
  if (address) *address = found;
  driver.variables[(uintptr_t)found] = symbol ? symbol->st_size : 0;
  if (bytes) *bytes = driver.variables[(uintptr_t)found];
  return SUCCESS;
}

API cuFuncGetAttribute(int* value, int attribute, Function* function) {
  BEGIN();
  const std::map<int, int> known = {
      {0, (int)function->kernel->threads}, {4, 32}, {8, function->dynamic_shared}};
  auto found = known.find(attribute);
  *value = found == known.end() ? 0 : found->second;
  return SUCCESS;
}

API cuFuncSetAttribute(Function* function, int attribute, int value) {
  BEGIN();
  if (attribute != 8) return SUCCESS;
  if (value < 0 || value > most_shared()) return INVALID_VALUE;
  function->dynamic_shared = value;
  return SUCCESS;
}

// ---- launches ----

API cuLaunchKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                   unsigned by, unsigned bz, unsigned shared, void* stream, void** params,
                   void** extra) {
  BEGIN();
  if (!function) return INVALID_HANDLE;
  if (extra || (int)shared > function->dynamic_shared) return INVALID_VALUE;
  uint64_t threads = (uint64_t)bx * by * bz;
  if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || !threads || bz > 64 || threads > 1024)
    return INVALID_VALUE;
  if (threads > function->kernel->threads) return 701;  // CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
  std::vector<std::string> values;
  for (unsigned i = 0; i < function->kernel->params; i++)
    values.emplace_back((const char*)params[i], function->kernel->sizes[i]);
  int device = current()->device;
  return submit(stream, [=]() mutable -> int {
    std::deque<std::string> names;
    std::vector<Range> ranges = all_memory(device, names);
    std::vector<void*> args;
    for (std::string& value : values) args.push_back(&value[0]);
    char message[1024];
    Launch launch = {function->kernel->name,
                     {gx, gy, gz},
                     {bx, by, bz},
                     shared,
                     (unsigned)most_shared(),
                     0,
                     600,
                     args.data(),
                     ranges.data(),
                     ranges.size(),
                     message,
                     sizeof message,
                     0};
    if (!function->module->launch(&launch)) return SUCCESS;
    fprintf(stderr, "emulator: %s\n", message);
    return breaks(ILLEGAL_ADDRESS);
  });
}

API cuLaunchHostFunc(void* stream, void (*function)(void*), void* data) {
  BEGIN();
  return submit(stream, [=] {
    function(data);
    return SUCCESS;
  });
}
