// A libcuda.so.1 of one GPU, as the environment describes it: what moec asks of the driver.
#include <stdlib.h>
#include <string.h>

static long number(const char* name, long otherwise) {
  const char* value = getenv(name);
  return value ? atol(value) : otherwise;
}

int cuInit(unsigned flags) { return number("FAKE_CUDA_BROKEN", 0); }
int cuDriverGetVersion(int* version) { *version = number("FAKE_CUDA_VERSION", 13000); return 0; }
int cuDeviceGetCount(int* count) { *count = number("FAKE_CUDA_GPUS", 1); return 0; }
int cuDeviceGet(int* device, int index) { *device = index; return 0; }
int cuDeviceGetName(char* name, int size, int device) { strncpy(name, "Fake GPU", size); return 0; }
int cuDeviceTotalMem_v2(size_t* bytes, int device) { *bytes = 80000000000; return 0; }
int cuDeviceGetAttribute(int* value, int code, int device) {
  long capability = number("FAKE_CUDA_CAPABILITY", 90);
  *value = code == 75 ? capability / 10 : capability % 10;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) { return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
int cuCtxPushCurrent_v2(void* context) { return 0; }
int cuCtxPopCurrent_v2(void** context) { return 0; }
int cuMemGetInfo_v2(size_t* free, size_t* total) {
  *free = number("FAKE_CUDA_FREE", 70000000000);
  return 0;
}
