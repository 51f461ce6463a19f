// A stand-in for the driver and for the CUDA runtime, under which TVM's runtime for CUDA runs as it
// is: memory of the GPU is memory of the CPU, and a cubin is the path of emulated kernels.
//
// Streams are in order, so that everything has happened when a call returns. While a stream is
// captured, launches and copies are written down, and happen when the graph is launched; what may
// not be captured (allocating, freeing, waiting) is the error 900, as CUDA C++ Programming Guide,
// 3.2.8.7.3, has it. `counts` tells what was asked for.
// With RUNTIME defined this is libcudart, which shares the state of libcuda.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ALLOCATIONS, WAITS, LAUNCHES, COPIES, OTHER_STREAMS, HOST_COPIES, GRAPHS, KINDS };
enum { UNSUPPORTED = 900, MOST_OPS = 100000 };

#define WIDEST 128  // a tensor map
typedef struct { char name[256]; void* library; } Kernel;
typedef struct {
  Kernel* kernel;  // NULL: a copy
  int sizes[6], dynamic;
  char* values;  // of the arguments, WIDEST bytes each
  void *to, *from;
  size_t bytes;
} Op;
typedef struct { Op* ops; int count; } Graph;
typedef struct {
  unsigned grid[3], threads[3], shared;
  void *stream, *attributes;
  unsigned attribute_count;
} Config;

#ifndef RUNTIME

long counts[KINDS];
void* expected_stream;
Graph* captured;

void count_from_zero(void* stream) { memset(counts, 0, sizeof counts); expected_stream = stream; }
void on(void* stream) { counts[OTHER_STREAMS] += stream != expected_stream; }

static void* symbol(const Kernel* kernel, const char* prefix) {
  char name[300];
  snprintf(name, sizeof name, "%s_%s", prefix, kernel->name);
  return dlsym(kernel->library, name);
}

void run(Op* op) {
  if (!op->kernel) { memcpy(op->to, op->from, op->bytes); return; }
  void (*launch)(void**, const int*, int) = symbol(op->kernel, "launch");
  void* arguments[256];
  for (int i = 0; i < 256; i++) arguments[i] = op->values + WIDEST * i;
  launch(arguments, op->sizes, op->dynamic);
}

int now_or_later(Op op) {
  if (!captured) { run(&op); free(op.values); return 0; }
  captured->ops = realloc(captured->ops, (captured->count + 1) * sizeof(Op));
  captured->ops[captured->count++] = op;
  return 0;
}

// ---- the driver ----------------------------------------------------------------------------

