// Linear layers of some hundred rows at most, with many inputs and few outputs, for Hopper (sm_90a): out [rows, outputs] = x [rows, inputs]
// weight [outputs, inputs]^T + bias.
//
// A tile (`tall_linear_hopper.cuh`) is 128 or 192 outputs of 64, 128 or (two blocks of a cluster) 256 or 384 rows, too few for all multiprocessors,
// so `PARTS` blocks share one: each sums a part of the inputs, leaves what it has in scratch memory, waits until all have, and adds up and stores
// its own stretch of the outputs, always in the same order, so that results do not depend on timing. All blocks must run at once, since they wait
// for each other: the launch is refused if the device has no room for them.

#include "tall_linear_hopper.cuh"

namespace gantline {
namespace {

struct Arguments {
  void* out;
  const void* bias;  // or null
  float4* sums;      // scratch: what a block leaves, half the outputs of a tile float32 a thread
  int* counters;     // of each tile of a block: parts that have left their sums, parts that have read; zero between launches
  int rows;
  int outputs;
  int chunks;     // of 64 inputs, of all parts
  int row_tiles;  // of clusters
  int tiles;      // of outputs, times row_tiles
};

// This thread's sums of outputs that part `part` is to add up: `SUMS / PARTS` of them, from its own and what the other parts have left.
template <typename V, int PARTS>
__device__ __forceinline__ void exchange(const float (&sums)[V::SUMS], float (&mine)[V::SUMS / PARTS], const Arguments& args, int part, int place) {
  constexpr int KEPT = V::SUMS / PARTS, QUADS = KEPT / 4, THREADS = V::COMPUTE_THREADS;
  // [tile and block][from][to][quad][thread]
  const auto at = [&](int from, int to) { return args.sums + ((static_cast<long long>(place) * PARTS + from) * PARTS + to) * QUADS * THREADS + threadIdx.x; };
#pragma unroll
  for (int to = 0; to < PARTS; ++to) {
#pragma unroll
    for (int i = 0; i < QUADS; ++i) {
      const float* quad = &sums[to * KEPT + i * 4];
      if (to == part) {
        mine[i * 4] = quad[0], mine[i * 4 + 1] = quad[1], mine[i * 4 + 2] = quad[2], mine[i * 4 + 3] = quad[3];
      } else {
        __stcg(at(part, to) + i * THREADS, make_float4(quad[0], quad[1], quad[2], quad[3]));
      }
    }
  }
  int* counter = args.counters + place * 2;
  __threadfence();
  named_sync<1, THREADS>();
  if (threadIdx.x == 0) {
    atomicAdd(counter, 1);
    while (load_acquire(counter) < PARTS) {
    }
    __threadfence();
  }
  named_sync<1, THREADS>();
  float4 theirs[PARTS - 1][QUADS];
#pragma unroll
  for (int other = 1; other < PARTS; ++other) {
#pragma unroll
    for (int i = 0; i < QUADS; ++i) theirs[other - 1][i] = __ldcg(at((part + other) % PARTS, part) + i * THREADS);
  }
#pragma unroll
  for (int other = 0; other < PARTS - 1; ++other) {
#pragma unroll
    for (int i = 0; i < QUADS; ++i) {
      const float4 next = theirs[other][i];
      mine[i * 4] += next.x, mine[i * 4 + 1] += next.y, mine[i * 4 + 2] += next.z, mine[i * 4 + 3] += next.w;
    }
  }
  named_sync<1, THREADS>();
  if (threadIdx.x == 0 && atomicAdd(counter + 1, 1) == PARTS - 1) counter[0] = 0, counter[1] = 0;
}

template <typename V, int KEPT>
__device__ __forceinline__ void store(float (&mine)[KEPT], const Arguments& args, int row, int column) {
  using T = typename V::Type;
  if (args.bias) {
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
      const int at = column + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
      if (at < args.outputs) mine[i] += static_cast<float>(static_cast<const T*>(args.bias)[at]);
    }
  }
  store_rows<T, KEPT / 4>(static_cast<T*>(args.out), args.rows, args.outputs, row, column, [&](int block, int half) {
    return pack(mine[block * 4 + half * 2], mine[block * 4 + half * 2 + 1], static_cast<const T*>(nullptr));
  });
}

template <typename V, int PARTS>
__global__ __launch_bounds__(V::THREADS, 1) void split_linear(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap weight_map,
                                                              const Arguments args) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& shared = *reinterpret_cast<typename V::Shared*>(raw);
  const int rank = V::CLUSTER == 1 ? 0 : cluster_rank(), cluster = blockIdx.x / V::CLUSTER;
  const int part = cluster / args.tiles, tile = cluster % args.tiles, output = tile / args.row_tiles * 2 * V::COLUMNS;
  const int first = args.chunks * part / PARTS, last = args.chunks * (part + 1) / PARTS;
  const Piece piece = {(tile % args.row_tiles * V::CLUSTER + rank) * V::ROWS, {output, output + V::COLUMNS}, first, last - first};
  if (threadIdx.x == V::COMPUTE_THREADS) V::begin(shared, &x_map, &weight_map);
  __syncthreads();
  if (V::CLUSTER > 1) cluster_sync();  // the other's barriers are there
  let_later_kernels_start();
  if (threadIdx.x >= V::COMPUTE_THREADS) {
    registers_decrease<V::FEEDING_REGISTERS>();
    if (threadIdx.x == V::COMPUTE_THREADS) {
      TallFeeder<V> feeder = {shared, &x_map, &weight_map, rank, args.row_tiles == 1 ? EVICT_FIRST : EVICT_NORMAL};
      feeder.feed(piece);
    }
    __syncwarp();
  } else {
    if (V::GROUPS > 1) registers_increase<V::COMPUTE_REGISTERS>();
    wait_for_earlier_kernels();  // whoever writes must have waited
    float sums[V::SUMS], mine[V::SUMS / PARTS];
    TallProducts<V>(shared).sum(sums, piece.chunks);
    exchange<V, PARTS>(sums, mine, args, part, tile * V::CLUSTER + rank);
    store<V>(mine, args, piece.row + threadIdx.x / 32 * 16, output + part * 2 * V::COLUMNS / PARTS);
  }
  if (V::CLUSTER > 1) cluster_sync();  // nobody leaves while the other writes to its shared memory
}

