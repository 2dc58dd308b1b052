// Hopper's asynchronous machinery in a few lines each: barriers in shared memory, the copy engine, warpgroup matrix products.
// Source of the encodings: the PTX ISA, sections on mbarrier, cp.async.bulk.tensor and wgmma.
#pragma once

#include <cuda.h>

#include "ampere.cuh"

namespace gantline {

// ---- barriers ----

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

__device__ __forceinline__ void barrier_init_visible() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrive, and expect so many bytes from the copy engine before the phase completes.
__device__ __forceinline__ void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra ready;\nbra again;\nready:\n}" ::"r"(
          shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// The same, where blocks of the cluster have written what is waited for.
__device__ __forceinline__ void barrier_wait_cluster(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n@done bra ready;\nbra again;\nready:\n}" ::"r"(
          shared_address(barrier)),
      "r"(parity)
      : "memory");
}

template <int id, int threads>
__device__ __forceinline__ void named_sync() {
  asm volatile("bar.sync %0, %1;" ::"n"(id), "n"(threads) : "memory");
}

__device__ __forceinline__ void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

__device__ __forceinline__ void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// Makes ordinary writes to shared memory visible to the copy engine and the matrix units.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A number in global memory that other blocks write; what they wrote before it is seen after.
__device__ __forceinline__ int load_acquire(const int* place) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(place) : "memory");
  return value;
}

// ---- the copy engine ----

__device__ __forceinline__ void copy_box(void* target, const CUtensorMap* map, int column, int row, uint64_t* barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                   shared_address(target)),
               "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
               : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// ---- clusters ----

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ int cluster_size() {
  int size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// Every thread of every block of the cluster; what was written before is seen after.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The address, in another block of the cluster, of what lies at `mine` here.
__device__ __forceinline__ uint32_t remote_address(const void* mine, int rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(mine)), "r"(rank));
  return address;
}

__device__ __forceinline__ float4 remote_load(const float4* mine, int rank) {
  float4 value;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(remote_address(mine, rank))
               : "memory");
  return value;
}

__device__ __forceinline__ uint2 remote_load(const uint2* mine, int rank) {
  uint2 value;
  asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(remote_address(mine, rank)) : "memory");
  return value;
}

__device__ __forceinline__ void remote_store(float* mine, int rank, float value) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote_address(mine, rank)), "f"(value) : "memory");
}

__device__ __forceinline__ int remote_add(int* mine, int rank, int value) {
  int before;
  asm volatile("atom.shared::cluster.add.u32 %0, [%1], %2;" : "=r"(before) : "r"(remote_address(mine, rank)), "r"(value) : "memory");
  return before;
}

// At addresses from `remote_address`: arrive at a barrier (which makes no writes to global memory visible: that would wait for them); store
// 16 bytes, which a barrier beside them counts.
__device__ __forceinline__ void remote_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void remote_store_async(uint32_t target, const float* quad, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(target), "f"(quad[0]), "f"(quad[1]),
               "f"(quad[2]), "f"(quad[3]), "r"(barrier)
               : "memory");
}

// ---- registers ----

template <int count>
__device__ __forceinline__ void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

template <int count>
__device__ __forceinline__ void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

// ---- warpgroup matrix products ----
// Operands lie in shared memory as panels of 64 columns: rows of 128 bytes, 16-byte pieces swizzled by (row mod 8), 1024-byte aligned.

// A panel's descriptor has 64 bits; the upper 32 are the same for all (1024 bytes between groups of eight rows, the swizzle), so only the
// lower ones are handed about: adding bytes / 16 moves the start. `leading`: bytes to the next panel, used where the panel's columns are
// not the inner dimension of the product. The same in all lanes, and the compiler knows it.
#define GANTLINE_PANEL_UPPER 0x40000040

__device__ __forceinline__ uint32_t panel(const void* pointer, uint32_t leading) {
  return __shfl_sync(~0u, ((shared_address(pointer) & 0x3FFFF) >> 4) | (leading >> 4 << 16), 0);
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Keeps the compiler from touching accumulators while products are in flight.
template <int n>
__device__ __forceinline__ void hold(float (&x)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

#define GANTLINE_F8(x, i) \
  "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), "+f"(x[i + 6]), "+f"(x[i + 7])
#define GANTLINE_F32(x, i) GANTLINE_F8(x, i), GANTLINE_F8(x, i + 8), GANTLINE_F8(x, i + 16), GANTLINE_F8(x, i + 24)
#define GANTLINE_LIST32                                                                                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, " \
  "%27, %28, %29, %30, %31"
#define GANTLINE_LIST64                                                                                                        \
  GANTLINE_LIST32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
                  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define GANTLINE_LIST16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"

// The products for one element type: both operands in shared memory (64 x 128, inner 16), or the left one in registers and the right
// one transposed (its columns are not the inner dimension).
#define GANTLINE_PRODUCTS(type, name)                                                                                               \
  __device__ __forceinline__ void product_64x128(float (&d)[64], uint32_t a, uint32_t b, int accumulate, const type*) {            \
    asm volatile("{\n.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %66, 0;\nmov.b64 a, {%64, %67};\nmov.b64 b, {%65, %67};\n"      \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name " {" GANTLINE_LIST64 "}, a, b, p, 1, 1, 0, 0;\n}"    \
                 : GANTLINE_F32(d, 0), GANTLINE_F32(d, 32)                                                                         \
                 : "r"(a), "r"(b), "r"(accumulate), "n"(GANTLINE_PANEL_UPPER));                                                    \
  }                                                                                                                                \
  __device__ __forceinline__ void product_transposed(float (&d)[64], const uint32_t* a, uint32_t b, const type*) {                 \
    asm volatile("{\n.reg .b64 b;\nmov.b64 b, {%68, %69};\nwgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name             \
                 " {" GANTLINE_LIST64 "}, {%64, %65, %66, %67}, b, 1, 1, 1, 1;\n}"                                                 \
                 : GANTLINE_F32(d, 0), GANTLINE_F32(d, 32)                                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(GANTLINE_PANEL_UPPER));                                 \
  }                                                                                                                                \
  __device__ __forceinline__ void product_transposed(float (&d)[32], const uint32_t* a, uint32_t b, const type*) {                 \
    asm volatile("{\n.reg .b64 b;\nmov.b64 b, {%36, %37};\nwgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name              \
                 " {" GANTLINE_LIST32 "}, {%32, %33, %34, %35}, b, 1, 1, 1, 1;\n}"                                                 \
                 : GANTLINE_F32(d, 0)                                                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(GANTLINE_PANEL_UPPER));                                 \
  }

GANTLINE_PRODUCTS(__nv_bfloat16, "bf16")
GANTLINE_PRODUCTS(__half, "f16")

__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to about the last place; 0 for what is infinite or nearly so.
__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t pack(float low, float high, const __nv_bfloat16*) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ uint32_t pack(float low, float high, const __half*) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

}  // namespace gantline
