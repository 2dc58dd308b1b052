// Linear layers for few rows (up to 64), for Hopper (sm_90a): bound by reading the weights once.
//
// out [rows, outputs] = x [rows, inputs] weight [outputs, inputs]^T + bias. The matrix units take the weights as their left operand, so
// that few rows waste little. A tile is 128 or 256 outputs, a chunk 64 inputs of it. A multiprocessor gets an even share of the bandwidth
// however much it asks for, so what ends last is the busiest: each block, one to a multiprocessor, takes the same number of chunks,
// counted through all tiles one after the other, whatever the shape. Where a tile is shared by several blocks, each leaves its sums in
// scratch memory and counts itself; the last one to do so adds them in the blocks' order, so results do not depend on timing, and nobody
// waits for another block.
//
// Weights depend on nothing, so a block may start before the kernel ahead of it ends (programmatic dependent launch): two fit a
// multiprocessor. But what it asks for while that kernel is in full swing only takes that kernel's bandwidth; what counts is the time when
// memory would idle, from that kernel's last loads until this one has its x. So each block says in memory when it is `lead` pieces from its
// end, and its successor's block of the same number waits for that (or for the end itself) before it fills its stages and asks for `ahead`
// pieces more into the second-level cache. The words alternate between launches; a wrong one costs time, never a result.

#include "host.cuh"
#include "hopper.cuh"

namespace gantline {
namespace {

constexpr int OUTPUTS = 128;  // of a piece, which a stage holds; a tile has one or two
constexpr int DEPTH = 64;     // inputs of a chunk
constexpr int COMPUTE_THREADS = 128;
constexpr int THREADS = COMPUTE_THREADS + 32;
constexpr int MAX_ROWS = 64;
constexpr int MAX_TILES = 16384, MAX_BLOCKS = 1024;
constexpr int SHARED_LIMIT = 113 * 1024;  // so that two blocks fit
constexpr int BUSY = 1, ENDING = 0;
constexpr uint64_t EVICT_FIRST = 0x12F0000000000000;  // weights are not met again before they would be evicted

struct Arguments {
  void* out;
  const void* bias;  // or null
  float4* sums;      // scratch: two tiles' sums of each block
  int* counters;     // of each tile: blocks that have left their sums; zero between launches
  int rows;
  int outputs;
  int chunks;  // of a tile
  int tiles;
  int ahead;
  int lead;
  int patience;  // what waits for the end of the kernel ahead: 0 nothing, 1 all weights, 2 what goes to the second-level cache
  int steady;    // stay ahead in the second-level cache to the end
  volatile int* state;              // of each block: whether it is far from its end
  const volatile int* state_ahead;  // the same of the kernel ahead
  int wide;  // out is float32
};

template <typename T, int COLUMNS, int PIECES>
struct __align__(1024) Shared {
  static constexpr int X_BYTES = COLUMNS * DEPTH * sizeof(T), PIECE_BYTES = OUTPUTS * DEPTH * sizeof(T);
  static constexpr int STAGES = (SHARED_LIMIT - 2048 - (PIECES - 1) * X_BYTES) / (PIECE_BYTES + X_BYTES / PIECES);
  static constexpr int X_STAGES = (STAGES + PIECES - 1) / PIECES;
  T weights[STAGES][OUTPUTS * DEPTH];
  T x[X_STAGES][COLUMNS * DEPTH];
  uint64_t full[STAGES], empty[STAGES], x_full[X_STAGES], x_empty[X_STAGES];
  int is_last;
  volatile int may_start;  // the kernels ahead have ended
};

// A place in a ring of stages, and the parity of its current round.
template <int SIZE>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == SIZE) stage = 0, parity ^= 1;
  }
};

__device__ __forceinline__ void copy_once_box(void* target, const CUtensorMap* map, int column, int row, uint64_t* barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(
                   shared_address(target)),
               "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "l"(EVICT_FIRST)
               : "memory");
}

__device__ __forceinline__ void prefetch_box(const CUtensorMap* map, int column, int row) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(map), "r"(column), "r"(row) : "memory");
}

