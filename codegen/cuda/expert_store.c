/* Experts in memory of the host: their weights are copied into slots of the GPU's memory.

   As the store of experts on disk, whose policy this is; here slots are filled by copies on a stream
   of their own. `plan` waits for the routing of a layer, decides which expert is in which slot, and
   divides the experts into waves: first those that are in slots, then, as they are copied, at most half
   as many as there are slots. The host launches each product of the layer once for each wave
   (codegen/cuda/gemm/slots.py):

     begin   the stream of the kernels waits for the copies into the slots of the wave
     end     copies into these slots wait until the launch has ended, and are queued

   So a call may need more experts than there are slots, each is copied once, and copies of a wave run
   under the products of those before.

   All products of a layer have the same experts in their slots, so that one table is for all. Calls
   of a model take turns, and a plan waits for all kernels of the plans before. */

#include "../cpu/expert_store.c"

enum { CUDA = 2, TO_GPU = 1, TO_HOST = 2 }; /* DLPack's device type; cudaMemcpyKind */

typedef struct {
  char *slots;         /* in memory of the GPU */
  const char *experts; /* in memory of the host */
  int64_t bytes;       /* of an expert */
} Array;
typedef struct {
  int32_t layer, number; /* of the layer; of the product in its layer */
  int32_t arrays, products; /* products: how many the layer has */
  const Array *array;
} Product;
typedef struct { /* functions of the CUDA runtime, and of tvm_ffi */
  int (*set_device)(int device);
  int (*copy)(void *to, const void *from, size_t bytes, int kind, void *stream);
  int (*synchronize)(void *stream);
  int (*wait)(void *stream, void *event, unsigned flags);
  int (*record)(void *event, void *stream);
  const char *(*text_of)(int error);
  void *(*stream_of)(int32_t type, int32_t device);
} Cuda;
typedef struct {
  Cuda cuda;
  const Options *policy; /* a stack is a layer, and has no pieces */
  const Product *product;
  int32_t *table, *ends;  /* pinned memory of 2 * experts of all layers, and of the most experts */
  void *stream;           /* of copies */
  void *read;             /* the event: the latest launch has ended */
  void **filled;          /* the events, by product of a layer and wave: its slots are filled */
  int32_t device, most;   /* experts of a layer at most, and so waves */
} DeviceOptions;

typedef struct {
  int32_t *table, *due; /* by visit: the wave after whose launch its slot is free; -1 before all */
  int32_t *first;       /* by wave: its first visit */
  int32_t waves, hits, open; /* open: products of the latest plan that have not ended */
} Layer;
typedef struct {
  DeviceOptions options;
  Store *store;
  Layer *layer;
  int32_t *numbers;
} DeviceStore;

static DeviceStore *store_of(const int64_t *key) { return (DeviceStore *)(intptr_t)key[0]; }

static void *kernel_stream(const DeviceStore *d) { return d->options.cuda.stream_of(CUDA, d->options.device); }

/* 0, or -1 with an error of tvm_ffi. */
static int checked(const DeviceStore *d, int error) {
  if (!error)
    return 0;
  char text[200], *to = text;
  append(&to, text + 199, "CUDA: experts cannot be copied: ");
  append(&to, text + 199, d->options.cuda.text_of(error));
  d->store->options.raise_text("RuntimeError", text);
  return -1;
}

/* Queues the copies of a product that may begin after the launch of wave `after`, or at once. */
static int copy_due(DeviceStore *d, const Product *p, int after) {
  const Cuda *c = &d->options.cuda;
  const Layer *layer = &d->layer[p->layer];
  const Stack *of = &d->store->stack[p->layer];
  void *stream = d->options.stream;
  int error = 0, waits = after >= 0;
  for (int wave = layer->hits > 0; wave < layer->waves && !error; wave++) {
    int end = wave + 1 < layer->waves ? layer->first[wave + 1] : of->visits;
    if (layer->due[layer->first[wave]] != after)
      continue;
    if (waits)
      error = c->wait(stream, d->options.read, 0), waits = 0;
    for (int i = layer->first[wave]; i < end; i++)
      for (int j = 0; j < p->arrays && !error; j++) {
        const Array *a = &p->array[j];
        error = c->copy(a->slots + of->visit[i].slot * a->bytes,
                        a->experts + of->visit[i].expert * a->bytes, a->bytes, TO_GPU, stream);
        d->store->counts.bytes += a->bytes;
      }
    if (!error)
      error = c->record(d->options.filled[p->number * d->options.most + wave], stream);
  }
  return error;
}

/* Divides the visits of a plan into waves, and writes them into the table. */
static void divide(Store *s, int number, Layer *layer) {
  Stack *of = &s->stack[number];
  int experts = of->shape.experts, most = (of->shape.slots + 1) / 2, first = 0, wave = 0;
  layer->hits = 0;
  while (layer->hits < of->visits && of->visit[layer->hits].state == READY)
    layer->hits++;
  for (int i = 0; i < of->visits; i++)
    layer->due[i] = -1;
  for (int e = 0; e < experts; e++)
    layer->table[e] = 0, layer->table[experts + e] = -1;
  for (; first < of->visits; wave++) {
    int last = first;
    layer->first[wave] = first;
    while (last < (first < layer->hits ? layer->hits : of->visits) && of->visit[last].slot >= 0 &&
           layer->due[last] == layer->due[first] && (first < layer->hits || last - first < most)) {
      Visit *visit = &of->visit[last++];
      layer->table[visit->expert] = visit->slot, layer->table[experts + visit->expert] = wave;
      of->slot[visit->slot].state = FULL, of->slot[visit->slot].visit = -1;
    }
    int before = of->filled;
    fill(s, number);
    for (int i = before; i < of->filled; i++)
      layer->due[i] = i < layer->hits ? -1 : wave;
    first = last;
  }
  layer->waves = wave;
}

