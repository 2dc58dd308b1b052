// What GPUs have from compute capability 8.0 on, in a few lines each: copies into shared memory that are waited for later, and products of
// a warp's matrices. Source of the encodings: the PTX ISA, sections on cp.async and mma.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace gantline {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// ---- copies ----

__device__ __forceinline__ void copy_16(void* target, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(target)), "l"(source) : "memory");
}

// Brought in from memory 256 bytes at a time. What is not `inside` is not read.
__device__ __forceinline__ void copy_16_or_zeros(uint32_t target, const void* source, bool inside) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(inside ? 16 : 0) : "memory");
}

// The same of what is not met again before it would be evicted; `policy` from `evict_first`.
__device__ __forceinline__ void copy_16_once_or_zeros(uint32_t target, const void* source, bool inside, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::256B [%0], [%1], 16, %2, %3;" ::"r"(target), "l"(source), "r"(inside ? 16 : 0),
               "l"(policy)
               : "memory");
}

__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
__device__ __forceinline__ void copy_16_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address) : "memory");
  return x;
}

// ---- kernels that start before the one ahead of them ends; in code for 9.0 only ----

__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_later_kernels_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- products ----

// d [16, 8] += a [16, 16] b [16, 8]. Lane 4 g + t holds of a rows g (a0, a2) and g + 8 (a1, a3), of b column g, each at the inner places
// 2 t, 2 t + 1 (a0, a1, b0) and 2 t + 8, 2 t + 9 (a2, a3, b1); of d columns 2 t and 2 t + 1 of row g (d[0], d[1]) and g + 8 (d[2], d[3]).
#define GANTLINE_MULTIPLY(type, name)                                                                                                        \
  __device__ __forceinline__ void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, const type*) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"         \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                             \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                                                     \
  }
GANTLINE_MULTIPLY(__nv_bfloat16, "bf16")
GANTLINE_MULTIPLY(__half, "f16")

}  // namespace gantline
