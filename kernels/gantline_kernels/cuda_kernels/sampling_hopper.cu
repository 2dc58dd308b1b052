// Choosing a token within limits, for Hopper (sm_90a): two readings of the logits at most.
//
// A limit becomes the least logit that is kept: the largest value such that what is not below it numbers k (top-k) or weighs p of the whole
// (top-p). It is found without sorting the row, in a fixed number of launches:
//
// 1. `survey` reads all. Each warp leaves the largest logit and the weight of each stretch of 512 tokens, each block how its logits (by
//    number, or by weight in fixed point) spread over 1024 bins; the bins' range comes from 1024 samples of the row. The last block of a row
//    to come picks the few bins that the limit lies in. Rows without limits are done then.
// 2. `gather` reads again the stretches that have anything to keep: weights above those bins are summed, logits in them listed. The last
//    block of a row sorts the list, which gives the limit, of both kinds at once, and draws: by the stretches' sums, then along one.
// 3. `sample_row` is for rows whose list would be too long (many equals, far outliers, large k with p), and mostly finds none: a cluster of
//    up to eight blocks holds a row in its shared memory, and spreads it over bins again and again until the limit is found.
//
// Every floating sum has a fixed order, and what is added in any order is integer, so that a row's result depends on nothing but the row.

#include "host.cuh"
#include "hopper.cuh"

namespace gantline {
namespace {

constexpr int THREADS = 512, WARPS = THREADS / 32;
constexpr int BINS = 1024;        // two for each thread
constexpr int LIST = BINS;        // logits that are sorted: two for each thread
constexpr int MAX_LEVELS = 64;    // each is at least three orders of magnitude finer; none but odd rows need more than three
constexpr int MAX_MOVES = 8;
constexpr float REACH = 40.f;     // e^-40 of the likeliest token weighs nothing
constexpr float ONE = 65536.f;    // a weight of one in fixed point, relative to its bin's upper edge; 65536 of them fit a block's bin
constexpr float LINEAR_SLACK = 3e-4f;  // the same where a bin's weights are taken to lie on a line
constexpr float TINY = 1e-30f;         // some bin that is not empty
constexpr float SLACK = 1e-5f;    // more than what fixed point errs by in a sum
constexpr float LARGEST = 1e38f;  // below -LARGEST is forbidden; so that differences are finite
constexpr float LOG2_E = 1.44269504f;
constexpr float INFINITE = __builtin_huge_valf();
constexpr int MAX_SLICE = 51200;  // 200 KB
constexpr int MAX_CLUSTERS = 48;  // as many as run at once
constexpr int ROW_OF_WARP = 128;  // four logits a lane
constexpr int STRETCH_STEPS = 4, STRETCH = STRETCH_STEPS * ROW_OF_WARP;
constexpr int MAX_STRETCHES = 2 * THREADS;
constexpr int STRETCHES = 2 * WARPS;   // of a block
constexpr int LONG_LIST = 4 * THREADS;  // four for each thread
constexpr float FINE_ONE = 1 << 22;     // 512 of them fit a word

struct Arguments {
  const void* logits;
  long long stride;
  const float* uniforms;
  const float* temperatures;
  const int* top_ks;     // or null, as the next two
  const float* top_ps;
  const float* min_ps;
  long long* tokens;
  int size;
  int stretch;    // of sample_row: logits of a warp, a multiple of ROW_OF_WARP
  int stretches;  // of the others: in a row
  // What the launches leave each other, of each row:
  struct RowState* states;
  int* counts;            // [3][rows]: blocks that have come to survey's end, and to gather's; logits listed. Zero at first
  uint32_t* bins;         // [blocks][BINS]
  float4* surveyed;       // [stretches]: largest logit; weight of all relative to it, and of bin 0; how many in bin 0
  float* above;           // [stretches]: weight above the list
  unsigned long long* listed;  // [LONG_LIST]: key of the logit, stretch
};

constexpr float WHOLE = 8388608.f;  // 2^23: a float from here on has no fraction, and its last bits are an integer's
__device__ __forceinline__ int last_bits(float whole) { return __float_as_int(whole) - 0x4B000000; }

// Bin 0 holds what is not below `hi`, the others are equally wide, `scale` to a unit, and the last one goes on without end.
struct Spread {
  float hi, scale;
  // The bin's number is the integer nearest to this: in few instructions, since they are most of what a logit costs.
  __device__ __forceinline__ float place(float value) const { return fmaxf(fminf(__fmaf_rn(__fsub_rn(hi, value), scale, 0.5f), BINS - 1), 0.f); }
  __device__ __forceinline__ int of(float value) const { return last_bits(place(value) + WHOLE); }
};

enum Kind { DONE, TO_FLOOR, BY_NUMBER, BY_WEIGHT, SLOW };

struct RowState {
  int kind;
  int first, last;  // the bins that are listed
  Spread spread;
  float high;
  float floor;  // what min-p keeps
  float goal;   // number or weight down to the limit, counted from the top, or, by number, from the list's top
  float share;  // by number: the top-p limit among what is kept, or 1
};

struct Shared {
  union {
    uint32_t bins[BINS];
    float listed[LIST];  // this block's part of a list
  };
  float list[LIST];              // the first block's
  float4 notes[2][WARPS][2];     // of each warp, for all blocks; two sets, so that nobody overwrites what another still reads
  float2 scan[WARPS];
  float result[4];               // written by the first block
  float high, low, goal, figures[8];
  int where, count, listed_count, place, found;
  alignas(16) float values[];
};

__device__ __forceinline__ float weight_of(float value, float high, float rate) { return fast_exp2((value - high) * rate); }

template <typename F>
__device__ __forceinline__ float reduce(float value, F join) {
#pragma unroll
  for (int step = 16; step; step /= 2) value = join(value, __shfl_xor_sync(~0u, value, step));
  return value;
}

__device__ __forceinline__ float add(float a, float b) { return a + b; }

// Sums of all earlier threads' values, of a block's threads in order.
template <typename Memory>
__device__ __forceinline__ float2 sums_before(Memory& shared, float2 value) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float2 sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const float x = __shfl_up_sync(~0u, sum.x, step), y = __shfl_up_sync(~0u, sum.y, step);
    if (lane >= step) sum.x += x, sum.y += y;
  }
  const float2 earlier = {__shfl_up_sync(~0u, sum.x, 1), __shfl_up_sync(~0u, sum.y, 1)};
  __syncthreads();
  if (lane == 31) shared.scan[warp] = sum;
  __syncthreads();
  float2 before = {0.f, 0.f};
  for (int i = 0; i < warp; ++i) before.x += shared.scan[i].x, before.y += shared.scan[i].y;
  return lane ? make_float2(before.x + earlier.x, before.y + earlier.y) : before;
}

