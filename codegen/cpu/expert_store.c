/* Experts that stay on disk: their weights are read into slots while a kernel multiplies others.

   A stack is the weights of one product of a layer, for all of its experts, in one or more arrays
   (codes, scales, ...), its pieces. It has some slots, fewer than experts, each with room for the
   pieces of one expert. Before the first product of a layer, `plan` takes the experts that have rows:
   those in slots come first, then the others, which readers read in this order. A kernel visits the
   experts in the order of its plan, waits for the slot of each, and says when it is done with it: the
   slot may then be filled with an expert further behind. So a call may need more experts than there
   are slots, and each is read once.

   What is read of an expert for the first time is hashed, and refused if it is not what the artifact
   lists.

   Which experts are in slots changes no bit of a result: a kernel computes each row as it would from
   resident weights.

   The linker puts this file into every library for Linux. Pointers to functions of pthread and
   tvm_ffi come from the loader (runtime/expert_store/native.py), as in pool.c. All numbers of stacks,
   experts and slots come from the loader too, which checks them. */

#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { DIGEST = 32, PAGE = 4096, BOUNCE = 1 << 20, BLOCK = 1 << 20, SPINS = 2000, AGES = 4096, MOST_READERS = 8 };
enum { FUTEX_WAIT_PRIVATE = 128, FUTEX_WAKE_PRIVATE = 129 };
enum { LRU, LFU, SLRU };
enum { EMPTY, QUEUED, READING, FULL }; /* a slot */
enum { PENDING, READY, FAILED };       /* a visit */

typedef struct {
  int32_t type;
  uint32_t padding;
  int64_t value;
} Any;
typedef struct {
  char *data;
  int32_t device[2], axes;
  uint32_t dtype;
  int64_t *shape, *strides;
  uint64_t offset;
} Tensor;

typedef struct {
  int64_t start, bytes; /* of the first expert in the file; of each */
  char *memory;         /* of the slots */
  const unsigned char *digests; /* SHA-256 of each expert */
  int32_t file, direct; /* direct: the file was opened with O_DIRECT */
} Piece;
typedef struct {
  int32_t layer, first, count; /* the layer's first stack, and how many it has */
  int32_t experts, slots, pieces;
  const Piece *piece;
} Shape;
typedef struct {
  int (*create_thread)(unsigned long *thread, const void *attributes, void *(*start)(void *),
                       void *argument);
  int (*join_thread)(unsigned long thread, void **result);
  void (*raise_text)(const char *kind, const char *text);
  unsigned char *(*sha256)(const void *content, size_t size, unsigned char *digest); /* or NULL */
  const Shape *shape;
  int32_t stacks, readers, policy, half_life;
} Options;
typedef struct { /* since the last reading of the counts; times in ns */
  int64_t calls, visits, hits, bytes, read_ns, stall_ns;
} Counts;

typedef struct {
  int32_t expert, state, visit; /* visit: its number in the call under way, or -1 */
} Slot;
typedef struct {
  int32_t expert, slot, error;
  _Atomic int32_t state, finished;
} Visit;
typedef struct {
  Shape shape;
  Slot *slot;
  Visit *visit;
  int32_t *where; /* expert -> slot, or -1 */
  int64_t *last;  /* expert -> the call that used it last */
  char *trusted;  /* expert -> the digest of its weights was right */
  char *safe;     /* expert -> used again while it was in a slot, of which 4/5 of the slots remember */
  double *score;  /* expert -> uses, each of which counts half after `half_life` calls */
  int32_t visits, filled;
  int64_t call;
} Stack;
typedef struct {
  Options options;
  Stack *stack;
  Counts counts;
  pid_t process;
  unsigned long thread[MOST_READERS];
  _Atomic uint32_t lock, work, done; /* futexes: a mutex; changes of the queue, and of visits */
  int32_t stop, *queue;              /* of (stack, slot) */
  int32_t trust;                     /* how often the file was distrusted */
  uint32_t head, tail, room;
  int32_t failed_stack, failed_expert, failed_error; /* the latest failure of a read */
  _Atomic int64_t stall_ns;
  double decay[AGES];
} Store;

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static void sleep_while(_Atomic uint32_t *word, uint32_t value) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL);
}

static void wake_all(_Atomic uint32_t *word) {
  atomic_fetch_add(word, 1);
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1 << 30);
}

/* A mutex of three values: free, held, held with others that sleep. */
static void lock(Store *s) {
  uint32_t none = 0;
  if (atomic_compare_exchange_strong(&s->lock, &none, 1))
    return;
  while (atomic_exchange(&s->lock, 2))
    sleep_while(&s->lock, 2);
}

