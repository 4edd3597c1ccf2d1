/* launch.cuh - launching a kernel so that it may start while the one before it ends (programmatic dependent launch, sm_90).
 *
 * A kernel launched by qtr_launch must begin with qtr_begin(), before it touches any memory but weights: it returns when
 * everything launched before is done and visible, and lets the next kernel's blocks take their places meanwhile. What is
 * gained is the launch latency and the start of each kernel, a few microseconds each: a decode step has three hundred of
 * them. */
#ifndef QTR_BACKEND_CUDA_LAUNCH_CUH
#define QTR_BACKEND_CUDA_LAUNCH_CUH

#include <cuda_runtime_api.h>

/* Lanes of a warp that arrive on a barrier of shared memory once all have read: one speaks for its warp, which has met in
 * __syncwarp. compute-sanitizer's racecheck does not follow that and reports the other 31, as it does for cuBLASLt's
 * kernels: for its sake all arrive with -DQTR_EVERY_LANE_ARRIVES. */
#ifdef QTR_EVERY_LANE_ARRIVES
#define QTR_ARRIVING_LANES 32
#else
#define QTR_ARRIVING_LANES 1
#endif

__device__ static inline void qtr_wait() { /* the first half of qtr_begin() */
#if defined __CUDA_ARCH__ && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ static inline void qtr_let_next() { /* the second half */
#if defined __CUDA_ARCH__ && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ static inline void qtr_begin() {
  qtr_wait();
  qtr_let_next();
}

static inline bool qtr_overlap_possible() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
}

/* overlap: may start while the kernel before it ends. cluster: blocks of a cluster, at Hopper; 1: none. */
template <class... P, class... A>
static inline cudaError_t qtr_launch_with(bool overlap, unsigned cluster, void (*kernel)(P...), dim3 grid, dim3 block,
                                          size_t shared_bytes, cudaStream_t stream, A... args) {
  cudaLaunchAttribute attribute[2] = {};
  attribute[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute[0].val.programmaticStreamSerializationAllowed = overlap;
  attribute[1].id = cudaLaunchAttributeClusterDimension;
  attribute[1].val.clusterDim.x = cluster;
  attribute[1].val.clusterDim.y = attribute[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = !qtr_overlap_possible() ? 0 : cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, P(args)...);
}

template <class... P, class... A>
static inline cudaError_t qtr_launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                                     A... args) {
  return qtr_launch_with(true, 1, kernel, grid, block, shared_bytes, stream, args...);
}

#endif