// The first token, from `token` on, whose running sum of kept weights exceeds `goal`; the last kept one if none does. A whole warp calls;
// `four(i)`: a lane's four logits of the i-th 128.
template <typename F>
__device__ int first_beyond(F four_at, int steps, float least, float goal, float high, float rate, int token) {
  const int lane = threadIdx.x % 32;
  float before = 0.f;
  int last = -1;
  for (int i = 0; i < steps; ++i) {
    const float4 four = four_at(i);
    const float values[4] = {four.x, four.y, four.z, four.w};
    float running[4], sum = 0.f;
    int kept = -1;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (values[j] >= least) sum += weight_of(values[j], high, rate), kept = j;
      running[j] = sum;
    }
    float scanned = sum;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const float other = __shfl_up_sync(~0u, scanned, step);
      if (lane >= step) scanned += other;
    }
    const float earlier = __shfl_up_sync(~0u, scanned, 1), start = before + (lane ? earlier : 0.f);
    int found = ROW_OF_WARP;
#pragma unroll
    for (int j = 3; j >= 0; --j) {
      if (values[j] >= least && start + running[j] > goal) found = lane * 4 + j;
    }
    found = __reduce_min_sync(~0u, found);
    if (found < ROW_OF_WARP) return token + i * ROW_OF_WARP + found;
    last = max(last, __reduce_max_sync(~0u, kept < 0 ? -1 : i * ROW_OF_WARP + lane * 4 + kept));
    before += __shfl_sync(~0u, scanned, 31);
  }
  return token + max(last, 0);
}

struct Row {
  Shared& shared;
  float4* mine;  // this thread's first four logits; the next are a warp's row further
  int steps, rank, ranks;
  int notes = 0;  // the set of notes to write next
  float high = 0.f, low = 0.f;  // largest and least logit
  float temperature = 1.f, rate = LOG2_E;

  template <typename F>
  __device__ __forceinline__ void each(F f) const {
    for (int i = 0; i < steps; ++i) {
      const float4 value = mine[i * 32];
      f(value.x), f(value.y), f(value.z), f(value.w);
    }
  }

  // The first warp goes through all warps' notes in order: f(number, first half, second half), a lane's numbers side by side.
  template <typename F>
  __device__ __forceinline__ void each_note(int set, F f) const {
    const int each = max(1, ranks * WARPS / 32);
    for (int i = 0; i < each; ++i) {
      const int note = threadIdx.x * each + i;
      if (note < ranks * WARPS) {
        const float4* place = shared.notes[set][note % WARPS];
        f(note, remote_load(place, note / WARPS), remote_load(place + 1, note / WARPS));
      }
    }
  }

  __device__ __forceinline__ int leave_note(float4 first, float4 second) {
    if (threadIdx.x % 32 == 0) shared.notes[notes][threadIdx.x / 32][0] = first, shared.notes[notes][threadIdx.x / 32][1] = second;
    notes ^= 1;
    return notes ^ 1;
  }

  // `high`, `low`, and which warp of the cluster has the first of the largest, from each thread's largest and least.
  __device__ int find_range(float largest, float least) {
    largest = reduce(largest, fmaxf), least = reduce(least, fminf);
    const int set = leave_note({largest, least, 0.f, 0.f}, {});
    cluster_sync();
    if (threadIdx.x < 32) {
      float top = -INFINITE, bottom = INFINITE;
      each_note(set, [&](int, float4 note, float4) { top = fmaxf(top, note.x), bottom = fminf(bottom, note.y); });
      top = reduce(top, fmaxf), bottom = reduce(bottom, fminf);
      int where = ranks * WARPS - 1;
      each_note(set, [&](int number, float4 note, float4) { if (note.x == top) where = min(where, number); });
      where = __reduce_min_sync(~0u, where);
      if (threadIdx.x == 0) shared.high = top, shared.low = bottom, shared.where = where;
    }
    __syncthreads();
    high = shared.high, low = fminf(shared.low, shared.high);
    return shared.where;
  }

  // ---- the least logit that a limit keeps ----

  struct Bins {
    float lo, hi;  // the logits that are spread
    float scale;   // bins to a unit
    __device__ __forceinline__ int of(float value) const { return min(static_cast<int>(__fmul_rn(__fsub_rn(hi, value), scale)), BINS - 1); }
  };

  __device__ __forceinline__ void spread(const Bins& bins, bool by_weight, float least, float& total) {
    const float step = __fdividef(1.f, bins.scale * temperature);  // a bin's width, as an exponent
    each([&](float value) {
      if (value < least) return;
      if (by_weight) total += weight_of(value, high, rate);
      if (value < bins.lo || value > bins.hi) return;
      const int bin = bins.of(value);
      uint32_t amount = 1;
      if (by_weight) {
        const float below = __saturatef((bins.hi - value) * bins.scale - bin) * step;
        amount = __float2uint_rn(ONE * (1.f - below * (1.f - below * (0.5f - below * (1.f / 6.f)))));  // e^-below, to 1e-7
      }
      atomicAdd(&shared.bins[bin], amount);
    });
  }

  // The first block: which bin the limit falls into -> result of all blocks: the bin, what lies in it and above at most, the goal.
  __device__ void pick_bin(const Bins& bins, bool by_weight, float goal, float above, float above_count) {
    float2 sums = {0.f, 0.f};
    for (int i = 0; i < ranks; ++i) {
      const uint2 part = remote_load(reinterpret_cast<const uint2*>(shared.bins) + threadIdx.x, i);
      sums.x += static_cast<float>(part.x), sums.y += static_cast<float>(part.y);
    }
    float2 counts = sums;
    if (by_weight) {
      const float step = __fdividef(rate, bins.scale), top = (bins.hi - high) * rate;
      sums.x *= fast_exp2(top - 2 * threadIdx.x * step) / ONE, sums.y *= fast_exp2(top - (2 * threadIdx.x + 1) * step) / ONE;
      counts.x *= 1.05f / ONE, counts.y *= 1.05f / ONE;
      goal *= 1.f + SLACK;
    }
    const float2 before = sums_before(shared, {sums.x + sums.y, counts.x + counts.y});
    const float first = above + before.x + sums.x, second = above + before.x + (sums.x + sums.y);
    if (second >= goal) atomicMin(&shared.found, 2 * threadIdx.x + (first < goal));
    __syncthreads();
    const int bin = shared.found;
    if (bin / 2 == threadIdx.x) {
      const float count = above_count + before.y + counts.x + (bin % 2 ? counts.y : 0.f);
      for (int i = 0; i < ranks; ++i) remote_store(&shared.result[0], i, static_cast<float>(bin)), remote_store(&shared.result[1], i, count);
    }
  }

  struct Exact {
    float above, inside, above_count, inside_count, inside_most, inside_least, above_least, below_most;
  };

