// Linear layers for few rows (up to 16), for any GPU from compute capability 8.0 on: bound by reading the weights once.
//
// out [rows, outputs] = x [rows, inputs] weight [outputs, inputs]^T + bias, or the gated half of a feed-forward layer: gate and up of an output
// in the same pass, and their activation where sums are added. Each block, one to a multiprocessor, takes the same number of outputs, in
// passes over as many as its sums' registers hold. The inputs of a pass are dealt out to the block's warps, whose sums are added in shared
// memory in the warps' order: results do not depend on timing, and no block knows of another.
//
// A warp brings its weights in through a ring in shared memory, each lane the very 16 bytes that it multiplies: nothing but the lane's own
// copies is waited for, and while a pass ends, the next one's weights are under way; on Hopper the first ones are before the kernel ahead has
// ended. The matrix units take x as their left operand, 16 rows of it, and weights as their right one. The inner dimension may be in any order
// as long as both operands have the same, so 16 bytes of a row are two products' operands as they are.
//
// Of up to 8 rows the left operand holds two stretches of x, one in its upper and one in its lower half; the right one's 8 columns are 4
// outputs at either stretch. So a warp reads 128 bytes of a row at once, and outputs are dealt out by fours. What multiplies one stretch of
// x with weights of the other is dropped.

#include <algorithm>

#include "ampere.cuh"
#include "host.cuh"

namespace gantline {
namespace {

constexpr int WARPS = 16;
constexpr int THREADS = 32 * WARPS;
constexpr int GROUPS = 4;  // of a pass, at most
constexpr int STAGES = 2;
constexpr int STAGE_BYTES = GROUPS * 32 * sizeof(uint4);
constexpr int HALF_ROWS = 8;
constexpr int HALF_A_MULTIPROCESSOR = 115 * 1024;  // of Hopper's shared memory, and a little: a second block finds no room
constexpr int MAX_SIZE = 1 << 30;  // of inputs and outputs: places are counted in 31 bits

struct Arguments {
  const void* x;
  const void* weight;
  const void* bias;  // or null
  void* out;
  long long x_stride;
  int rows;
  int inputs;
  int outputs;
  int share;   // groups of outputs of each block
  int longer;  // of so many blocks, the first: one more
  int wide;    // out is float32
};

// TALL: more than 8 rows. GATED: a pass's groups are of gate and of up in turns. A step is what a warp takes of a pass at once: a stretch of
// inputs of each group of outputs.
template <bool TALL, bool GATED>
struct Layout {
  static constexpr int UNITS = GATED ? GROUPS / 2 : GROUPS;  // of a pass, at most: groups, or pairs of them
  static constexpr int OUTPUTS = TALL ? 8 : 4;  // of a group
  static constexpr int DEPTH = TALL ? 32 : 64;  // inputs of a step
  static constexpr int PITCH = GROUPS * OUTPUTS + 4;

  struct Shared {
    uint4 ring[WARPS][STAGES][GROUPS][32];
    float sums[WARPS][HALF_ROWS][PITCH];
  };