__device__ __forceinline__ void wait_for_earlier_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_later_kernels_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

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
  }                                                                                                                                    \
  __device__ __forceinline__ void product(float (&d)[16], uint32_t a, uint32_t b, const type*) {                                       \
    asm volatile("{\n.reg .b64 a, b;\nmov.b64 a, {%16, %18};\nmov.b64 b, {%17, %18};\nwgmma.mma_async.sync.aligned.m64n32k16.f32." name "." \
                 name " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, a, b, 1, 1, 1, 0, 0;\n}"                \
                 : GANTLINE_F8(d, 0), GANTLINE_F8(d, 8)                                                                                \
                 : "r"(a), "r"(b), "n"(GANTLINE_PANEL_UPPER));                                                                         \
  }                                                                                                                                    \
  __device__ __forceinline__ void product(float (&d)[32], uint32_t a, uint32_t b, const type*) {                                       \
    asm volatile("{\n.reg .b64 a, b;\nmov.b64 a, {%32, %34};\nmov.b64 b, {%33, %34};\nwgmma.mma_async.sync.aligned.m64n64k16.f32." name "." \
                 name " {" GANTLINE_LIST32 "}, a, b, 1, 1, 1, 0, 0;\n}"                                                                 \
                 : GANTLINE_F32(d, 0)                                                                                                  \
                 : "r"(a), "r"(b), "n"(GANTLINE_PANEL_UPPER));                                                                         \
  }

GANTLINE_FEW(__nv_bfloat16, "bf16")
GANTLINE_FEW(__half, "f16")

// A block's share: the chunks from `first` to before `last`, counted through all tiles. The same formula tells every block others' shares.
__device__ __forceinline__ int share_begin(const Arguments& args, int block) {
  return static_cast<int>(static_cast<long long>(args.tiles) * args.chunks * block / gridDim.x);
}

// The block whose share a chunk is in.
__device__ __forceinline__ int owner(const Arguments& args, int chunk) {
  return static_cast<int>((static_cast<long long>(chunk + 1) * gridDim.x - 1) / (static_cast<long long>(args.tiles) * args.chunks));
}

// The pieces of a share in order.
template <int PIECES>
struct Cursor {
  int tile, chunk, piece = 0;
  __device__ __forceinline__ void advance(int chunks) {
    if (++piece < PIECES) return;
    piece = 0;
    if (++chunk == chunks) chunk = 0, ++tile;
  }
  __device__ __forceinline__ int column() const { return chunk * DEPTH; }
  __device__ __forceinline__ int row() const { return (tile * PIECES + piece) * OUTPUTS; }
};

template <typename T, int COLUMNS, int PIECES>
__device__ void feed(const CUtensorMap* weight_map, const CUtensorMap* x_map, Shared<T, COLUMNS, PIECES>& shared, const Arguments& args, int first, int last) {
  using Stages = Shared<T, COLUMNS, PIECES>;
  const int total = (last - first) * PIECES, early = min(Stages::STAGES, total), signal = max(0, total - args.lead);
  Cursor<PIECES> at{first / args.chunks, first % args.chunks};
  Ring<Stages::STAGES> ring;
  Ring<Stages::X_STAGES> x_ring;
  const auto copy_piece = [&] {
    barrier_arrive_expect(&shared.full[ring.stage], Stages::PIECE_BYTES);
    copy_once_box(shared.weights[ring.stage], weight_map, at.column(), at.row(), &shared.full[ring.stage]);
    at.advance(args.chunks), ring.advance();
  };
  const auto wait_for_tail = [&] {
    while (args.state_ahead[blockIdx.x] == BUSY && !shared.may_start) {
    }
  };
  args.state[blockIdx.x] = signal > early ? BUSY : ENDING;
  __threadfence();
  let_later_kernels_start();
  Cursor<PIECES> of_x = at;
  if (args.patience == 1) wait_for_tail();
  for (int i = 0; i < early; ++i) copy_piece();
  Cursor<PIECES> later = at;
  int asked = early;
  const auto ask = [&](int until) {
    for (; asked < min(total, until); ++asked) {
      prefetch_box(weight_map, later.column(), later.row());
      later.advance(args.chunks);
    }
  };
  if (args.patience == 2) wait_for_tail();
  ask(early + args.ahead);
  wait_for_earlier_kernels();
  for (int i = 0; i < total; ++i) {
    if (of_x.piece == 0) {
      barrier_wait(&shared.x_empty[x_ring.stage], x_ring.parity ^ 1);
      barrier_arrive_expect(&shared.x_full[x_ring.stage], Stages::X_BYTES);
      copy_box(shared.x[x_ring.stage], x_map, of_x.column(), 0, &shared.x_full[x_ring.stage]);
      x_ring.advance();
    }
    of_x.advance(args.chunks);
    if (i >= early) {
      barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
      copy_piece();
      if (args.steady & 1) ask(i + 1 + args.ahead);
      if (i + 1 == signal) args.state[blockIdx.x] = ENDING;
    }
  }
}

