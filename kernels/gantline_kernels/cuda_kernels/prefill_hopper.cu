// Causal attention of chunks of prompts over the paged cache, for Hopper (sm_90a).
//
// After FlashAttention-3 (https://arxiv.org/abs/2407.08608): one warpgroup feeds, two compute; the product of the next scores runs while
// the last ones are turned into weights, and the two warpgroups take turns on the matrix units. Ours: rows are (query, query head) pairs
// of one key/value head, so that grouped heads share every key and short chunks fill the rows; tiles come block by block from the paged
// cache; persistent blocks fetch their next tile of work while they compute, in an order that keeps one head's keys in the second-level
// cache and its longest rows first.
//
// Letters: a tile of work is ROWS rows of one sequence and key/value head; it walks over tiles of KEYS keys from the last to the first, over
// all that it sees or a part of them (`prefill_work.cuh`).

#include "host.cuh"
#include "hopper.cuh"
#include "prefill_join.cuh"
#include "prefill_work.cuh"

namespace gantline {
namespace {

constexpr int STAGES = 2;
constexpr int COMPUTE_WARPGROUPS = 2;
constexpr int THREADS = (COMPUTE_WARPGROUPS + 1) * 128;
constexpr int COMPUTE_WARPS = COMPUTE_WARPGROUPS * 4;
constexpr int PANEL = 64;  // columns of a panel

// Named barriers; 0 is __syncthreads.
constexpr int BARRIER_TURN = 1;  // and 2: whose turn it is on the matrix units
constexpr int BARRIER_TAIL = 3;

template <typename T, int DIM>
struct __align__(1024) Shared {
  T q[2][DIM / PANEL][ROWS * PANEL];
  T keys[STAGES][DIM / PANEL][KEYS * PANEL];
  T values[STAGES][DIM / PANEL][KEYS * PANEL];
  uint64_t tile_known[2], q_full[2], q_empty[2];
  uint64_t keys_full[STAGES], keys_empty[STAGES], values_full[STAGES], values_empty[STAGES];
  Tile tile[2];
  Plan plan;
};

// Rows of queries into the swizzled panels; by the feeding warpgroup's warps 1 to 3.
template <typename T, int DIM>
__device__ __forceinline__ void load_queries(const Arguments& args, const Tile& tile, T* panels, int thread) {
  constexpr int PIECES = DIM / 8;
  for (int i = thread; i < ROWS * PIECES; i += 96) {
    const int row = i / PIECES, piece = i % PIECES;
    const int query = (tile.first_row + row) / args.group;
    const int head = tile.kv_head * args.group + (tile.first_row + row) % args.group;
    T* target = panels + (piece / 8) * ROWS * PANEL + row * PANEL + ((piece % 8) ^ (row % 8)) * 8;
    if (query < tile.num_queries) {
      copy_16(target, static_cast<const T*>(args.q) + (tile.begin + query) * args.q_stride + head * DIM + piece * 8);
    } else {
      *reinterpret_cast<uint4*>(target) = make_uint4(0, 0, 0, 0);
    }
  }
  copy_16_wait_all();
  fence_async_proxy();
}

// A tile of keys or values comes in boxes of a block's tokens, or of KEYS where blocks are larger. Boxes past the sequence's end are not
// read. Lane i knows the i-th box's first row in the cache.
struct Boxes {
  int row;
  int count;
};

__device__ __forceinline__ Boxes find_boxes(const Arguments& args, const Tile& tile, const int* table, int keys, int box_bits, int lane) {
  const int first_key = keys * KEYS, key = first_key + (lane << box_bits);
  const int tokens = min(KEYS, tile.length - first_key);
  Boxes boxes = {0, (tokens + (1 << box_bits) - 1) >> box_bits};
  if (keys >= 0 && lane < boxes.count) {
    const int block = table[key >> args.block_bits];
    boxes.row = ((block * args.kv_heads + tile.kv_head) << args.block_bits) + (key & ((1 << args.block_bits) - 1));
  }
  return boxes;
}

template <typename T, int DIM>
__device__ __forceinline__ void copy_tile(const CUtensorMap* map, T* target, uint64_t* full, const Boxes& boxes, int box_bits, bool leader) {
  if (leader) barrier_arrive_expect(full, (boxes.count << box_bits) * DIM * sizeof(T));
#pragma unroll 2
  for (int i = 0; i < boxes.count; ++i) {
    const int row = __shfl_sync(~0u, boxes.row, i);
    if (leader) {
#pragma unroll
      for (int panel = 0; panel < DIM / PANEL; ++panel) {
        copy_box(target + panel * KEYS * PANEL + (i << box_bits) * PANEL, map, panel * PANEL, row, full);
      }
    }
  }
}

// Tell the others of a tile of work, once the place that it takes is free.
template <typename T, int DIM>
__device__ __forceinline__ void announce(const Tile& tile, Shared<T, DIM>& shared, int turn, int lane) {
  barrier_wait(&shared.q_empty[turn % 2], ((turn / 2) & 1) ^ 1);
  if (lane == 0) {
    shared.tile[turn % 2] = tile;
    barrier_arrive(&shared.tile_known[turn % 2]);
  }
  __syncwarp();
}

// Warps 1 to 3 of the feeding warpgroup.
template <typename T, int DIM>
__device__ void feed_queries(const Arguments& args, Shared<T, DIM>& shared) {
  for (int turn = 0;; ++turn) {
    barrier_wait(&shared.tile_known[turn % 2], (turn / 2) & 1);
    const Tile tile = shared.tile[turn % 2];
    if (tile.sequence >= 0) load_queries<T, DIM>(args, tile, &shared.q[turn % 2][0][0], threadIdx.x - 32);
    barrier_arrive(&shared.q_full[turn % 2]);
    if (tile.sequence < 0) return;
  }
}

// For the kernel that joins.
__device__ __forceinline__ void tell_plan(const Plan& plan, Plan* target, int lane) {
  for (int i = lane; i < static_cast<int>(sizeof(Plan) / sizeof(int)); i += 32) reinterpret_cast<int*>(target)[i] = reinterpret_cast<const int*>(&plan)[i];
}

// Warp 0. The next tile of work is fetched as soon as the ring of stages is full, so that its queries are there when their turn comes.
template <typename T, int DIM>
__device__ void feed_keys(const Arguments& args, const CUtensorMap* key_map, const CUtensorMap* value_map, Shared<T, DIM>& shared) {
  const int lane = threadIdx.x;
  const int box_bits = min(args.block_bits, KEYS_BITS);
  int steps = 0;
  Tile tile = next_tile(args, shared.plan, true, lane);
  announce(tile, shared, 0, lane);
  for (int turn = 1; tile.sequence >= 0; ++turn) {
    const int* table = args.block_tables + static_cast<long long>(tile.sequence) * args.table_stride;
    const int fetch_at = max(tile.last_keys - STAGES + 1, tile.first_keys);
    Boxes boxes = find_boxes(args, tile, table, tile.last_keys, box_bits, lane);
    for (int keys = tile.last_keys; keys >= tile.first_keys; --keys, ++steps) {
      const Boxes next = find_boxes(args, tile, table, keys - 1, box_bits, lane);  // before waiting
      const int stage = steps % STAGES, parity = ((steps / STAGES) & 1) ^ 1;
      barrier_wait(&shared.keys_empty[stage], parity);
      copy_tile<T, DIM>(key_map, &shared.keys[stage][0][0], &shared.keys_full[stage], boxes, box_bits, lane == 0);
      barrier_wait(&shared.values_empty[stage], parity);
      copy_tile<T, DIM>(value_map, &shared.values[stage][0][0], &shared.values_full[stage], boxes, box_bits, lane == 0);
      boxes = next;
      if (keys == fetch_at) announce(next_tile(args, shared.plan, false, lane), shared, turn, lane);
    }
    tile = shared.tile[turn % 2];
  }
  let_later_kernels_start();
}

// scores[64 x KEYS] = queries of this warpgroup times keys; left in flight. Operands by their descriptors.
template <typename T, int DIM>
__device__ __forceinline__ void begin_scores(float (&scores)[64], uint32_t queries, uint32_t keys) {
#pragma unroll
  for (int step = 0; step < DIM / 16; ++step) {
    const int panel = step / 4, column = step % 4 * 16;
    const int from_queries = (panel * ROWS * PANEL + column) * sizeof(T) / 16, from_keys = (panel * KEYS * PANEL + column) * sizeof(T) / 16;
    product_64x128(scores, queries + from_queries, keys + from_keys, step > 0, static_cast<const T*>(nullptr));
  }
}

// sums[64 x DIM] += weights times values; left in flight.
template <typename T, int DIM>
__device__ __forceinline__ void begin_sums(float (&sums)[DIM / 2], const uint32_t (&weights)[32], uint32_t values) {
#pragma unroll
  for (int step = 0; step < KEYS / 16; ++step) {
    product_transposed(sums, weights + 4 * step, values + step * 16 * PANEL * sizeof(T) / 16, static_cast<const T*>(nullptr));
  }
}

// Keys that a row must not see get -inf. A thread's scores: rows r and r + 8, columns 8 i + 2 (lane % 4) and the next.
__device__ __forceinline__ void mask(float (&scores)[64], int first_key, int position_0, int position_1, int window, int lane) {
  const int oldest_0 = window ? position_0 - window + 1 : 0, oldest_1 = window ? position_1 - window + 1 : 0;
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const int key = first_key + i / 4 * 8 + lane % 4 * 2 + i % 2;
    const bool second = i % 4 >= 2;
    const bool seen = second ? key <= position_1 && key >= oldest_1 : key <= position_0 && key >= oldest_0;
    if (!seen) scores[i] = -INFINITY;
  }
}

// Largest of a row, over its four lanes.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

struct RowState {
  float top[2];    // largest score so far
  float total[2];  // this lane's part of the sum of weights
  float shrink[2];  // what the last step multiplies earlier sums with
};

// Scores become weights; the state follows.
__device__ __forceinline__ void soften(float (&scores)[64], RowState& state, float scale) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = state.top[r];
#pragma unroll
    for (int i = 0; i < 16; ++i) top = fmaxf(top, fmaxf(scores[4 * i + 2 * r], scores[4 * i + 2 * r + 1]));
    top = row_max(top);
    const float base = top == -INFINITY ? 0.f : top * scale;
    state.shrink[r] = fast_exp2(state.top[r] * scale - base);
    state.top[r] = top;
    float total = state.total[r] * state.shrink[r];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float& low = scores[4 * i + 2 * r];
      float& high = scores[4 * i + 2 * r + 1];
      low = fast_exp2(low * scale - base);
      high = fast_exp2(high * scale - base);
      total += low + high;
    }
    state.total[r] = total;
  }
}

