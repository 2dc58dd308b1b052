// Attention of single queries over the paged cache, for Hopper. Contexts of few sequences are cut into parts that fill the GPU once.
//
// A block takes one sequence, one key/value head with all query heads that share it, and one part of the context; each of its warps every
// so many tiles of 16 tokens, by itself: its own ring of stages that it fills and empties, its own running maximum, sums and means. Which
// tiles a part has depends little on the length, so that the blocks' numbers are read while the length is. Warps are joined in shared
// memory, and parts by the block that comes last to its sequence and head, in the parts' order: results do not depend on timing, and there
// is no second launch. A launch may begin before the one ahead of it ends; every block waits for that before it reads anything.
//
// The matrix units take 16 query heads (some of them zero) by 8 tokens. The inner dimension may be in any order as long as both operands
// have the same: a lane's 16 bytes of a query and of a key are two steps' operands as they are.

#include "host.cuh"
#include "hopper.cuh"

namespace gantline {
namespace {

constexpr int TILE = 16;    // tokens
constexpr int STAGES = 3;   // of a warp's ring
constexpr int MAX_WARPS = 8;
constexpr int ROWS = 16;    // query heads to a key/value head, at most
constexpr int MAX_PARTS = 128;
constexpr int AHEAD = 8;    // parts whose means are asked for at once
constexpr int SHARED_LIMIT = 225 * 1024;  // a few hundred bytes are not of the rings
constexpr float NONE = -1e30f;  // the maximum of no scores

struct Arguments {
  const void* q;
  const void* keys;
  const void* values;
  const int* tables;
  const int* lens;
  void* out;
  float* part_means;   // [sequences, kv_heads, parts, group, DIM], not yet divided by the sums; null if there is but one part
  float2* part_sums;   // [sequences, kv_heads, parts, group]: maximum and sum
  int* counters;       // [sequences, kv_heads]: parts that have left theirs; zero between launches
  long long q_stride;
  long long table_stride;
  int table_width;
  int kv_heads;
  int group;
  int block_bits;      // a cache block has TILE << block_bits tokens
  int window;          // or 0
  int least;           // tokens of a part, where there is more than one
  int guess;           // parts of the longest context
  float scale;         // times log2(e); of scores that are capped: times -2 log2(e) / their cap
  float cap;           // times log2(e), or 0
  int early;           // kernels behind may start before this one ends: 0 not, 1 at once, 2 as soon as what is ahead has ended
};

// Four 8 x 8 matrices, each transposed.
__device__ __forceinline__ uint4 load_transposed(uint32_t address) {
  uint4 x;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Counts one more; whoever learns the count from it sees what the others had written before theirs.
__device__ __forceinline__ int count_up(int* counter) {
  int before;
  asm volatile("atom.global.add.acq_rel.gpu.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

template <int DIM>
struct Layout {
  static constexpr int PIECES = DIM / 8;                  // of 16 bytes, of a token's key or value
  static constexpr int TILE_BYTES = TILE * DIM * 2;
  static constexpr int RING_BYTES = STAGES * 2 * TILE_BYTES;  // of a warp: keys and values of each stage
  static constexpr int PITCH = DIM + 8;                   // floats between rows of means, so that a warp's stores meet no bank twice
  static_assert(RING_BYTES >= ROWS * PITCH * 4, "means take a ring's place");

  // Pieces of a token are turned so that eight tokens' same pieces, and two tokens' four next ones, lie in different banks.
  static __device__ __forceinline__ int turn(int token) { return (DIM / 32 % 2 ? 0 : (token & 1) << 2) | ((token >> 1) & 3); }
  static __device__ __forceinline__ uint32_t place(int token, int piece) { return (token * PIECES + (piece ^ turn(token))) * 16; }
};

// One warp's running result: of rows g and g + 8, columns 8 j + 2 c and the next; g = lane / 4, c = lane % 4.
template <int DIM>
struct Running {
  float means[DIM / 8][4];
  float top[2];
  float total[2];
};

template <typename T, int DIM>
__device__ __forceinline__ void attend_tile(Running<DIM>& running, const uint4 (&queries)[2][DIM / 32], uint32_t keys, int first_token, int length,
                                            const Arguments& args, int lane) {
  using L = Layout<DIM>;
  const int g = lane / 4, c = lane % 4;
  float scores[2][4] = {};
#pragma unroll
  for (int i = 0; i < DIM / 32; ++i) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const uint4 key = load_shared(keys + L::place(n * 8 + g, c + 4 * i));
      const uint4 &a = queries[0][i], &b = queries[1][i];
      multiply(scores[n], a.x, b.x, a.y, b.y, key.x, key.y, static_cast<const T*>(nullptr));
      multiply(scores[n], a.z, b.z, a.w, b.w, key.z, key.w, static_cast<const T*>(nullptr));
    }
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float x = scores[n][i] * args.scale;
      if (args.cap > 0.f) x = args.cap * (2.f * fast_reciprocal(1.f + fast_exp2(x)) - 1.f);  // cap * tanh(score / cap)
      scores[n][i] = x;
    }
  }
  const int least = args.window ? length - args.window : 0;
  if (first_token + TILE > length || first_token < least) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = first_token + n * 8 + 2 * c + i % 2;
        if (token >= length || token < least) scores[n][i] = -INFINITY;
      }
    }
  }
  float top[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    top[r] = quad_max(fmaxf(fmaxf(scores[0][2 * r], scores[0][2 * r + 1]), fmaxf(scores[1][2 * r], scores[1][2 * r + 1])));
  }
  if (__any_sync(~0u, top[0] > running.top[0] || top[1] > running.top[1])) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float raised = fmaxf(running.top[r], top[r]), shrink = fast_exp2(running.top[r] - raised);
      running.top[r] = raised;
      running.total[r] *= shrink;
