/* Experts that stay on disk: their weights are read into slots while a kernel multiplies others.

   A stack is the weights of one product of a layer, for all of its experts, in one or more arrays
   (codes, scales, ...), its pieces. It has some slots, fewer than experts, each with room for the
   pieces of one expert. Before the first product of a layer, `plan` takes the experts that have rows:
   those in slots come first, then the others, which readers read in this order. A kernel visits the
   experts in the order of its plan, waits for the slot of each, and says when it is done with it: the
   slot may then be filled with an expert further behind. So a call may need more experts than there
   are slots, and each is read once.

   A plan may come with a guess: the choices that the next layer is expected to make. Readers that have
   nothing else to read then read what is absent of them, into slots of that layer's least useful
   experts, until the layer's own plan says what it needs. A wrong guess is dropped between two blocks.

   An artifact may have a narrow copy of each expert, of few bits (narrow_copy.c). With a budget, the
   experts that carry the least routing weight in a call are then read from it and widened into their
   slots, as long as the share of the weight that they carry is within the budget. Without one, none.

   What is read of an expert for the first time is hashed, and refused if it is not what the artifact
   lists.

   Which experts are in slots changes no bit of a result, without a budget: a kernel computes each row
   as it would from resident weights.

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
enum { DROPPED = -3 };                 /* a read of a wrong guess */
enum { NEVER, ALWAYS, MEASURED };      /* guesses are used */
enum { WARM = 64, WINDOW = 8, TRIAL = 128, HELD = 4096 }; /* steps */

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
typedef struct {         /* the narrow copies of the first piece of a stack */
  int64_t start, bytes;  /* as in Piece; no bytes where there are none */
  int64_t elements;      /* of an expert */
  const unsigned char *digests;
  int32_t file, kind;    /* kind: of elements, see narrow_copy.c */
} Narrow;
typedef struct {
  int (*create_thread)(unsigned long *thread, const void *attributes, void *(*start)(void *),
                       void *argument);
  int (*join_thread)(unsigned long thread, void **result);
  void (*raise_text)(const char *kind, const char *text);
  unsigned char *(*sha256)(const void *content, size_t size, unsigned char *digest); /* or NULL */
  const Shape *shape;
  int32_t stacks, readers, policy, half_life;
  const Narrow *narrow; /* of each stack, or NULL */
  double budget;        /* the greatest share of the routing weight that they may carry */
} Options;
typedef struct { /* since the last reading of the counts; times in ns */
  int64_t calls, visits, hits, bytes, read_ns, stall_ns;
} Counts;
typedef struct { /* experts guessed, those used, those read early; bytes of those not used */
  int64_t guesses, right, early, vain;
} GuessCounts;
typedef struct { /* narrow copies that were read; routing weight of all calls, and what they carried */
  int64_t reads, bytes;
  double weight, carried;
} NarrowCounts;