static void unlock(Store *s) {
  if (atomic_exchange(&s->lock, 0) == 2)
    syscall(SYS_futex, &s->lock, FUTEX_WAKE_PRIVATE, 1);
}

/* ---- reading -------------------------------------------------------------------------- */

/* 0; an errno; -1 where the file has become too short. `read` grows by the bytes that were read. */
static int read_span(int file, char *to, int64_t from, int64_t bytes, int64_t *read) {
  while (bytes > 0) {
    ssize_t n = pread(file, to, bytes < BLOCK ? bytes : BLOCK, from);
    if (n < 0 && errno != EINTR)
      return errno;
    if (!n)
      return -1;
    if (n > 0)
      to += n, from += n, bytes -= n, *read += n;
  }
  return 0;
}

/* The pages with `want` bytes from the start of one on: 0, an errno, or -1. */
static int read_pages(int file, char *to, int64_t from, int64_t want) {
  int64_t got = 0, rounded = (want + PAGE - 1) / PAGE * PAGE;
  while (got < want) { /* the end of the file may be in the middle of the last page */
    ssize_t n = pread(file, to + got, rounded - got, from + got);
    if (n < 0 && errno != EINTR)
      return errno;
    if (!n || (n > 0 && n % PAGE && got + n < want))
      return -1;
    got += n > 0 ? n : 0;
  }
  return 0;
}

/* Direct reads take whole pages, and what begins or ends in the middle of one is copied. */
static int read_piece(const Piece *p, int expert, int slot, char *bounce, int64_t *read) {
  int64_t from = p->start + expert * p->bytes, left = p->bytes;
  char *to = p->memory + slot * p->bytes;
  if (!p->direct || !((from | left | (int64_t)(intptr_t)to) % PAGE))
    return read_span(p->file, to, from, left, read);
  while (left > 0) {
    int64_t skip = from % PAGE, want = skip + left < BOUNCE ? skip + left : BOUNCE;
    int error = read_pages(p->file, bounce, from - skip, want);
    if (error)
      return error;
    memcpy(to, bounce + skip, want - skip);
    to += want - skip, from += want - skip, left -= want - skip, *read += want - skip;
  }
  return 0;
}

/* Whether an expert's bytes are not what was written. */
static int differs(const Store *s, const void *content, int64_t bytes, const unsigned char *digests,
                   int expert) {
  unsigned char digest[DIGEST];
  if (!s->options.sha256)
    return 0;
  s->options.sha256(content, bytes, digest);
  return memcmp(digest, digests + (int64_t)expert * DIGEST, DIGEST) != 0;
}

/* 0; -2 where an expert is not what was written. */
static int check_digests(const Store *s, const Stack *of, int expert, int slot) {
  for (int i = 0; i < of->shape.pieces; i++) {
    const Piece *p = &of->shape.piece[i];
    if (differs(s, p->memory + slot * p->bytes, p->bytes, p->digests, expert))
      return -2;
  }
  return 0;
}

static int take_queued(Store *s, int32_t *stack, int32_t *slot) {
  while (s->head != s->tail) {
    const int32_t *entry = s->queue + 2 * (s->head++ % s->room);
    *stack = entry[0], *slot = entry[1];
    if (s->stack[*stack].slot[*slot].state == QUEUED)
      return 1; /* else it was given up */
  }
  return 0;
}

static void fill(Store *s, int stack);

static void *read_queued(void *argument) {
  Store *s = argument;
  char *memory = malloc(BOUNCE + 2 * PAGE), *bounce = memory + (PAGE - (intptr_t)memory % PAGE);
  int32_t stack, number;
  lock(s);
  while (!s->stop) {
    if (!take_queued(s, &stack, &number)) {
      uint32_t work = atomic_load(&s->work);
      unlock(s);
      sleep_while(&s->work, work);
      lock(s);
      continue;
    }
    Stack *of = &s->stack[stack];
    Slot *slot = &of->slot[number];
    int expert = slot->expert, error = memory ? 0 : ENOMEM;
    int trusted = of->trusted[expert];
    int64_t begin = now_ns(), read = 0;
    int32_t trust = s->trust;
    slot->state = READING;
    unlock(s);
    for (int i = 0; i < of->shape.pieces && !error; i++)
      error = read_piece(&of->shape.piece[i], expert, number, bounce, &read);
    int64_t end = now_ns();
    if (!error && !trusted)
      error = check_digests(s, of, expert, number);
    lock(s);
    s->counts.read_ns += end - begin, s->counts.bytes += read;
    of->trusted[expert] |= !error && s->trust == trust;
    slot->state = error ? EMPTY : FULL;
    if (error)
      of->where[expert] = -1;
    if (error && slot->visit >= 0) {
      s->failed_stack = stack, s->failed_expert = expert, s->failed_error = error;
    }
    if (slot->visit >= 0) {
      of->visit[slot->visit].error = error;
      atomic_store(&of->visit[slot->visit].state, error ? FAILED : READY);
    } else
      fill(s, stack);
    wake_all(&s->done);
  }
  unlock(s);
  free(memory);
  return NULL;
}