  // What lies in a bin, above and below it, exactly; the same in all blocks.
  __device__ Exact measure(const Bins& bins, int bin, bool by_weight, float least) {
    float above = 0.f, inside = 0.f, most = -INFINITE, lowest = INFINITE, above_least = INFINITE, below_most = -INFINITE;
    int above_count = 0, inside_count = 0;
    each([&](float value) {
      if (value < least) return;
      const int of = value > bins.hi ? -1 : value < bins.lo ? BINS : bins.of(value);
      if (of > bin) {
        below_most = fmaxf(below_most, value);
        return;
      }
      const float weight = by_weight ? weight_of(value, high, rate) : 1.f;
      if (of < bin) {
        above += weight, ++above_count, above_least = fminf(above_least, value);
      } else {
        inside += weight, ++inside_count, most = fmaxf(most, value), lowest = fminf(lowest, value);
      }
    });
    above = reduce(above, add), inside = reduce(inside, add);
    most = reduce(most, fmaxf), lowest = reduce(lowest, fminf), above_least = reduce(above_least, fminf), below_most = reduce(below_most, fmaxf);
    above_count = __reduce_add_sync(~0u, above_count), inside_count = __reduce_add_sync(~0u, inside_count);
    const int set = leave_note({above, inside, __int_as_float(above_count), __int_as_float(inside_count)}, {most, lowest, above_least, below_most});
    cluster_sync();
    if (threadIdx.x < 32) {
      Exact sum = {0.f, 0.f, 0.f, 0.f, -INFINITE, INFINITE, INFINITE, -INFINITE};
      each_note(set, [&](int, float4 a, float4 b) {
        sum.above += a.x, sum.inside += a.y, sum.above_count += __float_as_int(a.z), sum.inside_count += __float_as_int(a.w);
        sum.inside_most = fmaxf(sum.inside_most, b.x), sum.inside_least = fminf(sum.inside_least, b.y);
        sum.above_least = fminf(sum.above_least, b.z), sum.below_most = fmaxf(sum.below_most, b.w);
      });
      const float figures[8] = {reduce(sum.above, add), reduce(sum.inside, add), reduce(sum.above_count, add), reduce(sum.inside_count, add),
                                reduce(sum.inside_most, fmaxf), reduce(sum.inside_least, fminf), reduce(sum.above_least, fminf), reduce(sum.below_most, fmaxf)};
      if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < 8; ++i) shared.figures[i] = figures[i];
      }
    }
    __syncthreads();
    const float* of = shared.figures;
    return {of[0], of[1], of[2], of[3], of[4], of[5], of[6], of[7]};
  }

  // List the logits of which `chosen`, at most LIST of the cluster, in the first block, in any order.
  template <typename F>
  __device__ void list_in_first(F chosen) {
    each([&](float value) {
      if (chosen(value)) {
        const int place = atomicAdd(&shared.listed_count, 1);
        if (place < LIST) shared.listed[place] = value;
      }
    });
    __syncthreads();
    const int count = min(shared.listed_count, LIST);
    if (threadIdx.x == 0) shared.place = remote_add(&shared.count, 0, count);
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += THREADS) {
      if (shared.place + i < LIST) remote_store(&shared.list[shared.place + i], 0, shared.listed[i]);
    }
    cluster_sync();
  }

  // The first block: its list, largest first; by pairs (Batcher's bitonic network).
  __device__ int sort_list() {
    const int count = min(shared.count, LIST);
    int size = 2;
    while (size < count) size *= 2;
    for (int i = count + threadIdx.x; i < size; i += THREADS) shared.list[i] = -INFINITE;
    __syncthreads();
    for (int run = 2; run <= size; run *= 2) {
      for (int apart = run / 2; apart; apart /= 2) {
        if (threadIdx.x < size / 2) {
          const int i = 2 * threadIdx.x - (threadIdx.x & (apart - 1)), j = i + apart;
          const float a = shared.list[i], b = shared.list[j];
          if ((i & run) == 0 ? a < b : a > b) shared.list[i] = b, shared.list[j] = a;
        }
        __syncthreads();
      }
    }
    return count;
  }

  // The first block: the first listed at which `above` and the weights listed so far reach `share` of themselves and the rest of
  // `counted` (`whole` 0), or of `whole`.
  __device__ float where_weight_reaches(int counted, float above, float share, float whole) {
    const int i = 2 * threadIdx.x;
    const float first = i < counted ? weight_of(shared.list[i], high, rate) : 0.f, second = i + 1 < counted ? weight_of(shared.list[i + 1], high, rate) : 0.f;
    const float before = above + sums_before(shared, {first + second, 0.f}).x;
    if (threadIdx.x == THREADS - 1) shared.goal = share * (whole > 0.f ? whole : before + (first + second));
    if (threadIdx.x == 0) shared.found = counted - 1;
    __syncthreads();
    if (i < counted && before + (first + second) >= shared.goal) atomicMin(&shared.found, i + (before + first < shared.goal));
    __syncthreads();
    return shared.list[min(max(shared.found, 0), counted - 1)];
  }

  // The first block: how many of the list are not below its k-th.
  __device__ int count_with_equals(int count, int k) {
    const float kth = shared.list[k - 1];
    if (threadIdx.x == 0) shared.found = 0;
    __syncthreads();
    const int i = 2 * threadIdx.x, kept = (i < count && shared.list[i] >= kth) + (i + 1 < count && shared.list[i + 1] >= kth);
    const int sum = __reduce_add_sync(~0u, kept);
    if (threadIdx.x % 32 == 0) atomicAdd(&shared.found, sum);
    __syncthreads();
    const int counted = shared.found;
    __syncthreads();
    return counted;
  }

  __device__ float from_first(float value) {
    if (rank == 0 && threadIdx.x < ranks) remote_store(&shared.result[2], threadIdx.x, value);
    cluster_sync();
    return shared.result[2];
  }

  // The largest logit such that those not below it (nor below `least`) number `limit`, or, by weight, weigh that share of them all. By
  // number: then also the top-p limit `share` among them, where the list allows (`share` becomes 1).
  __device__ float least_kept(bool by_weight, float limit, float least, float& share) {
    Bins bins = {by_weight ? fmaxf(least, high - REACH * temperature) : least, high, 0.f};
    float goal = limit, whole = 0.f, above = 0.f, above_count = 0.f;
    for (int level = 0; level < MAX_LEVELS && bins.lo < bins.hi; ++level) {
      bins.scale = BINS / (bins.hi - bins.lo);
      for (int i = threadIdx.x; i < BINS; i += THREADS) shared.bins[i] = 0;
      if (threadIdx.x == 0) shared.count = shared.listed_count = 0, shared.found = BINS - 1;
      __syncthreads();
      float total = 0.f;
      spread(bins, by_weight, least, total);
      int set = 0;
      if (by_weight && level == 0) set = leave_note({reduce(total, add), 0.f, 0.f, 0.f}, {});
      cluster_sync();
      if (by_weight && level == 0) {
        if (threadIdx.x < 32) {
          float sum = 0.f;
          each_note(set, [&](int, float4 note, float4) { sum += note.x; });
          sum = reduce(sum, add);
          if (threadIdx.x == 0) shared.goal = sum;
        }
        __syncthreads();
        whole = shared.goal, goal = limit * whole;
      }
      if (rank == 0) pick_bin(bins, by_weight, goal, above, above_count);
      cluster_sync();
      int bin = static_cast<int>(shared.result[0]);
      if (shared.result[1] <= LIST) {
        list_in_first([&](float value) { return value >= least && (value > bins.hi || (value >= bins.lo && bins.of(value) <= bin)); });
        float found = high;
        if (rank == 0) {
          const int count = sort_list();
          if (by_weight) {
            found = where_weight_reaches(count, 0.f, limit, whole);
          } else {
            const int k = min(static_cast<int>(limit), count);
            found = shared.list[k - 1];
            if (share < 1.f) found = where_weight_reaches(count_with_equals(count, k), 0.f, share, 0.f);
          }
        }
        if (!by_weight) share = 1.f;
        return from_first(found);
      }
      Exact exact = measure(bins, bin, by_weight, least);
      for (int move = 0, way = 0; move < MAX_MOVES; ++move) {  // fixed point may miss by a bin
        if (exact.above >= goal && exact.above_count > 0.f && way <= 0) {
          way = -1, bin = exact.above_least > bins.hi ? bin : bins.of(exact.above_least);
        } else if (exact.above + exact.inside < goal && exact.below_most >= bins.lo && way >= 0) {
          way = 1, bin = bins.of(exact.below_most);
        } else {
          break;
        }
        exact = measure(bins, bin, by_weight, least);
      }
      if (exact.inside_count <= LIST && exact.inside_count > 0.f) {
        list_in_first([&](float value) { return value >= bins.lo && value <= bins.hi && bins.of(value) == bin; });
        float found = high;
        if (rank == 0) {
          const int count = sort_list();
          if (by_weight) {
            found = where_weight_reaches(count, exact.above, limit, whole);
          } else {
            found = shared.list[min(max(static_cast<int>(goal - exact.above), 1), count) - 1];
          }
        }
        return from_first(found);
      }
      above = exact.above, above_count = exact.above_count;
      bins.lo = fminf(exact.inside_least, exact.inside_most), bins.hi = exact.inside_most;
    }
    return fmaxf(bins.hi, least);  // one value, or a weight that rounding leaves out of reach
  }

  // ---- the draw ----

  // The number of the warp whose stretch the draw falls into; shared.goal: how far.
  __device__ int draw(float least, float uniform) {
    float sum = 0.f;
    each([&](float value) { if (value >= least) sum += weight_of(value, high, rate); });
    const int set = leave_note({reduce(sum, add), 0.f, 0.f, 0.f}, {});
    cluster_sync();
    if (threadIdx.x < 32) {
      float mine = 0.f;
      each_note(set, [&](int, float4 note, float4) { mine += note.x; });
      float scanned = mine;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const float other = __shfl_up_sync(~0u, scanned, step);
        if (threadIdx.x >= step) scanned += other;
      }
      const float goal = uniform * __shfl_sync(~0u, scanned, 31), earlier = __shfl_up_sync(~0u, scanned, 1);
      float before = threadIdx.x ? earlier : 0.f, found_before = 0.f;
      int found = 1 << 20, last = 0;
      each_note(set, [&](int number, float4 note, float4) {
        if (note.x > 0.f && before + note.x > goal && found == 1 << 20) found = number, found_before = before;
        if (note.x > 0.f) last = number;
        before += note.x;
      });
      const int where = __reduce_min_sync(~0u, found);
      last = __reduce_max_sync(~0u, last);
      if (where == 1 << 20) {  // rounding left none
        if (threadIdx.x == 0) shared.where = last, shared.goal = INFINITE;
      } else if (found == where) {
        shared.where = where, shared.goal = goal - found_before;
      }
    }
    __syncthreads();
    return shared.where;
  }
};

