/* The time of each call of a function: the wrapper that `moec profile` puts around kernels.

   The linker puts this file into every library for Linux, where nothing calls it. The loader
   (runtime/device/timed.py) gets the address of `timed_call`, creates a function of tvm_ffi from it for
   each kernel, with a `Timed` as its state, and lets the virtual machine call these. Pointers to
   functions of the C library and tvm_ffi come from the loader, as for pool.c. */

#include <stdint.h>
#include <time.h>

typedef struct {
  int32_t type;
  uint32_t padding;
  int64_t value;
} Any; /* of tvm_ffi */

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

static int timed_call(void *self, const void *arguments, int32_t count, void *result) {
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

/* A function of tvm_ffi, which returns the address as an integer (type 1). */
int __tvm_ffi_moec_timed_1(void *self, const void *arguments, int32_t count, Any *result) {
  (void)self, (void)arguments, (void)count;
  result->type = 1;
  result->value = (intptr_t)timed_call;
  return 0;
}
