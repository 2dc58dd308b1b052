// Linear layers of up to 256 rows with many inputs and few outputs, for Hopper (sm_90a): out [rows, outputs] = x [rows, inputs]
// weight [outputs, inputs]^T + bias.
//
// A tile (`tall_linear_hopper.cuh`) is 128 or 192 outputs of 64, 128 or (two blocks of a cluster) 256 rows, too few for all multiprocessors, so
// `PARTS` blocks share one: each sums a part of the inputs, leaves what it has in scratch memory, waits until all have, and adds up and stores its own
// stretch of the outputs, in the parts' order, so that results do not depend on timing. All blocks must run at once, since they wait for each
// other: the launch is refused if the device has no room for them.

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
  int chunks;  // of 64 inputs, of all parts
  int tiles;   // of outputs
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
  float4 theirs[PARTS][QUADS];
#pragma unroll
  for (int from = 0; from < PARTS; ++from) {
#pragma unroll
    for (int i = 0; i < QUADS; ++i) theirs[from][i] = from == part ? make_float4(mine[i * 4], mine[i * 4 + 1], mine[i * 4 + 2], mine[i * 4 + 3]) : __ldcg(at(from, part) + i * THREADS);
  }
#pragma unroll
  for (int i = 0; i < QUADS; ++i) {
    float4 sum = theirs[0][i];
#pragma unroll
    for (int from = 1; from < PARTS; ++from) {
      const float4 next = theirs[from][i];
      sum.x += next.x, sum.y += next.y, sum.z += next.z, sum.w += next.w;
    }
    mine[i * 4] = sum.x, mine[i * 4 + 1] = sum.y, mine[i * 4 + 2] = sum.z, mine[i * 4 + 3] = sum.w;
  }
  named_sync<1, THREADS>();
  if (threadIdx.x == 0 && atomicAdd(counter + 1, 1) == PARTS - 1) counter[0] = 0, counter[1] = 0;
}

template <typename V, int KEPT>
__device__ __forceinline__ void store(const float (&mine)[KEPT], const Arguments& args, int first_row, int first_output) {
  using T = typename V::Type;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + half * 8 + lane / 4;
    if (row >= args.rows) continue;
    T* target = static_cast<T*>(args.out) + static_cast<long long>(row) * args.outputs;
#pragma unroll
    for (int block = 0; block < KEPT / 4; ++block) {
      const int i = block * 4 + half * 2, output = first_output + block * 8 + lane % 4 * 2;
      if (output >= args.outputs) continue;  // they are even in number
      float low = mine[i], high = mine[i + 1];
      if (args.bias) low += static_cast<float>(static_cast<const T*>(args.bias)[output]), high += static_cast<float>(static_cast<const T*>(args.bias)[output + 1]);
      *reinterpret_cast<uint32_t*>(target + output) = pack(low, high, static_cast<const T*>(nullptr));
    }
  }
}

