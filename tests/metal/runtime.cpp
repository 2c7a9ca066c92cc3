// Runs a Metal kernel on the CPU, one fiber a thread, and looks at every memory access before it happens.
//
// The kernel's file is compiled with -fsanitize=thread and finds the hooks below instead of libtsan. Reported are:
// accesses outside of buffers, writes to inputs, reads of what was never written, races (two threads, one of them
// writing, no barrier between), barriers and SIMD functions that not all threads reach, outputs left unwritten.
#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

#include "metal_subset.h"

using Kernel = void (*)(void* const* buffers);

namespace emulator {
namespace {

constexpr size_t GAP_BYTES = 64 << 10;  // between buffers, so that a wrong index hits none
constexpr size_t STACK_BYTES = 64 << 10;
constexpr size_t MOST_THREADS = 1024;
constexpr size_t MOST_SHARED_BYTES = 32 << 10;
constexpr int LANES = 32;
constexpr int MANY = -1;
constexpr unsigned char POISON = 0xFB;

// What happened to one value of an output or of threadgroup memory. Threads count from 1.
struct Cell {
  int writer = 0, reader = 0;
  long write_epoch = 0, read_epoch = 0;
  long write_simd_epoch = 0;
};

enum class Kind { input, output, shared };

struct Region {
  const char* name;
  Kind kind;
  char* start;
  size_t bytes, item_bytes;
  int id;
  std::vector<Cell> cells;
};

enum class Waits { no, for_simdgroup, for_threadgroup, done };

struct Fiber {
  jmp_buf resume;
  bool is_started = false;
  Waits waits = Waits::done;
  const char* function = nullptr;
  int line = 0;
  uint64_t agreed = 0;
  mem_flags flags = mem_flags::mem_none;
  long num_exchanges = 0;
  int index = 0, lane = 0, simdgroup = 0;
  uint3 position{};
};

struct Simdgroup {
  uint64_t posts[2][LANES];
  int present = 0;
  long epoch = 1;
};

Fiber fibers[MOST_THREADS];
Simdgroup simdgroups[MOST_THREADS / LANES];
char* stacks = nullptr;
ucontext_t starting;
jmp_buf scheduler, failed;
Fiber* current = nullptr;
std::vector<Region> regions;
void* pointers[64];  // static: the hooks know this file's memory
char *arena = nullptr, *arena_end = nullptr, *shared_next = nullptr;
size_t arena_bytes = 0, shared_bytes = 0;
Kernel kernel = nullptr;
struct Image {
  uintptr_t inside, start, end;
} images[2];  // of this library and of the kernel's: there lie what lanes posted, and constants
uint3 grid, group, threads, groups;
int num_threads = 0;
long device_epoch = 1, shared_epoch = 1, group_epoch = 1;
uint64_t seed = 1;
char message[512];

[[noreturn]] void fail(const char* format, ...) {
  int used = 0;
  if (current)
    used = snprintf(message, sizeof message, "thread (%u, %u, %u) of group (%u, %u, %u) ", current->position.x,
                    current->position.y, current->position.z, group.x, group.y, group.z);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message + used, sizeof message - used, format, arguments);
  va_end(arguments);
  longjmp(failed, 1);
}

uint64_t next_random() {
  seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
  return seed;
}

// 0 is in order, 1 reversed, all others shuffle.
void arrange(std::vector<int>& order, int kind) {
  int count = int(order.size());
  for (int i = 0; i < count; i++) order[i] = kind == 1 ? count - 1 - i : i;
  if (kind > 1)
    for (int i = count - 1; i > 0; i--) std::swap(order[i], order[next_random() % (i + 1)]);
}

void run_fiber() {
  for (;;) {
    kernel(pointers);
    current->waits = Waits::done;
    if (!_setjmp(current->resume)) longjmp(scheduler, 1);
  }
}

void switch_to(Fiber& fiber) {
  current = &fiber;
  if (!_setjmp(scheduler)) {
    if (fiber.is_started) longjmp(fiber.resume, 1);
    fiber.is_started = true;
    getcontext(&starting);
    starting.uc_stack.ss_sp = stacks + STACK_BYTES * fiber.index;
    starting.uc_stack.ss_size = STACK_BYTES;
    makecontext(&starting, run_fiber, 0);
    setcontext(&starting);
  }
  current = nullptr;
}

void wait(Waits waits, const char* function, int line) {
  current->waits = waits, current->function = function, current->line = line;
  if (!_setjmp(current->resume)) longjmp(scheduler, 1);
}

const char* told(const Fiber& fiber) { return fiber.waits == Waits::done ? "the end" : fiber.function; }

[[noreturn]] void fail_divergent(const Fiber& a, const Fiber& b) {
  fail("threads of one group diverge: thread %d waits at %s (line %d), thread %d at %s (line %d)", a.index, told(a),
       a.line, b.index, told(b), b.line);
}

// Lets the SIMD groups go on whose lanes all wait at one call; whether there are any.
bool release_simdgroups() {
  bool has_released = false;
  for (int first = 0; first < num_threads; first += LANES) {
    int end = std::min(first + LANES, num_threads), waiting = -1;
    for (int i = first; i < end; i++)
      if (fibers[i].waits == Waits::for_simdgroup) waiting = i;
    if (waiting < 0) continue;
    Fiber& one = fibers[waiting];
    for (int i = first; i < end; i++) {
      Fiber& other = fibers[i];
      if (other.waits != one.waits || other.line != one.line || other.function != one.function)
        fail_divergent(one, other);
      if (other.agreed != one.agreed) fail("lanes of a SIMD group ask %s (line %d) for different lanes", one.function, one.line);
    }
    for (int i = first; i < end; i++) fibers[i].waits = Waits::no;
    if (one.flags != mem_flags::mem_none) simdgroups[first / LANES].epoch++;
    has_released = true;
  }
  return has_released;
}

// Lets the threadgroup pass its barrier; false when it has ended.
bool release_threadgroup() {
  Fiber& one = fibers[0];
  for (int i = 1; i < num_threads; i++)
    if (fibers[i].waits != one.waits || (one.waits != Waits::done && fibers[i].line != one.line))
      fail_divergent(one, fibers[i]);
  if (one.waits == Waits::done) return false;
  if (int(one.flags) & int(mem_flags::mem_device)) device_epoch++;
  if (int(one.flags) & int(mem_flags::mem_threadgroup)) shared_epoch++;
  for (int i = 0; i < num_threads; i++) fibers[i].waits = Waits::no;
  return true;
}

void forget_shared() {
  while (!regions.empty() && regions.back().kind == Kind::shared) regions.pop_back();
  shared_bytes = 0;
}

void run_group(int kind) {
  uint3 size{std::min(threads.x, grid.x - group.x * threads.x), std::min(threads.y, grid.y - group.y * threads.y),
             std::min(threads.z, grid.z - group.z * threads.z)};
  num_threads = int(size.x * size.y * size.z);
  forget_shared();
  shared_next = arena_end;
  group_epoch = ++device_epoch;
  shared_epoch++;
  for (int i = 0; i < num_threads; i++) {
    Fiber& fiber = fibers[i];
    fiber.waits = Waits::no, fiber.index = i, fiber.lane = i % LANES, fiber.simdgroup = i / LANES;
    fiber.position = {uint(i) % size.x, uint(i) / size.x % size.y, uint(i) / size.x / size.y};
    fiber.num_exchanges = 0, fiber.line = 0, fiber.function = nullptr, fiber.flags = mem_flags::mem_none;
    simdgroups[i / LANES].present = i % LANES + 1, simdgroups[i / LANES].epoch++;
  }
  static std::vector<int> order;  // static: a failure jumps over destructors
  order.resize(num_threads);
  do {
    do {
      arrange(order, kind);
      for (int i : order)
        if (fibers[i].waits == Waits::no) switch_to(fibers[i]);
    } while (release_simdgroups());
  } while (release_threadgroup());
}

void look_at(Region& region, uintptr_t address, size_t bytes, bool is_write) {
  size_t offset = address - uintptr_t(region.start);
  const char* verb = is_write ? "writes" : "reads";
  long index = long(offset / region.item_bytes);
  if (offset + bytes > region.bytes)
    fail("%s %s[%ld], past its end (%zu values)", verb, region.name, index, region.bytes / region.item_bytes);
  if (region.kind == Kind::input) {
    if (is_write) fail("writes %s[%ld], an input", region.name, index);
    return;
  }
  bool is_shared = region.kind == Kind::shared;
  long epoch = is_shared ? shared_epoch : device_epoch, simd_epoch = simdgroups[current->simdgroup].epoch;
  int self = current->index + 1;
  auto is_ordered = [&](const Cell& cell) {  // by a barrier of the SIMD group that both are in
    return (cell.writer - 1) / LANES == current->simdgroup && cell.write_simd_epoch < simd_epoch;
  };
  for (size_t i = offset / region.item_bytes; i * region.item_bytes < offset + bytes; i++) {
    Cell& cell = region.cells[i];
    if (!is_write && !cell.writer) fail("reads %s[%ld], which nothing has been written to", region.name, long(i));
    if (!is_shared && cell.writer && cell.write_epoch < group_epoch)
      fail("%s %s[%ld], which another group has written", verb, region.name, long(i));
    if (cell.writer && cell.writer != self && cell.write_epoch == epoch && !is_ordered(cell))
      fail("%s %s[%ld], which thread %d has written with no barrier between", verb, region.name, long(i), cell.writer - 1);
    if (is_write && cell.reader && cell.reader != self && cell.read_epoch == epoch)
      fail("writes %s[%ld], which another thread has read with no barrier between", region.name, long(i));
    if (is_write) {
      cell.writer = self, cell.write_epoch = epoch, cell.write_simd_epoch = simd_epoch;
    } else {
      bool is_first = cell.read_epoch != epoch || cell.reader == self;
      cell.reader = is_first ? self : MANY, cell.read_epoch = epoch;
    }
  }
}

void access(void* pointer, size_t bytes, bool is_write) {
  if (!current) return;
  uintptr_t address = uintptr_t(pointer), own = uintptr_t(stacks) + STACK_BYTES * current->index;
  if (address >= own && address < own + STACK_BYTES) return;
  Region* nearest = nullptr;
  for (Region& region : regions)
    if (address >= uintptr_t(region.start)) {
      if (!nearest || region.start > nearest->start) nearest = &region;
    }
  if (nearest && address < uintptr_t(nearest->start) + nearest->bytes) return look_at(*nearest, address, bytes, is_write);
  for (const Image& image : images)
    if (address >= image.start && address < image.end && !is_write) return;
  const char* verb = is_write ? "writes" : "reads";
  if (address >= uintptr_t(arena) && address < uintptr_t(arena) + arena_bytes) {
    Region* closest = &regions[0];
    auto distance = [&](const Region& region) {
      uintptr_t start = uintptr_t(region.start), end = start + region.bytes;
      return address < start ? start - address : address - end;
    };
    for (Region& region : regions)
      if (distance(region) < distance(*closest)) closest = &region;
    fail("%s %s[%ld], outside of its %zu values", verb, closest->name,
         (long(address) - long(closest->start)) / long(closest->item_bytes), closest->bytes / closest->item_bytes);
  }
  fail("%s memory that is no buffer's", verb);
}

int find_image(dl_phdr_info* info, size_t, void*) {
  uintptr_t low = UINTPTR_MAX, high = 0;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    low = std::min<uintptr_t>(low, info->dlpi_addr + header.p_vaddr);
    high = std::max<uintptr_t>(high, info->dlpi_addr + header.p_vaddr + header.p_memsz);
  }
  for (Image& image : images)
    if (image.inside >= low && image.inside < high) image.start = low, image.end = high;
  return 0;
}

