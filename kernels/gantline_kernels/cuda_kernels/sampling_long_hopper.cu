// Choosing a token within limits, for Hopper (sm_90a), where a row is long: one reading of the logits, or two.
//
// Three launches. `probe` looks at every sixteenth stretch of eight logits and says which logits of a row decide: those around the least
// one that is kept, as far as a probe can tell, and the largest. `read` reads the row: of each stretch of 1024 logits it leaves the largest,
// and the weights of all, relative to that; logits that decide are listed, those between the two kinds only summed. `choose`, a block for
// each row, finds the least logit that is kept in the list, exactly, and draws: by sums of the stretches, then along one of them.
//
// What the probe cannot know is the weight of single large logits. So where a limit by weight is not among what was listed, the block
// knows the weight of the row by then, and only needs to estimate what is below the limit, which many small logits make up: it lists anew,
// in a second reading. Where that fails too, or a row is odd, it searches without any estimate (`sampling.cuh`). Whatever was listed, the
// limits come out the same; every sum has a fixed order or is one of integers, so that a row's result depends on nothing but the row.

#include "host.cuh"
#include "sampling.cuh"

namespace gantline {
namespace {

constexpr int STRETCH = 1024, STEPS = STRETCH / ROW_OF_WARP;  // logits of a warp
constexpr int READERS = 8, READING_BLOCKS = 4;               // warps of a block that reads, blocks of a multiprocessor
constexpr int MAX_STRETCHES = THREADS;
constexpr int CAPACITY = 12288;      // logits of a row that are listed
constexpr int CELLS = 4 * THREADS;   // bins of a probe, and of a list
constexpr int PERIOD = 128, PROBED = 8;                       // eight logits of each 128 are probed
constexpr float ONE_OF = static_cast<float>(PERIOD / PROBED);
constexpr float MOST_PROBED = 0.8f * CAPACITY / ONE_OF;       // probed logits that stand for as many as can be listed
constexpr float LEAST_PROBED = 96.f;                          // the largest 1500 or so are listed whatever the limits
constexpr float DEVIATIONS = 4.5f;                            // an estimate that is further off costs time, and nothing else
constexpr int FEW = 256;             // logits that are compared each with each
constexpr int HALF_BITS = 18;        // a weight has 36 bits in fixed point, and is summed as two halves
constexpr float UNIT = 68719476736.f;

// Listed is what is not below `lo`, but not what lies between `hi` and `top`.
struct Wanted {
  float lo, hi, top;
};

// What a probe saw: `largest`, and how its logits spread over cells, `scale` to a unit, downwards from it; 0: nothing was seen.
struct Probe {
  Wanted wanted;
  float largest, scale;
};

struct Stretch {
  float most, whole, between;  // the largest logit; weights relative to it, of all and of what lies between
  int between_count, offset, count;  // where in the list its logits are
  int unused[2];
};

struct LongArguments {
  const void* logits;
  long long stride;
  const float* uniforms;
  const float* temperatures;
  const int* top_ks;     // or null, as the next two
  const float* top_ps;
  const float* min_ps;
  long long* tokens;
  Probe* probes;         // [rows]
  uint32_t* cells;       // [rows, CELLS]
  int* listed;           // [rows]: how many
  float* list;           // [rows, CAPACITY]
  Stretch* stretches;    // [rows, count]
  int size, count;       // logits and stretches of a row
  int early;             // a launch may begin before the one ahead has ended
};

struct Limits {
  float temperature, rate, top_p, min_p;
  int top_k;  // 0: none

  __device__ Limits(const LongArguments& args, int row) {
    temperature = args.temperatures[row];
    rate = temperature > 0.f ? LOG2_E / temperature : LOG2_E;
    top_k = args.top_ks ? args.top_ks[row] : 0, top_p = args.top_ps ? args.top_ps[row] : 1.f, min_p = args.min_ps ? args.min_ps[row] : 0.f;
    if (top_k < 0 || top_k >= args.size) top_k = 0;
    if (!(temperature > 0.f)) top_k = 0, top_p = 1.f, min_p = 0.f;
  }
};

__device__ __forceinline__ void await_launch_ahead() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_launch_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

template <typename T>
__device__ __forceinline__ float4 four_at(const T* logits, int at, int size) {
  const bool aligned = reinterpret_cast<uintptr_t>(logits) % (4 * sizeof(T)) == 0 && at + 4 <= size;
  return aligned ? load_aligned(logits + at) : load_any(logits, at, size);
}

// A forbidden logit becomes -infinity.
__device__ __forceinline__ float clamped(float value) { return value < -LARGEST ? -INFINITE : fminf(value, LARGEST); }

// ---- sums and so on over a block's threads, in a fixed order; the same in all of them ----

struct Joined {
  float4 parts[WARPS];

  template <typename F>
  __device__ float4 of(float4 value, F join) {
    value = {reduce(value.x, join), reduce(value.y, join), reduce(value.z, join), reduce(value.w, join)};
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    float4 sum = parts[0];
#pragma unroll
    for (int i = 1; i < WARPS; ++i) {
      sum = {join(sum.x, parts[i].x), join(sum.y, parts[i].y), join(sum.z, parts[i].z), join(sum.w, parts[i].w)};
    }
    return sum;
  }
};

__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }

// Sums of all earlier threads' values, of a block's threads in order: of floats in a fixed order, of integers exactly.
template <typename N>
__device__ __forceinline__ N sum_before(N* scratch, N value, N& whole) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  N sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const N other = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += other;
  }
  const N earlier = __shfl_up_sync(~0u, sum, 1);
  __syncthreads();
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  N before = 0;
  whole = 0;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) {
    if (i == warp) before = whole;
    whole += scratch[i];
  }
  return lane ? before + earlier : before;
}