// Whether so many clusters run at once on a device with nothing else to do; asked once for each kernel and device.
template <typename V, int PARTS>
bool has_room(int clusters) {
  static int room[64] = {};
  int device = 0;
  cudaGetDevice(&device);
  int& most = room[device % 64];
  if (most == 0) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = V::CLUSTER, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(clusters * V::CLUSTER);
    config.blockDim = dim3(V::THREADS);
    config.dynamicSmemBytes = sizeof(typename V::Shared);
    config.attrs = &attribute;
    config.numAttrs = 1;
    if (cudaOccupancyMaxActiveClusters(&most, split_linear<V, PARTS>, &config) != cudaSuccess) return false;
  }
  return clusters <= most;
}

template <typename V, int PARTS>
int launch(const void* x, long long x_stride, const void* weight, int inputs, Arguments args, cudaStream_t stream) {
  using T = typename V::Type;
  cudaError_t error = raise_shared_memory<split_linear<V, PARTS>>(sizeof(typename V::Shared));
  if (error != cudaSuccess) return error;
  args.row_tiles = (args.rows + V::CLUSTER * V::ROWS - 1) / (V::CLUSTER * V::ROWS), args.tiles *= args.row_tiles;
  if (!has_room<V, PARTS>(args.tiles * PARTS)) return cudaErrorCooperativeLaunchTooLarge;
  CUtensorMap x_map, weight_map;
  if (!make_map<T>(&weight_map, weight, args.outputs, inputs, inputs, V::COLUMNS, CU_TENSOR_MAP_L2_PROMOTION_L2_256B) ||
      !make_map<T>(&x_map, x, args.rows, inputs, x_stride, V::ROWS, CU_TENSOR_MAP_L2_PROMOTION_L2_128B)) {
    return cudaErrorInvalidValue;
  }
  return launch_tall<V>(split_linear<V, PARTS>, args.tiles * PARTS, stream, x_map, weight_map, args);
}

