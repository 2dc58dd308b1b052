// The gated half of a feed-forward layer, for Hopper (sm_90a): out [rows, width] = silu(x gate^T + its bias) * (x up^T + its bias), of
// x [rows, inputs] and weight [2 width, inputs] = gate, then up. Bound by the matrix units from some 150 rows on, by reading the weights below.
//
// A block's tile is 64 or 128 rows of x by `COLUMNS` outputs, that is as many rows of gate and as many of up: both products of an output
// lie in the same thread, so the activation costs no memory. One warpgroup feeds, one or two compute 64 rows each; products of a chunk of 64
// inputs are started before those of the chunk ahead have ended, so the matrix units never wait for a barrier. Where there are more than 128
// rows, what the second-level cache delivers is too little for every block by itself: two blocks are a cluster then, take neighbouring rows of the
// same outputs, and one brings in gate's weights and one up's, for both.
//
// Blocks walk over tiles in equal strides; no tile is shared, so nothing is summed between blocks, and results do not depend on timing.
// `COLUMNS` is chosen by the caller so that few multiprocessors idle in the last round.

#include "host.cuh"
#include "hopper.cuh"
#include "linear_hopper.cuh"

namespace gantline {
namespace {

constexpr int SHARED_LIMIT = 227 * 1024;
constexpr int FEEDING_THREADS = 128;  // a warpgroup, so that it can give registers away; one thread of it works
constexpr int STRETCH = 8;            // tiles of rows that are walked through before the next outputs: what of x stays in the second-level cache

struct Arguments {
  void* out;
  const void* bias;  // [2 width], or null
  int rows;
  int width;
  int chunks;       // of 64 inputs
  int row_tiles;    // of clusters
  int column_tiles;
};

template <typename T, int COLUMNS_, int GROUPS_, int CLUSTER_>
struct Variant {
  using Type = T;
  static constexpr int COLUMNS = COLUMNS_, GROUPS = GROUPS_, CLUSTER = CLUSTER_;
  static constexpr int ROWS = 64 * GROUPS, SUMS = COLUMNS;  // of a thread: two columns of gate and up in each of two rows, for each 8 columns
  static constexpr int COMPUTE_WARPS = 4 * GROUPS, THREADS = FEEDING_THREADS + 128 * GROUPS;
  struct Stage {
    T x[ROWS * DEPTH];
    T weights[2][COLUMNS * DEPTH];  // gate, up
  };
  static constexpr int STAGES = (SHARED_LIMIT - 1024) / static_cast<int>(sizeof(Stage));
  struct __align__(1024) Shared {
    Stage stage[STAGES];
    uint64_t full[STAGES], empty[STAGES];
  };
  static_assert(sizeof(Shared) <= SHARED_LIMIT && STAGES >= 3 && COLUMNS % 8 == 0, "must fit");
};

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
#define GANTLINE_GATED(type, name, N, list, a, b, upper, flag, ...)                                                                            \
  __device__ __forceinline__ void product(float (&d)[N / 2], uint32_t x, uint32_t weights, int accumulate, const type*) {                      \
    asm volatile("{\n.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %" flag ", 0;\nmov.b64 a, {%" a ", %" upper "};\nmov.b64 b, {%" b ", %" upper \
                 "};\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." name "." name " {" list "}, a, b, p, 1, 1, 0, 0;\n}"                      \
                 : __VA_ARGS__                                                                                                                 \
                 : "r"(x), "r"(weights), "n"(GANTLINE_PANEL_UPPER), "r"(accumulate));                                                          \
  }
#define GANTLINE_GATED_ALL(type, name)                                                                                                           \
  GANTLINE_GATED(type, name, 128, GANTLINE_LIST64, "64", "65", "66", "67", GANTLINE_F32(d, 0), GANTLINE_F32(d, 32))                              \
  GANTLINE_GATED(type, name, 160, GANTLINE_LIST80, "80", "81", "82", "83", GANTLINE_F32(d, 0), GANTLINE_F32(d, 32), GANTLINE_F16(d, 64))         \
  GANTLINE_GATED(type, name, 192, GANTLINE_LIST96, "96", "97", "98", "99", GANTLINE_F32(d, 0), GANTLINE_F32(d, 32), GANTLINE_F32(d, 64))         \
  GANTLINE_GATED(type, name, 224, GANTLINE_LIST112, "112", "113", "114", "115", GANTLINE_F32(d, 0), GANTLINE_F32(d, 32), GANTLINE_F32(d, 64),    \
                 GANTLINE_F16(d, 96))                                                                                                            \
  GANTLINE_GATED(type, name, 256, GANTLINE_LIST128, "128", "129", "130", "131", GANTLINE_F32(d, 0), GANTLINE_F32(d, 32), GANTLINE_F32(d, 64),    \
                 GANTLINE_F32(d, 96))
GANTLINE_GATED_ALL(__nv_bfloat16, "bf16")
GANTLINE_GATED_ALL(__half, "f16")

// The first row and output of a block's tile. Within a stretch of STRETCH tiles the rows come first, so that neighbours in time read the same weights.
struct Tile {
  int row, column;
};

template <typename V>
__device__ __forceinline__ Tile tile_at(const Arguments& args, int index, int rank) {
  const int first = index / (STRETCH * args.column_tiles) * STRETCH;
  const int high = min(STRETCH, args.row_tiles - first), within = index - first * args.column_tiles;
  return {((first + within % high) * V::CLUSTER + rank) * V::ROWS, within / high * V::COLUMNS};
}

template <typename V>
__device__ void feed(typename V::Shared& shared, const CUtensorMap* x_map, const CUtensorMap* weight_map, const Arguments& args, int cluster, int clusters, int rank) {
  Ring<V::STAGES> ring;
  const int tiles = args.row_tiles * args.column_tiles;
  const uint64_t policy = args.row_tiles == 1 ? EVICT_FIRST : EVICT_NORMAL;
  bool waited = false;
  auto copy_x = [&](const Tile& tile, int chunk, int stage) {
    copy_box(shared.stage[stage].x, x_map, chunk * DEPTH, tile.row, &shared.full[stage]);
  };
  for (int index = cluster; index < tiles; index += clusters) {
    const Tile tile = tile_at<V>(args, index, rank);
    for (int chunk = 0; chunk < args.chunks; ++chunk) {
      // Before the kernel ahead has ended: as much of the weights as there are stages for.
      if (!waited && chunk == min(V::STAGES, args.chunks)) {
        wait_for_earlier_kernels();
        waited = true;
        for (int i = 0; i < chunk; ++i) copy_x(tile, i, i);
      }
      if (waited) barrier_wait_cluster(&shared.empty[ring.stage], ring.parity ^ 1);
      auto& stage = shared.stage[ring.stage];
      uint64_t* full = &shared.full[ring.stage];
      barrier_arrive_expect(full, sizeof(stage));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = half * args.width + tile.column;
        if (V::CLUSTER == 1) {
          copy_box_as(stage.weights[half], weight_map, chunk * DEPTH, row, full, policy);
        } else if (half == rank) {
          copy_to_cluster(stage.weights[half], weight_map, chunk * DEPTH, row, full, V::CLUSTER, policy);
        }
      }
      if (waited) copy_x(tile, chunk, ring.stage);
      ring.advance();
    }
    if (!waited) {
      wait_for_earlier_kernels();
      waited = true;
      for (int i = 0; i < args.chunks; ++i) copy_x(tile, i, i);
    }
  }
}

__device__ __forceinline__ float gated(float gate, float up) { return gate * up / (1.f + fast_exp2(gate * -1.4426950408889634f)); }

template <typename V>
__device__ __forceinline__ void add_bias(float (&sums)[V::SUMS], const Arguments& args, int first_column) {
  const auto* bias = static_cast<const typename V::Type*>(args.bias);
#pragma unroll
  for (int i = 0; i < V::SUMS; ++i) {
    constexpr int UP = V::SUMS / 2;
    const int column = first_column + i % UP / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
    if (column < args.width) sums[i] += static_cast<float>(bias[i / UP * args.width + column]);
  }
}

// Two outputs in each of two rows, eight rows apart, for each eight columns: neighbouring lanes hold neighbouring columns.
template <typename V>
__device__ __forceinline__ void store(float (&sums)[V::SUMS], const Arguments& args, int first_row, int first_column) {
  using T = typename V::Type;
  constexpr int UP = V::SUMS / 2;
  const int lane = threadIdx.x % 32;
  if (args.bias) add_bias<V>(sums, args, first_column);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + half * 8 + lane / 4;
    if (row >= args.rows) continue;
    T* target = static_cast<T*>(args.out) + static_cast<long long>(row) * args.width + first_column;
#pragma unroll
    for (int block = 0; block < V::COLUMNS / 8; ++block) {
      const int i = block * 4 + half * 2, column = block * 8 + lane % 4 * 2;
      if (first_column + column >= args.width) continue;  // the width is even
      const uint32_t pair = pack(gated(sums[i], sums[UP + i]), gated(sums[i + 1], sums[UP + i + 1]), static_cast<const T*>(nullptr));
      *reinterpret_cast<uint32_t*>(target + column) = pair;
    }
  }
}