// ---- what decides, by a probe ----

struct Edges {
  int lo, surely, hi;  // of the cells
};

struct ProbeDesk {
  Joined joined;
  uint32_t cells[CELLS];
  float scratch[WARPS];
  Edges edges;
  int found[4];
};

// The cell that a logit falls into, from the largest down.
__device__ __forceinline__ int cell_of(float value, float largest, float scale) {
  return max(0, static_cast<int>(fminf(__fmul_rn(__fsub_rn(largest, value), scale), static_cast<float>(CELLS - 1))));
}

// Where cells are to be listed down to number `lo`, but, if not all of these can be, not those above number `hi` (-1: no more is known)
// save for the largest: the wanted logits. `hi` UPWARDS: as many of these as can be, from `lo` up. `before`: probed logits above this
// thread's four cells; `counts`: those in each.
constexpr int UPWARDS = -2;

__device__ Wanted wanted_of(int (&found)[4], float largest, float scale, const uint32_t (&counts)[4], float before, int lo, int hi) {
  const auto lower_edge = [&](int cell) { return largest - static_cast<float>(cell + 1) / scale; };
  __syncthreads();
  if (threadIdx.x == 0) found[0] = CELLS - 1, found[1] = CELLS;
  __syncthreads();
  const auto number = [&](int cell) {  // of what is not below this thread's cell
    float sum = before;
    for (int i = 0; i <= cell % 4; ++i) sum += static_cast<float>(counts[i]);
    return sum;
  };
#pragma unroll
  for (int i = 3; i >= 0; --i) {
    const int cell = 4 * threadIdx.x + i;
    if (number(cell) >= LEAST_PROBED) atomicMin(&found[0], cell);
    if (number(cell) > MOST_PROBED) atomicMin(&found[1], cell);  // too many from here on
  }
  __syncthreads();
  const int top = found[0], most = found[1];
  lo = max(lo, top);
  if (lo < most) return {lower_edge(lo), INFINITE, INFINITE};
  if (hi == UPWARDS) {
    if (threadIdx.x == lo / 4) found[2] = static_cast<int>(number(lo));
    if (threadIdx.x == 0) found[3] = lo;
    __syncthreads();
#pragma unroll
    for (int i = 3; i >= 0; --i) {
      const int cell = 4 * threadIdx.x + i;
      if (static_cast<float>(found[2]) - number(cell) + LEAST_PROBED <= MOST_PROBED) atomicMin(&found[3], cell);
    }
    __syncthreads();
    hi = found[3];
    __syncthreads();
  }
  if (hi > top) {
    if (threadIdx.x == lo / 4) found[2] = static_cast<int>(number(lo));
    if (threadIdx.x == hi / 4) found[3] = static_cast<int>(number(hi));
    __syncthreads();
    if (static_cast<float>(found[2] - found[3]) + LEAST_PROBED <= MOST_PROBED) return {lower_edge(lo), lower_edge(hi), lower_edge(top)};
  }
  return {lower_edge(max(0, most - 1)), INFINITE, INFINITE};
}

