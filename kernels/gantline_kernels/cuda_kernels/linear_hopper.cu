// Linear layers for few rows (up to 16), for Hopper (sm_90a): bound by reading the weights once.
//
// out [rows, outputs] = x [rows, inputs] weight [outputs, inputs]^T + bias. The matrix units take the weights as their left operand, so
// that few rows waste little. A tile is 128 outputs, a chunk 64 inputs of it. A multiprocessor gets an even share of the bandwidth
// however much it asks for, so what ends last is the busiest: each block, one to a multiprocessor, takes the same number of chunks,
// counted through all tiles one after the other, whatever the shape. Where a tile is shared by several blocks, each leaves its sums in
// scratch memory and counts itself; the last one to do so adds them in the blocks' order, so results do not depend on timing, and nobody
// waits for another block.
//
// Weights depend on nothing, so a block may start before the kernel ahead of it ends (programmatic dependent launch), fill its stages, and
// only then wait. Two blocks fit a multiprocessor, and successors may start at once: were they let in at the end, some multiprocessors would
// be free by then and get two of their blocks, while others get none.

#include "host.cuh"
#include "hopper.cuh"
#include "linear_hopper.cuh"

namespace gantline {
namespace {

constexpr int COMPUTE_THREADS = 128;
constexpr int THREADS = COMPUTE_THREADS + 32;
constexpr int MAX_ROWS = 16;
constexpr int MAX_TILES = 16384;
constexpr int SHARED_LIMIT = 113 * 1024;  // so that two blocks fit

struct Arguments {
  void* out;
  const void* bias;  // or null
  float4* sums;      // scratch: two tiles' sums of each block
  int* counters;     // of each tile: blocks that have left their sums; zero between launches
  int rows;
  int outputs;
  int chunks;  // of a tile
  int total;   // chunks of all tiles; times the blocks it fits 31 bits
  int wide;    // out is float32
};

template <typename T, int COLUMNS>
struct __align__(1024) Shared {
  struct Stage {
    T weights[OUTPUTS * DEPTH];
    T x[COLUMNS * DEPTH];
  };
  static constexpr int STAGES = (SHARED_LIMIT - 2048) / sizeof(Stage);
  Stage stage[STAGES];
  uint64_t full[STAGES], empty[STAGES];
  int is_last;
};

// sums[64 x COLUMNS] += 64 outputs' weights times COLUMNS rows of x, inner 16.
#define GANTLINE_FEW(type, name)                                                                                                        \
  __device__ __forceinline__ void product(float (&d)[4], uint32_t a, uint32_t b, const type*) {                                        \
    asm volatile("{\n.reg .b64 a, b;\nmov.b64 a, {%4, %6};\nmov.b64 b, {%5, %6};\nwgmma.mma_async.sync.aligned.m64n8k16.f32." name "." name \
                 " {%0, %1, %2, %3}, a, b, 1, 1, 1, 0, 0;\n}"                                                                           \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                      \
                 : "r"(a), "r"(b), "n"(GANTLINE_PANEL_UPPER));                                                                         \
  }                                                                                                                                    \
  __device__ __forceinline__ void product(float (&d)[8], uint32_t a, uint32_t b, const type*) {                                        \
    asm volatile("{\n.reg .b64 a, b;\nmov.b64 a, {%8, %10};\nmov.b64 b, {%9, %10};\nwgmma.mma_async.sync.aligned.m64n16k16.f32." name "."  \
                 name " {%0, %1, %2, %3, %4, %5, %6, %7}, a, b, 1, 1, 1, 0, 0;\n}"                                                      \
                 : GANTLINE_F8(d, 0)                                                                                                   \
                 : "r"(a), "r"(b), "n"(GANTLINE_PANEL_UPPER));                                                                         \
  }

GANTLINE_FEW(__nv_bfloat16, "bf16")
GANTLINE_FEW(__half, "f16")

// A block's share: the chunks from `share_begin` to before the next block's, counted through all tiles.
__device__ __forceinline__ int share_begin(const Arguments& args, int block) { return args.total * block / static_cast<int>(gridDim.x); }

// The block whose share a chunk is in.
__device__ __forceinline__ int owner(const Arguments& args, int chunk) { return ((chunk + 1) * static_cast<int>(gridDim.x) - 1) / args.total; }

// The chunks of a share in order.
struct Cursor {
  int tile, chunk;
  __device__ __forceinline__ void advance(int chunks) {
    if (++chunk == chunks) chunk = 0, ++tile;
  }
  __device__ __forceinline__ int column() const { return chunk * DEPTH; }
  __device__ __forceinline__ int row() const { return tile * OUTPUTS; }
};

template <typename T, int COLUMNS>
__device__ void feed(const CUtensorMap* weight_map, const CUtensorMap* x_map, Shared<T, COLUMNS>& shared, const Arguments& args, int first, int last) {
  constexpr int STAGES = Shared<T, COLUMNS>::STAGES;
  const int total = last - first, early = min(STAGES, total);
  const Cursor start = {first / args.chunks, first % args.chunks};
  Cursor at = start;
  Ring<STAGES> ring;
  const auto copy_weights = [&] {
    barrier_arrive_expect(&shared.full[ring.stage], sizeof(shared.stage[0]));
    copy_once_box(shared.stage[ring.stage].weights, weight_map, at.column(), at.row(), &shared.full[ring.stage]);
  };
  const auto copy_x = [&] { copy_box(shared.stage[ring.stage].x, x_map, at.column(), 0, &shared.full[ring.stage]); };
  const auto advance = [&] { at.advance(args.chunks), ring.advance(); };
  let_later_kernels_start();
  for (int i = 0; i < early; ++i) copy_weights(), advance();
  wait_for_earlier_kernels();
  at = start, ring = {};
  for (int i = 0; i < early; ++i) copy_x(), advance();
  for (int i = early; i < total; ++i) {
    barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
    copy_weights(), copy_x(), advance();
  }
}

// A thread's sums of a tile: `of[half][i]`, of each half of 64 outputs.
template <int COLUMNS>
struct Sums {
  static constexpr int QUADS = COLUMNS / 4;  // float4s
  float of[2][COLUMNS / 2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) of[i / (COLUMNS / 2)][i % (COLUMNS / 2)] = 0.f;
  }
  __device__ __forceinline__ float* quad(int i) { return &of[i / (QUADS / 2)][i % (QUADS / 2) * 4]; }
  __device__ __forceinline__ void add(int i, float4 value) {
    float* place = quad(i);
    place[0] += value.x, place[1] += value.y, place[2] += value.z, place[3] += value.w;
  }
};

template <typename T, int COLUMNS>
__device__ __forceinline__ void store(const Sums<COLUMNS>& sums, const Arguments& args, int tile) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int part = 0; part < 4; ++part) {  // a thread's four outputs: two of each half
    const int output = tile * OUTPUTS + part / 2 * 64 + part % 2 * 8 + warp * 16 + lane / 4;
    if (output >= args.outputs) continue;
    const float bias = args.bias ? static_cast<float>(static_cast<const T*>(args.bias)[output]) : 0.f;
#pragma unroll
    for (int i = 0; i < COLUMNS / 4; ++i) {
      const int row = i / 2 * 8 + lane % 4 * 2 + i % 2;
      if (row >= args.rows) continue;
      const float value = sums.of[part / 2][i / 2 * 4 + part % 2 * 2 + i % 2] + bias;
      const long long place = static_cast<long long>(row) * args.outputs + output;
      if (args.wide) {
        static_cast<float*>(args.out)[place] = value;
      } else {
        static_cast<T*>(args.out)[place] = static_cast<T>(value);
      }
    }
  }
}