#pragma unroll
      for (int j = 0; j < DIM / 8; ++j) running.means[j][2 * r] *= shrink, running.means[j][2 * r + 1] *= shrink;
    }
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[n][i] = fast_exp2(scores[n][i] - running.top[i / 2]);
      running.total[i / 2] += scores[n][i];
    }
  }
  uint32_t weights[4];  // of rows g and g + 8, tokens 2 c and the next, then 8 further
#pragma unroll
  for (int i = 0; i < 4; ++i) weights[i] = pack(scores[i / 2][2 * (i % 2)], scores[i / 2][2 * (i % 2) + 1], static_cast<const T*>(nullptr));
  const uint32_t values = keys + L::TILE_BYTES;
  const int token = lane % 16;
#pragma unroll
  for (int j = 0; j < DIM / 8; j += 2) {
    const uint4 x = load_transposed(values + L::place(token, j + lane / 16));
    multiply(running.means[j], weights[0], weights[1], weights[2], weights[3], x.x, x.y, static_cast<const T*>(nullptr));
    multiply(running.means[j + 1], weights[0], weights[1], weights[2], weights[3], x.z, x.w, static_cast<const T*>(nullptr));
  }
}

template <typename T>
__device__ __forceinline__ void store_4(T* target, const float4& x, float factor) {
  uint2 packed;
  packed.x = pack(x.x * factor, x.y * factor, static_cast<const T*>(nullptr));
  packed.y = pack(x.z * factor, x.w * factor, static_cast<const T*>(nullptr));
  *reinterpret_cast<uint2*>(target) = packed;
}

__device__ __forceinline__ void add_weighted(float4& sum, float weight, const float4& x) {
  sum.x += weight * x.x, sum.y += weight * x.y, sum.z += weight * x.z, sum.w += weight * x.w;
}

