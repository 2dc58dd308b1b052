// Linear layers for batches (17 to 64 rows), for Hopper (sm_90a): bound by reading the weights once.
//
// out [rows, outputs] = x [rows, inputs] weight [outputs, inputs]^T + bias. The matrix units take the weights as their left operand, and
// shares are equal: each cluster of two blocks has the same number of chunks of the weights, counted through all tiles. A cluster's tile is
// 128 outputs of all rows; its blocks take every other chunk of 64 inputs, so each brings in half of x, and at a tile's end each sends the
// other one's half of the rows over the cluster's shared memory. Only tiles that clusters share go through scratch memory: each leaves its
// sums and counts itself, and the last one to do so adds them in the clusters' order, so results do not depend on timing. It is warps that
// count and add, each for its 16 outputs. Nobody waits for a block outside the cluster.
//
// Blocks start before the kernel ahead of them ends, fill their stages with weights, and only then wait.

#include "host.cuh"
#include "hopper.cuh"
#include "linear_hopper.cuh"

namespace gantline {
namespace {

constexpr int COMPUTE_WARPS = 8, COMPUTE_THREADS = COMPUTE_WARPS * 32;
constexpr int THREADS = COMPUTE_THREADS + 32;  // one thread of the last warp feeds
constexpr int SPLIT = 2;                       // blocks of a cluster
constexpr int MAX_TILES = 8192;
constexpr int REGISTERS = 80;  // a thread's: two blocks leave room for small kernels that start early
constexpr int SHARED_LIMIT = 113 * 1024;  // so that two blocks fit

struct Arguments {
  void* out;
  const void* bias;  // or null
  float4* sums;      // scratch: two tiles' sums of each cluster
  int* counters;     // of each tile, block and warp: clusters that have left their sums; zero between launches
  int rows;
  int outputs;
  int groups;  // of a tile: SPLIT chunks
  int total;   // groups of all tiles; times the clusters it fits 31 bits
  int clusters;
  int wide;  // out is float32
};

template <typename T, int ROWS_>
struct Variant {
  using Type = T;
  static constexpr int ROWS = ROWS_;
  static constexpr int SUMS = ROWS / 2, KEPT = SUMS / SPLIT, QUADS = KEPT / 4;  // of a thread: before blocks exchange theirs, and after
  static constexpr int AHEAD = ROWS == 32 ? 4 : 1;  // clusters whose sums a thread loads at once: as many as there are registers for
  struct Stage {
    T weights[OUTPUTS * DEPTH];
    T x[ROWS * DEPTH];
  };
  static constexpr int EXCHANGE = QUADS * COMPUTE_THREADS * 16;
  static constexpr int STAGES = (SHARED_LIMIT - EXCHANGE - 256) / static_cast<int>(sizeof(Stage));
  struct __align__(1024) Shared {
    Stage stage[STAGES];
    float4 exchange[SPLIT - 1][QUADS * COMPUTE_THREADS];  // what the others send
    uint64_t full[STAGES], empty[STAGES], sums_full, sums_empty;
  };
  static_assert(sizeof(Shared) <= SHARED_LIMIT && STAGES >= 2, "must fit");
};

__device__ __forceinline__ void add(float* sums, float4 value) { sums[0] += value.x, sums[1] += value.y, sums[2] += value.z, sums[3] += value.w; }

// 8 x 8 numbers of 16 bits, two of a row in each lane.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t pair) {
  uint32_t transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// sums[64 x N] += 64 outputs' weights times N rows of x, inner 16. `a`, `b` and `upper` are the places of the operands after the sums.
#define GANTLINE_WIDE(type, name, N, list, a, b, upper, ...)                                                                       \
  __device__ __forceinline__ void product(float (&d)[N / 2], uint32_t weights, uint32_t x, const type*) {                          \
    asm volatile("{\n.reg .b64 a, b;\nmov.b64 a, {%" a ", %" upper "};\nmov.b64 b, {%" b ", %" upper "};\n"                        \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." name "." name " {" list "}, a, b, 1, 1, 1, 0, 0;\n}"            \
                 : __VA_ARGS__                                                                                                     \
                 : "r"(weights), "r"(x), "n"(GANTLINE_PANEL_UPPER));                                                               \
  }
#define GANTLINE_WIDE_BOTH(type, name)                                                                   \
  GANTLINE_WIDE(type, name, 32, GANTLINE_LIST16, "16", "17", "18", GANTLINE_F8(d, 0), GANTLINE_F8(d, 8)) \
  GANTLINE_WIDE(type, name, 64, GANTLINE_LIST32, "32", "33", "34", GANTLINE_F32(d, 0))
GANTLINE_WIDE_BOTH(__nv_bfloat16, "bf16")
GANTLINE_WIDE_BOTH(__half, "f16")

__device__ __forceinline__ int share_begin(const Arguments& args, int cluster) { return args.total * cluster / args.clusters; }

// The cluster whose share a group is in.
__device__ __forceinline__ int owner(const Arguments& args, int group) { return ((group + 1) * args.clusters - 1) / args.total; }

// The order of a share's groups: the parts of tiles that are shared, at its beginning and end, come first, so that their sums are long there
// when the whole tiles are done.
struct Walk {
  int begin, end;
  int whole, back;  // where the whole tiles begin, and what comes after the part at the beginning

  __device__ __forceinline__ static Walk of(const Arguments& args, int begin, int end) {
    Walk walk = {begin, end, begin, begin};
    if (begin % args.groups) walk.whole = min(begin + args.groups - begin % args.groups, end);
    walk.back = walk.whole < end && end % args.groups ? end - end % args.groups : walk.whole;
    return walk;
  }
  __device__ __forceinline__ int start() const { return whole > begin ? begin : back; }
  // Where to go on instead of at `at`, to which a part or tile has come.
  __device__ __forceinline__ int onward(int at) const { return at == whole ? back : at == end ? whole : at; }
};

// The thread that brings a block's chunks in.
template <typename V>
struct Feeder {
  const CUtensorMap *weight_map, *x_map;
  typename V::Shared& shared;
  const Walk walk;
  int groups, rank;
  int at, tile, group, left;
  Ring<V::STAGES> ring = {};

  __device__ __forceinline__ Feeder(const CUtensorMap* weight_map, const CUtensorMap* x_map, typename V::Shared& shared, const Arguments& args, const Walk& walk, int rank)
      : weight_map(weight_map), x_map(x_map), shared(shared), walk(walk), groups(args.groups), rank(rank), left(walk.end - walk.begin) {
    go(walk.start());
  }
  __device__ __forceinline__ void go(int there) { at = there, tile = there / groups, group = there % groups; }
  __device__ __forceinline__ int column() const { return (group * SPLIT + rank) * DEPTH; }
  __device__ __forceinline__ void copy_weights() {
    barrier_arrive_expect(&shared.full[ring.stage], sizeof(shared.stage[0]));
    copy_once_box(shared.stage[ring.stage].weights, weight_map, column(), tile * OUTPUTS, &shared.full[ring.stage]);
  }
  __device__ __forceinline__ void copy_x() { copy_box(shared.stage[ring.stage].x, x_map, column(), 0, &shared.full[ring.stage]); }
  __device__ __forceinline__ void advance() {
    if (++group == groups) group = 0, ++tile;
    const int there = walk.onward(++at);
    if (there != at) go(there);
    ring.advance();
  }
  // Fill all stages: the weights before the kernel ahead ends, x after.
  __device__ __forceinline__ void start() {
    const int early = min(V::STAGES, left);
    let_later_kernels_start();
    for (int i = 0; i < early; ++i) copy_weights(), advance();
    wait_for_earlier_kernels();
    go(walk.start()), ring = {}, left -= early;
    for (int i = 0; i < early; ++i) copy_x(), advance();
  }
  // The next chunk, as soon as its stage is free.
  __device__ __forceinline__ void next() {
    if (left == 0) return;
    barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
    copy_weights(), copy_x(), advance();
    --left;
  }
};

// Two of a thread's outputs, 8 apart, of eight rows: `low` and `high`, each of rows 2 (lane % 4) and the next. Neighbours exchange, so that
// each lane writes four outputs of row lane / 4, and a row's four lanes 32 bytes.
template <typename T>
__device__ __forceinline__ void store_block(uint32_t low, uint32_t high, T* row_start, bool inside, int lane) {
  const uint32_t u = transpose_8x8(low), v = transpose_8x8(high);
  const bool odd = lane % 2;
  const uint32_t other = __shfl_xor_sync(~0u, odd ? u : v, 1);
  const uint2 piece = odd ? make_uint2(other, v) : make_uint2(u, other);
  if (inside) *reinterpret_cast<uint2*>(row_start + odd * 8 + lane % 4 / 2 * 4) = piece;
}

// A warp's place in the results.
struct Place {
  int output, row;  // its first ones
  float bias[2];    // of this thread's outputs
};

// A thread's sums, those of the rows from `first_row` on.
template <typename V>
__device__ __forceinline__ void store(const float (&sums)[V::KEPT], const Arguments& args, const Place& at, int first_row) {
  using T = typename V::Type;
  const int lane = threadIdx.x % 32;
  if (!args.wide && args.outputs % 4 == 0 && at.output + 16 <= args.outputs) {
    T* target = static_cast<T*>(args.out) + static_cast<long long>(first_row + lane / 4) * args.outputs + at.output;
#pragma unroll
    for (int i = 0; i < V::KEPT; i += 4) {
      const uint32_t low = pack(sums[i] + at.bias[0], sums[i + 1] + at.bias[0], static_cast<const T*>(nullptr));
      const uint32_t high = pack(sums[i + 2] + at.bias[1], sums[i + 3] + at.bias[1], static_cast<const T*>(nullptr));
      store_block(low, high, target + static_cast<long long>(i * 2) * args.outputs, first_row + i * 2 + lane / 4 < args.rows, lane);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < V::KEPT; ++i) {
    const int row = first_row + i / 4 * 8 + lane % 4 * 2 + i % 2, output = at.output + i % 4 / 2 * 8 + lane / 4;
    if (row >= args.rows || output >= args.outputs) continue;
    const float value = sums[i] + at.bias[i % 4 / 2];
    const long long place = static_cast<long long>(row) * args.outputs + output;
    if (args.wide) {
      static_cast<float*>(args.out)[place] = value;
    } else {
      static_cast<T*>(args.out)[place] = static_cast<T>(value);
    }
  }
}

// The two blocks of a tile hand each other their halves of the rows: `kept` is the whole sum of this block's rows.
template <typename V>
__device__ __forceinline__ void exchange(float (&sums)[V::SUMS], float (&kept)[V::KEPT], typename V::Shared& shared, int rank, uint32_t parity) {
  const int thread = threadIdx.x, lane = threadIdx.x % 32;
  barrier_wait_cluster(&shared.sums_empty, parity ^ 1);
  if (thread == 0) barrier_arrive_expect(&shared.sums_full, V::EXCHANGE);
#pragma unroll
  for (int to = 0; to < SPLIT; ++to) {
    if (to == rank) {
#pragma unroll
      for (int i = 0; i < V::KEPT; ++i) kept[i] = sums[to * V::KEPT + i];
    } else {
      const uint32_t target = remote_address(&shared.exchange[rank - (rank > to)][thread], to), barrier = remote_address(&shared.sums_full, to);
#pragma unroll
      for (int i = 0; i < V::QUADS; ++i) remote_store_async(target + i * COMPUTE_THREADS * 16, &sums[to * V::KEPT + i * 4], barrier);
    }
  }
  barrier_wait_cluster(&shared.sums_full, parity);
#pragma unroll
  for (int from = 0; from < SPLIT - 1; ++from) {
#pragma unroll
    for (int i = 0; i < V::QUADS; ++i) add(&kept[i * 4], shared.exchange[from][i * COMPUTE_THREADS + thread]);
  }
  __syncwarp();
  if (lane < SPLIT && lane != rank) remote_arrive(remote_address(&shared.sums_empty, lane));
}

// Where a cluster left a warp's sums of a tile: those of the first tile of its share apart from those of the last.
template <typename V>
__device__ __forceinline__ float4* sums_of(const Arguments& args, int cluster, int rank, int tile) {
  const bool begins_there = share_begin(args, cluster) >= tile * args.groups;
  return args.sums + ((2ll * cluster + !begins_there) * SPLIT + rank) * V::QUADS * COMPUTE_THREADS + threadIdx.x;
}

// The end of a tile that clusters `first` to `last` share: leave this warp's sums, unless all others have; whoever comes last adds them up,
// in the clusters' order, and stores. Two numbers' sum has no order: of two clusters the second one's sums need not leave its registers.
template <typename V>
__device__ __forceinline__ void finish(float (&sums)[V::KEPT], const Arguments& args, int tile, int cluster, int rank, int first, int last) {
  constexpr int QUADS = V::QUADS, AHEAD = V::AHEAD;
  const int lane = threadIdx.x % 32, parts = last - first + 1;
  int from = first, to = last;  // whose sums are to be added
  if (parts > 1) {
    int* counter = args.counters + ((tile * SPLIT + rank) * COMPUTE_WARPS + threadIdx.x / 32);
    int before = 0;
    if (parts == 2) before = load_acquire(counter);
    if (__shfl_sync(~0u, before, 0) == 0) {
      float4* mine = sums_of<V>(args, cluster, rank, tile);
#pragma unroll
      for (int i = 0; i < QUADS; ++i) __stcg(mine + i * COMPUTE_THREADS, make_float4(sums[i * 4], sums[i * 4 + 1], sums[i * 4 + 2], sums[i * 4 + 3]));
      __threadfence();
      __syncwarp();
      if (lane == 0) before = atomicAdd(counter, 1);
    }
    if (__shfl_sync(~0u, before, 0) != parts - 1) return;
    __threadfence();
    if (lane == 0) *counter = 0;
  }
  const bool anew = parts > 2;
  if (parts == 1) from = 1, to = 0;
  if (parts == 2) from = to = first + last - cluster;
  Place at = {tile * OUTPUTS + static_cast<int>(threadIdx.x) / 32 * 16, rank * (V::ROWS / SPLIT)};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int output = at.output + half * 8 + lane / 4;
    at.bias[half] = args.bias && output < args.outputs ? static_cast<float>(static_cast<const typename V::Type*>(args.bias)[output]) : 0.f;
  }
  if (anew) {
#pragma unroll
    for (int i = 0; i < V::KEPT; ++i) sums[i] = 0.f;
  }
#pragma unroll 1
  for (int part = from; part <= to; part += AHEAD) {
    float4 loaded[AHEAD][QUADS];
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      if (part + a > to) continue;
      const float4* theirs = sums_of<V>(args, part + a, rank, tile);
#pragma unroll
      for (int i = 0; i < QUADS; ++i) loaded[a][i] = __ldcg(theirs + i * COMPUTE_THREADS);
    }
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      if (part + a > to) continue;
#pragma unroll
      for (int i = 0; i < QUADS; ++i) add(&sums[i * 4], loaded[a][i]);
    }
  }
  store<V>(sums, args, at, at.row);
}

template <typename V>
__device__ void compute(typename V::Shared& shared, const Arguments& args, const Walk& walk, int cluster, int rank) {
  using T = typename V::Type;
  constexpr uint32_t STEP = sizeof(shared.stage[0]) / 16, HALF = OUTPUTS * DEPTH * sizeof(T) / 32;
  const int lane = threadIdx.x % 32;
  const uint32_t all_weights = panel(shared.stage[0].weights, 16) + __shfl_sync(~0u, threadIdx.x / 128, 0) * HALF, all_x = panel(shared.stage[0].x, 16);
  Ring<V::STAGES> ring;
  uint32_t exchanges = 0;
#pragma unroll 1
  for (int at = walk.start(), left = walk.end - walk.begin; left > 0; at = walk.onward(at)) {
    const int tile = at / args.groups, tile_end = (tile + 1) * args.groups, until = min(tile_end, walk.end);
    left -= until - at;
    float sums[V::SUMS];
#pragma unroll
    for (int i = 0; i < V::SUMS; ++i) sums[i] = 0.f;
    hold(sums);
#pragma unroll 1
    for (; at < until; ++at) {
      barrier_wait(&shared.full[ring.stage], ring.parity);
      hold(sums);
      products_begin();
#pragma unroll
      for (int step = 0; step < DEPTH / 16; ++step) {
        product(sums, all_weights + ring.stage * STEP + step * 2, all_x + ring.stage * STEP + step * 2, static_cast<const T*>(nullptr));
      }
      products_commit();
      products_wait<0>();
      hold(sums);
      if (lane == 0) barrier_arrive(&shared.empty[ring.stage]);
      ring.advance();
    }
    const int first = owner(args, tile_end - args.groups), last = owner(args, tile_end - 1);
    float kept[V::KEPT];
    exchange<V>(sums, kept, shared, rank, exchanges & 1);
    ++exchanges;
    finish<V>(kept, args, tile, cluster, rank, first, last);
  }
}

template <typename V>
__global__ __maxnreg__(REGISTERS) void batch(const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap x_map, const Arguments args) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& shared = *reinterpret_cast<typename V::Shared*>(raw);
  const int cluster = blockIdx.x / SPLIT, rank = blockIdx.x % SPLIT;
  const Walk walk = Walk::of(args, share_begin(args, cluster), share_begin(args, cluster + 1));
  if (threadIdx.x == COMPUTE_THREADS) {
    if (shared_address(raw) % 1024) __trap();
    prefetch_map(&weight_map), prefetch_map(&x_map);
    for (int i = 0; i < V::STAGES; ++i) barrier_init(&shared.full[i], 1), barrier_init(&shared.empty[i], COMPUTE_WARPS);
    barrier_init(&shared.sums_full, 1), barrier_init(&shared.sums_empty, COMPUTE_WARPS);
    barrier_init_visible();
  }
  __syncthreads();
  cluster_sync();  // the other's barriers are there
  Feeder<V> feeder(&weight_map, &x_map, shared, args, walk, rank);
  if (threadIdx.x >= COMPUTE_THREADS) {
    if (threadIdx.x == COMPUTE_THREADS) {
      feeder.start();
      while (feeder.left) feeder.next();
    }
    __syncwarp();
  } else {
    __syncwarp();
    wait_for_earlier_kernels();  // whoever writes must have waited
    compute<V>(shared, args, walk, cluster, rank);
    __syncwarp();
  }
  cluster_sync();  // nobody leaves while the other writes to its shared memory
}

