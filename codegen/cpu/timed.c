/* The time of each call of a function: the wrapper that `moec profile` puts around kernels.

   The linker puts this file into every library for Linux, where nothing calls it. The loader
   (runtime/device/timed.py) creates functions of tvm_ffi from `moec_timed_1`, one for each kernel, with
   a `Timed` as their state, and lets the virtual machine call these. Pointers to functions of the C
   library and tvm_ffi come from the loader, as for pool.c. */

#include <stdint.h>
#include <time.h>

typedef struct {
  int64_t start, end; /* nanoseconds of the monotonic clock */
  int64_t function;   /* its number */
} Span;

typedef struct {
  int64_t count, room; /* spans that were begun, and those that fit */
  Span *spans;
  int (*clock)(clockid_t, struct timespec *);
  int (*call)(void *function, const void *arguments, int32_t count, void *result);
} Log;

typedef struct {
  Log *log;
  void *function;
  int64_t number;
} Timed;

static int64_t now(const Log *log) {
  struct timespec time;
  log->clock(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1000000000LL + time.tv_nsec;
}

__attribute__((visibility("default"))) int moec_timed_1(void *self, const void *arguments,
                                                        int32_t count, void *result) {
  Timed *timed = self;
  Log *log = timed->log;
  int64_t at = log->count++; /* calls of one library take turns */
  if (at >= log->room) return log->call(timed->function, arguments, count, result);
  Span *span = &log->spans[at];
  span->function = timed->number;
  span->start = now(log);
  int status = log->call(timed->function, arguments, count, result);
  span->end = now(log);
  return status;
}
