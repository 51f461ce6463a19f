/* Threads that share the tasks of parallel loops: whoever runs claims the next one.

   A launch publishes a job, wakes the workers that sleep, and claims tasks itself until none is
   left. It waits for tasks that a worker has claimed and not finished, and never for a worker that
   the system has not scheduled. (TVM's own pool hands each worker one task and waits for all.)

   The linker puts this file into every library for Linux. The loader (runtime/process/pool.py) uses the
   pool of the first library that a process loads, keeps that one loaded, and gives the address of
   its `moec_pool_launch` to all. Pointers to functions of pthread and tvm_ffi come from the loader:
   a library that named them would need the C library of the machine that compiled it.

   A job has a slot, which is never freed. Its ticket holds how many tasks it has and how many are
   claimed, in one word. To claim is to add one to that word: who comes late, when the slot has another
   job, claims a task of that one, or none. A claimed task keeps its job alive until it is finished. */

#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
  SLOTS = 16,  /* jobs at a time; a caller beyond them runs its tasks alone */
  MOST_THREADS = 1024,
  MOST_TASKS = 1 << 14, /* twice as many fit in a ticket, with claims by all threads behind the last */
  PARTS = 8,            /* of a loop for each thread: the last of them are soon done by any two */
  FEWEST_PARTS = 32,    /* of a loop: it may have no more than that many turns of unequal work */
  FUTEX_WAIT_PRIVATE = 128,
  FUTEX_WAKE_PRIVATE = 129,
};

/* TVM's types: ffi/c_api.h and runtime/c_backend_api.h. */
typedef struct {
  void *barrier;
  int32_t tasks;
} Group;
typedef int (*Run)(int task, Group *group, void *data);
typedef struct {
  int32_t type;
  uint32_t padding;
  int64_t value;
} Any;

typedef struct {
  _Atomic uint32_t ticket; /* tasks << 16 | claimed */
  _Atomic uint32_t taken;  /* by a caller */
  _Atomic uint32_t unfinished;
  _Atomic uint32_t sleeping; /* the caller, until no task is unfinished */
  _Atomic uint32_t failed;
  void *error; /* of tvm_ffi, of the first task that failed */
  Run run;
  void *data;
} __attribute__((aligned(128))) Slot;

typedef struct {
  int (*create_thread)(unsigned long *thread, const void *attributes, void *(*start)(void *),
                       void *argument);
  int (*detach_thread)(unsigned long thread);
  void (*take_error)(void **error);
  void (*raise_error)(void *error);
  void (*raise_text)(const char *kind, const char *text);
  int (*release)(void *object);
} Functions;

static Functions functions;
static Slot slots[SLOTS];
static _Atomic uint32_t started; /* 0: no worker; 1: a thread starts them; 2: they are there */
static _Atomic uint32_t threads; /* workers and one caller */
static uint32_t spins; /* looks for work before a thread sleeps */
static _Atomic uint32_t published __attribute__((aligned(128))); /* jobs; workers sleep on it */
static _Atomic uint32_t parked;                                  /* workers that sleep */
static __thread int inside; /* a task: what it launches runs in this thread alone */

extern __attribute__((weak)) void *__TVMBackendParallelLaunch;

static void sleep_while(_Atomic uint32_t *word, uint32_t value) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL);
}

static void wake(_Atomic uint32_t *word, int count) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count);
}

