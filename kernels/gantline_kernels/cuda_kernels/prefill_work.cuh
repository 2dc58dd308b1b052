// What a block of the prefill kernel works on: rows of queries, and the keys that they walk over.
//
// Where the tiles of rows are too few to fill the multiprocessors, or fill them unevenly, each is cut into parts of so many tiles of keys
// ("flash decoding", https://pytorch.org/blog/flash-decoding/, for many rows); `prefill_join.cuh` joins their results. How many keys
// follows from the true lengths, which only the device knows: graphs are captured for the largest batch of a class. Every block comes to
// the same plan by itself.
#pragma once

#include "hopper.cuh"

namespace gantline {

constexpr int ROWS = 128;
constexpr int KEYS_BITS = 7;
constexpr int KEYS = 1 << KEYS_BITS;
constexpr int MAX_PLANNED = 32;  // sequences, one for each lane
constexpr int MAX_PARTS = 64;

// In times of a step over a tile of keys, about 1.9 us: what beginning and ending an item costs, and joining.
constexpr int WHOLE_COST = 2, PART_COST = 3, JOIN_COST = 2, PARTS_FOR_ONE = 16;

struct Arguments {
  const void* q;
  void* out;
  const int* block_tables;
  const int* query_starts;
  const int* context_lens;
  int* counters;  // [2], zero: items fetched; blocks that are done. Zero again at the end.
  float* parts;  // means [slots][ROWS][dim], logarithms of weights [slots][ROWS], the Plan
  long long q_stride;  // elements between tokens
  int table_stride;
  int heads;
  int kv_heads;
  int group;  // query heads of a key/value head
  int block_bits;  // a block has 1 << block_bits tokens
  int first_sequence;
  int sequences;
  int tiles;  // upper bound
  int slots;  // places for results of parts; 0: nothing is split
  int window;  // 0: none
  float scale_log2;
  int beside;  // the kernel ahead may still be working, on other rows of out
};

struct Tile {
  int sequence;  // -1: no more work
  int kv_head;
  int first_row;  // of the sequence's num_queries * group rows
  int num_queries;
  int begin;  // the sequence's first token in q
  int length;
  int last_keys;  // tile of keys, from
  int first_keys;  // down to
  int slot;  // where the result goes; -1: to the output
};

// Of the sequence of each lane. A sequence's items go through its heads, of each through the parts, of each through the tiles of rows from
// the last to the first; its slots through heads, tiles of rows, parts.
struct Plan {
  int items;
  int split_tiles;  // tiles of rows, of all heads, of sequences with several parts
  int size;  // of a part, in tiles of keys
  int first_item[MAX_PLANNED], first_slot[MAX_PLANNED], first_split[MAX_PLANNED];
  int tiles[MAX_PLANNED];  // of rows, of one head
  int parts[MAX_PLANNED];  // at most, of a tile
  int begin[MAX_PLANNED], num_queries[MAX_PLANNED], length[MAX_PLANNED];
};

__device__ __forceinline__ int divide_up(int a, int b) { return (a + b - 1) / b; }

__device__ __forceinline__ float* part_means(const Arguments& args) { return args.parts; }

__device__ __forceinline__ float* part_logs(const Arguments& args, int dim) { return args.parts + static_cast<long long>(args.slots) * ROWS * dim; }

__device__ __forceinline__ Plan* known_plan(const Arguments& args, int dim) {
  return reinterpret_cast<Plan*>(part_logs(args, dim) + args.slots * ROWS);
}

// The tiles of keys that a tile of rows walks over.
__device__ __forceinline__ void find_keys(Tile& tile, const Arguments& args) {
  const int before = tile.length - tile.num_queries;
  const int last_position = min(before + (tile.first_row + ROWS - 1) / args.group, tile.length - 1);
  tile.last_keys = last_position / KEYS;
  tile.first_keys = args.window ? max(before + tile.first_row / args.group - args.window + 1, 0) / KEYS : 0;
}

// Sum over the lanes before.
__device__ __forceinline__ int sum_before(int x, int lane) {
  int sum = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += other;
  }
  return sum - x;
}