// A thread's sums of a tile, and where they lie in it.
template <int COLUMNS, int PIECES>
struct Sums {
  static constexpr int QUADS = PIECES * COLUMNS / 4;  // float4s
  float of[PIECES][2][COLUMNS / 2];                   // of each piece's upper and lower 64 outputs

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < QUADS * 4; ++i) (&of[0][0][0])[i] = 0.f;
  }
  __device__ __forceinline__ void add(int quad, float4 value) {
    float* place = &of[0][0][0] + quad * 4;
    place[0] += value.x, place[1] += value.y, place[2] += value.z, place[3] += value.w;
  }
  __device__ __forceinline__ float4 quad(int quad) const {
    const float* place = &of[0][0][0] + quad * 4;
    return make_float4(place[0], place[1], place[2], place[3]);
  }
};

template <typename T, int COLUMNS, int PIECES>
__device__ __forceinline__ void store(const Sums<COLUMNS, PIECES>& sums, const Arguments& args, int tile) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < PIECES * 4; ++half) {  // the tile's halves of 64 outputs, of each the two of a thread
    const int output = tile * PIECES * OUTPUTS + half / 2 * 64 + half % 2 * 8 + warp * 16 + lane / 4;
    if (output >= args.outputs) continue;
    const float bias = args.bias ? static_cast<float>(static_cast<const T*>(args.bias)[output]) : 0.f;
#pragma unroll
    for (int i = 0; i < COLUMNS / 4; ++i) {
      const int row = i / 2 * 8 + lane % 4 * 2 + i % 2;
      if (row >= args.rows) continue;
      const float value = sums.of[half / 4][half / 2 % 2][i / 2 * 4 + half % 2 * 2 + i % 2] + bias;
      const long long place = static_cast<long long>(row) * args.outputs + output;
      if (args.wide) {
        static_cast<float*>(args.out)[place] = value;
      } else {
        static_cast<T*>(args.out)[place] = static_cast<T>(value);
      }
    }
  }
}

// Leave this block's sums of a tile that others share, and if all have: add them up, in the blocks' order, and store.
template <typename T, int COLUMNS, int PIECES>
__device__ __forceinline__ void share(Sums<COLUMNS, PIECES>& sums, Shared<T, COLUMNS, PIECES>& shared, const Arguments& args, int tile, bool begins) {
  constexpr int QUADS = Sums<COLUMNS, PIECES>::QUADS, BATCH = QUADS >= 8 ? 1 : 8 / QUADS;  // blocks whose sums are under way at once
  const auto place = [&](int block, bool begins_there) { return args.sums + (2ll * block + !begins_there) * QUADS * COMPUTE_THREADS + threadIdx.x; };
  float4* mine = place(blockIdx.x, begins);
#pragma unroll
  for (int i = 0; i < QUADS; ++i) __stcg(mine + i * COMPUTE_THREADS, sums.quad(i));
  const int from = tile * args.chunks, first = owner(args, from), last = owner(args, from + args.chunks - 1);
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
      const float4* theirs = place(min(block + b, last), share_begin(args, min(block + b, last)) >= from);
#pragma unroll
      for (int i = 0; i < QUADS; ++i) parts[b][i] = __ldcg(theirs + i * COMPUTE_THREADS);
    }
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
#pragma unroll
      for (int i = 0; i < QUADS; ++i) {
        if (block + b <= last) sums.add(i, parts[b][i]);
      }
    }
  }
  store<T>(sums, args, tile);
}