template <typename T>
__global__ __launch_bounds__(THREADS, 2) void probe(const LongArguments args) {
  extern __shared__ __align__(16) unsigned char raw[];
  ProbeDesk& desk = *reinterpret_cast<ProbeDesk*>(raw);
  float4* probed = reinterpret_cast<float4*>(raw + sizeof(ProbeDesk));
  const int row = blockIdx.x;
  const T* logits = static_cast<const T*>(args.logits) + row * args.stride;
  const Limits limits(args, row);
  if (args.early) let_next_launch_begin();
  if (threadIdx.x == 0) args.listed[row] = 0;
  if (!limits.top_k && !(limits.top_p < 1.f) && !(limits.min_p > 0.f)) {
    if (threadIdx.x == 0) args.probes[row] = {{INFINITE, INFINITE, INFINITE}, 0.f, 0.f};
    return;
  }
  const int fours = args.size / PERIOD * (PROBED / 4);
  float largest = -INFINITE, least = INFINITE;
  for (int i = threadIdx.x; i < fours; i += THREADS) {
    const int group = i / (PROBED / 4);
    const int at = static_cast<int>(group * 2654435761u >> 24) % (PERIOD / PROBED);  // at no regular distance
    const float4 four = four_at(logits, group * PERIOD + at * PROBED + i % (PROBED / 4) * 4, args.size);
    const float values[4] = {four.x, four.y, four.z, four.w};
    probed[i] = four;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (fabsf(values[j]) <= LARGEST) largest = fmaxf(largest, values[j]), least = fminf(least, values[j]);
    }
  }
  for (int i = threadIdx.x; i < CELLS; i += THREADS) desk.cells[i] = 0;
  const float4 range = desk.joined.of({largest, -least, 0.f, 0.f}, larger);
  largest = range.x, least = -range.y;
  if (!(largest > -INFINITE)) {
    if (threadIdx.x == 0) args.probes[row] = {{INFINITE, INFINITE, INFINITE}, 0.f, 0.f};
    return;
  }
  const bool by_floor = !limits.top_k && !(limits.top_p < 1.f);
  const float lowest = largest + __logf(limits.min_p) * limits.temperature;  // of min-p, as far as is known here
  if (!limits.top_k && limits.top_p < 1.f) least = fmaxf(least, largest - REACH * limits.temperature);
  const float scale = least < largest ? fminf(CELLS / (largest - least), LARGEST) : 1.f;
  for (int i = threadIdx.x; i < fours; i += THREADS) {
    const float4 four = probed[i];
    const float values[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (fabsf(values[j]) <= LARGEST) atomicAdd(&desk.cells[cell_of(values[j], largest, scale)], 1u);
    }
  }
  __syncthreads();
  const int first = 4 * threadIdx.x;
  const uint32_t counts[4] = {desk.cells[first], desk.cells[first + 1], desk.cells[first + 2], desk.cells[first + 3]};
  *reinterpret_cast<uint4*>(args.cells + static_cast<long long>(row) * CELLS + first) = {counts[0], counts[1], counts[2], counts[3]};
  float all, whole, squares;
  const float before = sum_before(desk.scratch, static_cast<float>(counts[0] + counts[1] + counts[2] + counts[3]), all);
  if (threadIdx.x == 0) desk.edges = {CELLS - 1, CELLS - 1, -1};
  __syncthreads();
  if (limits.top_k) {
    const float expected = limits.top_k / ONE_OF, off = DEVIATIONS * sqrtf(expected);
    float number = before;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      number += static_cast<float>(counts[i]);
      if (number >= expected + off + DEVIATIONS * DEVIATIONS * 0.5f) atomicMin(&desk.edges.lo, first + i);
      if (number <= expected - off) atomicMax(&desk.edges.hi, first + i);
    }
  } else if (limits.top_p < 1.f) {
    const float p = limits.top_p, step = limits.rate / scale;
    const int last = CELLS - 1 - first;  // upwards, since a few large weights would leave nothing of what is below them
    float weights[4], numbers[4], sum = 0.f, square = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      numbers[i] = static_cast<float>(desk.cells[last - i]), weights[i] = fast_exp2(-(static_cast<float>(last - i) + 0.5f) * step);
      sum += numbers[i] * weights[i], square += numbers[i] * weights[i] * weights[i];
    }
    float below = sum_before(desk.scratch, sum, whole), square_below = sum_before(desk.scratch, square, squares);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float above = whole - below, square_above = fmaxf(squares - square_below, 0.f);
      // Whatever the probe missed above: what it saw there is at least there.
      const bool surely = (1.f - p) * above >= p * ONE_OF * (below + DEVIATIONS * sqrtf(square_below));
      const float more = above - p * whole, off = DEVIATIONS * sqrtf((1.f - p) * (1.f - p) * square_above + p * p * square_below);
      if (surely) atomicMin(&desk.edges.surely, last - i);
      if (more >= off) atomicMin(&desk.edges.lo, last - i);
      if (more <= -off) atomicMax(&desk.edges.hi, last - i);
      below += numbers[i] * weights[i], square_below += numbers[i] * weights[i] * weights[i];
    }
  } else if (threadIdx.x == 0) {  // from here up: a largest logit that was not probed only raises the floor
    desk.edges.lo = lowest > least ? min(cell_of(lowest, largest, scale) + 1, CELLS - 1) : CELLS - 1, desk.edges.hi = UPWARDS;
  }
  __syncthreads();
  Wanted wanted = wanted_of(desk.found, largest, scale, counts, before, min(desk.edges.lo, desk.edges.surely), desk.edges.hi);
  // Where some of these are not listed, none of the list would do.
  if (by_floor) wanted.lo = wanted.lo <= largest - static_cast<float>(desk.edges.lo + 1) / scale ? fminf(wanted.lo, lowest) : INFINITE;
  if (threadIdx.x == 0) args.probes[row] = {wanted, largest, scale};
}

// ---- reading ----

template <typename T>
__device__ __forceinline__ void load_stretch(float (&values)[4 * STEPS], const T* logits, int begin, int size) {
  const int at = begin + threadIdx.x % 32 * 4;
  float4 fours[STEPS];
  if (reinterpret_cast<uintptr_t>(logits) % (4 * sizeof(T)) == 0 && begin + STRETCH <= size) {
#pragma unroll
    for (int i = 0; i < STEPS; ++i) fours[i] = load_aligned(logits + at + i * ROW_OF_WARP);
  } else {
#pragma unroll
    for (int i = 0; i < STEPS; ++i) fours[i] = four_at(logits, at + i * ROW_OF_WARP, size);
  }
#pragma unroll
  for (int i = 0; i < STEPS; ++i) values[4 * i] = fours[i].x, values[4 * i + 1] = fours[i].y, values[4 * i + 2] = fours[i].z, values[4 * i + 3] = fours[i].w;
}

// One logit: what lies between is summed; what is wanted goes to shared memory, `next`, which moves on by 128 bytes. In the compiler's own
// words this takes twice the instructions, since it tests all logits first and keeps the answers.
__device__ __forceinline__ void sort_out(float value, float weight, const Wanted& wanted, float& between, int& between_count, uint32_t& next) {
  asm volatile(
      "{\n.reg .pred between, listed;\nsetp.gt.f32 between, %3, %5;\nsetp.lt.and.f32 between, %3, %6, between;\n"
      "setp.ge.and.f32 listed, %3, %4, !between;\n@between add.f32 %0, %0, %7;\n@between add.s32 %1, %1, 1;\n"
      "@listed st.shared.f32 [%2], %3;\n@listed add.u32 %2, %2, 128;\n}"
      : "+f"(between), "+r"(between_count), "+r"(next)
      : "f"(value), "f"(wanted.lo), "f"(wanted.hi), "f"(wanted.top), "f"(weight)
      : "memory");
}