// The last block of a sequence and head: the average of all parts, into `out` [group, DIM]. `scratch` is shared memory of parts * group
// float2 and, behind them, a float4 and a float for each thread.
template <typename T, int DIM>
__device__ void join_parts(const Arguments& args, long long first_part, int parts, T* out, unsigned char* scratch) {
  const int quads = args.group * (DIM / 4), sets = max(1, static_cast<int>(blockDim.x) / quads);
  float2* const known = reinterpret_cast<float2*>(scratch);
  float4* const sums = reinterpret_cast<float4*>(scratch + MAX_PARTS * ROWS * sizeof(float2));
  float* const totals = reinterpret_cast<float*>(sums + MAX_WARPS * 32);
  const float4* const means = reinterpret_cast<const float4*>(args.part_means + first_part * args.group * DIM);
  const float2* const part_sums = args.part_sums + first_part * args.group;
  const int set = sets > 1 ? threadIdx.x / quads : 0, begin = sets > 1 ? threadIdx.x % quads : threadIdx.x;
  const bool active = set < sets;

  float4 ahead[AHEAD];
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) {
    const int part = set + i * sets;
    if (active && begin < quads && part < parts) ahead[i] = __ldcg(means + static_cast<long long>(part) * quads + begin);
  }
  for (int i = threadIdx.x; i < parts * args.group; i += blockDim.x) known[i] = __ldcg(part_sums + i);
  __syncthreads();
  for (int quad = begin; active && quad < quads; quad += blockDim.x) {
    const int row = quad / (DIM / 4);
    float top = NONE, total = 0.f;
#pragma unroll 4
    for (int part = 0; part < parts; ++part) top = fmaxf(top, known[part * args.group + row].x);
    float4 sum = {0.f, 0.f, 0.f, 0.f};
    for (int from = set; from < parts; from += AHEAD * sets) {
      if (from != set || quad != begin) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
          if (from + i * sets < parts) ahead[i] = __ldcg(means + static_cast<long long>(from + i * sets) * quads + quad);
        }
      }
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        if (from + i * sets >= parts) break;
        const float2 one = known[(from + i * sets) * args.group + row];
        const float weight = fast_exp2(one.x - top);
        total += weight * one.y;
        add_weighted(sum, weight, ahead[i]);
      }
    }
    if (sets == 1) {
      store_4(out + quad * 4, sum, fast_reciprocal(total));
    } else {
      sums[set * quads + quad] = sum;
      totals[set * quads + quad] = total;
    }
  }
  if (sets == 1) return;
  __syncthreads();
  if (set == 0) {
    float4 sum = sums[begin];
    float total = totals[begin];
    for (int i = 1; i < sets; ++i) {
      add_weighted(sum, 1.f, sums[i * quads + begin]);
      total += totals[i * quads + begin];
    }
    store_4(out + begin * 4, sum, fast_reciprocal(total));
  }
}

template <typename T, int DIM>
__global__ __launch_bounds__(MAX_WARPS * 32, 1) void decode(const Arguments args) {
  using L = Layout<DIM>;
  extern __shared__ __align__(128) unsigned char rings[];
  __shared__ float2 warp_sums[MAX_WARPS][ROWS];
  __shared__ int is_last;
  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0), warps = blockDim.x / 32;
  const int part = blockIdx.x, kv_head = blockIdx.y, g = lane / 4, c = lane % 4;
  const long long sequence = blockIdx.z, pair = sequence * args.kv_heads + kv_head;
  if (args.early == 1) let_later_kernels_start();

  // Until it waits: only what the kernel ahead does not write, and that one has let this begin after all before it had ended (triton_kernels/
  // early.py). It writes the queries and each sequence's newest token. Everything that has an address is asked for at once; what was guessed
  // wrong, again.
  const int* const table = args.tables + sequence * args.table_stride;
  const int length = args.lens[sequence];
  int parts = args.guess, first = 0;
  auto tile_of = [&](int round) { return first + (round * parts + part) * warps + warp; };
  auto entry_of = [&](int round) {
    const int block = tile_of(round) >> args.block_bits;
    return block < args.table_width ? table[block] : 0;
  };
  int entries = entry_of(lane), entries_after = entry_of(lane + 32);  // of so many rounds
  if (args.window && length > args.window) first = (length - args.window) / TILE;
  const int tiles = (length + TILE - 1) / TILE - first;
  const int wanted = min(static_cast<int>(gridDim.x), (length - first * TILE + args.least - 1) / args.least);
  const int count = min(wanted, (tiles + warps - 1) / warps);
  if (length <= 0 || part >= count) return wait_for_earlier_kernels();  // as all must (early.py)
  if (count != parts || first) {
    parts = count;
    entries = entry_of(lane), entries_after = entry_of(lane + 32);
  }
  const int begin = part * warps + warp, rounds = begin < tiles ? (tiles - begin - 1) / (parts * warps) + 1 : 0;

  unsigned char* const ring = rings + warp * L::RING_BYTES;
  const uint32_t ring_address = shared_address(ring);
  auto ask = [&](int round) {
    if (round < rounds) {
      if (round && round % 32 == 0) entries = entries_after, entries_after = entry_of(round + 32 + lane);
      const int tile = tile_of(round), in_block = tile & ((1 << args.block_bits) - 1);
      const long long block = __shfl_sync(~0u, entries, round % 32);
      const long long token = (((block * args.kv_heads + kv_head) << args.block_bits) + in_block) * TILE;
      const T* const keys = static_cast<const T*>(args.keys) + token * DIM;
      const T* const values = static_cast<const T*>(args.values) + token * DIM;
      const uint32_t stage = ring_address + round % STAGES * 2 * L::TILE_BYTES;
#pragma unroll
      for (int i = 0; i < TILE * L::PIECES / 32; ++i) {
        const int piece = i * 32 + lane, at = piece / L::PIECES;
        const uint32_t place = L::place(at, piece % L::PIECES);
        const bool inside = tile * TILE + at < length;
        copy_16_or_zeros(stage + place, keys + piece * 8, inside);
        copy_16_or_zeros(stage + L::TILE_BYTES + place, values + piece * 8, inside);
      }
    }
    copies_commit();
  };
  Running<DIM> running;