static int start_readers(Store *s) {
  s->process = getpid();
  for (int i = 0; i < s->options.readers; i++)
    if (s->options.create_thread(&s->thread[i], NULL, read_queued, s))
      return s->options.readers = i, i > 0;
  return 1;
}

/* A child has none of the readers: what they were reading is lost. */
static void restart_after_fork(Store *s) {
  atomic_store(&s->lock, 0);
  for (int i = 0; i < s->options.stacks; i++)
    for (int j = 0; j < s->stack[i].shape.slots; j++) {
      Slot *slot = &s->stack[i].slot[j];
      if (slot->state == QUEUED || slot->state == READING) {
        slot->state = EMPTY;
        s->stack[i].where[slot->expert] = -1;
      }
    }
  s->head = s->tail = 0;
  start_readers(s);
}

/* ---- slots ---------------------------------------------------------------------------- */

static double worth(const Store *s, const Stack *of, int expert) {
  int64_t age = of->call - of->last[expert];
  if (s->options.policy != LFU)
    return 1e12 * of->safe[expert] - (double)age;
  double score = age < AGES ? of->score[expert] * s->decay[age] : 0;
  return score - 1e-9 * (double)age; /* of equal ones, the one that was not used for longest */
}

/* A slot for another expert; -1 if all are in use. */
static int free_slot(Store *s, Stack *of) {
  int best = -1;
  double least = 0;
  for (int i = 0; i < of->shape.slots; i++) {
    Slot *slot = &of->slot[i];
    if (slot->state == EMPTY)
      return i;
    if (slot->state != FULL || slot->visit >= 0)
      continue;
    double value = worth(s, of, slot->expert);
    if (best < 0 || value < least)
      best = i, least = value;
  }
  if (best >= 0) {
    int expert = of->slot[best].expert;
    of->where[expert] = -1, of->safe[expert] = 0, of->slot[best].state = EMPTY;
  }
  return best;
}

/* Queues reads of the next experts, as far as there are slots. */
static void fill(Store *s, int stack) {
  Stack *of = &s->stack[stack];
  int queued = 0;
  for (; of->filled < of->visits; of->filled++) {
    Visit *visit = &of->visit[of->filled];
    if (visit->slot >= 0)
      continue;
    int number = free_slot(s, of);
    if (number < 0)
      break;
    of->slot[number] = (Slot){visit->expert, QUEUED, of->filled};
    of->where[visit->expert] = visit->slot = number;
    int32_t *entry = s->queue + 2 * (s->tail++ % s->room);
    entry[0] = stack, entry[1] = number, queued = 1;
  }
  if (queued)
    wake_all(&s->work);
}

/* At most 4/5 of the slots are safe: those that were used last. */
static void limit_safe(Stack *of) {
  for (;;) {
    int count = 0, oldest = -1;
    for (int e = 0; e < of->shape.experts; e++) {
      count += of->safe[e];
      if (of->safe[e] && (oldest < 0 || of->last[e] < of->last[oldest]))
        oldest = e;
    }
    if (count <= of->shape.slots * 4 / 5)
      return;
    of->safe[oldest] = 0;
  }
}

static void use(Store *s, Stack *of, int expert) {
  int64_t age = of->call - of->last[expert];
  of->score[expert] = 1 + (age < AGES ? of->score[expert] * s->decay[age] : 0);
  of->last[expert] = of->call;
}

