// Linear layers for few rows (up to 64), for Hopper (sm_90a): bound by reading the weights once.
//
// out [rows, outputs] = x [rows, inputs] weight [outputs, inputs]^T + bias. A block takes 64 outputs and a part of the inputs: the copy
// engine streams its weights, and the rows of x that go with them, through a ring of stages; the matrix units take the weights as their
// left operand, so that few rows waste little. The blocks that share outputs form a cluster and add their parts through each other's
// shared memory, always in the same order, so results do not depend on timing. The grid is chosen so that all blocks run at once: what
// counts is that enough bytes are under way everywhere until the end. The first weights are fetched before the kernel waits for the one
// before it (programmatic dependent launch): they depend on nothing.

#include "host.cuh"
#include "hopper.cuh"

namespace gantline {
namespace {

constexpr int OUTPUTS = 64;  // of a block
constexpr int PANEL = 64;    // inputs of a panel
constexpr int PANELS = 1;  // of a stage; two (and fewer stages) were measured too: no difference
constexpr int CHUNK = PANELS * PANEL;
constexpr int COMPUTE_THREADS = 128;
constexpr int THREADS = COMPUTE_THREADS + 32;
constexpr int MAX_PARTS = 8;
constexpr uint64_t EVICT_FIRST = 0x12F0000000000000;  // weights are not met again before they would be evicted

struct Arguments {
  void* out;
  const void* bias;  // or null
  int rows;
  int outputs;
  int chunks;  // of all inputs
  int parts;   // blocks of a cluster
  int wide;    // out is float32
};

template <int COLUMNS>
constexpr int STAGES_FOR = COLUMNS <= 16 ? 5 : 4;

template <typename T, int COLUMNS>
struct __align__(1024) Shared {
  struct Stage {
    T weights[PANELS][OUTPUTS * PANEL];
    T x[PANELS][COLUMNS * PANEL];
  };
  union {
    Stage stage[STAGES_FOR<COLUMNS>];
    float sums[COLUMNS][OUTPUTS];
  };
  uint64_t full[STAGES_FOR<COLUMNS>], empty[STAGES_FOR<COLUMNS>];
};

__device__ __forceinline__ void copy_once_box(void* target, const CUtensorMap* map, int column, int row, uint64_t* barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(
                   shared_address(target)),
               "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "l"(EVICT_FIRST)
               : "memory");
}

__device__ __forceinline__ void wait_for_earlier_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_later_kernels_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ float load_from(const float* mine, int block) {
  uint32_t address;
  float value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(mine)), "r"(block));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

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

template <typename T, int COLUMNS>
__device__ __forceinline__ void copy_weights(const CUtensorMap* map, Shared<T, COLUMNS>& shared, int stage, int chunk, int output) {
  barrier_arrive_expect(&shared.full[stage], (OUTPUTS + COLUMNS) * CHUNK * sizeof(T));
#pragma unroll
  for (int i = 0; i < PANELS; ++i) copy_once_box(shared.stage[stage].weights[i], map, chunk * CHUNK + i * PANEL, output, &shared.full[stage]);
}

template <typename T, int COLUMNS>
__device__ __forceinline__ void copy_x(const CUtensorMap* map, Shared<T, COLUMNS>& shared, int stage, int chunk) {
#pragma unroll
  for (int i = 0; i < PANELS; ++i) copy_box(shared.stage[stage].x[i], map, chunk * CHUNK + i * PANEL, 0, &shared.full[stage]);
}

template <typename T, int COLUMNS>
__device__ void feed(const CUtensorMap* weight_map, const CUtensorMap* x_map, Shared<T, COLUMNS>& shared, int first, int last, int output) {
  constexpr int STAGES = STAGES_FOR<COLUMNS>;
  const int early = min(STAGES, last - first);
  for (int i = 0; i < early; ++i) copy_weights(weight_map, shared, i, first + i, output);
  wait_for_earlier_kernels();
  for (int i = 0; i < early; ++i) copy_x(x_map, shared, i, first + i);
  for (int chunk = first + early; chunk < last; ++chunk) {
    const int at = chunk - first, stage = at % STAGES;
    barrier_wait(&shared.empty[stage], ((at / STAGES) & 1) ^ 1);
    copy_weights(weight_map, shared, stage, chunk, output);
    copy_x(x_map, shared, stage, chunk);
  }
}

template <typename T, int COLUMNS>
__device__ void compute(Shared<T, COLUMNS>& shared, int chunks) {
  constexpr int STAGES = STAGES_FOR<COLUMNS>;
  constexpr uint32_t STEP = sizeof(typename Shared<T, COLUMNS>::Stage) / 16;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t all_weights = panel(shared.stage[0].weights[0], 16), all_x = panel(shared.stage[0].x[0], 16);
  float sums[COLUMNS / 2];
#pragma unroll
  for (int i = 0; i < COLUMNS / 2; ++i) sums[i] = 0.f;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int i = chunk % STAGES;
    barrier_wait(&shared.full[i], (chunk / STAGES) & 1);
    products_begin();
#pragma unroll
    for (int step = 0; step < CHUNK / 16; ++step) {
      const int of_weights = (step / 4 * OUTPUTS * PANEL + step % 4 * 16) * sizeof(T) / 16, of_x = (step / 4 * COLUMNS * PANEL + step % 4 * 16) * sizeof(T) / 16;
      product(sums, all_weights + i * STEP + of_weights, all_x + i * STEP + of_x, static_cast<const T*>(nullptr));
    }
    products_commit();
    products_wait<0>();
    hold(sums);
    if (lane == 0) barrier_arrive(&shared.empty[i]);
  }
  named_sync<1, COMPUTE_THREADS>();  // the stages are done with: their memory takes the sums
