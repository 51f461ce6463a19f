// One block of threads on one thread of the CPU: fibers, shared memory, meetings, schedules.
//
// A fiber runs until it waits for others. `late` copies happen when they are waited for, early ones
// at once; where the schedule is `skewed` one warp runs until it is stuck before another moves.
// A failure ends the launch with a message; nothing of the block runs after it.
#pragma once
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <vector>

struct Dim { int x = 1, y = 1, z = 1; };
static Dim threadIdx, blockIdx;

// Every __shared__ array of the kernel is in this section, and is NaN when a block starts.
static __attribute__((section("block_memory"), used)) char first_byte;
extern char __start_block_memory[], __stop_block_memory[];

namespace emulator {

constexpr size_t STACK = 1 << 16;
constexpr uint32_t STATIC = 1u << 24;  // in a shared address: an array, no dynamic memory

struct Copy { uint32_t to; const void* from; uint32_t size; };
struct Fiber {
  ucontext_t context;
  int index;
  bool done;
  std::string waits;                     // for what, while it does
  std::vector<Copy> open;                // copies since the last commit
  std::deque<std::vector<Copy>> groups;  // committed and not waited for
};
struct Meeting { const char* what = nullptr; int arrived = 0; long round = 0; void* slot[1024]; };

static Dim size;
static std::vector<Fiber> fibers;
static std::vector<Meeting> warps;
static Meeting block;
static Fiber* now;
static ucontext_t home;
static long stuck;  // switches since anything happened
static int alive;
static bool late = true, skewed = false;
static std::function<void()> body;
static std::string message;
static char* dynamic_memory;  // ends where a page without access begins
static size_t dynamic_size;
static std::vector<void (*)()> block_starts;  // what else of a block begins anew

[[noreturn]] static void fail(const std::string& reason) {
  message = reason;
  setcontext(&home);
  __builtin_unreachable();
}

static std::string where() {
  char text[96];
  snprintf(text, sizeof text, " (block %d, thread %d)", blockIdx.x, now->index);
  return text;
}

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

static void on_fault(int, siginfo_t*, void*) { fail("an access outside of all tensors and shared memory" + where()); }

static char* shared(uint32_t address, uint32_t bytes) {
  if (address >= STATIC) return __start_block_memory + (address - STATIC);
  if (address + bytes > dynamic_size) fail("an address behind the end of dynamic shared memory" + where());
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

static void yield() {
  static int spins;
  if (++stuck == 1) spins = 0;
  if (stuck > 8 * long(fibers.size()) + 256) fail("threads wait for each other for ever" + where() + who_waits());
  Fiber *was = now, *next = after(was, skewed && ++spins % 33);
  if (next == was) return;
  enter(next);
  swapcontext(&was->context, &next->context);
  enter(was);
}

// All `count` threads arrive with what they bring; the last one acts on all of it.
template <class Action>
static void meet(Meeting& meeting, const char* what, int index, int count, void* brought, Action action) {
  if (meeting.arrived && strcmp(meeting.what, what))
    fail(std::string("threads that must execute the same instruction do not: ") + meeting.what + " and " + what + where());
  meeting.what = what;
  meeting.slot[index] = brought;
  if (++meeting.arrived == count) {
    action(meeting.slot);
    meeting.arrived = 0;
    meeting.round++;
    stuck = 0;
    return;
  }
  now->waits = what;
  for (long round = meeting.round; meeting.round == round;) yield();
}

template <class Action>
static void warp(const char* what, void* brought, Action action) {
  meet(warps[now->index / 32], what, now->index % 32, 32, brought, action);
}

static void start() {
  body();
  now->done = true;
  stuck = 0;
  if (block.arrived) fail("a thread ends while others wait at a barrier" + where());
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

// After a failure nothing is launched until a schedule is set again.
static void launch(Dim grid, Dim threads, int64_t bytes, std::function<void()> kernel) {
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
  body = kernel;
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

extern "C" void emulator_schedule(int late, int skewed) {
  emulator::late = late;
  emulator::skewed = skewed;
  emulator::message.clear();
}
extern "C" const char* emulator_message() { return emulator::message.c_str(); }