void* reserve(size_t bytes) {
  void* made = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (made == MAP_FAILED) abort();
  return made;
}

void prepare(size_t bytes) {
  if (!stacks) stacks = static_cast<char*>(reserve(STACK_BYTES * MOST_THREADS));
  if (bytes > arena_bytes) {
    if (arena) munmap(arena, arena_bytes);
    arena = static_cast<char*>(reserve(arena_bytes = bytes));
  }
}

}  // namespace

Posts exchange(const char* function, int line, uint64_t value, uint64_t agreed) {
  Simdgroup& own = simdgroups[current->simdgroup];
  uint64_t* posts = own.posts[current->num_exchanges++ % 2];
  posts[current->lane] = value;
  current->agreed = agreed, current->flags = mem_flags::mem_none;
  wait(Waits::for_simdgroup, function, line);
  return {posts, current->lane, own.present};
}

void wait_for_threadgroup(mem_flags flags, int line) {
  current->flags = flags;
  wait(Waits::for_threadgroup, "threadgroup_barrier", line);
}

void wait_for_simdgroup(mem_flags flags, int line) {
  current->flags = flags, current->agreed = 0;
  wait(Waits::for_simdgroup, "simdgroup_barrier", line);
}

int checked_lane(const char* function, int line, int lane) {
  if (lane >= simdgroups[current->simdgroup].present)
    fail("asks %s (line %d) for lane %d, which does not exist", function, line, lane);
  return lane;
}