template <typename T>
__device__ __forceinline__ void pack_weights(uint32_t (&weights)[32], const float (&scores)[64]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) weights[i] = pack(scores[2 * i], scores[2 * i + 1], static_cast<const T*>(nullptr));
}

// Rows of values past the sequence's end may hold anything, and 0 * NaN is NaN: zero them.
template <typename T, int DIM>
__device__ __forceinline__ void clear_tail(T* values, int from) {
  for (int i = threadIdx.x - 128 + from * (DIM / 8); i < KEYS * (DIM / 8); i += COMPUTE_WARPGROUPS * 128) {
    const int row = i / (DIM / 8), piece = i % (DIM / 8);
    *reinterpret_cast<uint4*>(values + (piece / 8) * KEYS * PANEL + row * PANEL + piece % 8 * 8) = make_uint4(0, 0, 0, 0);
  }
  fence_async_proxy();
  named_sync<BARRIER_TAIL, COMPUTE_WARPGROUPS * 128>();
}

// Neighbouring lanes exchange so that each writes 8 bytes, and two of them 32 in a row.
template <typename T, int DIM>
__device__ __forceinline__ void store_rows(const Arguments& args, const Tile& tile, const float (&sums)[DIM / 2], const RowState& state, int row, int lane) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float total = row_sum(state.total[r]);
    const float factor = total > 0.f ? 1.f / total : 0.f;
    const int at = row + 8 * r;
    const int query = at / args.group, head = tile.kv_head * args.group + at % args.group;
    T* target = static_cast<T*>(args.out) + (static_cast<long long>(tile.begin + query) * args.heads + head) * DIM;
