// The gated half of a feed-forward layer, for Hopper (sm_90a): out [rows, width] = silu(x gate^T + its bias) * (x up^T + its bias), of
// x [rows, inputs] and weight [2 width, inputs] = gate, then up. Bound by the matrix units from some 150 rows on, by reading the weights below.
//
// A tile (`tall_linear_hopper.cuh`) is `COLUMNS` outputs, that is as many rows of gate and as many of up: both products of an output lie in the
// same thread, so the activation costs no memory. Blocks walk over tiles in equal strides; no tile is shared, so nothing is summed between
// blocks, and results do not depend on timing. `COLUMNS` is chosen by the caller so that few multiprocessors idle in the last round.

#include "tall_linear_hopper.cuh"

namespace gantline {
namespace {

constexpr int STRETCH = 8;  // tiles of rows that are walked through before the next outputs: what of x stays in the second-level cache

struct Arguments {
  void* out;
  const void* bias;  // [2 width], or null
  int rows;
  int width;
  int chunks;       // of 64 inputs
  int row_tiles;    // of clusters
  int column_tiles;
};

// Within a stretch of STRETCH tiles the rows come first, so that neighbours in time read the same weights.
template <typename V>
__device__ __forceinline__ Piece tile_at(const Arguments& args, int index, int rank) {
  const int first = index / (STRETCH * args.column_tiles) * STRETCH;
  const int high = min(STRETCH, args.row_tiles - first), within = index - first * args.column_tiles;
  const int column = within / high * V::COLUMNS;
  return {((first + within % high) * V::CLUSTER + rank) * V::ROWS, {column, args.width + column}, 0, args.chunks};
}

__device__ __forceinline__ float gated(float gate, float up) { return gate * up * fast_reciprocal(1.f + fast_exp2(gate * -1.4426950408889634f)); }

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

template <typename V>
__device__ __forceinline__ void store(float (&sums)[V::SUMS], const Arguments& args, int row, int column) {
  using T = typename V::Type;
  constexpr int UP = V::SUMS / 2;
  if (args.bias) add_bias<V>(sums, args, column);
  store_rows<T, V::COLUMNS / 8>(static_cast<T*>(args.out), args.rows, args.width, row, column, [&](int block, int half) {
    const int i = block * 4 + half * 2;
    return pack(gated(sums[i], sums[UP + i]), gated(sums[i + 1], sums[UP + i + 1]), static_cast<const T*>(nullptr));
  });
}

template <typename V>
__global__ __launch_bounds__(V::THREADS, 1) void gated_linear(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap weight_map,
                                                              const Arguments args) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& shared = *reinterpret_cast<typename V::Shared*>(raw);
  const int rank = V::CLUSTER == 1 ? 0 : cluster_rank(), clusters = gridDim.x / V::CLUSTER, tiles = args.row_tiles * args.column_tiles;
  if (threadIdx.x == V::COMPUTE_THREADS) V::begin(shared, &x_map, &weight_map);
  __syncthreads();
  if (V::CLUSTER > 1) cluster_sync();  // the other's barriers are there
  let_later_kernels_start();
  if (threadIdx.x >= V::COMPUTE_THREADS) {
    registers_decrease<V::FEEDING_REGISTERS>();
    if (threadIdx.x == V::COMPUTE_THREADS) {
      TallFeeder<V> feeder = {shared, &x_map, &weight_map, rank, args.row_tiles == 1 ? EVICT_FIRST : EVICT_NORMAL};
      for (int index = blockIdx.x / V::CLUSTER; index < tiles; index += clusters) feeder.feed(tile_at<V>(args, index, rank));
    }
    __syncwarp();
  } else {
    if (V::GROUPS > 1) registers_increase<V::COMPUTE_REGISTERS>();
    wait_for_earlier_kernels();  // whoever writes must have waited
    TallProducts<V> products(shared);
    float sums[V::SUMS];
    for (int index = blockIdx.x / V::CLUSTER; index < tiles; index += clusters) {
      const Piece tile = tile_at<V>(args, index, rank);
      products.sum(sums, tile.chunks);
      store<V>(sums, args, tile.row + threadIdx.x / 32 * 16, tile.weights[0]);
    }
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
  return launch_tall<V>(gated_linear<V>, static_cast<int>((tiles + rounds - 1) / rounds), stream, x_map, weight_map, args);
}

template <typename T, int COLUMNS>
int launch_by_rows(int groups, const void* x, long long x_stride, const void* weight, int inputs, const Arguments& args, int blocks, cudaStream_t stream) {
  if (args.rows <= 64) return launch<Tall<T, COLUMNS, 1, 1>>(x, x_stride, weight, inputs, args, blocks, stream);
  if (args.rows <= 128) return launch<Tall<T, COLUMNS, 2, 1>>(x, x_stride, weight, inputs, args, blocks, stream);
  if constexpr (COLUMNS <= 96) {  // what registers there are for three
    if (groups == 3) return launch<Tall<T, COLUMNS, 3, 2>>(x, x_stride, weight, inputs, args, blocks, stream);
  }
  return groups == 2 ? launch<Tall<T, COLUMNS, 2, 2>>(x, x_stride, weight, inputs, args, blocks, stream) : cudaErrorInvalidValue;
}

template <typename T>
int launch_by_columns(int columns, int groups, const void* x, long long x_stride, const void* weight, int inputs, const Arguments& args, int blocks,
                      cudaStream_t stream) {
  switch (columns) {
    case 64: return launch_by_rows<T, 64>(groups, x, x_stride, weight, inputs, args, blocks, stream);
    case 80: return launch_by_rows<T, 80>(groups, x, x_stride, weight, inputs, args, blocks, stream);
    case 96: return launch_by_rows<T, 96>(groups, x, x_stride, weight, inputs, args, blocks, stream);
    case 112: return launch_by_rows<T, 112>(groups, x, x_stride, weight, inputs, args, blocks, stream);
    case 128: return launch_by_rows<T, 128>(groups, x, x_stride, weight, inputs, args, blocks, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace gantline

// `type` 0: bfloat16, 1: float16. x [rows, inputs] with rows `x_stride` elements apart (a multiple of 8), weight [2 width, inputs], bias
// [2 width] or null, out [rows, width]; x and weight aligned to 16 bytes, inputs a multiple of 8, width of 4. `columns`: outputs of a tile, 64, 80,
// 96, 112 or 128. `groups`: a tile of more than 128 rows has 128 times as many, 2 or, with up to 96 columns, 3. `blocks`: an even number, at most
// what runs at once. Returns a cudaError_t.
GANTLINE_EXPORT int gantline_gated_linear_hopper(int type, const void* x, long long x_stride, const void* weight, const void* bias, void* out, int rows,
                                                 int inputs, int width, int columns, int groups, int blocks, void* stream) {
  using namespace gantline;
  if (rows < 1 || inputs < 8 || inputs % 8 || width < 4 || width % 4 || blocks < 2 || blocks % 2) return cudaErrorInvalidValue;
  const Arguments args = {out, bias, rows, width, (inputs + DEPTH - 1) / DEPTH, 0, 0};
  const auto on = static_cast<cudaStream_t>(stream);
  return type == 0 ? launch_by_columns<__nv_bfloat16>(columns, groups, x, x_stride, weight, inputs, args, blocks, on)
                   : launch_by_columns<__half>(columns, groups, x, x_stride, weight, inputs, args, blocks, on);
}