void* shared(int id, const char* name, size_t bytes, size_t item_bytes) {
  for (Region& region : regions)
    if (region.kind == Kind::shared && region.id == id) return region.start;
  shared_bytes += bytes;
  if (shared_bytes > MOST_SHARED_BYTES)
    fail("needs %zu bytes of threadgroup memory, expected at most %zu", shared_bytes, MOST_SHARED_BYTES);
  char* start = shared_next + GAP_BYTES / 16;
  shared_next = start + (bytes + 63) / 64 * 64;
  memset(start, POISON, bytes);
  regions.push_back({name, Kind::shared, start, bytes, item_bytes, id, std::vector<Cell>(bytes / item_bytes)});
  return start;
}

uint3 position_in_threadgroup() { return current->position; }
uint3 group_position() { return group; }
uint3 group_size() { return threads; }
uint3 grid_size() { return grid; }
uint3 num_groups() { return groups; }
uint3 position_in_grid() {
  uint3 own = current->position;
  return {group.x * threads.x + own.x, group.y * threads.y + own.y, group.z * threads.z + own.z};
}
uint index_in_threadgroup() { return uint(current->index); }
uint simdgroup_index() { return uint(current->simdgroup); }
uint lane_index() { return uint(current->lane); }
uint num_simdgroups() { return uint(num_threads + LANES - 1) / LANES; }

