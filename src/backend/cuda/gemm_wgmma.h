/* gemm_wgmma.h - wgmma.mma_async.m64nNk32.s32.s8.s8 with A in registers, one function a token tile N (sm_90a).
 *
 * d: (N / 2) accumulators a thread, a: one k32 step of 64 rows, b: shared-memory descriptor of N rows of 32 bytes (K-major,
 * 128-byte swizzle). accumulate = 0 starts from zero. Neither d nor a may be touched before wgmma_wait (ptx.cuh) says so. */
#ifndef QTR_BACKEND_CUDA_GEMM_WGMMA_H
#define QTR_BACKEND_CUDA_GEMM_WGMMA_H

#include <stdint.h>

template <int N>
struct wgmma;

#define D4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
#define D64(i) D16(i), D16(i + 16), D16(i + 32), D16(i + 48)
#define A4 "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])

/* clang-format off */
template <>
struct wgmma<8> {
  static __device__ __forceinline__ void mma(int32_t (&d)[4], const uint32_t *a, uint64_t b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %9, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8 {"
                 "%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, %8, p;\n}\n"
                 : D4(0)
                 : A4, "l"(b), "r"(accumulate));
  }
};
template <>
struct wgmma<16> {
  static __device__ __forceinline__ void mma(int32_t (&d)[8], const uint32_t *a, uint64_t b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %13, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n16k32.s32.s8.s8 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7}, "
                 "{%8, %9, %10, %11}, %12, p;\n}\n"
                 : D4(0), D4(4)
                 : A4, "l"(b), "r"(accumulate));
  }
};
template <>
struct wgmma<32> {
  static __device__ __forceinline__ void mma(int32_t (&d)[16], const uint32_t *a, uint64_t b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k32.s32.s8.s8 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
                 "{%16, %17, %18, %19}, %20, p;\n}\n"
                 : D16(0)
                 : A4, "l"(b), "r"(accumulate));
  }
};
template <>
struct wgmma<64> {
  static __device__ __forceinline__ void mma(int32_t (&d)[32], const uint32_t *a, uint64_t b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "{%32, %33, %34, %35}, %36, p;\n}\n"
                 : D16(0), D16(16)
                 : A4, "l"(b), "r"(accumulate));
  }
};
template <>
struct wgmma<96> {
  static __device__ __forceinline__ void mma(int32_t (&d)[48], const uint32_t *a, uint64_t b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %53, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n96k32.s32.s8.s8 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, "
                 "{%48, %49, %50, %51}, %52, p;\n}\n"
                 : D16(0), D16(16), D16(32)
                 : A4, "l"(b), "r"(accumulate));
  }
};
template <>
struct wgmma<128> {
  static __device__ __forceinline__ void mma(int32_t (&d)[64], const uint32_t *a, uint64_t b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "{%64, %65, %66, %67}, %68, p;\n}\n"
                 : D64(0)
                 : A4, "l"(b), "r"(accumulate));
  }
};
template <>
struct wgmma<192> {
  static __device__ __forceinline__ void mma(int32_t (&d)[96], const uint32_t *a, uint64_t b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %101, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n192k32.s32.s8.s8 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
                 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
                 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
                 "{%96, %97, %98, %99}, %100, p;\n}\n"
                 : D64(0), D16(64), D16(80)
                 : A4, "l"(b), "r"(accumulate));
  }
};
template <>
struct wgmma<256> {
  static __device__ __forceinline__ void mma(int32_t (&d)[128], const uint32_t *a, uint64_t b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %133, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
                 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
                 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
                 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
                 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
                 "{%128, %129, %130, %131}, %132, p;\n}\n"
                 : D64(0), D64(64)
                 : A4, "l"(b), "r"(accumulate));
  }
};
/* clang-format on */

#undef D4
#undef D16
#undef D64
#undef A4

#endif