// How long `workers` blocks take, in steps: items longer than half a part count as `whole` ones of `whole_cost`, which are worked off in
// rounds; the others, `rest` in all, fill what the rounds leave.
__device__ __forceinline__ int rounds_cost(int whole, int whole_cost, int rest, int workers) {
  return max(divide_up(whole, workers) * whole_cost, divide_up(whole * whole_cost + rest, workers));
}

// The same in sixteenths of a step, if each lane's `tiles` of rows walk over `steps` tiles of keys in parts of `size`, at least two of the
// longest; above all others where the parts have no place.
__device__ __forceinline__ unsigned cut_cost(const Arguments& args, int tiles, int steps, int size, int count, int workers) {
  int whole = 0, slots = 0, rest = 0;
  const float inverse = 1.f / size;
  for (unsigned left = __ballot_sync(~0u, tiles > 0); left; left &= left - 1) {
    const int lane = __ffs(left) - 1;
    const int t = __shfl_sync(~0u, tiles, lane), s = __shfl_sync(~0u, steps, lane);
    const int full = __float2int_rd((s + .5f) * inverse), over = s - full * size;  // s / size, exactly, below 2^20
    whole += t * (full + (2 * over > size));
    if (over && 2 * over <= size) rest += t * (over + PART_COST);
    if (s > size) slots += t * (full + (over > 0));
  }
  if (slots > args.slots) return ~0u >> 8;
  return 16 * (rounds_cost(whole, size + PART_COST, rest, workers) + JOIN_COST) + 16 * count / PARTS_FOR_ONE;
}

// Tiles of keys in a part, for what takes the shortest: `longest` where no cut can pay.
__device__ __forceinline__ int choose_size(const Arguments& args, int tiles, int steps, int longest, int workers, int lane) {
  const bool is_whole = 2 * steps > longest;
  const int whole = __reduce_add_sync(~0u, is_whole ? tiles : 0), rest = __reduce_add_sync(~0u, is_whole ? 0 : tiles * (steps + WHOLE_COST));
  const int uncut = rounds_cost(whole, longest + WHOLE_COST, rest, workers);
  const int least = divide_up(__reduce_add_sync(~0u, tiles * (steps + PART_COST)), workers) + JOIN_COST;
  if (uncut <= least) return longest;
  unsigned best = 16 * uncut << 7 | 1;
#pragma unroll 1
  for (int first = 2; first <= MAX_PARTS; first += 32) {
    const int count = min(first + lane, MAX_PARTS);
    best = min(best, cut_cost(args, tiles, steps, divide_up(longest, count), count, workers) << 7 | count);
  }
  return divide_up(longest, static_cast<int>(__reduce_min_sync(~0u, best) & 127));
}

// By a whole warp, for at most MAX_PLANNED sequences.
__device__ void make_plan(const Arguments& args, Plan& plan, int workers, int lane) {
  int begin = 0, num_queries = 0, length = 0;
  if (lane < args.sequences) {
    const int sequence = args.first_sequence + lane;
    begin = args.query_starts[sequence];
    num_queries = args.query_starts[sequence + 1] - begin;
    length = args.context_lens[sequence];
  }
  const int of_head = divide_up(num_queries * args.group, ROWS), tiles = of_head * args.kv_heads;
  int steps = divide_up(length, KEYS);
  if (args.window) steps = min(steps, (args.window + (ROWS - 1) / args.group + KEYS - 1) / KEYS + 1);  // at most so many a tile touches
  if (tiles == 0) steps = 0;
  const int longest = max(__reduce_max_sync(~0u, steps), 1);
  const int size = args.slots ? choose_size(args, tiles, steps, longest, workers, lane) : longest;
  const int parts = divide_up(steps, size), items = tiles * parts, split = parts > 1 ? tiles : 0;
  const int first_item = sum_before(items, lane), first_split = sum_before(split, lane), first_slot = sum_before(split * parts, lane);
  plan.first_item[lane] = first_item, plan.first_split[lane] = first_split, plan.first_slot[lane] = first_slot;
  plan.tiles[lane] = of_head, plan.parts[lane] = parts;
  plan.begin[lane] = begin, plan.num_queries[lane] = num_queries, plan.length[lane] = length;
  if (lane == 31) plan.items = first_item + items, plan.split_tiles = first_split + split, plan.size = size;
  __syncwarp();
}

