// The parts that the prefill kernel cut its tiles into, joined: the average of their means by the weight of each, in a fixed order.
#pragma once

#include "host.cuh"
#include "prefill_work.cuh"

namespace gantline {

constexpr int JOIN_WARPS = 8;
constexpr int JOIN_BLOCKS = 4;  // for each multiprocessor

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// This lane's DIM / 32 columns of one row, over `parts` parts that lie ROWS rows apart.
template <int DIM>
__device__ __forceinline__ void join_row(const float* means, const float* logs, int parts, int lane, float (&result)[DIM / 32]) {
  constexpr int COLUMNS = DIM / 32;
  static_assert(MAX_PARTS == 64, "two for each lane");
  const float log_0 = lane < parts ? logs[lane * ROWS] : -INFINITY, log_1 = lane + 32 < parts ? logs[(lane + 32) * ROWS] : -INFINITY;
  const float top = warp_max(fmaxf(log_0, log_1)), base = top == -INFINITY ? 0.f : top;
  const float weight_0 = fast_exp2(log_0 - base), weight_1 = fast_exp2(log_1 - base), total = warp_sum(weight_0 + weight_1);
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) result[i] = 0.f;
#pragma unroll 8
  for (int part = 0; part < parts; ++part) {
    const float weight = __shfl_sync(~0u, part < 32 ? weight_0 : weight_1, part % 32);
    float mean[COLUMNS];
    const float* source = means + static_cast<long long>(part) * ROWS * DIM + lane * COLUMNS;
    if constexpr (COLUMNS == 4) {
      *reinterpret_cast<float4*>(mean) = __ldcs(reinterpret_cast<const float4*>(source));
    } else {
      *reinterpret_cast<float2*>(mean) = __ldcs(reinterpret_cast<const float2*>(source));
    }
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) result[i] += weight * mean[i];
  }
  const float factor = total > 0.f ? 1.f / total : 0.f;
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) result[i] *= factor;
}

// A warp for each row. Its blocks wait while the prefill kernel's last ones work.
template <typename T, int DIM>
__global__ __launch_bounds__(JOIN_WARPS * 32, JOIN_BLOCKS) void join(const Arguments args) {
  constexpr int COLUMNS = DIM / 32;
  static_assert(COLUMNS == 2 || COLUMNS == 4, "head dimensions 64 and 128");
  wait_for_earlier_kernels();
  const Plan& plan = *known_plan(args, DIM);
  const int lane = threadIdx.x % 32;
  const int first_split = plan.parts[lane] > 1 ? plan.first_split[lane] : INT32_MAX, rows = plan.split_tiles * ROWS;
  for (int at = blockIdx.x * JOIN_WARPS + threadIdx.x / 32; at < rows; at += gridDim.x * JOIN_WARPS) {
    const int index = at / ROWS, row = at % ROWS;
    const int local = 31 - __clz(__ballot_sync(~0u, first_split <= index));
    const int rest = index - plan.first_split[local], tiles = plan.tiles[local];
    const Tile tile = whole_tile(args, plan, local, rest / tiles, rest % tiles);
    const int query = (tile.first_row + row) / args.group, head = tile.kv_head * args.group + (tile.first_row + row) % args.group;
    if (tile.slot < 0 || query >= tile.num_queries) continue;
    const long long place = static_cast<long long>(tile.slot) * ROWS + row;
    float result[COLUMNS];
    const int parts = divide_up(tile.last_keys - tile.first_keys + 1, plan.size);
    join_row<DIM>(part_means(args) + place * DIM, part_logs(args, DIM) + place, parts, lane, result);
    uint32_t packed[COLUMNS / 2];
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; ++i) packed[i] = pack(result[2 * i], result[2 * i + 1], static_cast<const T*>(nullptr));
    T* target = static_cast<T*>(args.out) + (static_cast<long long>(tile.begin + query) * args.heads + head) * DIM + lane * COLUMNS;
    if constexpr (COLUMNS == 4) {
      *reinterpret_cast<uint2*>(target) = make_uint2(packed[0], packed[1]);
    } else {
      *reinterpret_cast<uint32_t*>(target) = packed[0];
    }
  }
}

template <typename T, int DIM>
cudaError_t launch_join(const Arguments& args, int num_sms, cudaStream_t stream) {
  // A multiprocessor that must divide its memory anew first runs empty: so this asks for the same as the prefill kernel.
  const cudaError_t error = cudaFuncSetAttribute(join<T, DIM>, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(JOIN_BLOCKS * num_sms);
  config.blockDim = dim3(JOIN_WARPS * 32);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, join<T, DIM>, args);
}

}  // namespace gantline