// A warp's stretch: its sums, and what of it is wanted -> list, in a fixed order of its own, at a place of which only the size is sure.
// `column`: where this lane may leave up to 4 * STEPS logits, each 32 places further; null: there is none, and the list is near.
template <bool has_column>
__device__ __forceinline__ Stretch take_stretch(const float (&values)[4 * STEPS], const Wanted& wanted, float rate, float* column, float* list, int* listed) {
  const int lane = threadIdx.x % 32;
  float most = values[0];
#pragma unroll
  for (int i = 1; i < 4 * STEPS; ++i) most = fmaxf(most, values[i]);
  most = reduce(most, larger);
  const float from = fminf(fmaxf(most, -LARGEST), LARGEST);
  float whole[2] = {}, between[2] = {};
  int count = 0, between_count = 0;
  uint32_t next = has_column ? shared_address(column) : 0;
#pragma unroll
  for (int i = 0; i < 4 * STEPS; ++i) {
    const float value = values[i], weight = fast_exp2((value - from) * rate);
    whole[i % 2] += weight;
    if (has_column) {
      sort_out(value, weight, wanted, between[i % 2], between_count, next);
    } else {
      const bool is_between = value > wanted.hi && value < wanted.top;
      if (is_between) between[i % 2] += weight, ++between_count;
      if (value >= wanted.lo && !is_between) ++count;
    }
  }
  if (has_column) count = (next - shared_address(column)) / 128;
  const float sum = reduce(whole[0] + whole[1], add);
  between_count = __reduce_add_sync(~0u, between_count);
  const float between_sum = between_count ? reduce(between[0] + between[1], add) : 0.f;
  int scanned = count;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, scanned, step);
    if (lane >= step) scanned += other;
  }
  const int total = __shfl_sync(~0u, scanned, 31);
  int offset = 0;
  if (lane == 0 && total) offset = atomicAdd(listed, total);
  offset = __shfl_sync(~0u, offset, 0);
  if (total && offset + total <= CAPACITY) {
    float* to = list + offset + (scanned - count);
    if (has_column) {
      for (int i = 0; i < count; ++i) to[i] = column[32 * i];
    } else {
#pragma unroll
      for (int i = 0; i < 4 * STEPS; ++i) {
        const float value = values[i];
        if (value >= wanted.lo && !(value > wanted.hi && value < wanted.top)) *to++ = value;
      }
    }
  }
  return {most, sum, between_sum, between_count, offset, total, {0, 0}};
}

__device__ __forceinline__ void store_stretch(Stretch* to, const Stretch& stretch) {
  float4* place = reinterpret_cast<float4*>(to);
  place[0] = {stretch.most, stretch.whole, stretch.between, __int_as_float(stretch.between_count)};
  place[1] = {__int_as_float(stretch.offset), __int_as_float(stretch.count), 0.f, 0.f};
}

__device__ __forceinline__ Stretch load_stretch_sums(const Stretch* from) {
  const float4* place = reinterpret_cast<const float4*>(from);
  const float4 a = place[0], b = place[1];
  return {a.x, a.y, a.z, __float_as_int(a.w), __float_as_int(b.x), __float_as_int(b.y), {0, 0}};
}

template <typename T>
__global__ __launch_bounds__(READERS * 32, READING_BLOCKS) void read(const LongArguments args) {
  __shared__ float columns[READERS][4 * STEPS][32];
  const int stretch = blockIdx.x * READERS + threadIdx.x / 32, row = blockIdx.y;
  if (stretch >= args.count) return;
  float values[4 * STEPS];
  load_stretch(values, static_cast<const T*>(args.logits) + row * args.stride, stretch * STRETCH, args.size);
  const float temperature = args.temperatures[row];
  if (args.early) let_next_launch_begin(), await_launch_ahead();
  const Wanted wanted = args.probes[row].wanted;
  const Stretch sums = take_stretch<true>(values, wanted, temperature > 0.f ? LOG2_E / temperature : LOG2_E, &columns[threadIdx.x / 32][0][threadIdx.x % 32],
                                          args.list + static_cast<long long>(row) * CAPACITY, args.listed + row);
  if (threadIdx.x % 32 == 0) store_stretch(args.stretches + static_cast<long long>(row) * args.count + stretch, sums);
}

// ---- choosing ----

typedef unsigned long long Fixed;  // a number, or a weight relative to the row's largest, in units of 2^-36

struct Desk {
  Shared shared;  // for a search without estimates
  alignas(16) float list[CAPACITY];
  uint32_t halves[2][CELLS];
  Joined joined;
  Fixed scan[WARPS];
  float few[FEW];
  Fixed few_amounts[FEW];
  float whole[MAX_STRETCHES], between[MAX_STRETCHES], sums[MAX_STRETCHES];
  int offsets[MAX_STRETCHES], counts[MAX_STRETCHES];
  int listed, few_count, found, where;
  unsigned best;
  Fixed before;
  int edges[2], searched[4];
};

