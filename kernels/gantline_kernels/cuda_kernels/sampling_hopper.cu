// Choosing a token within limits, for Hopper (sm_90a), where a row is small: one reading of the logits.
//
// A cluster of up to eight blocks holds a row in its shared memory, each block a slice, each warp a stretch of consecutive tokens, and
// all further passes read it there (`sampling.cuh`). The draw goes by sums of the warps' stretches, then along one of them.

#include "host.cuh"
#include "sampling.cuh"

namespace gantline {
namespace {

constexpr int MAX_SLICE = 51200;  // 200 KB

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
  int stretch;  // logits of a warp, a multiple of ROW_OF_WARP
};

// A thread's logits in shared memory: four, and the next a warp's row further.
struct Held {
  float4* mine;
  int steps;

  template <typename F>
  __device__ __forceinline__ void each(F f) const {
    for (int i = 0; i < steps; ++i) {
      const float4 value = mine[i * 32];
      f(value.x), f(value.y), f(value.z), f(value.w);
    }
  }
};

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
__device__ __forceinline__ void load(const Held& held, const T* logits, int begin, int size, float& largest, float& least) {
  const int lane = threadIdx.x % 32;
  if (reinterpret_cast<uintptr_t>(logits) % (4 * sizeof(T)) == 0 && begin + held.steps * ROW_OF_WARP <= size) {
    const T* from = logits + begin + lane * 4;
    int i = 0;
    for (; i + 4 <= held.steps; i += 4) {
      float4 fours[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) fours[j] = load_aligned(from + (i + j) * ROW_OF_WARP);
#pragma unroll
      for (int j = 0; j < 4; ++j) take(held.mine + (i + j) * 32, fours[j], largest, least);
    }
    for (; i < held.steps; ++i) take(held.mine + i * 32, load_aligned(from + i * ROW_OF_WARP), largest, least);
  } else {
    for (int i = 0; i < held.steps; ++i) take(held.mine + i * 32, load_any(logits, begin + i * ROW_OF_WARP + lane * 4, size), largest, least);
  }
}

template <typename T>
__global__ __launch_bounds__(THREADS, 3) void sample_row(const Arguments args) {
  extern __shared__ __align__(16) unsigned char raw[];
  Shared& shared = *reinterpret_cast<Shared*>(raw);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, line = blockIdx.y;
  float* values = reinterpret_cast<float*>(raw + sizeof(Shared));
  const Held held = {reinterpret_cast<float4*>(values + warp * args.stretch) + lane, args.stretch / ROW_OF_WARP};
  Row<Held> row = {shared, held, cluster_rank(), cluster_size()};
  const int me = row.rank * WARPS + warp, begin = me * args.stretch;
  const T* logits = static_cast<const T*>(args.logits) + line * args.stride;
  float largest = -INFINITE, least = INFINITE;
  load(held, logits, begin, args.size, largest, least);
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
    const int token = row.first_beyond(kept, goal, begin);
    if (lane == 0) args.tokens[line] = min(token, args.size - 1);
  }
  cluster_sync();  // nobody leaves while others read its notes
}

template <typename T>
int launch_sample(const Arguments& args, int rows, int ranks, cudaStream_t stream) {
  const int bytes = sizeof(Shared) + WARPS * args.stretch * sizeof(float);
  const cudaError_t error = raise_shared_memory<sample_row<T>>(sizeof(Shared) + MAX_SLICE * sizeof(float));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = ranks;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(ranks, rows);
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, sample_row<T>, args);
}

}  // namespace
}  // namespace gantline

// `type` of the logits 0: bfloat16, 1: float16, 2: float32. logits [rows, size] with `stride` elements between rows; uniforms, temperatures,
// top_ps and min_ps float32 [rows], top_ks int32 [rows], tokens int64 [rows]; the limits may be null. rows at most 65535, size at most
// 409600. Returns a cudaError_t.
GANTLINE_EXPORT int gantline_sample_hopper(int type, const void* logits, long long stride, const void* uniforms, const void* temperatures, const void* top_ks,
                                           const void* top_ps, const void* min_ps, void* tokens, int rows, int size, void* stream) {
  using namespace gantline;
  const int ranks = size <= 4096 ? 1 : size <= 8192 ? 2 : size <= 16384 ? 4 : 8, share = ranks * WARPS * ROW_OF_WARP;
  const int stretch = (size + share - 1) / share * ROW_OF_WARP;
  if (size < 1 || rows < 1 || rows > 65535 || stretch * WARPS > MAX_SLICE) return cudaErrorInvalidValue;
  const Arguments args = {logits,
                          stride,
                          static_cast<const float*>(uniforms),
                          static_cast<const float*>(temperatures),
                          static_cast<const int*>(top_ks),
                          static_cast<const float*>(top_ps),
                          static_cast<const float*>(min_ps),
                          static_cast<long long*>(tokens),
                          size,
                          stretch};
  const auto on = static_cast<cudaStream_t>(stream);
  if (type == 0) return launch_sample<__nv_bfloat16>(args, rows, ranks, on);
  return type == 1 ? launch_sample<__half>(args, rows, ranks, on) : launch_sample<float>(args, rows, ranks, on);
}