#pragma unroll
    for (int i = 0; i < DIM / 8; i += 2) {
      const uint32_t first = pack(sums[4 * i + 2 * r] * factor, sums[4 * i + 2 * r + 1] * factor, static_cast<const T*>(nullptr));
      const uint32_t second = pack(sums[4 * i + 4 + 2 * r] * factor, sums[4 * i + 5 + 2 * r] * factor, static_cast<const T*>(nullptr));
      const bool odd = lane % 2;
      const uint32_t other = __shfl_xor_sync(~0u, odd ? first : second, 1);
      const uint2 piece = odd ? make_uint2(other, second) : make_uint2(first, other);
      if (query < tile.num_queries) *reinterpret_cast<uint2*>(target + (i + odd) * 8 + lane % 4 / 2 * 4) = piece;
    }
  }
}

// The mean of a part's values in each row, and the logarithm of its weight. Four lanes write 32 bytes in a row.
template <int DIM>
__device__ __forceinline__ void store_part(const Arguments& args, const Tile& tile, const float (&sums)[DIM / 2], const RowState& state, int my_row, int lane) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float total = row_sum(state.total[r]);
    const float factor = total > 0.f ? 1.f / total : 0.f;
    const int at = my_row + 8 * r;
    if ((tile.first_row + at) / args.group >= tile.num_queries) continue;
    const long long place = static_cast<long long>(tile.slot) * ROWS + at;
    float* target = part_means(args) + place * DIM + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < DIM / 8; ++i) {
      *reinterpret_cast<float2*>(target + 8 * i) = make_float2(sums[4 * i + 2 * r] * factor, sums[4 * i + 2 * r + 1] * factor);
    }
    if (lane % 4 == 0) part_logs(args, DIM)[place] = total > 0.f ? state.top[r] * args.scale_log2 + log2f(total) : -INFINITY;
  }
}