// The same order as of the floats, but for -0 and NaN.
__device__ __forceinline__ unsigned ordered(float value) {
  const unsigned bits = __float_as_uint(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unordered(unsigned bits) { return __uint_as_float(bits & 0x80000000u ? bits & 0x7FFFFFFFu : ~bits); }

// A thread's logits of a row in memory.
template <typename T>
struct Afar {
  static constexpr int AT_ONCE = 4;  // loads, or a block would wait for each
  const T* row;
  int size;

  template <typename F>
  __device__ __forceinline__ void each(F f) const {
    for (int at = 4 * threadIdx.x; at < size; at += 4 * AT_ONCE * THREADS) {
      float4 fours[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) fours[i] = four_at(row, at + 4 * i * THREADS, size);  // past the row: forbidden
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) f(clamped(fours[i].x)), f(clamped(fours[i].y)), f(clamped(fours[i].z)), f(clamped(fours[i].w));
    }
  }
};

template <typename T>
struct Choice {
  const LongArguments& args;
  Desk& desk;
  const Limits& limits;
  const T* logits;
  int row;
  Wanted wanted;
  int listed = 0;           // more than CAPACITY: the list is of no use
  float most = 0.f;         // the largest logit
  float whole = 0.f, between = 0.f;  // weights relative to it
  int between_count = 0;
  bool clamps = false;

  __device__ __forceinline__ float weight(float value) const { return fast_exp2((value - most) * limits.rate); }
  __device__ __forceinline__ Fixed fixed_weight(float value) const { return __float2ull_rn(fminf(weight(value), 1.f) * UNIT); }
  __device__ static __forceinline__ Fixed fixed(double weight) { return static_cast<Fixed>(fmax(weight, 0.0) * static_cast<double>(UNIT) + 0.5); }

  // The sums of stretches, each thread having one's.
  __device__ void gather(const Stretch& mine) {
    const float largest = desk.joined.of({mine.most, 0.f, 0.f, 0.f}, larger).x;
    most = fminf(largest, LARGEST);
    const float factor = mine.most > -INFINITE ? fast_exp2((fminf(mine.most, LARGEST) - most) * limits.rate) : 0.f;
    const int i = threadIdx.x;
    desk.whole[i] = mine.whole * factor, desk.between[i] = mine.between * factor, desk.offsets[i] = mine.offset, desk.counts[i] = mine.count;
    const float4 sums = desk.joined.of({desk.whole[i], desk.between[i], static_cast<float>(mine.between_count), static_cast<float>(mine.count)}, add);
    whole = sums.x, between = sums.y, between_count = static_cast<int>(sums.z), listed = static_cast<int>(sums.w);
    clamps = !(largest <= LARGEST) || !(whole < INFINITE);
  }

  __device__ __forceinline__ bool usable() const { return listed <= CAPACITY && !clamps; }
  __device__ __forceinline__ bool splits() const { return wanted.hi < INFINITE; }

  template <typename F>
  __device__ __forceinline__ void each_listed(F f) const {
    for (int i = threadIdx.x; i < listed; i += THREADS) f(desk.list[i]);
  }

  // What is listed, by number or weight, between `lo` and `hi`.
  template <bool by_weight>
  __device__ Fixed amount_within(float lo, float hi) {
    Fixed mine = 0, sum;
    each_listed([&](float value) { if (value >= lo && value <= hi) mine += by_weight ? fixed_weight(value) : 1; });
    sum_before(desk.scan, mine, sum);
    return sum;
  }

  // All that is not below `least`, where that is listed.
  __device__ Fixed weight_from(float least) {
    const Fixed listed_above = amount_within<true>(least, INFINITE);
    return splits() && least <= wanted.hi ? listed_above + fixed(between) : listed_above;
  }

  // The largest listed logit such that those not below it amount to `goal` -> least. False if it is not listed.
  template <bool by_weight>
  __device__ bool find_listed(Fixed goal, float& least) {
    if (!usable() || !listed) return false;
    goal = max(goal, static_cast<Fixed>(1));
    if (!splits()) return search<by_weight>(-INFINITE, INFINITE, goal, least);
    const Fixed largest = amount_within<by_weight>(wanted.top, INFINITE);
    if (goal <= largest) return search<by_weight>(wanted.top, INFINITE, goal, least);
    const Fixed skipped = largest + (by_weight ? fixed(between) : between_count);
    return goal > skipped && search<by_weight>(-INFINITE, wanted.hi, goal - skipped, least);
  }

  // The same among what is listed between `lo` and `hi`.
  template <bool by_weight>
  __device__ __noinline__ bool search(float lo, float hi, Fixed goal, float& least) {
    __syncthreads();  // what an earlier search left has been read
    for (int level = 0; level < MAX_LEVELS; ++level) {
      float lowest = INFINITE, highest = -INFINITE;
      each_listed([&](float value) { if (value >= lo && value <= hi) lowest = fminf(lowest, value), highest = fmaxf(highest, value); });
      for (int i = threadIdx.x; i < CELLS; i += THREADS) desk.halves[0][i] = desk.halves[1][i] = 0;
      if (threadIdx.x == 0) desk.found = CELLS, desk.few_count = 0, desk.best = 0;
      const float4 range = desk.joined.of({highest, -lowest, 0.f, 0.f}, larger);
      hi = range.x, lo = -range.y;
      if (!(lo <= hi)) return false;
      const float scale = lo < hi ? fminf(CELLS / (hi - lo), LARGEST) : 0.f;
      each_listed([&](float value) {
        if (value < lo || value > hi) return;
        const int cell = cell_of(value, hi, scale);
        if (by_weight) {
          const Fixed amount = fixed_weight(value);
          atomicAdd(&desk.halves[0][cell], static_cast<uint32_t>(amount) & ((1u << HALF_BITS) - 1));
          atomicAdd(&desk.halves[1][cell], static_cast<uint32_t>(amount >> HALF_BITS));
        } else {
          atomicAdd(&desk.halves[0][cell], 1u);
        }
      });
      __syncthreads();
      Fixed amounts[4], mine = 0, all;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        amounts[i] = desk.halves[0][4 * threadIdx.x + i];
        if (by_weight) amounts[i] += static_cast<Fixed>(desk.halves[1][4 * threadIdx.x + i]) << HALF_BITS;
        mine += amounts[i];
      }
      const Fixed start = sum_before(desk.scan, mine, all);
      if (all < goal) return false;
      if (start < goal && start + mine >= goal) {
        Fixed before = start;
        int cell = 0;
#pragma unroll
        for (int i = 0; i < 3; ++i) {
          if (cell == i && before + amounts[i] < goal) before += amounts[i], ++cell;
        }
        desk.found = 4 * threadIdx.x + cell, desk.before = before;
      }
      __syncthreads();
      const int cell = desk.found;
      goal -= desk.before;
      if (lo == hi) {
        least = lo;
        return true;
      }
      float inner_lo = INFINITE, inner_hi = -INFINITE;
      each_listed([&](float value) {
        if (value < lo || value > hi || cell_of(value, hi, scale) != cell) return;
        inner_lo = fminf(inner_lo, value), inner_hi = fmaxf(inner_hi, value);
        const int place = atomicAdd(&desk.few_count, 1);
        if (place < FEW) desk.few[place] = value, desk.few_amounts[place] = by_weight ? fixed_weight(value) : 1;
      });
      __syncthreads();
      const int few = desk.few_count;
      if (few <= FEW) {
        if (threadIdx.x < few) {
          const float value = desk.few[threadIdx.x];
          Fixed sum = 0;
          for (int i = 0; i < few; ++i) sum += desk.few[i] >= value ? desk.few_amounts[i] : 0;
          if (sum >= goal) atomicMax(&desk.best, ordered(value));
        }
        __syncthreads();
        least = unordered(desk.best);
        return true;
      }
      const float4 inner = desk.joined.of({inner_hi, -inner_lo, 0.f, 0.f}, larger);
      hi = inner.x, lo = -inner.y;
    }
    return false;
  }

  // What decides, now that the row's weight is known: such that what is not below `base`, but below the limit, weighs `dropped`.
  __device__ __noinline__ bool want_anew(float base, float dropped) {
    const Probe& seen = args.probes[row];
    const float largest = seen.largest, scale = seen.scale;
    if (!(scale > 0.f) || clamps) return false;
    const int first = 4 * threadIdx.x, last = CELLS - 1 - first;  // upwards, as above
    const uint32_t* cells = args.cells + static_cast<long long>(row) * CELLS;
    const uint4 loaded = *reinterpret_cast<const uint4*>(cells + first);
    const uint32_t counts[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
    float weights[4], squares[4], sum = 0.f, square = 0.f, all;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float number = static_cast<float>(cells[last - i]), middle = largest - (static_cast<float>(last - i) + 0.5f) / scale;
      const float each = middle >= base ? ONE_OF * fminf(weight(middle), 1.f) : 0.f;
      weights[i] = number * each, squares[i] = number * each * each;
      sum += weights[i], square += squares[i];
    }
    float* scratch = reinterpret_cast<float*>(desk.scan);
    const float before = sum_before(scratch, static_cast<float>(counts[0] + counts[1] + counts[2] + counts[3]), all);
    float below = sum_before(scratch, sum, all), square_below = sum_before(scratch, square, all);
    if (threadIdx.x == 0) desk.edges[0] = CELLS - 1, desk.edges[1] = -1, desk.listed = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float off = DEVIATIONS * sqrtf(square_below);
      if (below + off <= dropped) atomicMin(&desk.edges[0], last - i);
      if (below - off >= dropped) atomicMax(&desk.edges[1], last - i);
      below += weights[i], square_below += squares[i];
    }
    __syncthreads();
    wanted = wanted_of(desk.searched, largest, scale, counts, before, desk.edges[0], desk.edges[1]);
    return true;
  }

  // The row once more, with what is wanted now.
  __device__ __noinline__ void read_anew() {
    const int warp = threadIdx.x / 32;
    Stretch* stretches = args.stretches + static_cast<long long>(row) * args.count;
    for (int stretch = warp; stretch < args.count; stretch += WARPS) {
      float values[4 * STEPS];
      load_stretch(values, logits, stretch * STRETCH, args.size);
      const Stretch sums = take_stretch<false>(values, wanted, limits.rate, nullptr, desk.list, &desk.listed);
      if (threadIdx.x % 32 == 0) store_stretch(stretches + stretch, sums);
    }
    __syncthreads();
    gather(mine());
  }

  __device__ Stretch mine() const {
    if (threadIdx.x >= args.count) return {-INFINITE, 0.f, 0.f, 0, 0, 0, {0, 0}};
    return load_stretch_sums(args.stretches + static_cast<long long>(row) * args.count + threadIdx.x);
  }

  // The least logit that top-k and top-p keep, without estimates.
  __device__ __noinline__ float search_row() {
    const Afar<T> afar = {logits, args.size};
    Row<Afar<T>> all = {desk.shared, afar, 0, 1};
    float largest = -INFINITE, least = INFINITE;
    afar.each([&](float value) { if (value > -INFINITE) largest = fmaxf(largest, value), least = fminf(least, value); });
    all.find_range(largest, least);
    all.temperature = limits.temperature, all.rate = limits.rate;
    most = all.high, clamps = true;
    float kept = all.low, top_p = limits.top_p;
    if (limits.top_k) kept = all.least_kept(false, static_cast<float>(limits.top_k), kept, top_p);
    if (top_p < 1.f) kept = all.least_kept(true, top_p, kept, top_p);
    return kept;
  }

  __device__ float least_kept() {
    float kept = -INFINITE;
    bool found = !clamps;
    if (found && limits.top_k) found = find_listed<false>(limits.top_k, kept);
    if (found && limits.top_p < 1.f) {
      const Fixed all = limits.top_k ? weight_from(kept) : fixed(whole), goal = fixed(static_cast<double>(limits.top_p) * static_cast<double>(all) / UNIT);
      const float base = kept;
      found = find_listed<true>(goal, kept);
      if (!found && want_anew(base, static_cast<float>(static_cast<double>(all - min(goal, all)) / UNIT))) {
        read_anew();
        found = find_listed<true>(goal, kept);
      }
    }
    if (!found) kept = search_row();
    if (limits.min_p > 0.f) kept = fmaxf(kept, most + __logf(limits.min_p) * limits.temperature);
    return fminf(kept, most);
  }

  // What each stretch weighs of what is not below `least` -> desk.sums.
  __device__ void sum_stretches(float least) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();
    if (least == -INFINITE && !clamps) {
      desk.sums[threadIdx.x] = desk.whole[threadIdx.x];
    } else if (usable() && least >= wanted.lo && (!splits() || least <= wanted.hi || least >= wanted.top)) {
      for (int stretch = warp; stretch < args.count; stretch += WARPS) {
        float sum = 0.f;
        for (int i = lane; i < desk.counts[stretch]; i += 32) {
          const float value = desk.list[desk.offsets[stretch] + i];
          if (value >= least) sum += weight(value);
        }
        sum = reduce(sum, add);
        if (lane == 0) desk.sums[stretch] = splits() && least <= wanted.hi ? sum + desk.between[stretch] : sum;
      }
    } else {
      for (int stretch = warp; stretch < args.count; stretch += WARPS) {
        float values[4 * STEPS], sum[2] = {};
        load_stretch(values, logits, stretch * STRETCH, args.size);
#pragma unroll
        for (int i = 0; i < 4 * STEPS; ++i) {
          const float value = clamped(values[i]);
          if (value >= least) sum[i % 2] += weight(value);
        }
        const float all = reduce(sum[0] + sum[1], add);
        if (lane == 0) desk.sums[stretch] = all;
      }
    }
    __syncthreads();
  }

  // The stretch that the draw falls into; `goal`: how far.
  __device__ int draw(float uniform, float& goal) {
    const float sum = threadIdx.x < args.count ? desk.sums[threadIdx.x] : 0.f;
    float all;
    if (threadIdx.x == 0) desk.where = MAX_STRETCHES, desk.found = 0;
    const float before = sum_before(reinterpret_cast<float*>(desk.scan), sum, all);
    goal = uniform * all;
    if (sum > 0.f) {
      atomicMax(&desk.found, threadIdx.x);
      if (before + sum > goal) atomicMin(&desk.where, threadIdx.x);
    }
    __syncthreads();
    const int where = desk.where;
    if (where == MAX_STRETCHES) {  // rounding left none
      goal = INFINITE;
      return desk.found;
    }
    if (threadIdx.x == where) desk.few[0] = goal - before;
    __syncthreads();
    goal = desk.few[0];
    return where;
  }

  // The first token of a stretch whose running sum exceeds `goal`; its last kept one if none does. For one warp.
  __device__ int first_beyond(int stretch, float least, float goal) const {
    const int lane = threadIdx.x % 32;
    float values[4 * STEPS], before = 0.f;
    load_stretch(values, logits, stretch * STRETCH, args.size);
    int first = STRETCH, last = 0;
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      float running[4], sum = 0.f;
      bool kept[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float value = clamped(values[4 * i + j]);
        kept[j] = value >= least && value > -INFINITE;
        if (kept[j]) sum += weight(value);
        running[j] = sum;
      }
      float scanned = sum;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const float other = __shfl_up_sync(~0u, scanned, step);
        if (lane >= step) scanned += other;
      }
      const float earlier = __shfl_up_sync(~0u, scanned, 1), start = before + (lane ? earlier : 0.f);
