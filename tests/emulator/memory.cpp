// Checks of memory: is there any, is it aligned, has it a value, does anybody else use it
// meanwhile?
//
// Every 4 bytes of shared and global memory have a cell that says who wrote and who read them last,
// and when; where bytes of such a word were used alone, each byte has. Time is counted in barriers:
// of all blocks together (`epoch`), and of each warp alone between those. Two threads of a block
// may use a byte, one of them to write, only if a barrier of both lies between; two blocks never.
// A barrier of some lanes of a warp counts as one of the whole warp.
#include <link.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "multiprocessor.h"

namespace emu {
namespace {

// Flags beside the number of a writer or reader.
enum : uint16_t {
  BY_ATOMIC = 0x8000,  // of a writer
  UNDER_WAY = 0x4000,  // of a writer: an asynchronous copy that nobody has waited for
  LANES = 0x8000,      // of a reader: others of its warp read too, after the warp's last barrier
  WARPS = 0x4000,      // of a reader: other warps read too, after the last barrier
  BLOCKS = 0x2000,     // of a reader: other blocks read too, in this launch
  BYTES = 0x1000,      // of a word's reader: look into the cells of the bytes
  NUMBER = kMaxThreads - 1
};

struct Cell {
  uint32_t written, read;  // epochs
  uint16_t writer, reader;
  uint16_t write_time, read_time;  // barriers of the warp
};

struct Memory {
  uintptr_t begin, end;
  const char* name;
  Cell *words, *bytes;
  bool shared;
};

constexpr size_t kArena = 2 << 20, kGap = 4096, kMaxStatic = 48 << 10;
constexpr int kMaxArrays = 64, kMaxRanges = 1 << 16;
char* arena;  // where all shared arrays are, with gaps between
Cell *arena_words, *arena_bytes;
Memory arrays[kMaxArrays];
int array_count;
size_t arena_used, static_bytes;

Memory* globals;  // sorted
int global_count;

void* reserve(size_t bytes) {
  return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
              -1, 0);
}

Cell* cells(size_t bytes) { return (Cell*)reserve((bytes + 4) * sizeof(Cell)); }

unsigned warp_of(unsigned thread) { return thread / 32; }
uint16_t now_of_warp() { return mp.warp_time[mp.running / 32]; }

// ---- messages ----

const char* kAccess[] = {"read", "write", "atomic operation", "read", "copy"};

struct Who {
  char text[64];
  explicit Who(unsigned number) {
    const uint3& t = mp.thread[number & NUMBER].index;
    snprintf(text, sizeof text, "thread (%u,%u,%u)", t.x, t.y, t.z);
  }
};

struct Place {
  char text[200];
  Place(const Memory& m, uintptr_t p) {
    snprintf(text, sizeof text, "byte %zu of %s '%s'", (size_t)(p - m.begin),
             m.shared ? "shared memory" : "tensor", m.name);
  }
};

[[noreturn]] void race(const Memory& m, uintptr_t p, const char* mine, unsigned other,
                       const char* theirs, bool same_block) {
  Place place(m, p);
  if (!same_block) fail("race: %s of %s, which another block %s", mine, place.text, theirs);
  fail("race: %s of %s, which %s %s with no barrier between", mine, place.text, Who(other).text,
       theirs);
}

[[noreturn]] void outside(uintptr_t p, size_t bytes, Access access, char space) {
  const char* what = space == 's' ? "shared memory" : space == 'g' ? "tensor" : "tensor and array";
  const Memory* nearest = nullptr;
  uintptr_t best = 1 << 20;
  auto look = [&](const Memory& m) {
    if ((space == 's' && !m.shared) || (space == 'g' && m.shared)) return;
    uintptr_t away = p < m.begin ? m.begin - p : p >= m.end ? p - m.end : 0;
    if (away < best) best = away, nearest = &m;
  };
  for (int i = 0; i < global_count; i++) look(globals[i]);
  for (int i = 0; i < array_count; i++) look(arrays[i]);
  if (!nearest) fail("%s of %zu bytes outside every %s", kAccess[access], bytes, what);
  fail("%s of %zu bytes outside every %s: at byte %td of '%s', which has %zu", kAccess[access],
       bytes, what, (ptrdiff_t)(p - nearest->begin), nearest->name,
       (size_t)(nearest->end - nearest->begin));
}

// ---- one cell ----

// Whether what another thread of this block did at that time may come before or after now.
bool unordered(uint32_t epoch, unsigned thread, uint16_t time) {
  if (epoch != mp.epoch) return false;
  return warp_of(thread) != warp_of(mp.running) || time == now_of_warp();
}

void check_last_write(const Memory& m, const Cell& c, uintptr_t p, Access access) {
  if (c.written < mp.launch_epoch) return;
  const char* mine = kAccess[access];
  const char* theirs = c.writer & BY_ATOMIC ? "changed atomically" : "wrote";
  bool both_atomic = access == ATOMIC && c.writer & BY_ATOMIC;
  if (c.written < mp.block_epoch) {
    if (!both_atomic && !m.shared) race(m, p, mine, 0, theirs, false);
    return;
  }
  unsigned thread = c.writer & NUMBER;
  if (c.writer & UNDER_WAY)
    fail("%s of %s while an asynchronous copy of %s to it is under way: no wait for it", mine,
         Place(m, p).text, Who(thread).text);
  if (access == READ_ONLY)
    fail("read-only load of %s, which this kernel has written", Place(m, p).text);
  if (thread != mp.running && !both_atomic && unordered(c.written, thread, c.write_time))
    race(m, p, mine, thread, theirs, true);
}

void note_read(const Memory& m, Cell& c, uintptr_t p, Access access) {
  check_last_write(m, c, p, access);
  if (m.shared && c.written < mp.block_epoch)
    fail("read of %s, which nobody has written", Place(m, p).text);
  uint16_t kept = c.reader & BYTES, number = mp.running, time = now_of_warp();
  if (c.read >= mp.launch_epoch) {
    if (c.read < mp.block_epoch)
      kept |= BLOCKS;
    else {
      kept |= c.reader & BLOCKS;
      if (c.read == mp.epoch) {
        unsigned last = c.reader & NUMBER;
        if (c.reader & WARPS || warp_of(last) != warp_of(number))
          kept |= WARPS;
        else if (time == c.read_time && (last != number || c.reader & LANES))
          kept |= LANES;
      }
    }
  }
  c.read = mp.epoch, c.reader = kept | number, c.read_time = time;
}

void note_write(const Memory& m, Cell& c, uintptr_t p, Access access) {
  check_last_write(m, c, p, access);
  const char* mine = kAccess[access];
  if (c.read >= mp.launch_epoch && !m.shared && (c.reader & BLOCKS || c.read < mp.block_epoch))
    race(m, p, mine, 0, "read", false);
  if (c.read == mp.epoch) {
    unsigned last = c.reader & NUMBER;
    bool others = c.reader & LANES || last != mp.running;
    if (c.reader & WARPS || (others && unordered(c.read, last, c.read_time)))
      race(m, p, mine, last, "read", true);
  }
  c.written = mp.epoch, c.write_time = now_of_warp();
  c.writer = mp.running | (access == ATOMIC ? BY_ATOMIC : access == COPY ? UNDER_WAY : 0);
}

void visit(const Memory& m, Cell& c, uintptr_t p, Access access) {
  if (access == READ || access == READ_ONLY)
    note_read(m, c, p, access);
  else
    note_write(m, c, p, access);
}

template <class Visit>
void each_cell(const Memory& m, uintptr_t p, size_t bytes, Visit visit) {
  size_t from = p - m.begin, to = from + bytes;
  for (size_t word = from / 4; word * 4 < to; word++) {
    size_t low = word * 4 < from ? from : word * 4, high = word * 4 + 4 > to ? to : word * 4 + 4;
    Cell& c = m.words[word];
    if (!(c.reader & BYTES)) {
      if (high - low == 4) {
        visit(c, m.begin + low);
        continue;
      }
      for (int i = 0; i < 4; i++) m.bytes[word * 4 + i] = c;
      c.reader |= BYTES;
    }
    for (size_t i = low; i < high; i++) visit(m.bytes[i], m.begin + i);
  }
}

Memory* array_of(uintptr_t p) {
  for (int i = 0; i < array_count; i++)
    if (p >= arrays[i].begin && p < arrays[i].end) return &arrays[i];
  return nullptr;
}

Memory* global_of(uintptr_t p) {
  int low = 0, high = global_count;
  while (low < high) {
    int middle = (low + high) / 2;
    if (globals[middle].end <= p)
      low = middle + 1;
    else
      high = middle;
  }
  return low < global_count && globals[low].begin <= p ? &globals[low] : nullptr;
}

// Constants and variables of the kernels' own code: where this library is loaded.
uintptr_t code_begin, code_end;

int find_code(dl_phdr_info* info, size_t, void*) {
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto& part = info->dlpi_phdr[i];
    uintptr_t begin = info->dlpi_addr + part.p_vaddr, here = (uintptr_t)&find_code;
    if (part.p_type == PT_LOAD && here >= begin && here < begin + part.p_memsz)
      code_begin = info->dlpi_addr;
  }
  for (int i = 0; code_begin && code_begin == info->dlpi_addr && i < info->dlpi_phnum; i++) {
    const auto& part = info->dlpi_phdr[i];
    uintptr_t end = info->dlpi_addr + part.p_vaddr + part.p_memsz;
    if (part.p_type == PT_LOAD && end > code_end) code_end = end;
  }
  return code_begin != 0;
}