  // Where a lane's weights lie in a group, and its x in a step.
  static __device__ __forceinline__ int output(int lane) { return lane / 4 % OUTPUTS; }
  static __device__ __forceinline__ int depth(int lane) { return lane / 4 / OUTPUTS * 32 + lane % 4 * 8; }
};

// The left operand of a step: 16 bytes of a row of each half.
struct Operand {
  uint4 upper, lower;
};

// Asked for where it stands, whatever is waited for behind.
template <typename T>
__device__ __forceinline__ uint4 load_or_zeros(const T* row, int column, bool inside) {
  uint4 x = make_uint4(0, 0, 0, 0);
  if (inside) {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(row + column) : "memory");
  }
  return x;
}

template <typename T, bool TALL>
__device__ __forceinline__ Operand load_x(const Arguments& args, int step) {
  const int lane = threadIdx.x % 32, row = lane / 4, column = step * Layout<TALL, false>::DEPTH + lane % 4 * 8;
  const int lower_row = TALL ? row + HALF_ROWS : row, lower_column = TALL ? column : column + 32;
  const T* x = static_cast<const T*>(args.x);
  return {load_or_zeros(x + row * args.x_stride, column, row < args.rows && column < args.inputs),
          load_or_zeros(x + lower_row * args.x_stride, lower_column, lower_row < args.rows && lower_column < args.inputs)};
}

// sums += x times a step's weights, which lie in the ring. Of groups that a pass does not have, what is summed is never stored.
template <typename T>
__device__ __forceinline__ void multiply_step(float (&sums)[GROUPS][4], const Operand& x, uint32_t stage) {
  uint4 weights[GROUPS];
#pragma unroll
  for (int j = 0; j < GROUPS; ++j) weights[j] = load_shared(stage + j * 32 * sizeof(uint4));
#pragma unroll
  for (int j = 0; j < GROUPS; ++j) {
    multiply(sums[j], x.upper.x, x.lower.x, x.upper.y, x.lower.y, weights[j].x, weights[j].y, static_cast<const T*>(nullptr));
  }
#pragma unroll
  for (int j = 0; j < GROUPS; ++j) {
    multiply(sums[j], x.upper.z, x.lower.z, x.upper.w, x.lower.w, weights[j].z, weights[j].w, static_cast<const T*>(nullptr));
  }
}

// A block's units of outputs, cut into passes of nearly the same size.
template <int UNITS>
struct Share {
  int first, passes, size, longer;

  __device__ __forceinline__ explicit Share(const Arguments& args) {
    const int block = blockIdx.x, count = args.share + (block < args.longer);
    first = block * args.share + min(block, args.longer);
    passes = (count + UNITS - 1) / UNITS;
    size = count / passes;
    longer = count - size * passes;
  }
  __device__ __forceinline__ int begin(int pass) const { return first + pass * size + min(pass, longer); }
};

// Asks for a warp's weights, a step at a time: every WARPS-th of a pass, pass after pass.
template <typename T, bool TALL, bool GATED>
class Feed {
  using L = Layout<TALL, GATED>;
  using S = Share<L::UNITS>;

 public:
  __device__ __forceinline__ Feed(const Arguments& args, const S& share, int steps, uint32_t ring)
      : args_(args), share_(share), steps_(steps), ring_(ring), policy_(evict_first()), step_(warp()), pass_(warp() < steps ? 0 : share.passes) {
    begin_pass();
  }

  // The next step into a stage; nothing past the last one.
  __device__ __forceinline__ void ask(int stage) {
    if (pass_ < share_.passes) {
      const int column = step_ * L::DEPTH + L::depth(threadIdx.x % 32);
      const bool inside = column < args_.inputs;
      const T* source = inside ? row_ + column : row_;
      const uint32_t target = ring_ + stage * STAGE_BYTES;
#pragma unroll
      for (int j = 0; j < GROUPS; ++j) {
        const int output = (GATED ? j / 2 : j) * L::OUTPUTS;
        if (output < outputs_) {
          const long long row = GATED && j % 2 ? args_.outputs + output : output;
          copy_16_once_or_zeros(target + j * 32 * sizeof(uint4), source + row * args_.inputs, inside, policy_);
        }
      }
      step_ += WARPS;
      if (step_ >= steps_) step_ = warp(), ++pass_, begin_pass();
    }
    copies_commit();
  }

 private:
  static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }

  __device__ __forceinline__ void begin_pass() {
    if (pass_ >= share_.passes) return;
    const int output = share_.begin(pass_) * L::OUTPUTS + L::output(threadIdx.x % 32);
    row_ = static_cast<const T*>(args_.weight) + static_cast<long long>(output) * args_.inputs;
    outputs_ = min(share_.begin(pass_ + 1) * L::OUTPUTS, args_.outputs) - output;
  }

  const Arguments& args_;
  const S& share_;
  const int steps_;
  const uint32_t ring_;
  const uint64_t policy_;
  int step_, pass_;
  const T* row_;  // of the lane's output in the first group
  int outputs_;   // from there to the pass's end
};

