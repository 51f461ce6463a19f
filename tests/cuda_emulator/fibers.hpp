// The state of the emulator, for its own files: fibers, meetings, the schedule.
//
// A fiber runs until it waits for others. `late` copies happen when they are waited for, early ones
// at once; where the schedule is `skewed` one warp runs until it is stuck before another moves.
// A failure ends the launch with a message; nothing of the block runs after it.
#pragma once
#include "block.hpp"
#include <deque>
#include <string>
#include <ucontext.h>
#include <vector>

// Every __shared__ array of the kernel is in this section, and is NaN when a block starts.
extern char __start_block_memory[], __stop_block_memory[];

namespace emulator {

constexpr uint32_t STATIC = 1u << 24;  // in a shared address: an array, no dynamic memory

struct Copy { uint32_t to; const void* from; uint32_t size; };
struct Fiber {
  ucontext_t context;
  int index;
  bool done;
  bool unpublished;                      // copies without a fence behind them
  std::string waits;                     // for what, while it does
  std::vector<Copy> open;                // copies since the last commit
  std::deque<std::vector<Copy>> groups;  // committed and not waited for
};
struct Meeting { const char* what = nullptr; int arrived = 0; long round = 0; void* slot[1024]; };

extern std::vector<Fiber> fibers;
extern Meeting block;
extern Fiber* now;
extern long stuck;  // switches since anything happened
extern int alive;
extern bool late;
extern std::vector<void (*)()> block_starts;  // what else of a block begins anew

[[noreturn]] void fail(const std::string& reason);
std::string where();
void yield();
void meet(Meeting& meeting, const char* what, int index, int count, void* brought, Action action,
          const void* context = nullptr);

}  // namespace emulator