#pragma unroll
      for (int j = 3; j >= 0; --j) {
        const int place = i * ROW_OF_WARP + lane * 4 + j;
        if (kept[j] && start + running[j] > goal) first = min(first, place);
        if (kept[j]) last = max(last, place);
      }
      before += __shfl_sync(~0u, scanned, 31);
    }
    first = __reduce_min_sync(~0u, first), last = __reduce_max_sync(~0u, last);
    return stretch * STRETCH + (first < STRETCH ? first : last);
  }
};

template <typename T>
__global__ __launch_bounds__(THREADS, 2) void choose(const LongArguments args) {
  extern __shared__ __align__(16) unsigned char raw[];
  Desk& desk = *reinterpret_cast<Desk*>(raw);
  const int row = blockIdx.x;
  const Limits limits(args, row);
  const float uniform = args.uniforms[row];
  if (args.early) await_launch_ahead();
  const T* logits = static_cast<const T*>(args.logits) + row * args.stride;
  Choice<T> choice = {args, desk, limits, logits, row, args.probes[row].wanted};
  const Stretch mine = choice.mine();
  const int listed = min(args.listed[row], CAPACITY);
  const float4* list = reinterpret_cast<const float4*>(args.list + static_cast<long long>(row) * CAPACITY);
  for (int i = threadIdx.x; 4 * i < listed; i += THREADS) reinterpret_cast<float4*>(desk.list)[i] = list[i];
  choice.gather(mine);
  float least = -INFINITE, goal = 0.f;
  int stretch = 0;
  if (!(limits.temperature > 0.f)) {  // the largest: the first at which anything exceeds nothing
    if (threadIdx.x == 0) desk.where = MAX_STRETCHES;
    __syncthreads();
    least = choice.most;
    if (threadIdx.x < args.count && fminf(mine.most, LARGEST) == least) atomicMin(&desk.where, threadIdx.x);
    __syncthreads();
    stretch = desk.where < MAX_STRETCHES ? desk.where : 0;
  } else if (choice.most > -LARGEST) {
    if (choice.clamps || limits.top_k || limits.top_p < 1.f || limits.min_p > 0.f) least = choice.least_kept();
    choice.sum_stretches(least);
    stretch = choice.draw(uniform, goal);
  }
  if (threadIdx.x < 32) {
    const int token = choice.first_beyond(stretch, least, goal);
    if (threadIdx.x == 0) args.tokens[row] = min(token, args.size - 1);
  }
}