bool in_code(uintptr_t p) { return p >= code_begin && p < code_end; }

void access_at(uintptr_t p, size_t bytes, Access access, char space, unsigned align) {
  size_t from_stack = p - (uintptr_t)mp.stacks;
  if (from_stack < kMaxThreads * kStack) {
    if (space)
      fail("a local variable where only %s memory may be", space == 's' ? "shared" : "global");
    if (from_stack / kStack != mp.running)
      fail("%s of a local variable of another thread", kAccess[access]);
    return;
  }
  bool in_arena = p - (uintptr_t)arena < kArena;
  if ((space == 's' && !in_arena) || (space == 'g' && in_arena)) outside(p, bytes, access, space);
  Memory* m = in_arena ? array_of(p) : global_of(p);
  if (!m && !space && in_code(p)) return;
  if (!m || p + bytes > m->end) outside(p, bytes, access, space);
  if (p % align)
    fail("%s of %zu bytes at %s: not a multiple of %u", kAccess[access], bytes, Place(*m, p).text,
         align);
  each_cell(*m, p, bytes, [&](Cell& c, uintptr_t at) { visit(*m, c, at, access); });
}

Memory* add_array(const char* name, size_t bytes) {
  if (array_count == kMaxArrays || arena_used + bytes + kGap > kArena)
    fail("too much shared memory: array '%s' of %zu bytes", name, bytes);
  Memory& m = arrays[array_count++];
  size_t at = arena_used += kGap;
  m = {(uintptr_t)arena + at,
       (uintptr_t)arena + at + bytes,
       name,
       arena_words + at / 4,
       arena_bytes + at,
       true};
  arena_used = (arena_used + bytes + 63) / 64 * 64;
  return &m;
}

}  // namespace