template <typename T, int COLUMNS, int PARTS>
int launch_by_rows(int groups, const void* x, long long x_stride, const void* weight, int inputs, const Arguments& args, cudaStream_t stream) {
  if (groups == 3) return launch<Tall<T, COLUMNS, 3, 2>, PARTS>(x, x_stride, weight, inputs, args, stream);
  if (args.rows > 128) return launch<Tall<T, COLUMNS, 2, 2>, PARTS>(x, x_stride, weight, inputs, args, stream);
  if (args.rows > 64) return launch<Tall<T, COLUMNS, 2, 1>, PARTS>(x, x_stride, weight, inputs, args, stream);
  return launch<Tall<T, COLUMNS, 1, 1>, PARTS>(x, x_stride, weight, inputs, args, stream);
}

template <typename T, int COLUMNS>
int launch_by_parts(int parts, int groups, const void* x, long long x_stride, const void* weight, int inputs, const Arguments& args, cudaStream_t stream) {
  return parts == 4 ? launch_by_rows<T, COLUMNS, 4>(groups, x, x_stride, weight, inputs, args, stream)
                    : launch_by_rows<T, COLUMNS, 2>(groups, x, x_stride, weight, inputs, args, stream);
}

template <typename T>
int launch_by_tile(int columns, int parts, int groups, const void* x, long long x_stride, const void* weight, int inputs, const Arguments& args, cudaStream_t stream) {
  return columns == 64 ? launch_by_parts<T, 64>(parts, groups, x, x_stride, weight, inputs, args, stream)
                       : launch_by_parts<T, 96>(parts, groups, x, x_stride, weight, inputs, args, stream);
}

}  // namespace
}  // namespace gantline

// `type` 0: bfloat16, 1: float16. x [rows, inputs], rows `x_stride` elements apart (a multiple of 8), weight [outputs, inputs], bias
// [outputs] or null, out [rows, outputs]; x and weight aligned to 16 bytes, inputs a multiple of 8, outputs of 4. A tile has `width` outputs, 128
// or 192, and with up to 64 rows 64 of them, up to 128 rows 128, else 128 times `groups`, 2 or 3. `parts`: 2 or 4, at most inputs / 64, rounded
// up. With `places` = ceil(outputs / width), with more than 128 rows times 2 ceil(rows / (128 groups)): `sums` is places * parts *
// max(128, 64 groups) * width float32, `counters` 2 * places int32, zero at first. Returns a cudaError_t: cudaErrorCooperativeLaunchTooLarge where the blocks would not all run at once.
GANTLINE_EXPORT int gantline_split_linear_hopper(int type, const void* x, long long x_stride, const void* weight, const void* bias, void* out, int rows,
                                                 int inputs, int outputs, int width, int parts, int groups, void* sums, void* counters, void* stream) {
  using namespace gantline;
  if (rows < 1 || inputs < 8 || inputs % 8 || outputs < 4 || outputs % 4 || (width != 128 && width != 192)) return cudaErrorInvalidValue;
  const int chunks = (inputs + DEPTH - 1) / DEPTH, tiles = (outputs + width - 1) / width;
  if ((parts != 2 && parts != 4) || chunks < parts || (groups != 2 && groups != 3) || (groups == 3 && rows <= 128)) return cudaErrorInvalidValue;
  const Arguments args = {out, bias, static_cast<float4*>(sums), static_cast<int*>(counters), rows, outputs, chunks, 1, tiles};
  const auto on = static_cast<cudaStream_t>(stream);
  return type == 0 ? launch_by_tile<__nv_bfloat16>(width / 2, parts, groups, x, x_stride, weight, inputs, args, on)
                   : launch_by_tile<__half>(width / 2, parts, groups, x, x_stride, weight, inputs, args, on);
}