/* Begins a call of a layer: the order of the experts that have rows, by their `ends`. */
static void start(Store *s, int stack, const int32_t *ends) {
  Stack *of = &s->stack[stack];
  for (int i = 0; i < of->shape.slots; i++) { /* of a call that failed, too */
    Slot *slot = &of->slot[i];
    slot->visit = -1;
    if (slot->state == QUEUED)
      of->where[slot->expert] = -1, slot->state = EMPTY;
  }
  of->call++, of->visits = of->filled = 0;
  for (int full = 1; full >= 0; full--)
    for (int e = 0; e < of->shape.experts; e++) {
      int where = of->where[e], ready = where >= 0 && of->slot[where].state == FULL;
      if (ends[e] <= (e ? ends[e - 1] : 0) || ready != full)
        continue;
      Visit *visit = &of->visit[of->visits];
      visit->expert = e, visit->slot = where, visit->error = 0;
      atomic_store(&visit->state, ready ? READY : PENDING);
      atomic_store(&visit->finished, 0);
      if (where >= 0)
        of->slot[where].visit = of->visits;
      s->counts.hits += ready, s->counts.visits++, of->visits++;
      use(s, of, e);
      of->safe[e] = s->options.policy == SLRU && ready;
    }
  if (s->options.policy == SLRU)
    limit_safe(of);
  fill(s, stack);
}

/* ---- the interface of kernels ---------------------------------------------------------- */

static void append(char **to, const char *end, const char *text) {
  while (*text && *to < end)
    *(*to)++ = *text++;
  **to = 0;
}

static void append_number(char **to, const char *end, int number) {
  char digits[12], *at = digits + 11;
  unsigned value = number < 0 ? 0u - (unsigned)number : (unsigned)number;
  for (*at = 0; value || !*at; value /= 10)
    *--at = (char)('0' + value % 10);
  append(to, end, at);
}

/* The slot of a visit once it is filled; -1, with an error of tvm_ffi, if it cannot be. */
int32_t expert_store_wait(int64_t address, int32_t stack, int32_t number) {
  Store *s = (Store *)(intptr_t)address;
  Visit *visit = &s->stack[stack].visit[number];
  if (atomic_load(&visit->state) == PENDING) {
    int64_t begin = now_ns();
    for (int i = 0; i < SPINS && atomic_load(&visit->state) == PENDING; i++)
      ;
    for (;;) {
      uint32_t done = atomic_load(&s->done);
      if (atomic_load(&visit->state) != PENDING)
        break;
      sleep_while(&s->done, done);
    }
    atomic_fetch_add(&s->stall_ns, now_ns() - begin);
  }
  if (atomic_load(&visit->state) == READY)
    return visit->slot;
  char text[80], *to = text;
  append(&to, text + 79, "expert ");
  append_number(&to, text + 79, visit->expert);
  append(&to, text + 79, " cannot be read");
  s->options.raise_text("RuntimeError", text);
  return -1;
}

/* One of the `parts` of a kernel's work on a visit is done. */
int32_t expert_store_done(int64_t address, int32_t stack, int32_t number, int32_t parts) {
  Store *s = (Store *)(intptr_t)address;
  Visit *visit = &s->stack[stack].visit[number];
  if (atomic_fetch_add(&visit->finished, 1) + 1 < parts)
    return 0;
  lock(s);
  s->stack[stack].slot[visit->slot].visit = -1;
  fill(s, stack);
  unlock(s);
  return 0;
}

/* ---- the interface of the virtual machine and of the loader ----------------------------- */

/* A pointer to a DLTensor, or an object that has a header of 24 bytes before it. */
static const Tensor *tensor_of(const Any *a) {
  return (const Tensor *)(intptr_t)(a->value + (a->type >= 64 ? 24 : 0));
}

static void *data_of(const Any *a) {
  return tensor_of(a)->data + tensor_of(a)->offset;
}

/* (key i64[2], ends i32[E], rows, plan i32[E + 1]): how many experts the kernel visits, then which. The
   key is the address of the store and the number of the stack. */
int __tvm_ffi_moec_store_plan(void *self, const Any *arguments, int32_t count, Any *result) {
  const int64_t *key = data_of(&arguments[0]);
  const int32_t *ends = data_of(&arguments[1]);
  int32_t *plan = data_of(&arguments[count - 1]), stack = (int32_t)key[1];
  Store *s = (Store *)(intptr_t)key[0];
  Stack *of = &s->stack[stack];
  if (s->process != getpid())
    restart_after_fork(s);
  lock(s);
  if (of->shape.first == stack) {
    s->counts.calls++;
    for (int i = 0; i < of->shape.count; i++)
      start(s, stack + i, ends);
  }
  plan[0] = of->visits, plan[1] = 0;
  for (int i = 0; i < of->visits; i++)
    plan[1 + i] = of->visit[i].expert;
  unlock(s);
  return (void)self, (void)result, 0;
}