__device__ __forceinline__ float widened(float value) { return value; }
__device__ __forceinline__ float widened(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widened(__half value) { return __half2float(value); }

// Four logits side by side; read once, so that they need not stay in any cache.
__device__ __forceinline__ float4 load_aligned(const float* four) { return __ldcs(reinterpret_cast<const float4*>(four)); }

template <typename T>
__device__ __forceinline__ float4 load_aligned(const T* four) {
  const uint2 bits = __ldcs(reinterpret_cast<const uint2*>(four));
  const T* of = reinterpret_cast<const T*>(&bits);
  return {widened(of[0]), widened(of[1]), widened(of[2]), widened(of[3])};
}

// The same from any place; what lies outside the row is forbidden.
template <typename T>
__device__ __forceinline__ float4 load_any(const T* row, int at, int size) {
  const auto one = [&](int i) { return i < size ? widened(row[i]) : -INFINITE; };
  return {one(at), one(at + 1), one(at + 2), one(at + 3)};
}

// Four logits are taken over: forbidden ones become -infinity, and the others count for the largest and the least.
__device__ __forceinline__ void take(float4* place, float4 four, float& largest, float& least) {
  float values[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool forbidden = values[i] < -LARGEST;
    values[i] = forbidden ? -INFINITE : fminf(values[i], LARGEST);
    largest = fmaxf(largest, values[i]), least = fminf(least, forbidden ? INFINITE : values[i]);
  }
  *place = {values[0], values[1], values[2], values[3]};
}

// This thread's logits of a row: memory -> shared memory.
template <typename T>
__device__ __forceinline__ void load(const Row& row, const T* logits, int begin, int size, float& largest, float& least) {
  const int lane = threadIdx.x % 32;
  if (reinterpret_cast<uintptr_t>(logits) % (4 * sizeof(T)) == 0 && begin + row.steps * ROW_OF_WARP <= size) {
    const T* from = logits + begin + lane * 4;
    int i = 0;
    for (; i + 4 <= row.steps; i += 4) {
      float4 fours[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) fours[j] = load_aligned(from + (i + j) * ROW_OF_WARP);
#pragma unroll
      for (int j = 0; j < 4; ++j) take(row.mine + (i + j) * 32, fours[j], largest, least);
    }
    for (; i < row.steps; ++i) take(row.mine + i * 32, load_aligned(from + i * ROW_OF_WARP), largest, least);
  } else {
    for (int i = 0; i < row.steps; ++i) take(row.mine + i * 32, load_any(logits, begin + i * ROW_OF_WARP + lane * 4, size), largest, least);
  }
}

template <typename T>
__device__ void sample_in_cluster(const Arguments& args, Shared& shared, int line) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Row row = {shared, reinterpret_cast<float4*>(shared.values + warp * args.stretch) + lane, args.stretch / ROW_OF_WARP, cluster_rank(), cluster_size()};
  const int me = row.rank * WARPS + warp, begin = me * args.stretch;
  const T* logits = static_cast<const T*>(args.logits) + line * args.stride;
  float largest = -INFINITE, least = INFINITE;
  load(row, logits, begin, args.size, largest, least);
  int chosen = row.find_range(largest, least);
  const float temperature = args.temperatures[line];
  float kept = row.high, goal = 0.f;
  if (temperature > 0.f) {
    row.temperature = temperature, row.rate = LOG2_E / temperature;
    kept = row.low;
    const int top_k = args.top_ks ? args.top_ks[line] : 0;
    float top_p = args.top_ps ? args.top_ps[line] : 1.f;
    if (top_k > 0 && top_k < args.size) kept = row.least_kept(false, static_cast<float>(top_k), kept, top_p);
    if (top_p < 1.f) kept = row.least_kept(true, top_p, kept, top_p);
    const float min_p = args.min_ps ? args.min_ps[line] : 0.f;
    if (min_p > 0.f) kept = fmaxf(kept, row.high + __logf(min_p) * temperature);
    kept = fminf(kept, row.high);
    chosen = row.draw(kept, args.uniforms[line]);
    goal = shared.goal;
  }
  if (chosen == me) {  // the largest: the first at which anything exceeds nothing
    const int token = first_beyond([&](int i) { return row.mine[i * 32]; }, row.steps, kept, goal, row.high, row.rate, begin);
    if (lane == 0) args.tokens[line] = min(token, args.size - 1);
  }
  cluster_sync();  // nobody leaves, or takes the next row, while others read its notes
}