template <typename T, int DIM>
__device__ void compute(const Arguments& args, Shared<T, DIM>& shared) {
  const int warpgroup = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
  const int my_row = warpgroup * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4;
  const bool leader = lane == 0;
  constexpr int STAGE_STEP = KEYS * DIM * sizeof(T) / 16;  // from a stage's descriptor to the next one's
  const uint32_t all_keys = panel(&shared.keys[0][0][0], 16);
  const uint32_t all_values = panel(&shared.values[0][0][0], KEYS * PANEL * sizeof(T));
  if (warpgroup == 1) named_arrive(BARRIER_TURN, 256);
  int steps = 0;
  for (int turn = 0;; ++turn) {
    const int side = turn % 2;
    barrier_wait(&shared.q_full[side], (turn / 2) & 1);
    const Tile tile = shared.tile[side];
    if (tile.sequence < 0) return;
    const uint32_t queries = panel(&shared.q[side][0][0] + warpgroup * 64 * PANEL, 16);
    const int row = tile.first_row + my_row, before = tile.length - tile.num_queries;
    const int position_0 = before + row / args.group, position_1 = before + (row + 8) / args.group;
    const int first_position = before + tile.first_row / args.group, last_position = before + (tile.first_row + ROWS - 1) / args.group;

    float scores[64], sums[DIM / 2];
    uint32_t weights[32];
    RowState state = {{-INFINITY, -INFINITY}, {0.f, 0.f}, {0.f, 0.f}};
#pragma unroll
    for (int i = 0; i < DIM / 2; ++i) sums[i] = 0.f;

    const auto hide = [&](int keys) {
      const int first_key = keys * KEYS;
      const bool late = first_key + KEYS - 1 > first_position;
      const bool early = args.window && first_key <= last_position - args.window;
      if (late || early) mask(scores, first_key, position_0, position_1, args.window, lane);
    };

    int keys = tile.last_keys;
    int stage = steps % STAGES, parity = (steps / STAGES) & 1;
    barrier_wait(&shared.keys_full[stage], parity);
    products_begin();
    begin_scores<T, DIM>(scores, queries, all_keys + stage * STAGE_STEP);
    products_commit();
    products_wait<0>();
    hold(scores);
    if (leader) barrier_arrive(&shared.keys_empty[stage]);
    hide(keys);
    soften(scores, state, args.scale_log2);
    pack_weights<T>(weights, scores);
    if ((keys + 1) * KEYS > tile.length) {
      barrier_wait(&shared.values_full[stage], parity);
      clear_tail<T, DIM>(&shared.values[stage][0][0], tile.length - keys * KEYS);
    }
    for (--keys; keys >= tile.first_keys; --keys) {
      const int previous = stage, previous_parity = parity;
      ++steps;
      stage = steps % STAGES, parity = (steps / STAGES) & 1;
      barrier_wait(&shared.values_full[previous], previous_parity);  // no branch may come between products in flight
      barrier_wait(&shared.keys_full[stage], parity);
      named_sync(BARRIER_TURN + warpgroup, 256);
      products_begin();
      begin_scores<T, DIM>(scores, queries, all_keys + stage * STAGE_STEP);
      products_commit();
      begin_sums<T, DIM>(sums, weights, all_values + previous * STAGE_STEP);
      products_commit();
      named_arrive(BARRIER_TURN + 1 - warpgroup, 256);
      products_wait<1>();
      hold(scores);
      if (leader) barrier_arrive(&shared.keys_empty[stage]);
      hide(keys);
      soften(scores, state, args.scale_log2);
      products_wait<0>();
      hold(sums);
      if (leader) barrier_arrive(&shared.values_empty[previous]);
#pragma unroll
      for (int i = 0; i < DIM / 2; ++i) sums[i] *= state.shrink[i % 4 / 2];
      pack_weights<T>(weights, scores);
    }
    ++steps;
    if (leader) barrier_arrive(&shared.q_empty[side]);
    barrier_wait(&shared.values_full[stage], parity);
    products_begin();
    begin_sums<T, DIM>(sums, weights, all_values + stage * STAGE_STEP);
    products_commit();
    products_wait<0>();
    hold(sums);
    if (leader) barrier_arrive(&shared.values_empty[stage]);
    if (tile.slot < 0) {
      store_rows<T, DIM>(args, tile, sums, state, row, lane);
    } else {
      store_part<DIM>(args, tile, sums, state, my_row, lane);
    }
  }
}