void memory_begin() {
  if (!arena) {
    dl_iterate_phdr(find_code, nullptr);
    arena = (char*)reserve(kArena);
    arena_words = cells(kArena / 4), arena_bytes = cells(kArena);
    globals = (Memory*)reserve(kMaxRanges * sizeof(Memory));
  }
  array_count = 0, arena_used = 0, static_bytes = 0;
  for (int i = 0; i < global_count; i++) {
    size_t bytes = globals[i].end - globals[i].begin;
    munmap(globals[i].words, (bytes / 4 + 5) * sizeof(Cell));
    munmap(globals[i].bytes, (bytes + 4) * sizeof(Cell));
  }
  global_count = 0;
  for (size_t i = 0; checked && i < mp.launch->range_count; i++) {
    const Range& r = mp.launch->ranges[i];
    size_t bytes = r.end - r.begin;
    int at = global_count++;
    for (; at > 0 && globals[at - 1].begin > r.begin; at--) globals[at] = globals[at - 1];
    globals[at] = {r.begin, r.end, r.name, cells(bytes / 4 + 1), cells(bytes), false};
  }
}

// A pattern that is unlikely to be a right value: code without checks should fail too.
void block_begin() { memset(arena, 0xCB, arena_used); }

size_t shared_bytes() { return static_bytes + mp.launch->dynamic_shared; }