// Leave this block's sums of a tile that blocks `first` to `last` share, and if all have: add them up, in the blocks' order, and store.
template <typename T, int COLUMNS>
__device__ __forceinline__ void share(Sums<COLUMNS>& sums, Shared<T, COLUMNS>& shared, const Arguments& args, int tile, int first, int last, bool begins) {
  constexpr int QUADS = Sums<COLUMNS>::QUADS, BATCH = COLUMNS == 8 ? 6 : 3;
  // BATCH: blocks whose sums are under way at once, since everything waits for them. Registers for more would keep the small kernels that start
  // early from finding room beside two blocks: a whole layer of 16 rows took 207 us with 6, and takes 166 with 3.
  const auto place = [&](int block, bool begins_there) { return args.sums + (2ll * block + !begins_there) * QUADS * COMPUTE_THREADS + threadIdx.x; };
  float4* mine = place(blockIdx.x, begins);
#pragma unroll
  for (int i = 0; i < QUADS; ++i) {
    const float* quad = sums.quad(i);
    __stcg(mine + i * COMPUTE_THREADS, make_float4(quad[0], quad[1], quad[2], quad[3]));
  }
  __threadfence();
  named_sync<1, COMPUTE_THREADS>();
  if (threadIdx.x == 0) {
    shared.is_last = atomicAdd(&args.counters[tile], 1) == last - first;
    if (shared.is_last) args.counters[tile] = 0;
    __threadfence();
  }
  named_sync<1, COMPUTE_THREADS>();
  if (!shared.is_last) return;
  sums.clear();
  for (int block = first; block <= last; block += BATCH) {
    float4 parts[BATCH][QUADS];
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      if (block + b > last) continue;
      const float4* theirs = place(block + b, share_begin(args, block + b) >= tile * args.chunks);
#pragma unroll
      for (int i = 0; i < QUADS; ++i) parts[b][i] = __ldcg(theirs + i * COMPUTE_THREADS);
    }
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      if (block + b > last) continue;
#pragma unroll
      for (int i = 0; i < QUADS; ++i) sums.add(i, parts[b][i]);
    }
  }
  store<T>(sums, args, tile);
}