#pragma unroll
  for (int r = 0; r < 2; ++r) running.top[r] = NONE, running.total[r] = 0.f;
#pragma unroll
  for (int j = 0; j < DIM / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) running.means[j][i] = 0.f;
  }
  const bool newest = rounds > 0 && tile_of(rounds - 1) == (length - 1) / TILE;
  const int before = min(STAGES - 1, rounds - newest);
  for (int round = 0; round < before; ++round) ask(round);
  wait_for_earlier_kernels();
  if (args.early == 2) let_later_kernels_start();
  uint4 queries[2][DIM / 32];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const T* const query = static_cast<const T*>(args.q) + sequence * args.q_stride + (kv_head * args.group + g + 8 * r) * DIM;
#pragma unroll
    for (int i = 0; i < DIM / 32; ++i) {
      queries[r][i] = g + 8 * r < args.group ? *reinterpret_cast<const uint4*>(query + 8 * (c + 4 * i)) : make_uint4(0, 0, 0, 0);
    }
  }
  for (int round = before; round < STAGES - 1; ++round) ask(round);
  for (int round = 0; round < rounds; ++round) {
    copies_wait<STAGES - 2>();
    __syncwarp();  // all lanes' copies are there, and all have read the stage that is filled next
    ask(round + STAGES - 1);
    attend_tile<T, DIM>(running, queries, ring_address + round % STAGES * 2 * L::TILE_BYTES, tile_of(round) * TILE, length, args, lane);
  }
  copies_wait<0>();
  __syncwarp();

  float* const means = reinterpret_cast<float*>(ring);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = g + 8 * r;
    const float total = quad_sum(running.total[r]);
    if (c == 0) warp_sums[warp][row] = make_float2(running.top[r], total);
    if (row < args.group) {
#pragma unroll
      for (int j = 0; j < DIM / 8; ++j) {
        *reinterpret_cast<float2*>(means + row * L::PITCH + 8 * j + 2 * c) = make_float2(running.means[j][2 * r], running.means[j][2 * r + 1]);
      }
    }
  }
  __syncthreads();
  T* const out = static_cast<T*>(args.out) + pair * args.group * DIM;
  const long long place = pair * gridDim.x + part;
  for (int quad = threadIdx.x; quad < args.group * (DIM / 4); quad += blockDim.x) {
    const int row = quad / (DIM / 4), column = quad % (DIM / 4) * 4;
    float top = NONE, total = 0.f;
    for (int w = 0; w < warps; ++w) top = fmaxf(top, warp_sums[w][row].x);
    float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
    for (int w = 0; w < warps; ++w) {
      const float weight = fast_exp2(warp_sums[w][row].x - top);
      total += weight * warp_sums[w][row].y;
      add_weighted(sum, weight, *reinterpret_cast<const float4*>(rings + w * L::RING_BYTES + (row * L::PITCH + column) * 4));
    }
    if (parts == 1) {
      store_4(out + quad * 4, sum, fast_reciprocal(total));
    } else {
      __stcg(reinterpret_cast<float4*>(args.part_means + (place * args.group + row) * DIM + column), sum);
      if (column == 0) __stcg(args.part_sums + place * args.group + row, make_float2(top, total));
    }
  }
  if (parts == 1) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = count_up(args.counters + pair) == parts - 1;
    if (is_last) args.counters[pair] = 0;
  }
  __syncthreads();
  if (is_last) join_parts<T, DIM>(args, pair * gridDim.x, parts, out, rings);
}