template <typename T>
__global__ __launch_bounds__(THREADS, 3) void sample_row(const Arguments args, int rows) {
  extern __shared__ __align__(16) unsigned char raw[];
  for (int first = 0; first < rows; first += gridDim.y * 32) {
    const int mine = first + blockIdx.y + gridDim.y * (threadIdx.x % 32);
    unsigned slow = __ballot_sync(~0u, mine < rows && args.states[mine].kind == SLOW);
    for (; slow; slow &= slow - 1) sample_in_cluster<T>(args, *reinterpret_cast<Shared*>(raw), first + blockIdx.y + gridDim.y * (__ffs(slow) - 1));
  }
}

// ---- survey and gather ----

struct Desk {  // a block's shared memory
  union {
    uint32_t bins[BINS];
    unsigned long long list[LONG_LIST];
  };
  uint32_t fine[MAX_STRETCHES];
  float2 scan[WARPS];
  float4 figures[WARPS];
  float goal;
  int is_last, found, count;
};

struct Limits {
  float temperature, rate;
  int top_k;
  float top_p, min_p;
  bool by_number, by_weight;  // whether logits are spread, and how

  __device__ Limits(const Arguments& args, int line) {
    temperature = args.temperatures[line], rate = temperature > 0.f ? LOG2_E / temperature : LOG2_E;
    top_k = args.top_ks ? args.top_ks[line] : 0;
    top_p = args.top_ps ? args.top_ps[line] : 1.f, min_p = args.min_ps ? args.min_ps[line] : 0.f;
    by_number = temperature > 0.f && top_k > 0 && top_k < args.size;
    by_weight = temperature > 0.f && !by_number && top_p < 1.f;
  }
};

// A float's bits, so mapped that larger floats have larger integers; and back.
__device__ __forceinline__ uint32_t key_of(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}
__device__ __forceinline__ float value_of(unsigned long long entry) {
  const uint32_t key = static_cast<uint32_t>(entry >> 32);
  return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xFFFFFFFFu));
}

__device__ __forceinline__ float clamped(float value) { return value < -LARGEST ? -INFINITE : fminf(value, LARGEST); }

// A lane's four logits.
template <typename T>
__device__ __forceinline__ float4 four_at(const T* logits, int at, int size) {
  const bool aligned = reinterpret_cast<uintptr_t>(logits) % (4 * sizeof(T)) == 0 && at + 4 <= size;
  return aligned ? load_aligned(logits + at) : load_any(logits, at, size);
}

// Sums and so on over a block's threads, in a fixed order; the same in all of them.
template <typename F>
__device__ float over_block(Desk& desk, float value, F join) {
  value = reduce(value, join);
  __syncthreads();
  if (threadIdx.x % 32 == 0) desk.figures[threadIdx.x / 32].x = value;
  __syncthreads();
  float result = desk.figures[0].x;
  for (int i = 1; i < WARPS; ++i) result = join(result, desk.figures[i].x);
  return result;
}

__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ float smaller(float a, float b) { return fminf(a, b); }

// The bins' range, from two samples of each thread: 128 places, eight tokens side by side.
template <typename T>
__device__ Spread choose_spread(const Arguments& args, Desk& desk, const Limits& limits, const T* logits) {
  const int places = THREADS / 4, place = static_cast<int>(static_cast<long long>(threadIdx.x / 4) * args.size / places) / 8 * 8 + threadIdx.x % 4 * 2;
  float most = -INFINITE, least = INFINITE, sum = 0.f, count = 0.f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float value = place + i < args.size ? clamped(widened(logits[place + i])) : -INFINITE;
    if (value > -INFINITE) most = fmaxf(most, value), least = fminf(least, value), sum += value, count += 1.f;
  }
  most = over_block(desk, most, larger), least = over_block(desk, least, smaller), sum = over_block(desk, sum, add), count = over_block(desk, count, add);
  if (count == 0.f) return {-LARGEST, 1.f};
  if (limits.by_weight) least = fmaxf(least, most - REACH * limits.temperature);
  if (limits.by_number && limits.top_k <= args.size / 16) least = sum / count;  // few are kept: what is below the middle need not be spread
  return {most, most > least ? (BINS - 2) / (most - least) : 1.f};
}

// The last of a row's blocks to come here?
__device__ __forceinline__ bool comes_last(Desk& desk, int* count) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    desk.is_last = atomicAdd(count, 1) == static_cast<int>(gridDim.x) - 1;
    __threadfence();
  }
  __syncthreads();
  return desk.is_last;
}

// The token at which the running sum of kept weights exceeds `uniform` times all, where `weight_at(stretch)` is what each stretch keeps.
template <typename T, typename F>
__device__ void draw_by_stretches(const Arguments& args, Desk& desk, int line, float uniform, F weight_at, float least, float high, float rate) {
  const int i = 2 * threadIdx.x;
  const float first = i < args.stretches ? weight_at(i) : 0.f, second = i + 1 < args.stretches ? weight_at(i + 1) : 0.f;
  const float before = sums_before(desk, {first + second, 0.f}).x;
  if (threadIdx.x == THREADS - 1) desk.goal = uniform * (before + (first + second));
  if (threadIdx.x == 0) desk.found = MAX_STRETCHES, desk.count = 0;
  __syncthreads();
  const float goal = desk.goal;
  if (first > 0.f && before + first > goal) {
    atomicMin(&desk.found, i);
  } else if (second > 0.f && before + (first + second) > goal) {
    atomicMin(&desk.found, i + 1);
  }
  if (first > 0.f || second > 0.f) atomicMax(&desk.count, second > 0.f ? i + 1 : i);
  __syncthreads();
  const bool beyond = desk.found == MAX_STRETCHES;  // rounding left none: the last kept one
  const int stretch = beyond ? desk.count : desk.found;
  __syncthreads();
  if (stretch / 2 == threadIdx.x) desk.goal = beyond ? INFINITE : goal - (stretch % 2 ? before + first : before);
  __syncthreads();
  if (threadIdx.x < 32) {
    const T* logits = static_cast<const T*>(args.logits) + line * args.stride;
    const int begin = stretch * STRETCH;
    const int token = first_beyond([&](int step) { return four_at(logits, begin + step * ROW_OF_WARP + threadIdx.x * 4, args.size); }, STRETCH_STEPS,
                                   least, desk.goal, high, rate, begin);
    if (threadIdx.x == 0) args.tokens[line] = min(token, args.size - 1);
  }
}