/* After a call that did not end, what is in slots is not known. */
static void forget_slots(Stack *of) {
  for (int i = 0; i < of->shape.slots; i++)
    of->slot[i] = (Slot){0, EMPTY, -1, 0, 0};
  for (int e = 0; e < of->shape.experts; e++)
    of->where[e] = -1;
}

/* ---- the interface of kernels' hosts ----------------------------------------------------- */

static const int64_t *key_of(const Tensor *key) { return (const int64_t *)(key->data + key->offset); }

/* How often the product of a key is launched. */
int32_t device_store_waves(const Tensor *key) {
  const DeviceStore *d = store_of(key_of(key));
  return d->layer[d->options.product[key_of(key)[1]].layer].waves;
}

int32_t device_store_begin(const Tensor *key, int32_t wave) {
  const DeviceStore *d = store_of(key_of(key));
  const Product *p = &d->options.product[key_of(key)[1]];
  if (wave == 0 && d->layer[p->layer].hits)
    return 0;
  void *filled = d->options.filled[p->number * d->options.most + wave];
  return checked(d, d->options.cuda.wait(kernel_stream(d), filled, 0));
}

int32_t device_store_end(const Tensor *key, int32_t wave) {
  DeviceStore *d = store_of(key_of(key));
  const Product *p = &d->options.product[key_of(key)[1]];
  Layer *layer = &d->layer[p->layer];
  int error = d->options.cuda.record(d->options.read, kernel_stream(d));
  lock(d->store);
  layer->open -= wave == layer->waves - 1;
  error = error ? error : copy_due(d, p, wave);
  unlock(d->store);
  return checked(d, error);
}

/* ---- the interface of the virtual machine and of the loader ----------------------------- */

/* (key i64[2] in memory of the host, ends i32[E], table i32[2 * E]): the slot of each expert, and then the
   wave in which it is multiplied. The key is the address of the store and the number of the product. */
int __tvm_ffi_moec_device_store_plan(void *self, const Any *arguments, int32_t count, Any *result) {
  const int64_t *key = data_of(&arguments[0]);
  DeviceStore *d = store_of(key);
  const Product *p = &d->options.product[key[1]];
  const Cuda *c = &d->options.cuda;
  Layer *layer = &d->layer[p->layer];
  Stack *of = &d->store->stack[p->layer];
  void *stream = kernel_stream(d);
  size_t experts = of->shape.experts;
  int error = c->set_device(d->options.device);
  error = error ? error : c->wait(stream, d->options.read, 0); /* which another stream may have been */
  error = error ? error : c->copy(d->options.ends, data_of(&arguments[1]), 4 * experts, TO_HOST, stream);
  error = error ? error : c->synchronize(stream);
  if (error)
    return checked(d, error);
  lock(d->store);
  if (layer->open)
    forget_slots(of);
  d->store->counts.calls++;
  start(d->store, p->layer, d->options.ends);
  divide(d->store, p->layer, layer);
  layer->open = layer->waves ? p->products : 0;
  for (int i = 0; i < p->products && !error; i++)
    error = copy_due(d, p + i, -1);
  unlock(d->store);
  error = error ? error : c->copy(data_of(&arguments[2]), layer->table, 8 * experts, TO_GPU, stream);
  return (void)self, (void)count, (void)result, checked(d, error);
}

/* (address of DeviceOptions, which stay in memory) -> the address of a store; 0 where there is no memory. */
int __tvm_ffi_moec_device_store_open(void *self, const Any *arguments, int32_t count, Any *result) {
  DeviceStore *d = calloc(1, sizeof *d);
  *result = (Any){1, 0, 0};
  if (!d)
    return 0;
  d->options = *(const DeviceOptions *)(intptr_t)arguments[0].value;
  const Options *policy = d->options.policy;
  Any address = {1, 0, (int64_t)(intptr_t)policy}, opened = {1, 0, 0};
  __tvm_ffi_moec_store_open(self, &address, 1, &opened);
  d->store = (Store *)(intptr_t)opened.value;
  size_t layers = policy->stacks, each = 2 * ((size_t)d->options.most + 1);
  d->layer = calloc(layers, sizeof *d->layer);
  d->numbers = calloc(layers * each, sizeof *d->numbers);
  if (!d->store || !d->layer || !d->numbers) {
    if (d->store)
      release(d->store);
    return free(d->layer), free(d->numbers), free(d), 0;
  }
  int32_t *table = d->options.table;
  for (size_t i = 0; i < layers; i++) {
    d->layer[i].table = table, table += 2 * policy->shape[i].experts;
    d->layer[i].due = d->numbers + i * each, d->layer[i].first = d->layer[i].due + each / 2;
  }
  result->value = (int64_t)(intptr_t)d;
  return (void)count, 0;
}

/* (address of a store): after its streams have ended. */
int __tvm_ffi_moec_device_store_close(void *self, const Any *arguments, int32_t count, Any *result) {
  DeviceStore *d = (DeviceStore *)(intptr_t)arguments[0].value;
  release(d->store);
  free(d->layer), free(d->numbers), free(d);
  return (void)self, (void)count, (void)result, 0;
}

/* (address of a store, of Counts): what happened since the last time. */
int __tvm_ffi_moec_device_store_counts(void *self, const Any *arguments, int32_t count, Any *result) {
  Store *s = ((DeviceStore *)(intptr_t)arguments[0].value)->store;
  lock(s);
  *(Counts *)(intptr_t)arguments[1].value = s->counts;
  s->counts = (Counts){0};
  unlock(s);
  return (void)self, (void)count, (void)result, 0;
}