template <typename T, int COLUMNS, int PIECES>
__device__ void compute(Shared<T, COLUMNS, PIECES>& shared, const Arguments& args, int first, int last) {
  using Stages = Shared<T, COLUMNS, PIECES>;
  constexpr uint32_t PIECE = Stages::PIECE_BYTES / 16, X = Stages::X_BYTES / 16;
  const int lane = threadIdx.x % 32;
  const uint32_t all_weights = panel(shared.weights[0], 16), all_x = panel(shared.x[0], 16);
  Ring<Stages::STAGES> ring;
  Ring<Stages::X_STAGES> x_ring;
  Sums<COLUMNS, PIECES> sums;
  for (int at = first; at < last;) {
    const int tile = at / args.chunks, end = min((tile + 1) * args.chunks, last), begin = at;
    sums.clear();
    for (; at < end; ++at) {
      barrier_wait(&shared.x_full[x_ring.stage], x_ring.parity);
#pragma unroll
      for (int piece = 0; piece < PIECES; ++piece) {
        barrier_wait(&shared.full[ring.stage], ring.parity);
        hold(sums.of[piece][0]);
        hold(sums.of[piece][1]);
        products_begin();
#pragma unroll
        for (int step = 0; step < DEPTH / 16; ++step) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            product(sums.of[piece][half], all_weights + ring.stage * PIECE + half * (PIECE / 2) + step * 2, all_x + x_ring.stage * X + step * 2,
                    static_cast<const T*>(nullptr));
          }
        }
        products_commit();
        products_wait<0>();
        hold(sums.of[piece][0]);
        hold(sums.of[piece][1]);
        if (lane == 0) barrier_arrive(&shared.empty[ring.stage]);
        ring.advance();
      }
      if (lane == 0) barrier_arrive(&shared.x_empty[x_ring.stage]);
      x_ring.advance();
    }
    if (end - begin == args.chunks) {
      store<T>(sums, args, tile);
    } else {
      share(sums, shared, args, tile, begin == first);
    }
  }
}

template <typename T, int COLUMNS, int PIECES>
__global__ __launch_bounds__(THREADS) void few_rows(const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap x_map, const Arguments args) {
  using Stages = Shared<T, COLUMNS, PIECES>;
  extern __shared__ unsigned char raw[];
  auto& shared = *reinterpret_cast<Stages*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t(1023));
  const int first = share_begin(args, blockIdx.x), last = share_begin(args, blockIdx.x + 1);
  if (threadIdx.x == COMPUTE_THREADS) {
    prefetch_map(&weight_map), prefetch_map(&x_map);
    for (int i = 0; i < Stages::STAGES; ++i) barrier_init(&shared.full[i], 1), barrier_init(&shared.empty[i], COMPUTE_THREADS / 32);
    for (int i = 0; i < Stages::X_STAGES; ++i) barrier_init(&shared.x_full[i], 1), barrier_init(&shared.x_empty[i], COMPUTE_THREADS / 32);
    barrier_init_visible();
    shared.may_start = 0;
  }
  __syncthreads();
  if (threadIdx.x >= COMPUTE_THREADS) {
    if (threadIdx.x == COMPUTE_THREADS) feed<T, COLUMNS, PIECES>(&weight_map, &x_map, shared, args, first, last);
    __syncwarp();
  } else {
    wait_for_earlier_kernels();  // whoever writes must have waited
    if (threadIdx.x == 0) shared.may_start = 1;
    compute<T, COLUMNS, PIECES>(shared, args, first, last);
  }
}

template <typename T>
bool make_map(CUtensorMap* map, const void* matrix, int rows, int columns, long long stride, int box_rows, CUtensorMapL2promotion promotion) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {stride * sizeof(T)};
  const cuuint32_t box[2] = {DEPTH, static_cast<cuuint32_t>(box_rows)};
  return encode_panels<T>(map, const_cast<void*>(matrix), sizes, strides, box, promotion);
}