// Tile of rows `row_tile` of `kv_head` of the lane `local`; its keys are all that it walks over.
__device__ __forceinline__ Tile whole_tile(const Arguments& args, const Plan& plan, int local, int kv_head, int row_tile) {
  Tile tile;
  tile.sequence = args.first_sequence + local;
  tile.kv_head = kv_head;
  tile.first_row = row_tile * ROWS;
  tile.num_queries = plan.num_queries[local];
  tile.begin = plan.begin[local];
  tile.length = plan.length[local];
  find_keys(tile, args);
  const int parts = plan.parts[local];
  const bool split = tile.last_keys - tile.first_keys >= plan.size;
  tile.slot = split ? plan.first_slot[local] + (kv_head * plan.tiles[local] + row_tile) * parts : -1;
  return tile;
}

// Item `index`; false if it has no keys.
__device__ __forceinline__ bool planned_tile(const Arguments& args, const Plan& plan, int index, int lane, Tile& tile) {
  const unsigned before = __ballot_sync(~0u, plan.tiles[lane] > 0 && plan.first_item[lane] <= index);
  const int local = 31 - __clz(before);
  const int tiles = plan.tiles[local], parts = plan.parts[local];
  const int rest = index - plan.first_item[local], row_tile = tiles - 1 - rest % tiles;
  const int part = rest / tiles % parts, kv_head = rest / tiles / parts;
  tile = whole_tile(args, plan, local, kv_head, row_tile);
  tile.first_keys += part * plan.size;
  tile.last_keys = min(tile.last_keys, tile.first_keys + plan.size - 1);
  if (tile.slot >= 0) tile.slot += part;
  return tile.first_keys <= tile.last_keys;
}

__device__ __forceinline__ int tiles_before(const Arguments& args, int sequence, int origin) {
  return args.kv_heads * ((args.query_starts[args.first_sequence + sequence] - origin) * args.group / ROWS + sequence);
}

// Without a plan: the last sequence whose first tile is not after `index`; a warp looks at 32 candidates at a time.
__device__ __forceinline__ int find_sequence(const Arguments& args, int index, int origin, int lane) {
  int low = 0, count = args.sequences;
  while (count > 1) {
    const int step = (count + 31) / 32;
    const int candidate = low + min(lane * step, count - 1);
    const unsigned before = __ballot_sync(~0u, lane * step < count && tiles_before(args, candidate, origin) <= index);
    const int chosen = 31 - __clz(before);  // lane 0 always qualifies
    low += chosen * step;
    count = min(step, count - chosen * step);
  }
  return low;
}

// The same of many sequences, which are not planned: no tile is split, and their numbers are further apart than they need be.
__device__ __forceinline__ bool found_tile(const Arguments& args, int index, int lane, Tile& tile) {
  const int origin = args.query_starts[args.first_sequence];
  const int local = find_sequence(args, index, origin, lane), sequence = args.first_sequence + local;
  tile.sequence = sequence;
  tile.begin = args.query_starts[sequence];
  tile.num_queries = args.query_starts[sequence + 1] - tile.begin;
  const int of_head = divide_up(tile.num_queries * args.group, ROWS);
  index -= tiles_before(args, local, origin);
  if (index >= of_head * args.kv_heads) return false;
  tile.kv_head = index / of_head;
  tile.first_row = (of_head - 1 - index % of_head) * ROWS;
  tile.length = args.context_lens[sequence];
  tile.slot = -1;
  find_keys(tile, args);
  return true;
}

// Fetch items until one has keys. The first is the block's own, so that none fetches a second one before all have one. All lanes of the
// warp return the same.
__device__ __forceinline__ Tile next_tile(const Arguments& args, const Plan& plan, bool first, int lane) {
  const bool planned = args.sequences <= MAX_PLANNED;
  const int items = planned ? plan.items : args.tiles;
  Tile tile;
  for (;; first = false) {
    int index = 0;
    if (lane == 0) index = first ? blockIdx.x : gridDim.x + atomicAdd(args.counters, 1);
    index = __shfl_sync(~0u, index, 0);
    tile.sequence = -1;
    if (index >= items) return tile;
    if (planned ? planned_tile(args, plan, index, lane, tile) : found_tile(args, index, lane, tile)) return tile;
  }
}

}  // namespace gantline