void* shared_array(const char* name, size_t bytes) {
  for (int i = 0; i < array_count; i++)
    if (arrays[i].name == name) return (void*)arrays[i].begin;
  static_bytes = (static_bytes + 15) / 16 * 16 + bytes;
  if (static_bytes > kMaxStatic)
    fail("%zu bytes of static shared memory, at most %zu", static_bytes, kMaxStatic);
  return (void*)add_array(name, bytes)->begin;
}

void* dynamic_shared() {
  static const char kName[] = "dynamic";
  for (int i = 0; i < array_count; i++)
    if (arrays[i].name == kName) return (void*)arrays[i].begin;
  return (void*)add_array(kName, mp.launch->dynamic_shared)->begin;
}

void touch(const void* p, size_t bytes, Access access, char space, unsigned align) {
  if (!checked || !bytes) return;
  mp.thread[mp.running].where = __builtin_return_address(0);
  access_at((uintptr_t)p, bytes, access, space, align);
}

// The bytes arrive: until now nobody may have touched them.
void land(const Copy& copy) {
  memcpy(copy.to, copy.from, copy.bytes);
  memset(copy.to + copy.bytes, 0, copy.size - copy.bytes);
  if (!checked) return;
  Memory* m = array_of((uintptr_t)copy.to);
  each_cell(*m, (uintptr_t)copy.to, copy.size, [](Cell& c, uintptr_t) {
    c.written = mp.epoch, c.write_time = now_of_warp(), c.writer = mp.running;
  });
}

}  // namespace emu

// ---- what g++ -fsanitize=thread,alignment,bounds,integer-divide-by-zero makes kernels call ----

#define HOOK extern "C" __attribute__((visibility("hidden"))) void
#define REPORT(p, n, access, align)                                      \
  {                                                                      \
    emu::mp.thread[emu::mp.running].where = __builtin_return_address(0); \
    emu::access_at((uintptr_t)p, n, emu::access, 0, align);              \
  }
#define HOOKS(n)                                                                         \
  HOOK __tsan_read##n(void* p) REPORT(p, n, READ, n) HOOK __tsan_write##n(void* p)       \
      REPORT(p, n, WRITE, n) HOOK __tsan_volatile_read##n(void* p) REPORT(p, n, READ, n) \
          HOOK __tsan_volatile_write##n(void* p) REPORT(p, n, WRITE, n)                  \
              HOOK __tsan_unaligned_read##n(void* p) REPORT(p, n, READ, 1)               \
                  HOOK __tsan_unaligned_write##n(void* p) REPORT(p, n, WRITE, 1)
HOOKS(1)
HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16) HOOK __tsan_read_range(void* p, size_t n)
    REPORT(p, n, READ, 1) HOOK __tsan_write_range(void* p, size_t n) REPORT(p, n, WRITE, 1) HOOK
    __tsan_func_entry(void*) {}
HOOK __tsan_func_exit() {}
HOOK __tsan_init() {}

// Descriptions that the compiler hands over, as far as they are needed.
struct Source {
  const char* file;
  unsigned line, column;
};
struct Mismatch {
  Source source;
  void* type;
  unsigned char log_align;
};
HOOK __ubsan_handle_type_mismatch_v1(Mismatch* at, uintptr_t p) {
  emu::mp.thread[emu::mp.running].where = __builtin_return_address(0);
  emu::fail("an address that is %d over a multiple of %d, which the type of the access needs",
            (int)(p % (1u << at->log_align)), 1 << at->log_align);
}
HOOK __ubsan_handle_out_of_bounds(void*, size_t index) {
  emu::mp.thread[emu::mp.running].where = __builtin_return_address(0);
  emu::fail("index %td outside of an array", (ptrdiff_t)index);
}
HOOK __ubsan_handle_divrem_overflow(void*, size_t, size_t) {
  emu::mp.thread[emu::mp.running].where = __builtin_return_address(0);
  emu::fail("integer division by zero, or one that overflows");
}