template <typename T, int COLUMNS, int PIECES>
int launch(const void* x, long long x_stride, const void* weight, int inputs, const Arguments& args, int blocks, cudaStream_t stream) {
  constexpr int bytes = sizeof(Shared<T, COLUMNS, PIECES>) + 1024;
  static_assert(bytes <= SHARED_LIMIT, "two blocks must fit a multiprocessor");
  const cudaError_t error = raise_shared_memory<few_rows<T, COLUMNS, PIECES>>(bytes);
  if (error != cudaSuccess) return error;
  cudaFuncSetAttribute(few_rows<T, COLUMNS, PIECES>, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  CUtensorMap weight_map, x_map;
  if (!make_map<T>(&weight_map, weight, args.outputs, inputs, inputs, OUTPUTS, args.steady & 2 ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_L2_128B) ||
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
  return cudaLaunchKernelEx(&config, few_rows<T, COLUMNS, PIECES>, weight_map, x_map, args);
}

template <typename T, int PIECES>
int launch_for_rows(const void* x, long long x_stride, const void* weight, int inputs, Arguments args, int blocks, cudaStream_t stream) {
  args.tiles = (args.outputs + PIECES * OUTPUTS - 1) / (PIECES * OUTPUTS);
  if (args.tiles > MAX_TILES || blocks > args.tiles * args.chunks) return cudaErrorInvalidValue;
  if (args.rows <= 8) return launch<T, 8, PIECES>(x, x_stride, weight, inputs, args, blocks, stream);
  if (args.rows <= 16) return launch<T, 16, PIECES>(x, x_stride, weight, inputs, args, blocks, stream);
  if (args.rows <= 32) return launch<T, 32, PIECES>(x, x_stride, weight, inputs, args, blocks, stream);
  return launch<T, 64, PIECES>(x, x_stride, weight, inputs, args, blocks, stream);
}

template <typename T>
int launch_for_pieces(const void* x, long long x_stride, const void* weight, int inputs, const Arguments& args, int pieces, int blocks, cudaStream_t stream) {
  return pieces == 1 ? launch_for_rows<T, 1>(x, x_stride, weight, inputs, args, blocks, stream)
                     : launch_for_rows<T, 2>(x, x_stride, weight, inputs, args, blocks, stream);
}

}  // namespace
}  // namespace gantline

// `type` 0: bfloat16, 1: float16, of x, weight and bias; out likewise, or float32 if `wide`. x [rows, inputs] with `x_stride` elements
// between rows, weight [outputs, inputs] contiguous; bias may be null. inputs and x_stride are multiples of 8, rows at most 64, pointers of
// 16 bytes. `pieces` (1 or 2): a tile's 128 outputs. `blocks`: as many as multiprocessors, at most one for each chunk. `sums`: 2 * blocks *
// pieces * 128 * (8, 16, 32 or 64 rows) float32; `counters`: 16384 + 2 * 1024 int32, zero at first; both for launches that follow each
// other, with `parity` 0 and 1 in turn. `ahead` and `lead`: see above. Returns a cudaError_t.
GANTLINE_EXPORT int gantline_linear_hopper(int type, const void* x, long long x_stride, const void* weight, const void* bias, void* out, int wide, int rows,
                                           int inputs, int outputs, void* sums, void* counters, int pieces, int blocks, int ahead, int lead, int patience, int steady, int parity, void* stream) {
  if (rows < 1 || rows > gantline::MAX_ROWS || inputs < 8 || inputs % 8 || outputs < 1 || pieces < 1 || pieces > 2 || blocks < 1 || blocks > gantline::MAX_BLOCKS) return cudaErrorInvalidValue;
  const int chunks = (inputs + gantline::DEPTH - 1) / gantline::DEPTH;
  volatile int* const states[2] = {static_cast<int*>(counters) + gantline::MAX_TILES, static_cast<int*>(counters) + gantline::MAX_TILES + gantline::MAX_BLOCKS};
  const gantline::Arguments args = {out,  bias,     static_cast<float4*>(sums), static_cast<int*>(counters), rows, outputs, chunks, 0, ahead,
                                    lead, patience, steady, states[parity & 1], states[~parity & 1], wide};
  const auto on = static_cast<cudaStream_t>(stream);
  return type == 0 ? gantline::launch_for_pieces<__nv_bfloat16>(x, x_stride, weight, inputs, args, pieces, blocks, on)
                   : gantline::launch_for_pieces<__half>(x, x_stride, weight, inputs, args, pieces, blocks, on);
}