template <typename V, int PARTS>
__global__ __launch_bounds__(V::THREADS, 1) void split_linear(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap weight_map,
                                                              const Arguments args) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& shared = *reinterpret_cast<typename V::Shared*>(raw);
  const int rank = V::CLUSTER == 1 ? 0 : cluster_rank(), cluster = blockIdx.x / V::CLUSTER;
  const int part = cluster / args.tiles, tile = cluster % args.tiles, output = tile * 2 * V::COLUMNS;
  const int first = args.chunks * part / PARTS, last = args.chunks * (part + 1) / PARTS;
  const Piece piece = {rank * V::ROWS, {output, output + V::COLUMNS}, first, last - first};
  if (threadIdx.x == V::COMPUTE_THREADS) V::begin(shared, &x_map, &weight_map);
  __syncthreads();
  if (V::CLUSTER > 1) cluster_sync();  // the other's barriers are there
  let_later_kernels_start();
  if (threadIdx.x >= V::COMPUTE_THREADS) {
    registers_decrease<40>();
    if (threadIdx.x == V::COMPUTE_THREADS) {
      TallFeeder<V> feeder = {shared, &x_map, &weight_map, rank, EVICT_FIRST};
      feeder.feed(piece);
    }
    __syncwarp();
  } else {
    if (V::GROUPS == 2) registers_increase<232>();
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
int launch(const void* x, long long x_stride, const void* weight, int inputs, const Arguments& args, cudaStream_t stream) {
  using T = typename V::Type;
  cudaError_t error = raise_shared_memory<split_linear<V, PARTS>>(sizeof(typename V::Shared));
  if (error != cudaSuccess) return error;
  if (!has_room<V, PARTS>(args.tiles * PARTS)) return cudaErrorCooperativeLaunchTooLarge;
  CUtensorMap x_map, weight_map;
  if (!make_map<T>(&weight_map, weight, args.outputs, inputs, inputs, V::COLUMNS, CU_TENSOR_MAP_L2_PROMOTION_L2_256B) ||
      !make_map<T>(&x_map, x, args.rows, inputs, x_stride, V::ROWS, CU_TENSOR_MAP_L2_PROMOTION_L2_128B)) {
    return cudaErrorInvalidValue;
  }
  return launch_tall<V>(split_linear<V, PARTS>, args.tiles * PARTS, stream, x_map, weight_map, args);
}

template <typename T, int COLUMNS, int PARTS>
int launch_by_rows(const void* x, long long x_stride, const void* weight, int inputs, const Arguments& args, cudaStream_t stream) {
  if (args.rows > 128) return launch<Tall<T, COLUMNS, 2, 2>, PARTS>(x, x_stride, weight, inputs, args, stream);
  if (args.rows > 64) return launch<Tall<T, COLUMNS, 2, 1>, PARTS>(x, x_stride, weight, inputs, args, stream);
  return launch<Tall<T, COLUMNS, 1, 1>, PARTS>(x, x_stride, weight, inputs, args, stream);
}

template <typename T>
int launch_by_tile(int columns, int parts, const void* x, long long x_stride, const void* weight, int inputs, const Arguments& args, cudaStream_t stream) {
  if (columns == 64) {
    return parts == 4 ? launch_by_rows<T, 64, 4>(x, x_stride, weight, inputs, args, stream) : launch_by_rows<T, 64, 2>(x, x_stride, weight, inputs, args, stream);
  }
  return parts == 4 ? launch_by_rows<T, 96, 4>(x, x_stride, weight, inputs, args, stream) : launch_by_rows<T, 96, 2>(x, x_stride, weight, inputs, args, stream);
}

}  // namespace
}  // namespace gantline

// `type` 0: bfloat16, 1: float16. x [rows, inputs], at most 256 rows `x_stride` elements apart (a multiple of 8), weight [outputs, inputs], bias
// [outputs] or null, out [rows, outputs]; x and weight aligned to 16 bytes, inputs a multiple of 8, outputs of 2. A tile has `width` outputs, 128
// or 192. `parts`: 2 or 4, at most inputs / 64, rounded up. With `tiles` = ceil(outputs / width), and `high` = 2 where rows > 128, else 1: `sums`
// is tiles * high * parts * 128 * width float32, `counters` 2 * tiles * high int32, zero at first. Returns a cudaError_t:
// cudaErrorCooperativeLaunchTooLarge where the blocks would not all run at once.
GANTLINE_EXPORT int gantline_split_linear_hopper(int type, const void* x, long long x_stride, const void* weight, const void* bias, void* out, int rows,
                                                 int inputs, int outputs, int width, int parts, void* sums, void* counters, void* stream) {
  using namespace gantline;
  if (rows < 1 || rows > 256 || inputs < 8 || inputs % 8 || outputs < 2 || outputs % 2 || (width != 128 && width != 192)) return cudaErrorInvalidValue;
  const int chunks = (inputs + DEPTH - 1) / DEPTH, tiles = (outputs + width - 1) / width;
  if ((parts != 2 && parts != 4) || chunks < parts) return cudaErrorInvalidValue;
  const Arguments args = {out, bias, static_cast<float4*>(sums), static_cast<int*>(counters), rows, outputs, chunks, tiles};
  const auto on = static_cast<cudaStream_t>(stream);
  return type == 0 ? launch_by_tile<__nv_bfloat16>(width / 2, parts, x, x_stride, weight, inputs, args, on)
                   : launch_by_tile<__half>(width / 2, parts, x, x_stride, weight, inputs, args, on);
}