// ---- the host's side ----

template <auto kernel>
int launch(const LongArguments& args, dim3 grid, int threads, int bytes, int most_bytes, bool early, cudaStream_t stream) {
  if (most_bytes > 48 * 1024) {
    const cudaError_t error = raise_shared_memory<kernel>(most_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args);
}

int stretches_of(int size) { return (size + STRETCH - 1) / STRETCH; }

template <typename T>
int launch_all(const LongArguments& args, int rows, int parts, cudaStream_t stream) {
  const int probed = args.size / PERIOD * PROBED * sizeof(float), most_probed = MAX_STRETCHES * STRETCH / PERIOD * PROBED * sizeof(float);
  int error = 0;
  if (parts & 1) error = launch<probe<T>>(args, dim3(rows), THREADS, sizeof(ProbeDesk) + probed, sizeof(ProbeDesk) + most_probed, false, stream);
  if (!error && parts & 2) error = launch<read<T>>(args, dim3((args.count + READERS - 1) / READERS, rows), READERS * 32, 0, 0, args.early, stream);
  if (!error && parts & 4) error = launch<choose<T>>(args, dim3(rows), THREADS, sizeof(Desk), sizeof(Desk), args.early, stream);
  return error;
}

}  // namespace
}  // namespace gantline

// What `scratch` must hold, in bytes, of at most 16384 rows.
GANTLINE_EXPORT int gantline_sample_long_scratch(int rows, int size) {
  using namespace gantline;
  return rows * static_cast<int>(sizeof(Stretch) * stretches_of(size) + (CAPACITY + CELLS) * 4 + sizeof(Probe) + 4) + 5 * 16;
}

