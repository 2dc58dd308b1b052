// What the kernels of linear layers for many rows share, for Hopper (sm_90a): a block multiplies 64, 128 or 192 rows of x with two stretches of
// `COLUMNS` rows of the weights. One warpgroup feeds, one to three compute 64 rows each; products of a chunk of 64 inputs are started before those
// of the chunk ahead have ended, so the matrix units never wait for a barrier. Where there are more than 128 rows, what the second-level cache
// delivers is too little for every block by itself: two blocks are a cluster then, take neighbouring rows with the same weights, and each brings
// in one of the two stretches for both.
#pragma once

#include "host.cuh"
#include "hopper.cuh"
#include "linear_hopper.cuh"

namespace gantline {

constexpr int FEEDING_THREADS = 128;  // a warpgroup, so that it can give registers away; one thread of it works

template <typename T, int COLUMNS_, int GROUPS_, int CLUSTER_>
struct Tall {
  using Type = T;
  static constexpr int COLUMNS = COLUMNS_, GROUPS = GROUPS_, CLUSTER = CLUSTER_;
  static constexpr int ROWS = 64 * GROUPS;
  static constexpr int SUMS = COLUMNS;  // of a thread: for each 8 columns of both stretches two neighbours in each of two rows
  static constexpr int COMPUTE_THREADS = 128 * GROUPS, THREADS = FEEDING_THREADS + COMPUTE_THREADS;
  static constexpr int FEEDING_REGISTERS = GROUPS == 3 ? 56 : 40, COMPUTE_REGISTERS = GROUPS == 3 ? 152 : 232;
  struct Stage {
    T x[ROWS * DEPTH];
    T weights[2][COLUMNS * DEPTH];
  };
  static constexpr int LIMIT = 227 * 1024, STAGES = (LIMIT - 1024) / static_cast<int>(sizeof(Stage));
  struct __align__(1024) Shared {
    Stage stage[STAGES];
    uint64_t full[STAGES], empty[STAGES];
  };
  static_assert(sizeof(Shared) <= LIMIT && STAGES >= 3 && COLUMNS % 8 == 0, "must fit");

  // By one thread; then all must meet before they use them.
  __device__ __forceinline__ static void begin(Shared& shared, const CUtensorMap* x_map, const CUtensorMap* weight_map) {
    if (shared_address(&shared) % 1024) __trap();
    prefetch_map(x_map), prefetch_map(weight_map);
    for (int i = 0; i < STAGES; ++i) barrier_init(&shared.full[i], 1), barrier_init(&shared.empty[i], COMPUTE_THREADS / 32 * CLUSTER);
    barrier_init_visible();
  }
};

// A block's work: its first row of x, the first rows of the two stretches of weights, and the chunks of inputs.
struct Piece {
  int row, weights[2], first_chunk, chunks;
};

// A warp's 16 rows from `row` of 8 * `BLOCKS` outputs from `column`. `pair(block, half)`: this thread's two neighbours of 8 columns, of the row
// that is eight further where `half` is 1. Two lanes exchange them so that each stores four, of every other 8 columns: whole sectors.
// `rows` and `columns` are those of out, a multiple of 4 columns.
template <typename T, int BLOCKS, typename Pair>
__device__ __forceinline__ void store_rows(T* out, int rows, int columns, int row, int column, Pair pair) {
  static_assert(BLOCKS % 2 == 0, "blocks are stored in pairs");
  const int lane = threadIdx.x % 32, odd = lane & 1;
  column += odd * 8 + (lane & 2) * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = row + half * 8 + lane / 4;
    T* target = out + static_cast<long long>(at) * columns + column;
#pragma unroll
    for (int block = 0; block < BLOCKS; block += 2) {
      const uint32_t first = pair(block, half), second = pair(block + 1, half);
      const uint32_t other = __shfl_xor_sync(~0u, odd ? first : second, 1);
      if (at < rows && column + block * 8 < columns) {
        *reinterpret_cast<uint2*>(target + block * 8) = odd ? make_uint2(other, second) : make_uint2(first, other);
      }
    }
  }
}

// Copies for all blocks of a cluster: to the same place in each, counted by each one's barrier.
__device__ __forceinline__ void copy_to_cluster(void* target, const CUtensorMap* map, int column, int row, uint64_t* barrier, int blocks, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(
          shared_address(target)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>((1 << blocks) - 1)), "l"(policy)
      : "memory");
}

// Lists of operands: products of N columns have N / 2 sums.
#define GANTLINE_LIST80 GANTLINE_LIST64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define GANTLINE_LIST96 GANTLINE_LIST80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define GANTLINE_LIST112 GANTLINE_LIST96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define GANTLINE_LIST128 \
  GANTLINE_LIST112 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define GANTLINE_F16(x, i) GANTLINE_F8(x, i), GANTLINE_F8(x, i + 8)

// sums[64 x N] (+)= 64 rows of x times N rows of the weights, inner 16. `a`, `b`, `upper`, `flag`: the places of the operands after the sums.
#define GANTLINE_TALL(type, name, N, list, a, b, upper, flag, ...)                                                                            \
  __device__ __forceinline__ void product(float (&d)[N / 2], uint32_t x, uint32_t weights, int accumulate, const type*) {                      \
    asm volatile("{\n.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %" flag ", 0;\nmov.b64 a, {%" a ", %" upper "};\nmov.b64 b, {%" b ", %" upper \
                 "};\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." name "." name " {" list "}, a, b, p, 1, 1, 0, 0;\n}"                      \
                 : __VA_ARGS__                                                                                                                 \
                 : "r"(x), "r"(weights), "n"(GANTLINE_PANEL_UPPER), "r"(accumulate));                                                          \
  }
