// What the kernels of linear layers share: tiles, rings, the weights' way in.
#pragma once

#include "host.cuh"
#include "hopper.cuh"

namespace gantline {

constexpr int OUTPUTS = 128;  // of a tile
constexpr int DEPTH = 64;     // inputs of a chunk, which a stage holds
constexpr uint64_t EVICT_FIRST = 0x12F0000000000000;  // weights are not met again before they would be evicted
constexpr uint64_t EVICT_NORMAL = 0x1000000000000000;

// A place in a ring of stages, and the parity of its current round.
template <int SIZE>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == SIZE) stage = 0, parity ^= 1;
  }
};

__device__ __forceinline__ void copy_box_as(void* target, const CUtensorMap* map, int column, int row, uint64_t* barrier, uint64_t policy) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(
                   shared_address(target)),
               "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "l"(policy)
               : "memory");
}

__device__ __forceinline__ void copy_once_box(void* target, const CUtensorMap* map, int column, int row, uint64_t* barrier) {
  copy_box_as(target, map, column, row, barrier, EVICT_FIRST);
}

template <typename T>
bool make_map(CUtensorMap* map, const void* matrix, int rows, int columns, long long stride, int box_rows, CUtensorMapL2promotion promotion) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {stride * sizeof(T)};
  const cuuint32_t box[2] = {DEPTH, static_cast<cuuint32_t>(box_rows)};
  return encode_panels<T>(map, const_cast<void*>(matrix), sizes, strides, box, promotion);
}

}  // namespace gantline