static int allocate(Store *s) {
  s->stack = calloc(s->options.stacks, sizeof *s->stack);
  for (int i = 0; s->stack && i < s->options.stacks; i++) {
    Stack *of = &s->stack[i];
    Shape shape = of->shape = s->options.shape[i];
    of->slot = calloc(shape.slots, sizeof *of->slot);
    of->visit = calloc(shape.experts, sizeof *of->visit);
    of->where = malloc(shape.experts * sizeof *of->where);
    of->last = calloc(shape.experts, sizeof *of->last);
    of->score = calloc(shape.experts, sizeof *of->score);
    of->trusted = calloc(shape.experts, 1);
    of->safe = calloc(shape.experts, 1);
    Piece *piece = malloc(shape.pieces * sizeof *piece);
    of->shape.piece = piece;
    if (!of->slot || !of->visit || !of->where || !of->last || !of->score || !of->trusted ||
        !of->safe || !piece)
      return 0;
    memcpy(piece, shape.piece, shape.pieces * sizeof *piece);
    for (int e = 0; e < shape.experts; e++)
      of->where[e] = -1;
    s->room += 4 * (uint32_t)shape.slots;
  }
  s->queue = calloc(s->room, 2 * sizeof *s->queue);
  return s->stack && s->queue;
}

static void release(Store *s) {
  for (int i = 0; s->stack && i < s->options.stacks; i++) {
    Stack *of = &s->stack[i];
    free(of->slot), free(of->visit), free(of->where), free(of->last), free(of->score);
    free(of->trusted), free(of->safe);
    free((void *)of->shape.piece);
  }
  free(s->stack), free(s->queue), free(s);
}

/* (address of Options) -> the address of a store; 0 where there is no
   memory, or no thread. */
int __tvm_ffi_moec_store_open(void *self, const Any *arguments, int32_t count, Any *result) {
  Store *s = calloc(1, sizeof *s);
  *result = (Any){1, 0, 0};
  if (!s)
    return 0;
  s->options = *(const Options *)(intptr_t)arguments[0].value;
  double step = 1, half = 1 / (double)s->options.half_life;
  step = 1 - 0.6931471805599453 * half + 0.2402265069591007 * half * half; /* about 2^-half */
  for (int i = 0; i < AGES; i++)
    s->decay[i] = i ? s->decay[i - 1] * step : 1;
  if (!allocate(s) || !start_readers(s))
    release(s);
  else
    result->value = (int64_t)(intptr_t)s;
  return (void)self, (void)count, 0;
}

/* (address of a store): before the memory of its slots is freed, as readers write into it. */
int __tvm_ffi_moec_store_close(void *self, const Any *arguments, int32_t count, Any *result) {
  Store *s = (Store *)(intptr_t)arguments[0].value;
  if (s->process == getpid()) {
    lock(s);
    s->stop = 1;
    unlock(s);
    wake_all(&s->work);
    for (int i = 0; i < s->options.readers; i++)
      s->options.join_thread(s->thread[i], NULL);
  }
  release(s);
  return (void)self, (void)count, (void)result, 0;
}

/* (address of a store): what is read from now on is hashed again. */
int __tvm_ffi_moec_store_distrust(void *self, const Any *arguments, int32_t count, Any *result) {
  Store *s = (Store *)(intptr_t)arguments[0].value;
  lock(s);
  s->trust++;
  for (int i = 0; i < s->options.stacks; i++)
    memset(s->stack[i].trusted, 0, s->stack[i].shape.experts);
  unlock(s);
  return (void)self, (void)count, (void)result, 0;
}

/* (address of a store, of Counts, of i32[3]): what happened since the last time; the stack, expert and
   error of the latest failed read, and -1 before one. */
int __tvm_ffi_moec_store_counts(void *self, const Any *arguments, int32_t count, Any *result) {
  Store *s = (Store *)(intptr_t)arguments[0].value;
  int32_t *failure = (int32_t *)(intptr_t)arguments[2].value;
  lock(s);
  s->counts.stall_ns = atomic_exchange(&s->stall_ns, 0);
  *(Counts *)(intptr_t)arguments[1].value = s->counts;
  failure[0] = s->failed_error ? s->failed_stack : -1;
  failure[1] = s->failed_expert, failure[2] = s->failed_error;
  s->counts = (Counts){0}, s->failed_error = 0;
  unlock(s);
  return (void)self, (void)count, (void)result, 0;
}