#define GANTLINE_TALL_ALL(type, name)                                                                                                           \
  GANTLINE_TALL(type, name, 128, GANTLINE_LIST64, "64", "65", "66", "67", GANTLINE_F32(d, 0), GANTLINE_F32(d, 32))                              \
  GANTLINE_TALL(type, name, 160, GANTLINE_LIST80, "80", "81", "82", "83", GANTLINE_F32(d, 0), GANTLINE_F32(d, 32), GANTLINE_F16(d, 64))         \
  GANTLINE_TALL(type, name, 192, GANTLINE_LIST96, "96", "97", "98", "99", GANTLINE_F32(d, 0), GANTLINE_F32(d, 32), GANTLINE_F32(d, 64))         \
  GANTLINE_TALL(type, name, 224, GANTLINE_LIST112, "112", "113", "114", "115", GANTLINE_F32(d, 0), GANTLINE_F32(d, 32), GANTLINE_F32(d, 64),    \
                 GANTLINE_F16(d, 96))                                                                                                            \
  GANTLINE_TALL(type, name, 256, GANTLINE_LIST128, "128", "129", "130", "131", GANTLINE_F32(d, 0), GANTLINE_F32(d, 32), GANTLINE_F32(d, 64),    \
                 GANTLINE_F32(d, 96))
GANTLINE_TALL_ALL(__nv_bfloat16, "bf16")
GANTLINE_TALL_ALL(__half, "f16")

// The thread that brings a block's pieces in, one after the other. Before the kernel ahead has ended: as much of the weights as there are stages for.
template <typename V>
struct TallFeeder {
  typename V::Shared& shared;
  const CUtensorMap *x_map, *weight_map;
  const int rank;
  const uint64_t policy;
  Ring<V::STAGES> ring = {};
  bool waited = false;

  __device__ __forceinline__ void copy_x(const Piece& piece, int chunk, int stage) {
    copy_box(shared.stage[stage].x, x_map, (piece.first_chunk + chunk) * DEPTH, piece.row, &shared.full[stage]);
  }
  __device__ __forceinline__ void wait(const Piece& piece, int chunks) {
    wait_for_earlier_kernels();
    waited = true;
    for (int i = 0; i < chunks; ++i) copy_x(piece, i, i);
  }
  __device__ __forceinline__ void feed(const Piece& piece) {
    for (int chunk = 0; chunk < piece.chunks; ++chunk) {
      if (!waited && chunk == V::STAGES) wait(piece, chunk);
      if (waited) barrier_wait_cluster(&shared.empty[ring.stage], ring.parity ^ 1);
      auto& stage = shared.stage[ring.stage];
      uint64_t* full = &shared.full[ring.stage];
      barrier_arrive_expect(full, sizeof(stage));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = (piece.first_chunk + chunk) * DEPTH;
        if (V::CLUSTER == 1) {
          copy_box_as(stage.weights[half], weight_map, column, piece.weights[half], full, policy);
        } else if (half == rank) {
          copy_to_cluster(stage.weights[half], weight_map, column, piece.weights[half], full, V::CLUSTER, policy);
        }
      }
      if (waited) copy_x(piece, chunk, ring.stage);
      ring.advance();
    }
    if (!waited) wait(piece, piece.chunks);
  }
};

// The warpgroups that compute.
template <typename V>
struct TallProducts {
  typename V::Shared& shared;
  uint32_t x, weights;
  Ring<V::STAGES> ring = {};

  __device__ __forceinline__ explicit TallProducts(typename V::Shared& shared) : shared(shared) {
    const uint32_t group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    x = panel(shared.stage[0].x, 16) + group * (64 * DEPTH * sizeof(typename V::Type) / 16), weights = panel(shared.stage[0].weights, 16);
  }
  // A stage is free again for each block that writes to it.
  __device__ __forceinline__ void release(int stage) {
    const int lane = threadIdx.x % 32;
    if (lane >= V::CLUSTER) return;
    if (V::CLUSTER == 1) {
      barrier_arrive(&shared.empty[stage]);
    } else {
      remote_arrive(remote_address(&shared.empty[stage], lane));
    }
  }
  // sums = the products of so many chunks, 1 at least.
  __device__ __forceinline__ void sum(float (&sums)[V::SUMS], int chunks) {
    constexpr uint32_t STEP = sizeof(shared.stage[0]) / 16;
    int before = 0;  // the stage whose products are under way
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      barrier_wait(&shared.full[ring.stage], ring.parity);
      hold(sums);
      products_begin();
#pragma unroll
      for (int step = 0; step < DEPTH / 16; ++step) {
        product(sums, x + ring.stage * STEP + step * 2, weights + ring.stage * STEP + step * 2, chunk + step, static_cast<const typename V::Type*>(nullptr));
      }
      products_commit();
      products_wait<1>();
      hold(sums);
      if (chunk > 0) release(before);
      before = ring.stage;
      ring.advance();
    }
    products_wait<0>();
    hold(sums);
    release(before);
  }
};

// Launch `kernel` in clusters of `V`, so that it may start before the kernel ahead of it ends.
template <typename V, typename... Parameters>
cudaError_t launch_tall(void (*kernel)(Parameters...), int clusters, cudaStream_t stream, Parameters... parameters) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = V::CLUSTER, attributes[1].val.clusterDim.y = 1, attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(clusters * V::CLUSTER);
  config.blockDim = dim3(V::THREADS);
  config.dynamicSmemBytes = sizeof(typename V::Shared);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, parameters...);
}

}  // namespace gantline