static void pause_core(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static uint32_t number(const char *variable, uint32_t otherwise) {
  const char *text = getenv(variable);
  uint32_t value = 0;
  if (!text || !*text)
    return otherwise;
  for (; *text >= '0' && *text <= '9'; text++) /* strtoul would ask for a new C library */
    value = value * 10 + (uint32_t)(*text - '0');
  return value;
}

static uint32_t tasks_of(uint32_t ticket) { return ticket >> 16; }
static uint32_t claimed_of(uint32_t ticket) { return ticket & 0xffff; }
static int all_claimed(uint32_t ticket) { return claimed_of(ticket) >= tasks_of(ticket); }

/* How many tasks it claimed and ran, until none was left. */
static int run_claimed(Slot *slot) {
  for (int count = 0;; count++) {
    if (all_claimed(atomic_load(&slot->ticket)))
      return count;
    uint32_t ticket = atomic_fetch_add(&slot->ticket, 1);
    if (all_claimed(ticket))
      return count;
    Group group = {NULL, (int32_t)tasks_of(ticket)};
    if (slot->run((int)claimed_of(ticket), &group, slot->data) &&
        !atomic_exchange(&slot->failed, 1))
      functions.take_error(&slot->error);
    if (atomic_fetch_sub(&slot->unfinished, 1) == 1 && atomic_load(&slot->sleeping))
      wake(&slot->unfinished, 1);
  }
}

static void *work(void *unused) {
  inside = 1;
  for (;;) {
    uint32_t jobs = atomic_load(&published);
    int count = 0;
    for (int i = 0; i < SLOTS; i++)
      count += run_claimed(&slots[i]);
    for (uint32_t i = 0; !count && i < spins; i++) {
      if (i < spins / 2)
        pause_core();
      else
        sched_yield(); /* some of the gaps between loops are long, and others may want the core */
      count = atomic_load(&published) != jobs;
    }
    if (count)
      continue;
    atomic_fetch_add(&parked, 1);
    sleep_while(&published, jobs);
    atomic_fetch_sub(&parked, 1);
  }
  return unused;
}

/* How many threads there are; 1 while another caller starts them. */
static uint32_t start(void) {
  uint32_t none = 0;
  if (atomic_load(&started) == 2)
    return atomic_load(&threads);
  if (!atomic_compare_exchange_strong(&started, &none, 1))
    return 1;
  uint32_t count = 1, most = number("TVM_NUM_THREADS", 1);
  spins = number("TVM_THREAD_POOL_SPIN_COUNT", 0);
  unsigned long thread;
  for (; count < most && count < MOST_THREADS; count++) { /* as many as the system allows */
    if (functions.create_thread(&thread, NULL, work, NULL))
      break;
    functions.detach_thread(thread);
  }
  atomic_store(&threads, count);
  atomic_store(&started, 2);
  return count;
}

static int run_alone(Run run, void *data, int tasks) {
  Group group = {NULL, tasks};
  for (int task = 0; task < tasks; task++)
    if (run(task, &group, data))
      return -1;
  return 0;
}

static Slot *free_slot(void) {
  for (int i = 0; i < SLOTS; i++) {
    uint32_t none = 0;
    if (atomic_compare_exchange_strong(&slots[i].taken, &none, 1))
      return &slots[i];
  }
  return NULL;
}

static void wait_for_claimed(Slot *slot) {
  for (uint32_t i = 0; i < spins && atomic_load(&slot->unfinished); i++)
    pause_core();
  atomic_store(&slot->sleeping, 1);
  for (uint32_t left; (left = atomic_load(&slot->unfinished));)
    sleep_while(&slot->unfinished, left);
}

static int raise_first(Slot *slot) {
  if (slot->error) {
    functions.raise_error(slot->error);
    functions.release(slot->error);
  } else {
    functions.raise_text("RuntimeError", "a task of a parallel loop failed");
  }
  return -1;
}

/* As TVMBackendParallelLaunch: `tasks` is 0 where it is ours to choose. */
int moec_pool_launch(Run run, void *data, int tasks) {
  uint32_t count = inside ? 1 : start();
  Slot *slot = count > 1 && tasks <= MOST_TASKS ? free_slot() : NULL;
  if (!slot)
    return run_alone(run, data, tasks ? tasks : 1);
  uint32_t parts = tasks ? (uint32_t)tasks : count * PARTS;
  if (!tasks && parts < FEWEST_PARTS)
    parts = FEWEST_PARTS;
  slot->run = run;
  slot->data = data;
  slot->error = NULL;
  atomic_store(&slot->failed, 0);
  atomic_store(&slot->sleeping, 0);
  atomic_store(&slot->unfinished, parts);
  atomic_store(&slot->ticket, parts << 16);
  atomic_fetch_add(&published, 1);
  if (atomic_load(&parked))
    wake(&published, (int)count - 1);
  inside = 1;
  run_claimed(slot);
  inside = 0;
  wait_for_claimed(slot);
  int code = atomic_load(&slot->failed) ? raise_first(slot) : 0;
  atomic_store(&slot->taken, 0);
  return code;
}

void moec_pool_connect(const Functions *given) { functions = *given; }

/* In a child, which has one thread and none of the parent's workers and callers. */
void moec_pool_forked(void) {
  for (int i = 0; i < SLOTS; i++) {
    atomic_store(&slots[i].ticket, 0);
    atomic_store(&slots[i].taken, 0);
  }
  atomic_store(&parked, 0);
  atomic_store(&started, 0);
}

/* The loops of this library are launched by the function at the address given. */
int __tvm_ffi_moec_pool_1(void *self, const Any *arguments, int32_t count, Any *result) {
  (void)self, (void)count, (void)result;
  if (&__TVMBackendParallelLaunch)
    __TVMBackendParallelLaunch = (void *)(intptr_t)arguments[0].value;
  return 0;
}
