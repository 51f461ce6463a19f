// One block of threads on one thread of the CPU: fibers, shared memory, meetings, schedules.
#include "fibers.hpp"
#include <csignal>
#include <cstdio>
#include <sys/mman.h>
#include <unistd.h>

Dim threadIdx, blockIdx;

// The section exists where a kernel has no array too.
static __attribute__((section("block_memory"), used)) char first_byte;

namespace emulator {

constexpr size_t STACK = 1 << 16;

std::vector<Fiber> fibers;
Meeting block;
Fiber* now;
long stuck;
int alive;
bool late = true;
char* dynamic_memory;
std::vector<void (*)()> block_starts;

static Dim size;
static std::vector<Meeting> warps;
static ucontext_t home;
static bool skewed = false;
static void (*body)(const void*);
static const void* kernel;
static std::string message;
static size_t dynamic_size;

void fail(const std::string& reason) {
  message = reason;
  setcontext(&home);
  __builtin_unreachable();
}

std::string where() {
  char text[96];
  snprintf(text, sizeof text, " (block %d, thread %d)", blockIdx.x, now->index);
  return text;
}

void fail(const char* what, const char* rest) { fail(std::string(what) + rest); }
void fail_here(const char* what) { fail(what + where()); }

// "for mbarrier 16777216: 128..255" and so on, of the threads that are not done.
static std::string who_waits() {
  std::string text;
  for (size_t i = 0, first = 0; i < fibers.size(); i++) {
    bool last = i + 1 == fibers.size() || fibers[i + 1].waits != fibers[i].waits || fibers[i + 1].done != fibers[i].done;
    if (!last) continue;
    if (!fibers[i].done) text += "; " + std::to_string(first) + ".." + std::to_string(i) + " for " + fibers[i].waits;
    first = i + 1;
  }
  return text;
}

static void on_fault(int, siginfo_t*, void*) { fail_here("an access outside of all tensors and shared memory"); }

char* shared(uint32_t address, uint32_t bytes) {
  if (address >= STATIC) return __start_block_memory + (address - STATIC);
  if (address + bytes > dynamic_size) fail_here("an address behind the end of dynamic shared memory");
  return dynamic_memory + address;
}

// ---- switching --------------------------------------------------------------------------

static void enter(Fiber* fiber) {
  now = fiber;
  threadIdx = {fiber->index % size.x, fiber->index / size.x % size.y, fiber->index / size.x / size.y};
}

// The next fiber that is not done: of this warp while it `stays`, else of any.
static Fiber* after(Fiber* fiber, bool stays) {
  int count = fibers.size(), warp = fiber->index / 32 * 32, from = skewed ? warp + 31 : fiber->index;
  int width = std::min(32, count - warp);
  for (int i = 1; stays && i < width; i++)
    if (auto& next = fibers[warp + (fiber->index - warp + i) % width]; !next.done) return &next;
  for (int i = 1; i <= count; i++)
    if (auto& next = fibers[(from + i) % count]; !next.done) return &next;
  return fiber;
}

void yield() {
  static int spins;
  if (++stuck == 1) spins = 0;
  if (stuck > 8 * long(fibers.size()) + 256) fail("threads wait for each other for ever" + where() + who_waits());
  Fiber *was = now, *next = after(was, skewed && ++spins % 33);
  if (next == was) return;
  enter(next);
  swapcontext(&was->context, &next->context);
  enter(was);
}

void meet(Meeting& meeting, const char* what, int index, int count, void* brought, Action action,
          const void* context) {
  if (meeting.arrived && strcmp(meeting.what, what))
    fail(std::string("threads that must execute the same instruction do not: ") + meeting.what + " and " + what + where());
  meeting.what = what;
  meeting.slot[index] = brought;
  if (++meeting.arrived == count) {
    action(meeting.slot, context);
    meeting.arrived = 0;
    meeting.round++;
    stuck = 0;
    return;
  }
  now->waits = what;
  for (long round = meeting.round; meeting.round == round;) yield();
}

void warp(const char* what, void* brought, Action action, const void* context) {
  meet(warps[now->index / 32], what, now->index % 32, 32, brought, action, context);
}

static void start() {
  body(kernel);
  now->done = true;
  stuck = 0;
  if (block.arrived) fail_here("a thread ends while others wait at a barrier");
  if (!--alive) setcontext(&home);
  Fiber* next = after(now, false);
  enter(next);
  setcontext(&next->context);
}

// ---- launching --------------------------------------------------------------------------

static void reserve(size_t bytes) {  // dynamic shared memory, at the end of its pages
  static char* pages;
  static size_t length;
  size_t page = sysconf(_SC_PAGESIZE), needed = (bytes + 1023) / 1024 * 1024;
  if (pages) munmap(pages, length);
  size_t usable = (needed + page - 1) / page * page;
  length = usable + page;
  pages = (char*)mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  mprotect(pages + usable, page, PROT_NONE);
  dynamic_memory = pages + usable - needed;
  dynamic_size = bytes;
}

static void prepare(int threads) {
  static std::vector<char> stacks;
  if (stacks.size() < threads * STACK) stacks.resize(threads * STACK);
  memset(dynamic_memory, 0xff, dynamic_size);  // NaN
  memset(__start_block_memory, 0xff, __stop_block_memory - __start_block_memory);
  fibers = std::vector<Fiber>(threads);
  warps.assign((threads + 31) / 32, Meeting{});
  block = Meeting{};
  for (auto start_anew : block_starts) start_anew();
  alive = threads;
  stuck = 0;
  for (int i = 0; i < threads; i++) {
    Fiber& fiber = fibers[i];
    fiber.index = i;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = &stacks[i * STACK];
    fiber.context.uc_stack.ss_size = STACK;
    makecontext(&fiber.context, start, 0);
  }
}

void launch(Dim grid, Dim threads, int64_t bytes, void (*of_thread)(const void*), const void* captured) {
  if (!message.empty()) return;
  static char signal_stack[1 << 16];
  stack_t alternative{}, old_stack;
  alternative.ss_sp = signal_stack;
  alternative.ss_size = sizeof signal_stack;
  sigaltstack(&alternative, &old_stack);
  struct sigaction action{}, old_action;
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, &old_action);
  body = of_thread;
  kernel = captured;
  size = threads;
  volatile int blocks = grid.x * grid.y * grid.z;
  if (blocks < 1) message = "a grid of no blocks, which CUDA refuses";
  reserve(bytes);
  for (volatile int b = 0; b < blocks && message.empty(); b = b + 1) {
    blockIdx = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
    prepare(threads.x * threads.y * threads.z);
    enter(&fibers[0]);
    swapcontext(&home, &fibers[0].context);
  }
  sigaction(SIGSEGV, &old_action, nullptr);
  sigaltstack(&old_stack, nullptr);
}

}  // namespace emulator

extern "C" __attribute__((visibility("default"))) void emulator_schedule(int late, int skewed) {
  emulator::late = late;
  emulator::skewed = skewed;
  emulator::message.clear();
}
extern "C" __attribute__((visibility("default"))) const char* emulator_message() { return emulator::message.c_str(); }