// By number: the bin of the k-th, or, by weight, the bins that the limit may lie in, whatever fixed point loses.
__device__ void pick_bins(const Arguments& args, Desk& desk, const Limits& limits, int line, RowState& state, float whole, float top_weight, float top_count) {
  float2 sums = {0.f, 0.f};
  for (int i = 0; i < static_cast<int>(gridDim.x); ++i) {
    const uint2 part = __ldcg(reinterpret_cast<const uint2*>(args.bins + (static_cast<long long>(line) * gridDim.x + i) * BINS) + threadIdx.x);
    sums.x += static_cast<float>(part.x), sums.y += static_cast<float>(part.y);
  }
  float2 counts = sums;
  if (limits.by_weight) {
    const float step = limits.rate / state.spread.scale, top = (state.spread.hi - state.high) * limits.rate;
    const int bin = 2 * threadIdx.x - 1;  // its upper edge, counted in bins from `hi`
    sums.x *= fast_exp2(top - bin * step) / ONE, sums.y *= fast_exp2(top - (bin + 1) * step) / ONE;
    counts.x *= 1.05f / ONE, counts.y *= 1.05f / ONE;
  }
  if (threadIdx.x == 0) sums.x = limits.by_weight ? top_weight : top_count, counts.x = top_count;
  const float2 before = sums_before(desk, {sums.x + sums.y, counts.x + counts.y});
  const float goal = limits.by_weight ? limits.top_p * whole : static_cast<float>(limits.top_k);
  const float early = limits.by_weight ? fmaxf(goal * (1.f - LINEAR_SLACK), TINY) : goal, late = limits.by_weight ? fmaxf(goal * (1.f + LINEAR_SLACK), TINY) : goal;
  const float one = before.x + sums.x, two = before.x + (sums.x + sums.y);
  if (threadIdx.x == 0) desk.found = BINS - 1, desk.count = BINS - 1;
  __syncthreads();
  if (two >= early) atomicMin(&desk.found, 2 * threadIdx.x + (one < early));
  if (two >= late) atomicMin(&desk.count, 2 * threadIdx.x + (one < late));
  __syncthreads();
  const int first = desk.found, last = desk.count;
  __syncthreads();
  const float2 number = {before.y + counts.x, before.y + (counts.x + counts.y)};  // down to each of this thread's bins
  if (first / 2 == threadIdx.x) desk.figures[0] = {first % 2 ? number.x : before.y, 0.f, 0.f, 0.f};
  __syncthreads();
  if (last / 2 == threadIdx.x) desk.figures[1] = {last % 2 ? number.y : number.x, 0.f, 0.f, 0.f};
  __syncthreads();
  const float above = desk.figures[0].x, down_to = desk.figures[1].x;
  state.first = first, state.last = last, state.goal = goal;
  state.kind = last >= BINS - 1 ? SLOW : limits.by_weight ? BY_WEIGHT : BY_NUMBER;
  if (limits.by_number && down_to <= LONG_LIST) {
    state.first = 0, state.share = limits.top_p;
  } else if (limits.by_number && limits.top_p >= 1.f) {
    state.goal = goal - above;
  } else if (limits.by_number) {
    state.kind = SLOW;
  }
  if ((state.first > 0 ? down_to - above : down_to) > LONG_LIST) state.kind = SLOW;
}

// The last block of a row: what the row's tokens need yet.
template <typename T>
__device__ void plan_row(const Arguments& args, Desk& desk, const Limits& limits, const Spread& spread, int line) {
  const float4* surveyed = args.surveyed + static_cast<long long>(line) * args.stretches;
  float most = -INFINITE;
  for (int i = threadIdx.x; i < args.stretches; i += THREADS) most = fmaxf(most, __ldcg(surveyed + i).x);
  const float high = over_block(desk, most, larger);
  const auto scaled = [&](const float4& of) { return of.x == -INFINITE ? 0.f : fast_exp2((of.x - high) * limits.rate); };
  RowState state = {DONE, 0, 0, spread, high, -INFINITE, 0.f, 1.f};
  if (limits.temperature <= 0.f) {  // the first of the largest: all others weigh nothing
    const auto weight = [&](int i) { return __ldcg(surveyed + i).x == high ? 1.f : 0.f; };
    draw_by_stretches<T>(args, desk, line, 0.f, weight, high, high, limits.rate);
  } else if (!limits.by_number && !limits.by_weight && limits.min_p <= 0.f) {
    const auto weight = [&](int i) { const float4 of = __ldcg(surveyed + i); return of.y * scaled(of); };
    draw_by_stretches<T>(args, desk, line, args.uniforms[line], weight, -LARGEST, high, limits.rate);
  } else {
    state.kind = TO_FLOOR, state.first = state.last = BINS;
    if (limits.min_p > 0.f) state.floor = fminf(high + __logf(limits.min_p) * limits.temperature, high);
    if (limits.by_number || limits.by_weight) {
      float whole = 0.f, top_weight = 0.f, top_count = 0.f;
      for (int i = threadIdx.x; i < args.stretches; i += THREADS) {
        const float4 of = __ldcg(surveyed + i);
        whole += of.y * scaled(of), top_weight += of.z * scaled(of), top_count += of.w;
      }
      whole = over_block(desk, whole, add), top_weight = over_block(desk, top_weight, add), top_count = over_block(desk, top_count, add);
      pick_bins(args, desk, limits, line, state, whole, top_weight, top_count);
      if (state.kind != SLOW && state.floor > -INFINITE && spread.of(state.floor) < state.first) state.kind = TO_FLOOR, state.first = state.last = BINS;
    }
  }
  if (threadIdx.x == 0) args.states[line] = state;
}