template <typename T, int DIM>
__global__ __launch_bounds__(THREADS, 1) void prefill(const __grid_constant__ CUtensorMap key_map, const __grid_constant__ CUtensorMap value_map, const Arguments args) {
  extern __shared__ unsigned char raw[];
  auto& shared = *reinterpret_cast<Shared<T, DIM>*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t(1023));
  if (threadIdx.x == 0) {
    prefetch_map(&key_map);
    prefetch_map(&value_map);
    for (int i = 0; i < 2; ++i) {
      barrier_init(&shared.tile_known[i], 1), barrier_init(&shared.q_full[i], 96), barrier_init(&shared.q_empty[i], COMPUTE_WARPS);
    }
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(&shared.keys_full[i], 1), barrier_init(&shared.keys_empty[i], COMPUTE_WARPS);
      barrier_init(&shared.values_full[i], 1), barrier_init(&shared.values_empty[i], COMPUTE_WARPS);
    }
    barrier_init_visible();
  }
  if (threadIdx.x < 32 && args.sequences <= MAX_PLANNED) {
    make_plan(args, shared.plan, gridDim.x, threadIdx.x);
    if (args.slots && blockIdx.x == 0) tell_plan(shared.plan, known_plan(args, DIM), threadIdx.x);
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_decrease<40>();
    if (threadIdx.x < 32) {
      feed_keys<T, DIM>(args, &key_map, &value_map, shared);
    } else {
      feed_queries<T, DIM>(args, shared);
    }
    if (threadIdx.x == 0 && atomicAdd(args.counters + 1, 1) == static_cast<int>(gridDim.x) - 1) {
      args.counters[0] = 0;  // the last block: nobody fetches any more
      args.counters[1] = 0;
    }
  } else {
    registers_increase<232>();
    compute<T, DIM>(args, shared);
  }
  if (args.beside) wait_for_earlier_kernels();  // whoever waits for this kernel has waited for the one beside it as well
}