template <typename T, int COLUMNS>
__device__ void compute(Shared<T, COLUMNS>& shared, const Arguments& args, int begin, int end) {
  constexpr uint32_t STEP = sizeof(shared.stage[0]) / 16, HALF = OUTPUTS * DEPTH * sizeof(T) / 32;
  const int lane = threadIdx.x % 32;
  const uint32_t all_weights = panel(shared.stage[0].weights, 16), all_x = panel(shared.stage[0].x, 16);
  Ring<Shared<T, COLUMNS>::STAGES> ring;
  Sums<COLUMNS> sums;
  for (int at = begin; at < end;) {
    const int tile = at / args.chunks, tile_end = (tile + 1) * args.chunks, until = min(tile_end, end);
    const int first = owner(args, tile_end - args.chunks), last = owner(args, tile_end - 1);
    const bool begins = at == begin;
    sums.clear();
    for (; at < until; ++at) {
      barrier_wait(&shared.full[ring.stage], ring.parity);
      hold(sums.of[0]);
      hold(sums.of[1]);
      products_begin();
#pragma unroll
      for (int step = 0; step < DEPTH / 16; ++step) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          product(sums.of[half], all_weights + ring.stage * STEP + half * HALF + step * 2, all_x + ring.stage * STEP + step * 2, static_cast<const T*>(nullptr));
        }
      }
      products_commit();
      products_wait<0>();
      hold(sums.of[0]);
      hold(sums.of[1]);
      if (lane == 0) barrier_arrive(&shared.empty[ring.stage]);
      ring.advance();
    }
    if (first == last) {
      store<T>(sums, args, tile);
    } else {
      share(sums, shared, args, tile, first, last, begins);
    }
  }
}

template <typename T, int COLUMNS>
__global__ __launch_bounds__(THREADS, 2) void few_rows(const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap x_map, const Arguments args) {
  constexpr int STAGES = Shared<T, COLUMNS>::STAGES;
  extern __shared__ unsigned char raw[];
  auto& shared = *reinterpret_cast<Shared<T, COLUMNS>*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t(1023));
  const int first = share_begin(args, blockIdx.x), last = share_begin(args, blockIdx.x + 1);
  if (threadIdx.x == COMPUTE_THREADS) {
    prefetch_map(&weight_map), prefetch_map(&x_map);
    for (int i = 0; i < STAGES; ++i) barrier_init(&shared.full[i], 1), barrier_init(&shared.empty[i], COMPUTE_THREADS / 32);
    barrier_init_visible();
  }
  __syncthreads();
  if (threadIdx.x >= COMPUTE_THREADS) {
    if (threadIdx.x == COMPUTE_THREADS) feed<T, COLUMNS>(&weight_map, &x_map, shared, args, first, last);
    __syncwarp();
  } else {
    wait_for_earlier_kernels();  // whoever writes must have waited
    compute<T, COLUMNS>(shared, args, first, last);
  }
}

