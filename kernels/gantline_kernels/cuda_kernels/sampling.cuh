// A row's limits, found exactly however odd the row is: each becomes the least logit that is kept.
//
// The largest value such that what is not below it numbers k (top-k) or weighs p of the whole (top-p). Found without sorting the row: its
// blocks count how the logits (by number, or by weight in fixed point) spread over 1024 bins between the largest and the least; the first
// block adds these up and picks the bin that the value lies in. Where what is not below this bin fits a list, the list is sorted, and gives
// the value, of both limits at once; otherwise the weight above the bin is summed exactly, and the bin's logits are listed, or, where they
// are too many, spread over 1024 bins in their turn. Every floating sum has a fixed order, so that a row's result depends on nothing but
// the row.
#pragma once

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
constexpr float SLACK = 1e-5f;    // more than what fixed point errs by in a sum
constexpr float LARGEST = 1e38f;  // below -LARGEST is forbidden; so that differences are finite
constexpr float LOG2_E = 1.44269504f;
constexpr float INFINITE = __builtin_huge_valf();
constexpr int ROW_OF_WARP = 128;  // four logits a lane

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
__device__ __forceinline__ float2 sums_before(Shared& shared, float2 value) {
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

// `Logits`: where a thread finds its logits: each(f).
template <typename Logits>
struct Row {
  Shared& shared;
  Logits logits;
  int rank, ranks;
  int notes = 0;  // the set of notes to write next
  float high = 0.f, low = 0.f;  // largest and least logit
  float temperature = 1.f, rate = LOG2_E;

  template <typename F>
  __device__ __forceinline__ void each(F f) const {
    logits.each(f);
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

  // The first token whose running sum exceeds `goal`, in this warp's stretch, which begins with `token`; its last kept one if none does.
  __device__ int first_beyond(float least, float goal, int token) const {
    const int lane = threadIdx.x % 32;
    float before = 0.f;
    int last = -1;
    for (int i = 0; i < logits.steps; ++i) {
      const float4 four = logits.mine[i * 32];
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

}  // namespace
}  // namespace gantline