template <typename T>
__global__ __launch_bounds__(THREADS, 2) void survey(const Arguments args) {
  __shared__ Desk desk;
  const int line = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const T* logits = static_cast<const T*>(args.logits) + line * args.stride;
  const Limits limits(args, line);
  const bool spreads = limits.by_number || limits.by_weight;
  float4 next[STRETCH_STEPS];
  const auto fetch = [&](int stretch) {
#pragma unroll
    for (int i = 0; i < STRETCH_STEPS; ++i) next[i] = four_at(logits, stretch * STRETCH + i * ROW_OF_WARP + lane * 4, args.size);
  };
  fetch(blockIdx.x * STRETCHES + warp);
  Spread spread = {INFINITE, 1.f};
  if (spreads) {
    for (int i = threadIdx.x; i < BINS; i += THREADS) desk.bins[i] = 0;
    spread = choose_spread(args, desk, limits, logits);
    __syncthreads();
  }
  const float step = 1.f / (spread.scale * limits.temperature);          // a bin's width, as an exponent
  const float slope = ONE * (1.f - __expf(-step));                      // of the weight along a bin, in fixed point
  const float middle = WHOLE + (ONE - 0.5f * slope);
  for (int round = 0; round < STRETCHES / WARPS; ++round) {
    const int stretch = blockIdx.x * STRETCHES + round * WARPS + warp;
    float values[STRETCH_STEPS * 4];
#pragma unroll
    for (int i = 0; i < STRETCH_STEPS; ++i) values[4 * i] = next[i].x, values[4 * i + 1] = next[i].y, values[4 * i + 2] = next[i].z, values[4 * i + 3] = next[i].w;
    if (round + 1 < STRETCHES / WARPS) fetch(stretch + WARPS);
    if (stretch >= args.stretches) continue;
    float most = values[0];
#pragma unroll
    for (int i = 1; i < STRETCH_STEPS * 4; ++i) most = fmaxf(most, values[i]);
    most = reduce(most, larger);
    const float from = most == -INFINITE ? 0.f : most;
    float whole = 0.f, top = 0.f;
    int count = 0;
#pragma unroll
    for (int i = 0; i < STRETCH_STEPS * 4; ++i) {
      const float value = values[i], weight = fast_exp2(__fmaf_rn(value, limits.rate, -from * limits.rate));
      whole += weight;
      if (!spreads) continue;
      const float place = spread.place(value), nearest = place + WHOLE;
      const int bin = last_bits(nearest);
      if (bin == 0) top += weight, ++count;
      const uint32_t amount = limits.by_weight ? last_bits(__fmaf_rn(place - (nearest - WHOLE), -slope, middle)) : 1;
      if (static_cast<unsigned>(bin - 1) >= BINS - 2) continue;
      atomicAdd(&desk.bins[bin], amount);
    }
    whole = reduce(whole, add);
    if (spreads) top = reduce(top, add), count = __reduce_add_sync(~0u, count);
    if (lane == 0) __stcg(args.surveyed + static_cast<long long>(line) * args.stretches + stretch, make_float4(most, whole, top, static_cast<float>(count)));
  }
  if (spreads) {
    __syncthreads();
    uint32_t* bins = args.bins + (static_cast<long long>(line) * gridDim.x + blockIdx.x) * BINS;
    for (int i = threadIdx.x; i < BINS; i += THREADS) __stcg(bins + i, desk.bins[i]);
  }
  if (comes_last(desk, args.counts + line)) plan_row<T>(args, desk, limits, spread, line);
}

// The list of a row, largest first; by pairs (Batcher's bitonic network).
__device__ void sort_list(Desk& desk, const unsigned long long* listed, int count) {
  int size = 2;
  while (size < count) size *= 2;
  for (int i = threadIdx.x; i < size; i += THREADS) desk.list[i] = i < count ? __ldcg(listed + i) : 0;
  __syncthreads();
  for (int run = 2; run <= size; run *= 2) {
    for (int apart = run / 2; apart; apart /= 2) {
      for (int pair = threadIdx.x; pair < size / 2; pair += THREADS) {
        const int i = 2 * pair - (pair & (apart - 1)), j = i + apart;
        const unsigned long long a = desk.list[i], b = desk.list[j];
        if ((i & run) == 0 ? a < b : a > b) desk.list[i] = b, desk.list[j] = a;
      }
      __syncthreads();
    }
  }
}

// The first of the list at which `above` and the weights so far reach `goal`, or, where that is 0, `share` of those of the first `counted`.
__device__ float where_weight_reaches(Desk& desk, int counted, float above, float goal, float share, float high, float rate) {
  const int begin = 4 * threadIdx.x;
  float sums[4], sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[i] = sum += begin + i < counted ? weight_of(value_of(desk.list[begin + i]), high, rate) : 0.f;
  const float before = above + sums_before(desk, {sum, 0.f}).x;
  if (threadIdx.x == THREADS - 1) desk.goal = goal > 0.f ? goal : share * (before + sum);
  if (threadIdx.x == 0) desk.found = counted;
  __syncthreads();
#pragma unroll
  for (int i = 3; i >= 0; --i) {
    if (begin + i < counted && before + sums[i] >= desk.goal) atomicMin(&desk.found, begin + i);
  }
  __syncthreads();
  return value_of(desk.list[min(desk.found, counted - 1)]);
}

// The last block of a row: the least logit that is kept, and the draw.
template <typename T>
__device__ void finish_row(const Arguments& args, Desk& desk, const Limits& limits, const RowState& state, int line, int rows) {
  const float* above = args.above + static_cast<long long>(line) * args.stretches;
  const int count = __ldcg(args.counts + 2 * rows + line);
  if (count > LONG_LIST || (count == 0 && state.kind != TO_FLOOR)) {
    if (threadIdx.x == 0) args.states[line].kind = SLOW;
    return;
  }
  float least = state.floor, largest_listed = 0.f;
  if (state.kind != TO_FLOOR) {
    sort_list(desk, args.listed + static_cast<long long>(line) * LONG_LIST, count);
    largest_listed = weight_of(value_of(desk.list[0]), state.high, limits.rate);
    if (state.kind == BY_WEIGHT) {
      float sum = 0.f;
      for (int i = threadIdx.x; i < args.stretches; i += THREADS) sum += __ldcg(above + i);
      sum = over_block(desk, sum, add);
      least = where_weight_reaches(desk, count, sum, state.goal, limits.top_p, state.high, limits.rate);
      if (state.goal > 0.f && (sum >= state.goal || desk.found == count)) {  // fixed point was further off than it may be
        if (threadIdx.x == 0) args.states[line].kind = SLOW;
        return;
      }
    } else {
      least = value_of(desk.list[min(max(static_cast<int>(state.goal), 1), count) - 1]);
      if (state.share < 1.f) {
        float kept = 0.f;
        for (int i = threadIdx.x; i < count; i += THREADS) kept += value_of(desk.list[i]) >= least ? 1.f : 0.f;
        const int counted = static_cast<int>(over_block(desk, kept, add));
        least = where_weight_reaches(desk, counted, 0.f, 0.f, state.share, state.high, limits.rate);
      }
    }
    least = fminf(fmaxf(least, state.floor), state.high);
  }
  for (int i = threadIdx.x; i < args.stretches; i += THREADS) desk.fine[i] = 0;
  __syncthreads();
  const float one = largest_listed > 0.f ? largest_listed : 1.f;
  for (int i = threadIdx.x; state.kind != TO_FLOOR && i < count; i += THREADS) {
    const float value = value_of(desk.list[i]);
    if (value >= least) atomicAdd(&desk.fine[static_cast<uint32_t>(desk.list[i])], __float2uint_rn(weight_of(value, state.high, limits.rate) / one * FINE_ONE));
  }
  __syncthreads();
  const auto weight = [&](int i) { return __ldcg(above + i) + desk.fine[i] * (one / FINE_ONE); };
  draw_by_stretches<T>(args, desk, line, args.uniforms[line], weight, least, state.high, limits.rate);
}