template <typename V>
__device__ void compute(typename V::Shared& shared, const Arguments& args, int cluster, int clusters, int rank) {
  using T = typename V::Type;
  constexpr uint32_t STEP = sizeof(shared.stage[0]) / 16;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = __shfl_sync(~0u, warp / 4, 0);
  const uint32_t all_x = panel(shared.stage[0].x, 16) + group * (64 * DEPTH * sizeof(T) / 16), all_weights = panel(shared.stage[0].weights, 16);
  const int tiles = args.row_tiles * args.column_tiles;
  Ring<V::STAGES> ring;
  auto release = [&](int stage) {  // one lane for each block that writes to this one's stage
    if (lane < V::CLUSTER) {
      if (V::CLUSTER == 1) {
        barrier_arrive(&shared.empty[stage]);
      } else {
        remote_arrive(remote_address(&shared.empty[stage], lane));
      }
    }
  };
  float sums[V::SUMS];
  for (int index = cluster; index < tiles; index += clusters) {
    const Tile tile = tile_at<V>(args, index, rank);
    int before = 0;  // the stage whose products are under way
#pragma unroll 1
    for (int chunk = 0; chunk < args.chunks; ++chunk) {
      barrier_wait(&shared.full[ring.stage], ring.parity);
      hold(sums);
      products_begin();
#pragma unroll
      for (int step = 0; step < DEPTH / 16; ++step) {
        product(sums, all_x + ring.stage * STEP + step * 2, all_weights + ring.stage * STEP + step * 2, chunk + step, static_cast<const T*>(nullptr));
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
    store<V>(sums, args, tile.row + warp * 16, tile.column);
  }
}

template <typename V>
__global__ __launch_bounds__(V::THREADS, 1) void gated_linear(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap weight_map,
                                                              const Arguments args) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& shared = *reinterpret_cast<typename V::Shared*>(raw);
  const int rank = V::CLUSTER == 1 ? 0 : cluster_rank(), cluster = blockIdx.x / V::CLUSTER, clusters = gridDim.x / V::CLUSTER;
  const bool feeds = threadIdx.x >= 128 * V::GROUPS;
  if (threadIdx.x == 128 * V::GROUPS) {
    if (shared_address(raw) % 1024) __trap();
    prefetch_map(&x_map), prefetch_map(&weight_map);
    for (int i = 0; i < V::STAGES; ++i) barrier_init(&shared.full[i], 1), barrier_init(&shared.empty[i], V::COMPUTE_WARPS * V::CLUSTER);
    barrier_init_visible();
  }
  __syncthreads();
  if (V::CLUSTER > 1) cluster_sync();  // the other's barriers are there
  let_later_kernels_start();
  if (feeds) {
    registers_decrease<40>();
    if (threadIdx.x == 128 * V::GROUPS) feed<V>(shared, &x_map, &weight_map, args, cluster, clusters, rank);
    __syncwarp();
  } else {
    if (V::GROUPS == 2) registers_increase<232>();
    wait_for_earlier_kernels();  // whoever writes must have waited
    compute<V>(shared, args, cluster, clusters, rank);
  }
  if (V::CLUSTER > 1) cluster_sync();  // nobody leaves while the other writes to its shared memory
}

template <typename V>
int launch(const void* x, long long x_stride, const void* weight, int inputs, Arguments args, int blocks, cudaStream_t stream) {
  using T = typename V::Type;
  cudaError_t error = raise_shared_memory<gated_linear<V>>(sizeof(typename V::Shared));
  if (error != cudaSuccess) return error;
  CUtensorMap x_map, weight_map;
  if (!make_map<T>(&weight_map, weight, 2 * args.width, inputs, inputs, V::COLUMNS, CU_TENSOR_MAP_L2_PROMOTION_L2_256B) ||
      !make_map<T>(&x_map, x, args.rows, inputs, x_stride, V::ROWS, CU_TENSOR_MAP_L2_PROMOTION_L2_128B)) {
    return cudaErrorInvalidValue;
  }
  constexpr int HIGH = V::CLUSTER * V::ROWS;
  args.row_tiles = (args.rows + HIGH - 1) / HIGH, args.column_tiles = (args.width + V::COLUMNS - 1) / V::COLUMNS;
  const long long tiles = static_cast<long long>(args.row_tiles) * args.column_tiles;
  if (tiles > INT32_MAX / 2) return cudaErrorInvalidValue;
  const int rounds = static_cast<int>((tiles * V::CLUSTER + blocks - 1) / blocks);
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = V::CLUSTER, attributes[1].val.clusterDim.y = 1, attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<int>((tiles + rounds - 1) / rounds) * V::CLUSTER);
  config.blockDim = dim3(V::THREADS);
  config.dynamicSmemBytes = sizeof(typename V::Shared);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, gated_linear<V>, x_map, weight_map, args);
}