#pragma unroll
  for (int i = 0; i < COLUMNS / 2; ++i) {
    const int row = i / 4 * 8 + lane % 4 * 2 + i % 2, output = warp * 16 + lane / 4 + (i % 4 >= 2 ? 8 : 0);
    shared.sums[row][output] = sums[i];
  }
}

template <typename T>
__device__ __forceinline__ void add_and_store(const Arguments& args, const float (*sums)[OUTPUTS], int part, int first_output) {
  for (int i = part * COMPUTE_THREADS + threadIdx.x; i < args.rows * OUTPUTS; i += args.parts * COMPUTE_THREADS) {
    const int row = i / OUTPUTS, output = first_output + i % OUTPUTS;
    float value = 0.f;
    for (int p = 0; p < args.parts; ++p) value += load_from(&sums[row][i % OUTPUTS], p);
    if (args.bias) value += static_cast<float>(static_cast<const T*>(args.bias)[output]);
    const long long place = static_cast<long long>(row) * args.outputs + output;
    if (args.wide) {
      static_cast<float*>(args.out)[place] = value;
    } else {
      static_cast<T*>(args.out)[place] = static_cast<T>(value);
    }
  }
}

template <typename T, int COLUMNS>
__global__ __launch_bounds__(THREADS) void few_rows(const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap x_map, const Arguments args) {
  extern __shared__ unsigned char raw[];
  auto& shared = *reinterpret_cast<Shared<T, COLUMNS>*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t(1023));
  const int part = blockIdx.x, output = blockIdx.y * OUTPUTS;
  const int first = static_cast<int>(static_cast<long long>(args.chunks) * part / args.parts);
  const int last = static_cast<int>(static_cast<long long>(args.chunks) * (part + 1) / args.parts);
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES_FOR<COLUMNS>; ++i) barrier_init(&shared.full[i], 1), barrier_init(&shared.empty[i], COMPUTE_THREADS / 32);
    barrier_init_visible();
  }
  __syncthreads();
  let_later_kernels_start();
  if (threadIdx.x >= COMPUTE_THREADS) {
    if (threadIdx.x == COMPUTE_THREADS) feed<T, COLUMNS>(&weight_map, &x_map, shared, first, last, output);
    __syncwarp();
  } else {
    compute<T, COLUMNS>(shared, last - first);
  }
  cluster_sync();
  if (threadIdx.x < COMPUTE_THREADS) {
    wait_for_earlier_kernels();  // whoever writes must have waited
    add_and_store<T>(args, shared.sums, part, output);
  }
  cluster_sync();  // nobody leaves while others read its sums
}

template <typename T>
bool make_map(CUtensorMap* map, const void* matrix, int rows, int columns, long long stride, int box_rows) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {stride * sizeof(T)};
  const cuuint32_t box[2] = {PANEL, static_cast<cuuint32_t>(box_rows)};
  return encode_panels<T>(map, const_cast<void*>(matrix), sizes, strides, box);
}

template <typename T, int COLUMNS>
int launch(const void* x, long long x_stride, const void* weight, int inputs, const Arguments& args, cudaStream_t stream) {
  constexpr int bytes = sizeof(Shared<T, COLUMNS>) + 1024;
  const cudaError_t error = raise_shared_memory<few_rows<T, COLUMNS>>(bytes);
  if (error != cudaSuccess) return error;
  CUtensorMap weight_map, x_map;
  if (!make_map<T>(&weight_map, weight, args.outputs, inputs, inputs, OUTPUTS) || !make_map<T>(&x_map, x, args.rows, inputs, x_stride, COLUMNS)) {
    return cudaErrorInvalidValue;
  }
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = args.parts;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(args.parts, args.outputs / OUTPUTS);
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, few_rows<T, COLUMNS>, weight_map, x_map, args);
}

template <typename T>
int launch_for_rows(const void* x, long long x_stride, const void* weight, int inputs, const Arguments& args, cudaStream_t stream) {
  if (args.rows <= 8) return launch<T, 8>(x, x_stride, weight, inputs, args, stream);
  if (args.rows <= 16) return launch<T, 16>(x, x_stride, weight, inputs, args, stream);
  if (args.rows <= 32) return launch<T, 32>(x, x_stride, weight, inputs, args, stream);
  return launch<T, 64>(x, x_stride, weight, inputs, args, stream);
}

}  // namespace
}  // namespace gantline

// `type` 0: bfloat16, 1: float16, of x, weight and bias; out likewise, or float32 if `wide`. x [rows, inputs] with `x_stride` elements
// between rows, weight [outputs, inputs] contiguous; bias may be null. inputs and outputs are multiples of 64, rows at most 64, pointers
// and strides of 16 bytes. `parts` (1 to 8, at most inputs / 64): blocks that share outputs. Returns a cudaError_t.
GANTLINE_EXPORT int gantline_linear_hopper(int type, const void* x, long long x_stride, const void* weight, const void* bias, void* out, int wide, int rows,
                                           int inputs, int outputs, int parts, void* stream) {
  if (rows < 1 || rows > 64 || inputs % gantline::CHUNK || outputs % gantline::OUTPUTS || parts < 1 || parts > gantline::MAX_PARTS ||
      parts > inputs / gantline::CHUNK) {
    return cudaErrorInvalidValue;
  }
  const gantline::Arguments args = {out, bias, rows, outputs, inputs / gantline::CHUNK, parts, wide};
  const auto on = static_cast<cudaStream_t>(stream);
  return type == 0 ? gantline::launch_for_rows<__nv_bfloat16>(x, x_stride, weight, inputs, args, on)
                   : gantline::launch_for_rows<__half>(x, x_stride, weight, inputs, args, on);
}