template <typename T>
__global__ __launch_bounds__(THREADS, 2) void gather(const Arguments args) {
  __shared__ Desk desk;
  const int line = gridDim.y - 1 - blockIdx.y, rows = gridDim.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;  // the last rows may be in cache yet
  const RowState state = args.states[line];
  if (state.kind == DONE || state.kind == SLOW) return;
  const Limits limits(args, line);
  const T* logits = static_cast<const T*>(args.logits) + line * args.stride;
  const float floor = state.kind == TO_FLOOR ? state.floor : -LARGEST;  // where there is a list, min-p is heeded after it
  for (int round = 0; round < STRETCHES / WARPS; ++round) {
    const int stretch = blockIdx.x * STRETCHES + round * WARPS + warp;
    if (stretch >= args.stretches) continue;
    const long long place = static_cast<long long>(line) * args.stretches + stretch;
    const float most = args.surveyed[place].x;
    float above = 0.f;
    if (most >= floor && state.spread.of(most) <= state.last) {
      float4 fours[STRETCH_STEPS];
#pragma unroll
      for (int i = 0; i < STRETCH_STEPS; ++i) fours[i] = four_at(logits, stretch * STRETCH + i * ROW_OF_WARP + lane * 4, args.size);
      unsigned chosen = 0;
      float values[STRETCH_STEPS * 4];
#pragma unroll
      for (int i = 0; i < STRETCH_STEPS; ++i) values[4 * i] = fours[i].x, values[4 * i + 1] = fours[i].y, values[4 * i + 2] = fours[i].z, values[4 * i + 3] = fours[i].w;
#pragma unroll
      for (int i = 0; i < STRETCH_STEPS * 4; ++i) {
        if (values[i] < floor) continue;
        const int bin = state.spread.of(values[i]);
        if (bin < state.first) above += weight_of(values[i], state.high, limits.rate);
        if (bin >= state.first && bin <= state.last) chosen |= 1u << i;
      }
      above = reduce(above, add);
      const int mine = __popc(chosen);
      int scanned = mine;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, scanned, step);
        if (lane >= step) scanned += other;
      }
      const int all = __shfl_sync(~0u, scanned, 31);
      if (all) {
        int base = 0;
        if (lane == 0) base = atomicAdd(args.counts + 2 * rows + line, all);
        int at = __shfl_sync(~0u, base, 0) + scanned - mine;
        unsigned long long* listed = args.listed + static_cast<long long>(line) * LONG_LIST;
#pragma unroll
        for (int i = 0; i < STRETCH_STEPS * 4; ++i) {
          if (chosen >> i & 1) {
            if (at < LONG_LIST) __stcg(listed + at, static_cast<unsigned long long>(key_of(values[i])) << 32 | static_cast<unsigned>(stretch));
            ++at;
          }
        }
      }
    }
    if (lane == 0) __stcg(args.above + place, above);
  }
  if (comes_last(desk, args.counts + rows + line)) finish_row<T>(args, desk, limits, state, line, rows);
}

template <typename T>
int launch_sample(const Arguments& args, int rows, int ranks, cudaStream_t stream) {
  const dim3 blocks((args.stretches + STRETCHES - 1) / STRETCHES, rows);
  survey<T><<<blocks, THREADS, 0, stream>>>(args);
  if (!args.top_ks && !args.top_ps && !args.min_ps) return cudaGetLastError();
  gather<T><<<blocks, THREADS, 0, stream>>>(args);
  cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) error = raise_shared_memory<sample_row<T>>(sizeof(Shared) + MAX_SLICE * sizeof(float));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = ranks;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(ranks, rows < MAX_CLUSTERS ? rows : MAX_CLUSTERS);
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = sizeof(Shared) + WARPS * args.stretch * sizeof(float);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, sample_row<T>, args, rows);
}

}  // namespace
}  // namespace gantline

static_assert(gantline::LONG_LIST * 8 + sizeof(gantline::RowState) <= 16448 && gantline::BINS * 4 == 4096 && gantline::STRETCHES == 32, "as promised below");

// `type` of the logits 0: bfloat16, 1: float16, 2: float32. logits [rows, size] with `stride` elements between rows; uniforms, temperatures,
// top_ps and min_ps float32 [rows], top_ks int32 [rows], tokens int64 [rows]; the limits may be null. rows at most 65535, size at most
// 409600. `counts`: 3 * rows zero int32; `work`: of each row 16448 bytes, 20 for each stretch of 512 tokens, and
// 4096 for each 32 stretches, 16-byte aligned. Returns a cudaError_t.
GANTLINE_EXPORT int gantline_sample_hopper(int type, const void* logits, long long stride, const void* uniforms, const void* temperatures, const void* top_ks,
                                           const void* top_ps, const void* min_ps, void* tokens, void* counts, void* work, int rows, int size, void* stream) {
  using namespace gantline;
  const int ranks = size <= 4096 ? 1 : size <= 8192 ? 2 : size <= 16384 ? 4 : 8, share = ranks * WARPS * ROW_OF_WARP;
  const int stretch = (size + share - 1) / share * ROW_OF_WARP, stretches = (size + STRETCH - 1) / STRETCH, blocks = (stretches + STRETCHES - 1) / STRETCHES;
  if (size < 1 || rows < 1 || rows > 65535 || stretch * WARPS > MAX_SLICE || stretches > MAX_STRETCHES) return cudaErrorInvalidValue;
  Arguments args = {};
  args.logits = logits, args.stride = stride, args.tokens = static_cast<long long*>(tokens);
  args.uniforms = static_cast<const float*>(uniforms), args.temperatures = static_cast<const float*>(temperatures);
  args.top_ks = static_cast<const int*>(top_ks), args.top_ps = static_cast<const float*>(top_ps), args.min_ps = static_cast<const float*>(min_ps);
  args.size = size, args.stretch = stretch, args.stretches = stretches, args.counts = static_cast<int*>(counts);
  unsigned char* at = static_cast<unsigned char*>(work);
  const auto next = [&](long long bytes) { at += bytes; return at - bytes; };
  args.listed = reinterpret_cast<unsigned long long*>(next(1ll * rows * LONG_LIST * sizeof(long long)));
  args.bins = reinterpret_cast<uint32_t*>(next(1ll * rows * blocks * BINS * sizeof(uint32_t)));
  args.surveyed = reinterpret_cast<float4*>(next(1ll * rows * stretches * sizeof(float4)));
  args.states = reinterpret_cast<RowState*>(next(1ll * rows * sizeof(RowState)));
  args.above = reinterpret_cast<float*>(at);
  const auto on = static_cast<cudaStream_t>(stream);
  if (type == 0) return launch_sample<__nv_bfloat16>(args, rows, ranks, on);
  return type == 1 ? launch_sample<__half>(args, rows, ranks, on) : launch_sample<float>(args, rows, ranks, on);
}