template <typename T, int COLUMNS>
int launch_by_rows(const void* x, long long x_stride, const void* weight, int inputs, const Arguments& args, int blocks, cudaStream_t stream) {
  if (args.rows <= 64) return launch<Variant<T, COLUMNS, 1, 1>>(x, x_stride, weight, inputs, args, blocks, stream);
  if (args.rows <= 128) return launch<Variant<T, COLUMNS, 2, 1>>(x, x_stride, weight, inputs, args, blocks, stream);
  return launch<Variant<T, COLUMNS, 2, 2>>(x, x_stride, weight, inputs, args, blocks, stream);
}

template <typename T>
int launch_by_columns(int columns, const void* x, long long x_stride, const void* weight, int inputs, const Arguments& args, int blocks, cudaStream_t stream) {
  switch (columns) {
    case 64: return launch_by_rows<T, 64>(x, x_stride, weight, inputs, args, blocks, stream);
    case 80: return launch_by_rows<T, 80>(x, x_stride, weight, inputs, args, blocks, stream);
    case 96: return launch_by_rows<T, 96>(x, x_stride, weight, inputs, args, blocks, stream);
    case 112: return launch_by_rows<T, 112>(x, x_stride, weight, inputs, args, blocks, stream);
    case 128: return launch_by_rows<T, 128>(x, x_stride, weight, inputs, args, blocks, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace gantline

// `type` 0: bfloat16, 1: float16. x [rows, inputs] with rows `x_stride` elements apart (a multiple of 8), weight [2 width, inputs], bias
// [2 width] or null, out [rows, width]; x and weight aligned to 16 bytes, inputs a multiple of 8, width of 2. `columns`: outputs of a tile, 64, 80, 96, 112 or 128. `blocks`:
// an even number, at most what runs at once. Returns a cudaError_t.
GANTLINE_EXPORT int gantline_gated_linear_hopper(int type, const void* x, long long x_stride, const void* weight, const void* bias, void* out, int rows,
                                                 int inputs, int width, int columns, int blocks, void* stream) {
  using namespace gantline;
  if (rows < 1 || inputs < 8 || inputs % 8 || width < 2 || width % 2 || blocks < 2 || blocks % 2) return cudaErrorInvalidValue;
  const Arguments args = {out, bias, rows, width, (inputs + DEPTH - 1) / DEPTH, 0, 0};
  const auto on = static_cast<cudaStream_t>(stream);
  return type == 0 ? launch_by_columns<__nv_bfloat16>(columns, x, x_stride, weight, inputs, args, blocks, on)
                   : launch_by_columns<__half>(columns, x, x_stride, weight, inputs, args, blocks, on);
}