int cuModuleLoadData(void** module, const void* image) {
  *module = dlopen(image, RTLD_NOW | RTLD_LOCAL);
  return *module ? 0 : 200;
}
int cuModuleUnload(void* module) { return 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
  Kernel* kernel = calloc(1, sizeof *kernel);
  strncpy(kernel->name, name, sizeof kernel->name - 1);
  kernel->library = module;
  *function = kernel;
  return symbol(kernel, "launch") ? 0 : 500;
}
int cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
int cuLaunchKernelEx(const Config* config, void* function, void** arguments, void** extra) {
  Op op = {.kernel = function, .dynamic = config->shared, .values = aligned_alloc(64, 256 * WIDEST)};
  const int* widths = symbol(op.kernel, "widths");
  for (int i = 0; widths[i]; i++) memcpy(op.values + WIDEST * i, arguments[i], widths[i]);
  for (int i = 0; i < 3; i++) op.sizes[i] = config->grid[i], op.sizes[3 + i] = config->threads[i];
  counts[LAUNCHES]++, on(config->stream);
  return now_or_later(op);
}
// As _encode of emulate.py: matrices of 16 bits.
int cuTensorMapEncodeTiled(long* map, int dtype, unsigned rank, void* base, const long* sizes,
                           const long* strides, const unsigned* box, const unsigned* steps,
                           int interleave, int swizzle, int promotion, int fill) {
  long values[] = {(long)base, sizes[0], sizes[1], strides[0], box[0], box[1], 2, swizzle};
  memcpy(map, values, sizeof values);
  return rank == 2 ? 0 : 801;
}
int cuGetErrorName(int code, const char** text) { *text = "CUDA_ERROR"; return 0; }
int cuGetErrorString(int code, const char** text) { *text = "an error of the driver"; return 0; }

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
int cuDeviceGetCount(int* count) { *count = 2; return 0; }
int cuDeviceGet(int* device, int index) { *device = index; return 0; }
int cuDeviceGetName(char* name, int size, int device) { strncpy(name, "Stand-in", size); return 0; }
int cuDeviceTotalMem_v2(size_t* bytes, int device) { *bytes = 80000000000; return 0; }
int cuDeviceGetAttribute(int* value, int code, int device) {
  *value = code == 75 ? 9 : 0;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) { return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
int cuCtxPushCurrent_v2(void* context) { return 0; }
int cuCtxPopCurrent_v2(void** context) { return 0; }
int cuMemGetInfo_v2(size_t* free, size_t* total) { return *free = *total = 70000000000, 0; }

#else

extern long counts[KINDS];
extern Graph* captured;
void on(void* stream);
void run(Op* op);
int now_or_later(Op op);
int cuMemGetInfo_v2(size_t* free, size_t* total);

// ---- the CUDA runtime ------------------------------------------------------------------------

int cudaSetDevice(int device) { return 0; }
int cudaGetDevice(int* device) { *device = 0; return 0; }
int cudaGetDeviceCount(int* count) { *count = 2; return 0; }
int cudaDeviceGetAttribute(int* value, int code, int device) { *value = code == 75 ? 9 : 1; return 0; }
int cudaGetDeviceProperties(void* properties, int device) { return 0; }
int cudaMemGetInfo(size_t* free, size_t* total) { return cuMemGetInfo_v2(free, total); }
int cudaMalloc(void** memory, size_t bytes) {
  counts[ALLOCATIONS]++;
  if (captured) return UNSUPPORTED;
  *memory = aligned_alloc(256, (bytes + 256) / 256 * 256);
  memset(*memory, 0xff, bytes);  // NaN
  return 0;
}
int cudaFree(void* memory) {
  if (captured) return UNSUPPORTED;
  free(memory);
  return 0;
}
int cudaMallocHost(void** memory, size_t bytes) { return cudaMalloc(memory, bytes); }
int cudaFreeHost(void* memory) { return cudaFree(memory); }
int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, void* stream) {
  counts[COPIES]++, on(stream);
  counts[HOST_COPIES] += kind == 1 || kind == 2;
  return now_or_later((Op){.to = to, .from = (void*)from, .bytes = bytes});
}
int cudaMemcpyPeerAsync(void* to, int a, const void* from, int b, size_t bytes, void* stream) {
  return cudaMemcpyAsync(to, from, bytes, 0, stream);
}
int cudaStreamSynchronize(void* stream) {
  counts[WAITS]++;
  return captured ? UNSUPPORTED : 0;
}
int cudaStreamCreate(void** stream) { *stream = malloc(1); return 0; }
int cudaStreamCreateWithFlags(void** stream, unsigned flags) { return cudaStreamCreate(stream); }
int cudaStreamDestroy(void* stream) { return 0; }
int cudaStreamWaitEvent(void* stream, void* event, unsigned flags) { return 0; }
int cudaEventCreate(void** event) { return 0; }
int cudaEventDestroy(void* event) { return 0; }
int cudaEventRecord(void* event, void* stream) { return 0; }
int cudaEventSynchronize(void* event) { counts[WAITS]++; return captured ? UNSUPPORTED : 0; }
int cudaEventElapsedTime(float* ms, void* a, void* b) { *ms = 0; return 0; }
const char* cudaGetErrorName(int code) { return "cudaError"; }
const char* cudaGetErrorString(int code) {
  return code == UNSUPPORTED ? "operation not permitted when stream is capturing" : "no error";
}
int cudaGetLastError() { return 0; }
int cudaPeekAtLastError() { return 0; }
int cudaStreamBeginCapture(void* stream, int mode) { captured = calloc(1, sizeof(Graph)); return 0; }
int cudaStreamEndCapture(void* stream, void** graph) { *graph = captured; captured = NULL; return 0; }
int cudaGraphInstantiate(void** exec, void* graph, unsigned long long flags) { *exec = graph; return 0; }
int cudaGraphLaunch(void* exec, void* stream) {
  Graph* graph = exec;
  counts[GRAPHS]++;
  for (int i = 0; i < graph->count; i++) run(&graph->ops[i]);
  return 0;
}
int cudaGraphDestroy(void* graph) { return 0; }
int cudaGraphExecDestroy(void* exec) { return 0; }

#endif