float from_bfloat(uint16_t bits) { return unpack<float>(uint64_t(bits) << 16); }

uint16_t to_bfloat(float value) {
  uint32_t bits = uint32_t(pack(value));
  if (value != value) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

float from_half(uint16_t bits) {
  int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float size = exponent == 31  ? (fraction ? NAN : INFINITY)
               : exponent == 0 ? ldexpf(float(fraction), -24)
                               : ldexpf(float(fraction | 1024), exponent - 25);
  return bits & 0x8000 ? -size : size;
}

uint16_t to_half(float value) {
  uint16_t sign = uint16_t(pack(value) >> 16 & 0x8000);
  float size = fabsf(value);
  if (size != size) return sign | 0x7E00;
  if (size >= 65520.0f) return sign | 0x7C00;
  int exponent = std::max(size > 0 ? ilogbf(size) : -14, -14);
  long steps = lrintf(ldexpf(size, 10 - exponent));  // 1024 to 2047, below for subnormal numbers; ties to even
  return uint16_t(sign | (steps + (long(exponent + 14) << 10)));
}

}  // namespace emulator

extern "C" {

struct EmulatorBuffer {
  const char* name;
  void* data;
  uint64_t bytes, item_bytes;
  int32_t is_output;
};

// Runs a kernel once and copies its outputs to their buffers.
//
// `order` says in which order threads and groups run. Returns what went wrong, empty when nothing did.
const char* emulator_run(Kernel called, const EmulatorBuffer* buffers, int count, const uint32_t* grid_size,
                         const uint32_t* group_size, int order) {
  using namespace emulator;
  if (called != kernel) {
    kernel = called;
    images[0].inside = uintptr_t(&message), images[1].inside = uintptr_t(called);
    dl_iterate_phdr(find_image, nullptr);
  }
  size_t needed = 2 * GAP_BYTES + MOST_SHARED_BYTES;
  for (int i = 0; i < count; i++) needed += (buffers[i].bytes + 63) / 64 * 64 + GAP_BYTES;
  prepare(needed + 64 * GAP_BYTES / 16);
  regions.clear();
  current = nullptr, message[0] = 0, seed = 0x9E3779B97F4A7C15ull + order;
  char* next = arena + GAP_BYTES;
  for (int i = 0; i < count; i++) {
    const EmulatorBuffer& buffer = buffers[i];
    bool is_output = buffer.is_output;
    if (is_output)
      memset(next, POISON, buffer.bytes);
    else
      memcpy(next, buffer.data, buffer.bytes);
    std::vector<Cell> cells(is_output ? buffer.bytes / buffer.item_bytes : 0);
    regions.push_back(
        {buffer.name, is_output ? Kind::output : Kind::input, next, buffer.bytes, buffer.item_bytes, -1, std::move(cells)});
    pointers[i] = next;
    next += (buffer.bytes + 63) / 64 * 64 + GAP_BYTES;
  }
  arena_end = next;
  grid = {grid_size[0], grid_size[1], grid_size[2]};
  threads = {group_size[0], group_size[1], group_size[2]};
  if (_setjmp(failed)) {
    for (Fiber& fiber : fibers) fiber.is_started = false;
    return message;
  }
  if (!threads.x || !threads.y || !threads.z || uint64_t(threads.x) * threads.y * threads.z > MOST_THREADS)
    fail("a threadgroup is %u x %u x %u, expected 1 to %zu threads", threads.x, threads.y, threads.z, MOST_THREADS);
  groups = {(grid.x + threads.x - 1) / threads.x, (grid.y + threads.y - 1) / threads.y,
            (grid.z + threads.z - 1) / threads.z};
  static std::vector<int> group_order;
  group_order.resize(groups.x * groups.y * groups.z);
  arrange(group_order, order);
  for (int i : group_order) {
    group = {uint(i) % groups.x, uint(i) / groups.x % groups.y, uint(i) / groups.x / groups.y};
    run_group(order);
  }
  for (Region& region : regions)
    for (size_t i = 0; region.kind == Kind::output && i < region.cells.size(); i++)
      if (!region.cells[i].writer)
        fail("%s[%zu] was never written (an output of %zu values)", region.name, i, region.cells.size());
  for (int i = 0; i < count; i++)
    if (buffers[i].is_output) memcpy(buffers[i].data, pointers[i], buffers[i].bytes);
  return message;
}

#define HOOKS(size)                                                                   \
  void __tsan_read##size(void* p) { emulator::access(p, size, false); }               \
  void __tsan_write##size(void* p) { emulator::access(p, size, true); }               \
  void __tsan_unaligned_read##size(void* p) { emulator::access(p, size, false); }     \
  void __tsan_unaligned_write##size(void* p) { emulator::access(p, size, true); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, long size) { emulator::access(p, size, false); }
void __tsan_write_range(void* p, long size) { emulator::access(p, size, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

struct UbsanPlace {
  const char* file;
  uint32_t line, column;
};
#define UNDEFINED(name, what)                                                                   \
  void __ubsan_handle_##name(UbsanPlace* place, ...) { emulator::fail("%s in line %u", what, place->line); }
UNDEFINED(out_of_bounds, "indexes past an array")
UNDEFINED(add_overflow, "overflows an addition")
UNDEFINED(sub_overflow, "overflows a subtraction")
UNDEFINED(mul_overflow, "overflows a multiplication")
UNDEFINED(negate_overflow, "overflows a negation")
UNDEFINED(divrem_overflow, "divides by zero")
UNDEFINED(shift_out_of_bounds, "shifts by more bits than there are")
}