typedef struct {
  int32_t expert, state, visit; /* visit: its number in the call under way, or -1 */
  int32_t guess, dropped;       /* it was read for a guess; which was wrong */
  int32_t narrow;               /* it has a narrow copy, widened */
} Slot;
typedef struct {
  const int32_t *dropped; /* of the slot */
  int64_t bytes;
} Progress;
typedef struct {
  int32_t expert, slot, error;
  _Atomic int32_t state, finished;
} Visit;
typedef struct {
  int32_t step, on;
  int64_t begun, ns[2], steps[2]; /* without guesses, and with */
} Trial;
typedef struct {
  Shape shape;
  Slot *slot;
  Visit *visit;
  int32_t *where; /* expert -> slot, or -1 */
  int64_t *last;  /* expert -> the call that used it last */
  char *trusted;  /* expert -> bits: the digest of its weights was right; of its narrow copy */
  char *safe;     /* expert -> used again while it was in a slot, of which 4/5 of the slots remember */
  char *guessed;  /* expert -> the next call is expected to use it */
  double *score;  /* expert -> uses, each of which counts half after `half_life` calls */
  char *narrow;   /* of a layer's first stack: expert -> the call may use its narrow copy */
  double *weight; /* and its routing weight in the call */
  double allowance; /* and what narrow copies may carry */
  int32_t visits, filled;
  int64_t call;
} Stack;
typedef struct {
  Options options;
  Stack *stack;
  Counts counts;
  GuessCounts guessed;
  NarrowCounts narrow;
  pid_t process;
  unsigned long thread[MOST_READERS];
  _Atomic uint32_t lock, work, done; /* futexes: a mutex; changes of the queue, and of visits */
  int32_t stop, *queue;              /* of (stack, slot) */
  int32_t trust;                     /* how often the file was distrusted */
  uint32_t head, tail, room;
  int32_t *guess, guesses, next_guess, demands; /* of (stack, expert): what is read when nothing else is */
  int32_t failed_stack, failed_expert, failed_error; /* the latest failure of a read */
  _Atomic int64_t stall_ns;
  Trial trial;
  int predict, guessing;
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

/* 0; an errno; -1 where the file has become too short; DROPPED. */
static int read_span(int file, char *to, int64_t from, int64_t bytes, Progress *progress) {
  while (bytes > 0) {
    if (__atomic_load_n(progress->dropped, __ATOMIC_RELAXED))
      return DROPPED;
    ssize_t n = pread(file, to, bytes < BLOCK ? bytes : BLOCK, from);
    if (n < 0 && errno != EINTR)
      return errno;
    if (!n)
      return -1;
    if (n > 0)
      to += n, from += n, bytes -= n, progress->bytes += n;
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
static int read_piece(const Piece *p, int expert, int slot, char *bounce, Progress *progress) {
  int64_t from = p->start + expert * p->bytes, left = p->bytes;
  char *to = p->memory + slot * p->bytes;
  if (!p->direct || !((from | left | (int64_t)(intptr_t)to) % PAGE))
    return read_span(p->file, to, from, left, progress);
  while (left > 0) {
    if (__atomic_load_n(progress->dropped, __ATOMIC_RELAXED))
      return DROPPED;
    int64_t skip = from % PAGE, want = skip + left < BOUNCE ? skip + left : BOUNCE;
    int error = read_pages(p->file, bounce, from - skip, want);
    if (error)
      return error;
    memcpy(to, bounce + skip, want - skip);
    to += want - skip, from += want - skip, left -= want - skip, progress->bytes += want - skip;
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
static int check_digests(const Store *s, const Stack *of, int expert, int slot, int first) {
  for (int i = first; i < of->shape.pieces; i++) {
    const Piece *p = &of->shape.piece[i];
    if (differs(s, p->memory + slot * p->bytes, p->bytes, p->digests, expert))
      return -2;
  }
  return 0;
}

void expert_store_widen(char *to, const uint8_t *copy, int64_t elements, int32_t kind);

/* Widens an expert's narrow copy into a slot; as read_span, and -2 where it is not what was written. */
static int read_narrow(const Store *s, const Narrow *n, int expert, char *to, char *buffer,
                       int trusted, Progress *progress) {
  int64_t from = n->start + expert * n->bytes, skip = from % PAGE;
  int error = read_pages(n->file, buffer, from - skip, skip + n->bytes);
  if (error)
    return error;
  progress->bytes += n->bytes;
  if (!trusted && differs(s, buffer + skip, n->bytes, n->digests, expert))
    return -2;
  expert_store_widen(to, (const uint8_t *)buffer + skip, n->elements, n->kind);
  return 0;
}

/* The narrow copies of a stack; NULL where none may be used. */
static const Narrow *narrow_of(const Store *s, int stack) {
  int some = s->options.narrow && s->options.budget > 0 && s->options.narrow[stack].bytes;
  return some ? &s->options.narrow[stack] : NULL;
}

/* The bytes of a reader's buffer for narrow copies. */
static int64_t narrow_room(const Store *s) {
  int64_t most = 0;
  for (int i = 0; i < s->options.stacks; i++) {
    const Narrow *n = narrow_of(s, i);
    most = n && n->bytes > most ? n->bytes : most;
  }
  return most ? most + 2 * PAGE : 0;
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

static int free_slot(Store *s, Stack *of);
static void fill(Store *s, int stack);

/* Guesses are read while nothing else is: they would share the disk with what a kernel waits for. */
static int take_guess(Store *s, int32_t *stack, int32_t *slot) {
  while (!s->demands && s->next_guess < s->guesses) {
    const int32_t *entry = s->guess + 2 * s->next_guess++;
    Stack *of = &s->stack[entry[0]];
    if (of->where[entry[1]] >= 0)
      continue;
    *stack = entry[0], *slot = free_slot(s, of);
    if (*slot < 0)
      continue;
    of->slot[*slot] = (Slot){entry[1], QUEUED, -1, 1, 0, 0};
    of->where[entry[1]] = *slot;
    return 1;
  }
  return 0;
}

static void *read_queued(void *argument) {
  Store *s = argument;
  char *memory = malloc(BOUNCE + 2 * PAGE + narrow_room(s));
  char *bounce = memory + (PAGE - (intptr_t)memory % PAGE), *buffer = bounce + BOUNCE;
  int32_t stack, number;
  lock(s);
  while (!s->stop) {
    if (!take_queued(s, &stack, &number) && !take_guess(s, &stack, &number)) {
      uint32_t work = atomic_load(&s->work);
      unlock(s);
      sleep_while(&s->work, work);
      lock(s);
      continue;
    }
    Stack *of = &s->stack[stack];
    Slot *slot = &of->slot[number];
    int expert = slot->expert, error = memory ? 0 : ENOMEM;
    int kind = 1 << slot->narrow, trusted = of->trusted[expert] & kind;
    const Narrow *narrow = slot->narrow ? narrow_of(s, stack) : NULL;
    Progress progress = {&slot->dropped, 0};
    int64_t begin = now_ns();
    int32_t trust = s->trust;
    int demand = !slot->guess;
    slot->state = READING, s->demands += demand;
    unlock(s);
    if (narrow && !error) {
      const Piece *p = of->shape.piece;
      error = read_narrow(s, narrow, expert, p->memory + number * p->bytes, buffer, trusted, &progress);
    }
    for (int i = narrow != NULL; i < of->shape.pieces && !error; i++)
      error = read_piece(&of->shape.piece[i], expert, number, bounce, &progress);
    int64_t end = now_ns();
    if (!error && !trusted)
      error = check_digests(s, of, expert, number, narrow != NULL);
    lock(s);
    if (narrow)
      s->narrow.reads++, s->narrow.bytes += progress.bytes;
    s->demands -= demand;
    if (!s->demands && s->next_guess < s->guesses)
      wake_all(&s->work);
    s->counts.read_ns += end - begin, s->counts.bytes += progress.bytes;
    s->guessed.vain += slot->dropped ? progress.bytes : 0;
    of->trusted[expert] |= !error && s->trust == trust ? kind : 0;
    slot->state = error || slot->dropped ? EMPTY : FULL;
    if (error && !slot->dropped)
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
        if (!slot->dropped)
          s->stack[i].where[slot->expert] = -1;
      }
    }
  s->head = s->tail = 0;
  s->guesses = s->next_guess = s->demands = 0;
  start_readers(s);
}

static int64_t bytes_of(const Stack *of) {
  int64_t bytes = 0;
  for (int i = 0; i < of->shape.pieces; i++)
    bytes += of->shape.piece[i].bytes;
  return bytes;
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
    if (slot->state != FULL || slot->visit >= 0 || of->guessed[slot->expert])
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

static int64_t id_at(const Tensor *ids, int64_t i) {
  const void *data = ids->data + ids->offset;
  return (ids->dtype >> 8 & 255) == 64 ? ((const int64_t *)data)[i] : ((const int32_t *)data)[i];
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
    int narrow = s->stack[of->shape.first].narrow[visit->expert] && narrow_of(s, stack);
    of->slot[number] = (Slot){visit->expert, QUEUED, of->filled, 0, 0, narrow};
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

/* The layer's call says which guesses were right: reads of the others end. */
static void judge(Store *s, Stack *of, const int32_t *ends) {
  for (int e = 0; e < of->shape.experts; e++) {
    int where = of->where[e], used = ends[e] > (e ? ends[e - 1] : 0);
    Slot *slot = where < 0 ? NULL : &of->slot[where];
    s->guessed.guesses += of->guessed[e], s->guessed.right += of->guessed[e] && used;
    of->guessed[e] = 0;
    if (!slot || !slot->guess)
      continue;
    slot->guess = 0;
    if (used)
      s->guessed.early++;
    else if (slot->state == READING)
      __atomic_store_n(&slot->dropped, 1, __ATOMIC_RELAXED), of->where[e] = -1;
    else
      s->guessed.vain += bytes_of(of);
  }
}

/* Element i of a tensor of routing weights; where it is no number, neither is the result. */
static double weight_at(const Tensor *weights, int64_t i) {
  const char *data = weights->data + weights->offset;
  int code = weights->dtype & 255, bits = weights->dtype >> 8 & 255;
  if (bits == 64)
    return ((const double *)data)[i];
  if (bits == 32)
    return (double)((const float *)data)[i];
  uint32_t half = ((const uint16_t *)data)[i], exponent = half & 0x7c00;
  int f16 = code == 2; /* else bf16 */
  uint32_t wide = f16 ? (half & 0x8000) << 16 | (half & 0x7fff) << 13 : half << 16;
  float x;
  memcpy(&x, &wide, sizeof x);
  if (!f16)
    return (double)x;
  return exponent == 0x7c00 ? 1e308 : (double)x * 0x1p112; /* the exponents begin 112 apart */
}

/* Whether a stack of the layer lacks the weights of an expert. */
static int lacks(const Store *s, const Stack *first, int expert) {
  for (int i = 0; i < first->shape.count; i++) {
    const Stack *of = &s->stack[first->shape.first + i];
    int where = of->where[expert];
    if (where < 0 || of->slot[where].narrow || of->slot[where].state == QUEUED)
      return 1;
  }
  return 0;
}

/* Chooses the experts of a layer's call that may be narrow: those of the least routing weight first,
   as far as the budget allows. What it left unused before counts half after `half_life` calls, so
   that a long text does not end in narrow experts only. */
static void choose_narrow(Store *s, Stack *of, const int32_t *ends, const Tensor *ids,
                          const Tensor *weights) {
  int64_t choices = ids->shape[0] * ids->shape[1];
  double total = 0;
  memset(of->weight, 0, of->shape.experts * sizeof *of->weight);
  for (int64_t i = 0; i < choices; i++) {
    int64_t e = id_at(ids, i);
    double weight = weight_at(weights, i);
    weight = weight < 0 ? -weight : weight;
    if (e >= 0 && e < of->shape.experts)
      total += weight, of->weight[e] += weight;
  }
  if (!(total < 1e300))
    return; /* some weight is no number */
  of->allowance = of->allowance * s->decay[1] + s->options.budget * total;
  s->narrow.weight += total;
  for (;;) {
    int least = -1;
    for (int e = 0; e < of->shape.experts; e++)
      if (ends[e] > (e ? ends[e - 1] : 0) && !of->narrow[e] &&
          (least < 0 || of->weight[e] < of->weight[least]) && lacks(s, of, e))
        least = e;
    if (least < 0 || of->weight[least] > of->allowance + 1e-12 * total)
      return;
    of->narrow[least] = 1, of->allowance -= of->weight[least];
    s->narrow.carried += of->weight[least];
  }
}

/* Gives up the narrow copies of experts whose weights a call needs. */
static void leave_narrow(Stack *of, const char *narrow, const int32_t *ends) {
  for (int e = 0; e < of->shape.experts; e++) {
    Slot *slot = of->where[e] < 0 ? NULL : &of->slot[of->where[e]];
    if (!slot || !slot->narrow || narrow[e] || ends[e] <= (e ? ends[e - 1] : 0))
      continue;
    if (slot->state == READING)
      __atomic_store_n(&slot->dropped, 1, __ATOMIC_RELAXED);
    else
      slot->state = EMPTY;
    of->where[e] = -1;
  }
}

/* Begins a call of a layer: the order of the experts that have rows, by their `ends`. */
static void start(Store *s, int stack, const int32_t *ends) {
  Stack *of = &s->stack[stack];
  judge(s, of, ends);
  for (int i = 0; i < of->shape.slots; i++) { /* of a call that failed, too */
    Slot *slot = &of->slot[i];
    slot->visit = -1;
    if (slot->state == QUEUED)
      of->where[slot->expert] = -1, slot->state = EMPTY;
  }
  leave_narrow(of, s->stack[of->shape.first].narrow, ends);
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

static void forget(Store *s, int first) {
  for (int j = first; j < first + s->stack[first].shape.count; j++)
    memset(s->stack[j].guessed, 0, s->stack[j].shape.experts);
  s->guesses = s->next_guess = 0;
}

/* The choices that the layer after `stack`'s is expected to make, where they fit in its slots: the
   likeliest column of each token first. */
static void expect(Store *s, int stack, const Tensor *ids) {
  const Shape *shape = &s->stack[stack].shape;
  int next = shape->first + shape->count;
  int64_t tokens = ids->shape[0], k = ids->shape[1];
  if (next >= s->options.stacks)
    return;
  const Shape *of = &s->stack[next].shape;
  int distinct = 0;
  forget(s, next);
  for (int64_t i = 0; i < tokens * k && distinct <= of->slots; i++) {
    int64_t e = id_at(ids, i % tokens * k + i / tokens);
    if (e < 0 || e >= of->experts || s->stack[next].guessed[e])
      continue;
    distinct++;
    for (int j = next; j < next + of->count; j++) {
      int32_t *entry = s->guess + 2 * s->guesses++;
      s->stack[j].guessed[e] = 1, entry[0] = j, entry[1] = (int32_t)e;
    }
  }
  if (distinct > of->slots)
    forget(s, next);
  if (s->guesses)
    wake_all(&s->work);
}

/* Whether a step uses guesses. Where that is measured, steps of few tokens are timed, in turns with
   guesses and without, and the faster way is used for the HELD steps that follow. */
static int begins_with_guesses(Store *s, int few) {
  Trial *t = &s->trial;
  if (s->predict != MEASURED)
    return s->predict == ALWAYS;
  int64_t begun = t->begun, now = now_ns();
  t->begun = few ? now : 0;
  if (!few)
    return t->on;
  if (begun && t->step > WARM && t->step <= WARM + TRIAL)
    t->ns[t->on] += now - begun, t->steps[t->on]++;
  if (t->step < WARM + TRIAL)
    t->on = t->step >= WARM && (t->step - WARM) / WINDOW % 2;
  else if (t->step == WARM + TRIAL)
    t->on = t->ns[1] * t->steps[0] < t->ns[0] * t->steps[1];
  if (++t->step == WARM + TRIAL + HELD)
    *t = (Trial){WARM, 0, 0, {0, 0}, {0, 0}};
  return t->on;
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

/* (key i64[2], ends i32[E], rows[, ids [T, k], weights [T, k]][, guess [T, k]], plan i32[E + 1]): how
   many experts the kernel visits, then which. The key is the address of the store and the number of
   the stack; the guess is of the choices of the next layer. Ids and weights are those of the routing,
   where there are narrow copies. */
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
    memset(of->narrow, 0, of->shape.experts);
    if (count >= 6 && s->options.narrow && s->options.budget > 0)
      choose_narrow(s, of, ends, tensor_of(&arguments[3]), tensor_of(&arguments[4]));
    for (int i = 0; i < of->shape.count; i++)
      start(s, stack + i, ends);
    s->guesses = s->next_guess = 0;
    int guesses = count % 2; /* ids and weights are two */
    if (guesses && stack == 0)
      s->guessing = begins_with_guesses(s, of->visits <= of->shape.slots);
    if (guesses && s->guessing)
      expect(s, stack, tensor_of(&arguments[count - 2]));
  }
  plan[0] = of->visits, plan[1] = 0;
  for (int i = 0; i < of->visits; i++)
    plan[1 + i] = of->visit[i].expert;
  unlock(s);
  return (void)self, (void)result, 0;
}

static int allocate(Store *s) {
  size_t experts = 0;
  if (s->options.narrow) {
    size_t bytes = s->options.stacks * sizeof(Narrow);
    void *narrow = malloc(bytes);
    s->options.narrow = narrow ? memcpy(narrow, s->options.narrow, bytes) : NULL;
    if (!narrow)
      return 0;
  }
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
    of->guessed = calloc(shape.experts, 1);
    of->narrow = calloc(shape.experts, 1);
    of->weight = calloc(shape.experts, sizeof *of->weight);
    Piece *piece = malloc(shape.pieces * sizeof *piece);
    of->shape.piece = piece;
    if (!of->slot || !of->visit || !of->where || !of->last || !of->score || !of->trusted ||
        !of->safe || !of->guessed || !of->narrow || !of->weight || !piece)
      return 0;
    memcpy(piece, shape.piece, shape.pieces * sizeof *piece);
    for (int e = 0; e < shape.experts; e++)
      of->where[e] = -1;
    s->room += 4 * (uint32_t)shape.slots;
    experts += (size_t)shape.experts;
  }
  s->queue = calloc(s->room, 2 * sizeof *s->queue);
  s->guess = calloc(experts, 2 * sizeof *s->guess);
  return s->stack && s->queue && s->guess;
}

static void release(Store *s) {
  for (int i = 0; s->stack && i < s->options.stacks; i++) {
    Stack *of = &s->stack[i];
    free(of->slot), free(of->visit), free(of->where), free(of->last), free(of->score);
    free(of->trusted), free(of->safe), free(of->guessed), free(of->narrow), free(of->weight);
    free((void *)of->shape.piece);
  }
  free(s->stack), free(s->queue), free(s->guess), free((void *)s->options.narrow), free(s);
}

/* (address of Options[, whether guesses are used]) -> the address of a store; 0 where there is no
   memory, or no thread. */
int __tvm_ffi_moec_store_open(void *self, const Any *arguments, int32_t count, Any *result) {
  Store *s = calloc(1, sizeof *s);
  *result = (Any){1, 0, 0};
  if (!s)
    return 0;
  s->options = *(const Options *)(intptr_t)arguments[0].value;
  s->predict = count > 1 ? (int)arguments[1].value : NEVER;
  double step = 1, half = 1 / (double)s->options.half_life;
  step = 1 - 0.6931471805599453 * half + 0.2402265069591007 * half * half; /* about 2^-half */
  for (int i = 0; i < AGES; i++)
    s->decay[i] = i ? s->decay[i - 1] * step : 1;
  if (!allocate(s) || !start_readers(s))
    release(s);
  else
    result->value = (int64_t)(intptr_t)s;
  return (void)self, 0;
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

/* (address of a store, of Counts, of i32[3][, of GuessCounts[, of NarrowCounts]]): what happened since the last time; the stack, expert
   and error of the latest failed read, and -1 before one. */
int __tvm_ffi_moec_store_counts(void *self, const Any *arguments, int32_t count, Any *result) {
  Store *s = (Store *)(intptr_t)arguments[0].value;
  int32_t *failure = (int32_t *)(intptr_t)arguments[2].value;
  lock(s);
  s->counts.stall_ns = atomic_exchange(&s->stall_ns, 0);
  *(Counts *)(intptr_t)arguments[1].value = s->counts;
  failure[0] = s->failed_error ? s->failed_stack : -1;
  failure[1] = s->failed_expert, failure[2] = s->failed_error;
  s->counts = (Counts){0}, s->failed_error = 0;
  if (count > 3)
    *(GuessCounts *)(intptr_t)arguments[3].value = s->guessed, s->guessed = (GuessCounts){0};
  if (count > 4)
    *(NarrowCounts *)(intptr_t)arguments[4].value = s->narrow, s->narrow = (NarrowCounts){0};
  unlock(s);
  return (void)self, (void)result, 0;
}