__device__ __forceinline__ float activated(float gate) { return __fdividef(gate, 1.f + __expf(-gate)); }

// The sums of all warps, added and stored: `units` from the output `first` on.
template <typename T, bool TALL, bool GATED>
__device__ __forceinline__ void store(const float (&sums)[GROUPS][4], typename Layout<TALL, GATED>::Shared& shared, const Arguments& args, int first, int units) {
  using L = Layout<TALL, GATED>;
  const T* bias = static_cast<const T*>(args.bias);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < (TALL ? 2 : 1); ++half) {
    __syncthreads();  // what was left there before has been read
#pragma unroll
    for (int j = 0; j < GROUPS; ++j) {
      if (j >= (GATED ? 2 * units : units)) continue;
      float2 pair = half ? make_float2(sums[j][2], sums[j][3]) : make_float2(sums[j][0], sums[j][1]);
      if (!TALL) {  // columns 0 to 3 are the upper stretch's, 4 to 7 the lower one's
        if (lane % 4 >= 2) pair = make_float2(sums[j][2], sums[j][3]);
        pair.x += __shfl_xor_sync(~0u, pair.x, 2);
        pair.y += __shfl_xor_sync(~0u, pair.y, 2);
      }
      const int column = lane % 4 * 2;
      if (column < L::OUTPUTS) *reinterpret_cast<float2*>(&shared.sums[warp][lane / 4][j * L::OUTPUTS + column]) = pair;
    }
    __syncthreads();
    const int row = half * HALF_ROWS + warp;
    if (warp >= HALF_ROWS || row >= args.rows) continue;
    for (int i = lane; i < units * L::OUTPUTS && first + i < args.outputs; i += 32) {
      const int column = GATED ? i + i / L::OUTPUTS * L::OUTPUTS : i;
      float sum = 0.f, up = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        sum += shared.sums[w][warp][column];
        if (GATED) up += shared.sums[w][warp][column + L::OUTPUTS];
      }
      if (bias) sum += static_cast<float>(bias[first + i]);
      if (GATED) {
        if (bias) up += static_cast<float>(bias[args.outputs + first + i]);
        sum = activated(sum) * up;
      }
      const long long place = static_cast<long long>(row) * args.outputs + first + i;
      if (args.wide) {
        static_cast<float*>(args.out)[place] = sum;
      } else {
        static_cast<T*>(args.out)[place] = static_cast<T>(sum);
      }
    }
  }
}

template <typename T, bool TALL, bool GATED>
__global__ __launch_bounds__(THREADS) void linear_few_rows(const Arguments args) {
  using L = Layout<TALL, GATED>;
  extern __shared__ uint4 raw[];
  auto& shared = *reinterpret_cast<typename L::Shared*>(raw);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int steps = (args.inputs + L::DEPTH - 1) / L::DEPTH;
  const Share<L::UNITS> share(args);
  const uint32_t ring = shared_address(&shared.ring[warp][0][0][lane]);
  let_later_kernels_start();
  Feed<T, TALL, GATED> feed(args, share, steps, ring);
  for (int stage = 0; stage < STAGES; ++stage) feed.ask(stage);
  wait_for_earlier_kernels();
  Operand next = load_x<T, TALL>(args, warp);
  int stage = 0;
  for (int pass = 0; pass < share.passes; ++pass) {
    const int begin = share.begin(pass), units = share.begin(pass + 1) - begin;
    float sums[GROUPS][4] = {};
    for (int step = warp; step < steps; step += WARPS) {
      const Operand x = next;
      next = load_x<T, TALL>(args, step + WARPS < steps ? step + WARPS : warp);
      copies_wait<STAGES - 1>();
      multiply_step<T>(sums, x, ring + stage * STAGE_BYTES);
      feed.ask(stage);
      stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    store<T, TALL, GATED>(sums, shared, args, begin * L::OUTPUTS, units);
  }
}

// Once for each kernel and device. What starts early takes more than half of a multiprocessor's shared memory: where two of its blocks fit,
// the next kernel's come before the small kernels between them, which then find no registers. And it asks for all there is, as these do
// (early.py): a multiprocessor that must divide its memory anew first runs empty. Code for 8.0, which a driver may have compiled for a newer
// GPU, does not wait for the kernel ahead, so it must not start early.
template <auto kernel>
cudaError_t prepare(int bytes, bool early, int* shared_bytes) {
  static int prepared[64][2] = {};
  int device = 0;
  cudaGetDevice(&device);
  int& known = prepared[device % 64][early];
  if (!known) {
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
    const int wanted = early && attributes.ptxVersion >= 90 ? HALF_A_MULTIPROCESSOR : bytes;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, std::max(wanted, attributes.maxDynamicSharedSizeBytes));
    if (error == cudaSuccess && wanted > bytes) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    }
    if (error != cudaSuccess) return error;
    known = wanted;
  }
  *shared_bytes = known;
  return cudaSuccess;
}

