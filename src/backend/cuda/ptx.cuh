/* ptx.cuh - instructions that CUDA C has no words for and that more than one kernel needs: words of shared memory, barriers
 * there, copies into it, and the order of wgmma (PTX ISA, "mbarrier", "Data Movement and Conversion", "Asynchronous wgmma").
 * Addresses of shared memory are what shared_address gives. Copies of 16 bytes are there from sm_80 on; bulk copies and the
 * barriers' bytes from sm_90 on; wgmma is sm_90a's. */
#ifndef QTR_BACKEND_CUDA_PTX_CUH
#define QTR_BACKEND_CUDA_PTX_CUH

#include <stdint.h>

__device__ static __forceinline__ uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ static __forceinline__ uint32_t shared_load4(uint32_t at) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(at));
  return v;
}

/* ---- barriers: `count` arrivals and all expected bytes end a phase ---------------------------------- */

__device__ static __forceinline__ void barrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
/* After the last barrier_init: the copy engine and other blocks of the cluster see them. */
__device__ static __forceinline__ void barriers_show() {
  asm volatile("fence.mbarrier_init.release.cluster;\n fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ static __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/* Arrives, and n_bytes are on their way. */
__device__ static __forceinline__ void barrier_expect(uint32_t barrier, uint32_t n_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(n_bytes) : "memory");
}
/* Until the phase of this parity has ended. */
__device__ static __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n .reg .pred p;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      " @!p bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

/* ---- copies from device memory into shared memory -------------------------------------------------- */

/* By the copy engine: n_bytes, a multiple of 16, both ends 16-byte aligned; they arrive on the barrier. */
__device__ static __forceinline__ void copy_bulk(uint32_t to, const void *from, uint32_t n_bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(n_bytes), "r"(barrier)
               : "memory");
}
/* What this thread wrote to shared memory is seen by the copy engine and by wgmma. */
__device__ static __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* By this thread, in groups: copy16 ..., copy_commit ends one, copy_wait until at most LEFT are unfinished. */
__device__ static __forceinline__ void copy16(uint32_t to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ static __forceinline__ void copy16(uint32_t to, const void *from, bool valid) { /* else zeros */
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ static __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
__device__ static __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

/* ---- wgmma ------------------------------------------------------------------------------------------ */

/* Before the first of a group: registers that it reads or adds to are written. */
__device__ static __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ static __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ static __forceinline__ void wgmma_wait() { /* until at most LEFT groups are unfinished */
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

#endif