// As gantline_sample_hopper, for at most 16384 rows of 1024 to 524288 logits. `scratch`: memory that need hold nothing, aligned to 16.
// `options`: 1, 2, 4: launch probe, read, choose; 8: launches may overlap. Results are the same with and without.
GANTLINE_EXPORT int gantline_sample_long(int type, const void* logits, long long stride, const void* uniforms, const void* temperatures, const void* top_ks,
                                         const void* top_ps, const void* min_ps, void* tokens, void* scratch, int rows, int size, int options, void* stream) {
  using namespace gantline;
  if (size < STRETCH || size > MAX_STRETCHES * STRETCH || rows < 1 || rows > 16384) return cudaErrorInvalidValue;
  unsigned char* at = static_cast<unsigned char*>(scratch);
  const auto take = [&](long long bytes) { unsigned char* place = at; at += (bytes + 15) / 16 * 16; return place; };
  LongArguments args = {logits,
                        stride,
                        static_cast<const float*>(uniforms),
                        static_cast<const float*>(temperatures),
                        static_cast<const int*>(top_ks),
                        static_cast<const float*>(top_ps),
                        static_cast<const float*>(min_ps),
                        static_cast<long long*>(tokens)};
  args.stretches = reinterpret_cast<Stretch*>(take(rows * static_cast<long long>(sizeof(Stretch)) * stretches_of(size)));
  args.list = reinterpret_cast<float*>(take(rows * 4LL * CAPACITY));
  args.cells = reinterpret_cast<uint32_t*>(take(rows * 4LL * CELLS));
  args.probes = reinterpret_cast<Probe*>(take(rows * static_cast<long long>(sizeof(Probe))));
  args.listed = reinterpret_cast<int*>(take(rows * 4LL));
  args.size = size, args.count = stretches_of(size), args.early = options & 8;
  const auto on = static_cast<cudaStream_t>(stream);
  if (type == 0) return launch_all<__nv_bfloat16>(args, rows, options & 7, on);
  return type == 1 ? launch_all<__half>(args, rows, options & 7, on) : launch_all<float>(args, rows, options & 7, on);
}
