/* Replaces the CUDA runtime and driver on a machine without a GPU. Device memory is host memory, streams and events do
   nothing, and no kernel can be launched. Everything else in torch's CUDA build is real: the caching allocator and its
   statistics, autograd's device threads, autocast, and the choice of an attention kernel for a compute capability. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <malloc.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cuda.h>
#include <cuda_runtime_api.h>

/* The headers rename some functions, and torch may ask for either name. */
#undef cudaGetDeviceProperties
#undef cudaEventElapsedTime
#undef cuLinkAddData
#undef cuLinkCreate
#undef cuGetProcAddress

static const size_t TOTAL_MEMORY = 141000000000ull;
static const size_t LARGEST_ALLOCATION = 12000000000ull; /* protects the memory of the host */

#define OK return cudaSuccess

/* Each wait of the host is reported to Python (mode.py). */
enum { DEVICE_SYNCHRONIZE = 10, STREAM_SYNCHRONIZE = 11 }; /* in addition to cudaMemcpyKind's values */
static void (*hook)(int kind, size_t bytes) = 0;
void emulated_gpu_hook(void (*function)(int, size_t)) { hook = function; }
static void tell(int kind, size_t bytes) { if (hook) hook(kind, bytes); }

/* The device */

static __thread int current = 0;

static int number(const char *variable, int otherwise) {
  const char *value = getenv(variable);
  return value ? atoi(value) : otherwise;
}
static int capability(void) { return number("EMULATED_GPU_CAPABILITY", 90); }

cudaError_t cudaGetDeviceCount(int *count) { *count = number("EMULATED_GPU_COUNT", 1); OK; }
cudaError_t cudaGetDevice(int *device) { *device = current; OK; }
cudaError_t cudaSetDevice(int device) { current = device; OK; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; OK; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; OK; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "emulated GPU");
  p->major = capability() / 10;
  p->minor = capability() % 10;
  p->totalGlobalMem = TOTAL_MEMORY;
  p->multiProcessorCount = 132; /* this value and those that follow: an H200 */
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 232448;
  p->sharedMemPerMultiprocessor = 233472;
  p->regsPerBlock = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->l2CacheSize = 52428800;
  p->totalConstMem = 65536;
  p->unifiedAddressing = 1;
  p->concurrentKernels = 1;
  OK;
}
cudaError_t cudaGetDeviceProperties_v2(struct cudaDeviceProp *p, int device) { return cudaGetDeviceProperties(p, device); }
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? capability() / 10
         : attribute == cudaDevAttrComputeCapabilityMinor ? capability() % 10
         : attribute == cudaDevAttrMultiProcessorCount ? 132 : 0;
  OK;
}
cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) { snprintf(id, length, "0000:%02x:00.0", device); OK; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; OK; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = 0; OK; }
cudaError_t cudaDeviceEnablePeerAccess(int device, unsigned flags) { OK; }

/* Memory */

static size_t used = 0;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define PINNED 4096
static struct { char *start; size_t bytes; } pinned[PINNED];

static void *allocate(size_t alignment, size_t bytes) {
  return aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
}
static void pin(char *start, size_t bytes) {
  pthread_mutex_lock(&lock);
  for (int i = 0; i < PINNED; i++)
    if (!pinned[i].start) { pinned[i].start = start; pinned[i].bytes = bytes; break; }
  pthread_mutex_unlock(&lock);
}
static void unpin(const char *start) {
  pthread_mutex_lock(&lock);
  for (int i = 0; i < PINNED; i++)
    if (pinned[i].start == start) pinned[i].start = 0;
  pthread_mutex_unlock(&lock);
}

cudaError_t cudaMemGetInfo(size_t *free, size_t *total) { *total = TOTAL_MEMORY; *free = TOTAL_MEMORY - used; OK; }
cudaError_t cudaMalloc(void **p, size_t bytes) {
  *p = bytes > LARGEST_ALLOCATION ? 0 : allocate(512, bytes);
  if (!*p) return cudaErrorMemoryAllocation;
  __sync_fetch_and_add(&used, malloc_usable_size(*p));
  OK;
}
cudaError_t cudaFree(void *p) { __sync_fetch_and_sub(&used, malloc_usable_size(p)); free(p); OK; }
cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned flags) {
  *p = allocate(4096, bytes);
  if (!*p) return cudaErrorMemoryAllocation;
  pin(*p, bytes);
  OK;
}
cudaError_t cudaFreeHost(void *p) { unpin(p); free(p); OK; }
cudaError_t cudaHostRegister(void *p, size_t bytes, unsigned flags) { pin(p, bytes); OK; }
cudaError_t cudaHostUnregister(void *p) { unpin(p); OK; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *p) {
  memset(attributes, 0, sizeof *attributes);
  attributes->type = cudaMemoryTypeUnregistered;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < PINNED; i++)
    if (pinned[i].start && (char *)p >= pinned[i].start && (char *)p < pinned[i].start + pinned[i].bytes)
      attributes->type = cudaMemoryTypeHost;
  pthread_mutex_unlock(&lock);
  OK;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
  tell(kind, bytes); memmove(to, from, bytes); OK;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
  tell(kind, bytes); memmove(to, from, bytes); OK;
}
cudaError_t cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t bytes, cudaStream_t stream) {
  memmove(to, from, bytes); OK;
}
cudaError_t cudaMemset(void *p, int value, size_t bytes) { memset(p, value, bytes); OK; }
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream) { memset(p, value, bytes); OK; }