template <typename T, bool TALL, bool GATED>
int launch(Arguments args, int blocks, bool early, cudaStream_t stream) {
  using L = Layout<TALL, GATED>;
  constexpr int bytes = sizeof(typename L::Shared);
  static_assert(bytes <= 99 * 1024, "all that a block may have where there is least: compute capability 8.6, 8.9, 12.0");
  constexpr auto kernel = linear_few_rows<T, TALL, GATED>;
  int shared_bytes = 0;
  const cudaError_t error = prepare<kernel>(bytes, early, &shared_bytes);
  if (error != cudaSuccess) return error;
  const int groups = (args.outputs + L::OUTPUTS - 1) / L::OUTPUTS;
  blocks = std::min(blocks, groups);
  args.share = groups / blocks, args.longer = groups % blocks;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = shared_bytes > bytes ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args);
}

template <typename T>
int launch_for(const Arguments& args, bool gated, int blocks, bool early, cudaStream_t stream) {
  if (gated) return args.rows <= HALF_ROWS ? launch<T, false, true>(args, blocks, early, stream) : launch<T, true, true>(args, blocks, early, stream);
  return args.rows <= HALF_ROWS ? launch<T, false, false>(args, blocks, early, stream) : launch<T, true, false>(args, blocks, early, stream);
}

}  // namespace
}  // namespace gantline

// `type` 0: bfloat16, 1: float16, of x, weight and bias; out likewise, or float32 if `wide`. x [rows, inputs] with `x_stride` elements
// between rows, weight [outputs, inputs] contiguous; bias may be null. `gated`: weight [2 outputs, inputs] is gate, then up, and out
// silu(x gate^T) * (x up^T), each with its bias. inputs and x_stride are multiples of 8, rows at most 16, pointers of 16 bytes. `blocks`: at
// most so many; as multiprocessors, say. `early`: it may start before the kernel ahead of it ends, where that is possible. Returns a cudaError_t.
GANTLINE_EXPORT int gantline_linear_few_rows(int type, const void* x, long long x_stride, const void* weight, const void* bias, void* out, int wide, int rows,
                                             int inputs, int outputs, int gated, int blocks, int early, void* stream) {
  using namespace gantline;
  if (rows < 1 || rows > 2 * HALF_ROWS || inputs < 8 || inputs % 8 || x_stride % 8 || outputs < 1 || blocks < 1) return cudaErrorInvalidValue;
  if (inputs > MAX_SIZE || outputs > MAX_SIZE) return cudaErrorInvalidValue;
  const Arguments args = {x, weight, bias, out, x_stride, rows, inputs, outputs, 0, 0, wide};
  const auto on = static_cast<cudaStream_t>(stream);
  return type == 0 ? launch_for<__nv_bfloat16>(args, gated, blocks, early, on) : launch_for<__half>(args, gated, blocks, early, on);
}

// `function`: a CUfunction, of a kernel that runs beside the one above. Returns a CUresult.
GANTLINE_EXPORT int gantline_prefer_shared_memory(void* function) { return gantline::prefer_shared_memory(function); }
