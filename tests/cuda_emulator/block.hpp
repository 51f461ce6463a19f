// A block of threads as the instructions of a kernel see it. block.cpp runs it.
//
// A kernel includes declarations alone, so that it is compiled in half of the time.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

struct Dim { int x = 1, y = 1, z = 1; };
extern Dim threadIdx, blockIdx;

namespace emulator {

extern char* dynamic_memory;  // ends where a page without access begins

// The launch ends with this message, or with the block and thread of `fail_here` behind it.
[[noreturn]] void fail(const char* what, const char* rest = "");
[[noreturn]] void fail_here(const char* what);

// The memory at an address of shared memory, of which `bytes` must be there.
char* shared(uint32_t address, uint32_t bytes);

// All 32 threads of a warp arrive with what they bring; the last one acts on all of it.
using Action = void (*)(void** brought, const void* context);
void warp(const char* what, void* brought, Action action, const void* context = nullptr);

// After a failure nothing is launched until a schedule is set again.
void launch(Dim grid, Dim threads, int64_t bytes, void (*body)(const void*), const void* kernel);
template <class Kernel> static void launch(Dim grid, Dim threads, int64_t bytes, Kernel kernel) {
  launch(grid, threads, bytes, [](const void* kernel) { (*(const Kernel*)kernel)(); }, &kernel);
}

}  // namespace emulator