template <typename T, int DIM>
int launch(const Arguments& args, int sequences, int parts, int warps, cudaStream_t stream) {
  constexpr int join_bytes = MAX_PARTS * ROWS * 8 + MAX_WARPS * 32 * 20;
  const int bytes = max(warps * Layout<DIM>::RING_BYTES, join_bytes);
  if (bytes > SHARED_LIMIT) return cudaErrorInvalidValue;
  const cudaError_t error = raise_shared_memory<decode<T, DIM>>(SHARED_LIMIT);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(parts, args.kv_heads, sequences);
  config.blockDim = dim3(warps * 32);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, decode<T, DIM>, args);
}

template <typename T>
int launch_for_dim(int dim, const Arguments& args, int sequences, int parts, int warps, cudaStream_t stream) {
  switch (dim) {
    case 64: return launch<T, 64>(args, sequences, parts, warps, stream);
    case 96: return launch<T, 96>(args, sequences, parts, warps, stream);
    case 128: return launch<T, 128>(args, sequences, parts, warps, stream);
    case 256: return launch<T, 256>(args, sequences, parts, warps, stream);
    default: return cudaErrorNotSupported;
  }
}

}  // namespace
}  // namespace gantline

// See api.py's paged_attention, for sequences of one query. `type` 0: bfloat16, 1: float16. q [sequences, heads, dim] with `q_stride`
// elements between sequences (a multiple of 8), out contiguous; pointers of 16 bytes; heads / kv_heads at most 16. Blocks have 1 << block_bits
// tokens, at least 16. Contexts are cut into at most `parts` (up to 128) of at least `least` tokens; if `parts` > 1, `part_means` float32
// [sequences * heads * parts * dim], `part_sums` float32 [sequences * heads * parts * 2], `counters` int32 [sequences * kv_heads], zero at
// first, for launches that follow each other. `warps` of a block: up to 8 that fit. `early`: whether the kernel behind may start before this one ends:
// 0 not, 1 at once, if it waits for this one before it reads what others write, 2 after what is ahead of this one has ended, if it reads nothing
// that this one writes and waits before it ends. Returns a cudaError_t.
GANTLINE_EXPORT int gantline_decode_hopper(int type, const void* q, const void* keys, const void* values, const int* block_tables, const int* context_lens,
                                           void* out, void* part_means, void* part_sums, int* counters, long long q_stride, long long table_stride,
                                           int table_width, int sequences, int heads, int kv_heads, int dim, int block_bits, int window, int max_context_len,
                                           int parts, int least, int warps, float scale, float softcap, int early, void* stream) {
  using namespace gantline;
  constexpr float LOG2_E = 1.4426950408889634f;
  const int group = heads / kv_heads;
  if (group < 1 || group > ROWS || block_bits < 4 || parts < 1 || parts > MAX_PARTS || least < 1 || warps < 1 || warps > MAX_WARPS) return cudaErrorInvalidValue;
  const int tiles = (max_context_len + TILE - 1) / TILE, wanted = min(parts, (max_context_len + least - 1) / least);
  const int guess = max(1, min(wanted, (tiles + warps - 1) / warps));
  const Arguments args = {q, keys, values, block_tables, context_lens, out, static_cast<float*>(part_means), static_cast<float2*>(part_sums), counters,
                          q_stride, table_stride, table_width, kv_heads, group, block_bits - 4, window, least, guess,
                          (softcap > 0.f ? -2.f / softcap : 1.f) * scale * LOG2_E, softcap * LOG2_E, early};
  const auto on = static_cast<cudaStream_t>(stream);
  return type == 0 ? launch_for_dim<__nv_bfloat16>(dim, args, sequences, parts, warps, on)
                   : launch_for_dim<__half>(dim, args, sequences, parts, warps, on);
}