/* Streams and events: every operation is finished when it returns */

cudaError_t cudaGetLastError(void) { OK; }
cudaError_t cudaPeekAtLastError(void) { OK; }
cudaError_t cudaDeviceSynchronize(void) { tell(DEVICE_SYNCHRONIZE, 0); OK; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { tell(STREAM_SYNCHRONIZE, 0); OK; }
cudaError_t cudaStreamQuery(cudaStream_t stream) { OK; }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) { OK; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = cudaStreamCaptureStatusNone; OK;
}
/* Its parameters differ between versions of CUDA; only the first two are used. */
int not_capturing(void *stream, int *status) __asm__("cudaStreamGetCaptureInfo");
int not_capturing(void *stream, int *status) { *status = cudaStreamCaptureStatusNone; return 0; }
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { OK; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) { *stream = malloc(8); OK; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { *stream = malloc(8); OK; }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { OK; }
cudaError_t cudaEventCreate(cudaEvent_t *event) { *event = malloc(8); OK; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { *event = malloc(8); OK; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { OK; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { OK; }
cudaError_t cudaEventQuery(cudaEvent_t event) { OK; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { OK; }
cudaError_t cudaEventDestroy(cudaEvent_t event) { OK; }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) { *milliseconds = 1; OK; }

/* Kernels: none */

cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t s, cudaStream_t t) { return cudaErrorLaunchFailure; }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) { return cudaErrorLaunchFailure; }
cudaError_t __cudaLaunchKernel(void *f, dim3 g, dim3 b, void **a, size_t s, cudaStream_t t) { return cudaErrorLaunchFailure; }
cudaError_t cudaFuncSetAttribute(const void *f, enum cudaFuncAttribute attribute, int value) { OK; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **p, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  *p = dlsym(RTLD_DEFAULT, name);
  if (result) *result = *p ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  OK;
}

/* Functions that libraries look up: they do nothing and report success. */

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) { *flags = 0; *active = 1; return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "emulated"; return CUDA_SUCCESS; }

#define NOTHING(name) int nothing_##name(void) __asm__(#name); int nothing_##name(void) { return 0; }
NOTHING(cudaDeviceGetDefaultMemPool) NOTHING(cudaDeviceGetGraphMemAttribute) NOTHING(cudaDeviceSetGraphMemAttribute)
NOTHING(cudaFuncGetAttributes) NOTHING(cudaGetSymbolAddress) NOTHING(cudaMallocAsync) NOTHING(cudaFreeAsync)
NOTHING(cudaMemPoolGetAttribute) NOTHING(cudaMemPoolSetAccess) NOTHING(cudaMemPoolSetAttribute)
NOTHING(cudaMemPoolTrimTo) NOTHING(cudaMemcpyToSymbol) NOTHING(cudaOccupancyMaxActiveBlocksPerMultiprocessor)
NOTHING(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags) NOTHING(cudaProfilerStart) NOTHING(cudaProfilerStop)
NOTHING(cudaStreamCreate) NOTHING(cudaStreamGetPriority) NOTHING(cudaLaunchCooperativeKernel)
NOTHING(cudaLaunchHostFunc) NOTHING(cudaKernelSetAttributeForDevice) NOTHING(cudaLibraryLoadData)
NOTHING(cudaLibraryGetKernel) NOTHING(cudaStreamAddCallback)
NOTHING(cuCtxGetCurrent) NOTHING(cuCtxSetCurrent) NOTHING(cuDeviceGet) NOTHING(cuDeviceGetAttribute)
NOTHING(cuDevicePrimaryCtxRetain) NOTHING(cuFuncGetAttribute) NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig) NOTHING(cuLaunchCooperativeKernel) NOTHING(cuLaunchKernel) NOTHING(cuLinkAddData_v2)
NOTHING(cuLinkComplete) NOTHING(cuLinkCreate_v2) NOTHING(cuModuleGetFunction) NOTHING(cuModuleLoad)
NOTHING(cuModuleLoadData) NOTHING(cuModuleLoadDataEx) NOTHING(cuModuleUnload)
NOTHING(cuOccupancyMaxActiveBlocksPerMultiprocessor) NOTHING(cuPointerGetAttribute) NOTHING(cuTensorMapEncodeTiled)