template <typename V>
int launch(const void* x, long long x_stride, const void* weight, int inputs, const Arguments& args, cudaStream_t stream) {
  using T = typename V::Type;
  cudaError_t error = raise_shared_memory<batch<V>>(227 * 1024);
  // All shared memory there is: then a block of the linear layer behind fits beside each of this one's, and fills its stages.
  if (error == cudaSuccess) error = cudaFuncSetAttribute(batch<V>, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  CUtensorMap weight_map, x_map;
  // Weights come in stretches of 128 bytes, but the next 128 of a row are asked for soon: both at once spares memory an access.
  if (!make_map<T>(&weight_map, weight, args.outputs, inputs, inputs, OUTPUTS, CU_TENSOR_MAP_L2_PROMOTION_L2_256B) ||
      !make_map<T>(&x_map, x, args.rows, inputs, x_stride, V::ROWS, CU_TENSOR_MAP_L2_PROMOTION_L2_128B)) {
    return cudaErrorInvalidValue;
  }
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = SPLIT, attributes[0].val.clusterDim.y = 1, attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(args.clusters * SPLIT);
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = sizeof(typename V::Shared);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, batch<V>, weight_map, x_map, args);
}

}  // namespace
}  // namespace gantline

// As gantline_linear_few_rows, for up to 64 rows, in `clusters` of two blocks. `sums`: clusters * 2 * 128 * (rows > 32 ? 64 : 32) float32;
// `counters`: 16 int32 for each 128 outputs, zero at first. Returns a cudaError_t.
GANTLINE_EXPORT int gantline_linear_batch_hopper(int type, const void* x, long long x_stride, const void* weight, const void* bias, void* out, int wide,
                                                 int rows, int inputs, int outputs, void* sums, void* counters, int clusters, void* stream) {
  using namespace gantline;
  if (rows < 1 || rows > 64 || inputs < 8 || inputs % 8 || outputs < 1 || clusters < 1) return cudaErrorInvalidValue;
  const long long tiles = (outputs + OUTPUTS - 1) / OUTPUTS, groups = (inputs + DEPTH * SPLIT - 1) / (DEPTH * SPLIT), total = tiles * groups;
  if (tiles > MAX_TILES || clusters > total || total * (clusters + 1) > INT32_MAX) return cudaErrorInvalidValue;
  const Arguments args = {out,  bias,    static_cast<float4*>(sums),   static_cast<int*>(counters), rows,
                          outputs, static_cast<int>(groups), static_cast<int>(total), clusters, wide};
  const auto on = static_cast<cudaStream_t>(stream);
  if (type == 0) {
    return rows > 32 ? launch<Variant<__nv_bfloat16, 64>>(x, x_stride, weight, inputs, args, on)
                     : launch<Variant<__nv_bfloat16, 32>>(x, x_stride, weight, inputs, args, on);
  }
  return rows > 32 ? launch<Variant<__half, 64>>(x, x_stride, weight, inputs, args, on) : launch<Variant<__half, 32>>(x, x_stride, weight, inputs, args, on);
}