template <typename T, int COLUMNS>
int launch(const void* x, long long x_stride, const void* weight, int inputs, const Arguments& args, int blocks, cudaStream_t stream) {
  constexpr int bytes = sizeof(Shared<T, COLUMNS>) + 1024;
  static_assert(bytes <= SHARED_LIMIT, "two blocks must fit a multiprocessor");
  cudaError_t error = raise_shared_memory<few_rows<T, COLUMNS>>(bytes);
  // A multiprocessor that must divide its memory anew first runs empty: so kernels beside this one ask for the same (early.py).
  if (error == cudaSuccess) error = cudaFuncSetAttribute(few_rows<T, COLUMNS>, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  CUtensorMap weight_map, x_map;
  // Weights come in stretches of 128 bytes, but the next 128 of a row are asked for soon: both at once spares memory an access.
  if (!make_map<T>(&weight_map, weight, args.outputs, inputs, inputs, OUTPUTS, CU_TENSOR_MAP_L2_PROMOTION_L2_256B) ||
      !make_map<T>(&x_map, x, args.rows, inputs, x_stride, COLUMNS, CU_TENSOR_MAP_L2_PROMOTION_L2_128B)) {
    return cudaErrorInvalidValue;
  }
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, few_rows<T, COLUMNS>, weight_map, x_map, args);
}

template <typename T>
int launch_for_rows(const void* x, long long x_stride, const void* weight, int inputs, const Arguments& args, int blocks, cudaStream_t stream) {
  return args.rows <= 8 ? launch<T, 8>(x, x_stride, weight, inputs, args, blocks, stream) : launch<T, 16>(x, x_stride, weight, inputs, args, blocks, stream);
}

}  // namespace
}  // namespace gantline

// `type` 0: bfloat16, 1: float16, of x, weight and bias; out likewise, or float32 if `wide`. x [rows, inputs] with `x_stride` elements
// between rows, weight [outputs, inputs] contiguous; bias may be null. inputs and x_stride are multiples of 8, rows at most 16, pointers of
// 16 bytes. `blocks`: as many as multiprocessors, at most one for each chunk of 128 x 64 weights. `sums`: 2 * blocks * 128 * 16 float32;
// `counters`: 16384 int32, zero at first; both for launches that follow each other. Returns a cudaError_t.
GANTLINE_EXPORT int gantline_linear_hopper(int type, const void* x, long long x_stride, const void* weight, const void* bias, void* out, int wide, int rows,
                                           int inputs, int outputs, void* sums, void* counters, int blocks, void* stream) {
  using namespace gantline;
  if (rows < 1 || rows > MAX_ROWS || inputs < 8 || inputs % 8 || outputs < 1 || blocks < 1) return cudaErrorInvalidValue;
  const long long tiles = (outputs + OUTPUTS - 1) / OUTPUTS, chunks = (inputs + DEPTH - 1) / DEPTH, total = tiles * chunks;
  if (tiles > MAX_TILES || blocks > total || total * (blocks + 1) > INT32_MAX) return cudaErrorInvalidValue;
  const Arguments args = {out,  bias,    static_cast<float4*>(sums),   static_cast<int*>(counters), rows,
                          outputs, static_cast<int>(chunks), static_cast<int>(total),     wide};
  const auto on = static_cast<cudaStream_t>(stream);
  return type == 0 ? launch_for_rows<__nv_bfloat16>(x, x_stride, weight, inputs, args, blocks, on)
                   : launch_for_rows<__half>(x, x_stride, weight, inputs, args, blocks, on);
}

// `function`: a CUfunction, of a kernel that runs beside the one above. Returns a CUresult.
GANTLINE_EXPORT int gantline_prefer_shared_memory(void* function) { return gantline::prefer_shared_memory(function); }