// A cache as rows of `dim`, copied in boxes of 64 columns.
template <typename T>
bool make_map(CUtensorMap* map, void* cache, long long rows, int dim, int box_rows) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(dim), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {dim * sizeof(T)};
  const cuuint32_t box[2] = {PANEL, static_cast<cuuint32_t>(box_rows)};
  return encode_panels<T>(map, cache, sizes, strides, box);
}

template <typename T, int DIM>
int launch(void* keys, void* values, long long blocks, const Arguments& args, int num_sms, cudaStream_t stream) {
  constexpr int bytes = sizeof(Shared<T, DIM>) + 1024;
  const cudaError_t error = raise_shared_memory<prefill<T, DIM>>(bytes);
  if (error != cudaSuccess) return error;
  CUtensorMap key_map, value_map;
  const long long rows = (blocks * args.kv_heads) << args.block_bits;
  const int box = 1 << (args.block_bits < KEYS_BITS ? args.block_bits : KEYS_BITS);
  if (!make_map<T>(&key_map, keys, rows, DIM, box) || !make_map<T>(&value_map, values, rows, DIM, box)) return cudaErrorInvalidValue;
  const int grid = args.slots || args.tiles > num_sms ? num_sms : args.tiles;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid), config.blockDim = dim3(THREADS), config.dynamicSmemBytes = bytes, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = args.beside ? 1 : 0;
  const cudaError_t launched = cudaLaunchKernelEx(&config, prefill<T, DIM>, key_map, value_map, args);
  return launched == cudaSuccess && args.slots ? launch_join<T, DIM>(args, num_sms, stream) : launched;
}

}  // namespace
}  // namespace gantline

// See api.py's paged_attention. `type` 0: bfloat16, 1: float16. Blocks have 1 << block_bits tokens. `counters` int32 [2], zero before the
// first call, one for each stream. `slots` > 0: tiles may be split, of at most 32 sequences; `parts` then float32 [slots * 128 * (dim + 1) + 512].
// `beside`: it may start while the kernel ahead of it works, which has let it begin after all before had ended, and writes nothing that it reads.
// Returns a cudaError_t; cudaErrorNotSupported for shapes that have no kernel here.
GANTLINE_EXPORT int gantline_prefill_hopper(
    int type, const void* q, void* keys, void* values, const int* block_tables, const int* query_starts, const int* context_lens, void* out, int* counters,
    void* parts, int slots, long long q_stride, int table_stride, int heads, int kv_heads, int dim, int block_bits, long long blocks, int first_sequence,
    int sequences, int tiles, int window, float scale, int beside, int num_sms, void* stream) {
  static_assert(sizeof(gantline::Plan) <= 512 * sizeof(float), "the plan's place");
  if (slots && (sequences > gantline::MAX_PLANNED || !parts)) return cudaErrorInvalidValue;
  const gantline::Arguments args = {q, out, block_tables, query_starts, context_lens, counters, static_cast<float*>(parts), q_stride, table_stride, heads,
                                    kv_heads, heads / kv_heads, block_bits, first_sequence, sequences, tiles, slots, window, scale * 1.4426950408889634f, beside};
  const auto on = static_cast<cudaStream_t>(stream);
  if (type == 0 && dim == 128) return gantline::launch<__nv_bfloat16, 128>(keys, values, blocks, args, num_sms, on);
  if (type == 0 && dim == 64) return gantline::launch<__nv_bfloat16, 64>(keys, values, blocks, args, num_sms, on);
  if (type == 1 && dim == 128) return gantline::launch<__half, 128>(keys, values, blocks, args, num_sms, on);
  if (type == 1 && dim == 64) return gantline::launch<__half, 64>(keys, values, blocks, args, num_sms, on);
  return cudaErrorNotSupported;
}
