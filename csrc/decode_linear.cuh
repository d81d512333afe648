// The decode linear on the device: the two kernels, and which of their instances runs. Torch-free.
//
// Streams W once for 1 to 64 rows. It has been compiled and read, and its arithmetic has been checked on a host; it has never
// run on a GPU. Budget: two blocks to a processor, so 255 registers a thread and 116,000 bytes of shared memory a block (the
// registers of each instance are in tinylora/kernels/decode_linear.py), and nothing in local memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

namespace tinylora {

__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
template <class E>
__device__ __forceinline__ E from_float(float x);
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float(float x) {
  return __float2half_rn(x);
}

}  // namespace tinylora

#include "decode_tile.h"

namespace tinylora {

// 16 bytes, of which the first `bytes` exist and the others become zeros. Past L1, where nobody would read W again.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&to)[2], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n" : "=r"(to[0]), "=r"(to[1]) : "r"(from) : "memory");
}

template <class E>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  if constexpr (std::is_same_v<E, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// One thread's part of run_pipeline's machine.
template <class E, int NT, int MT>
struct Machine {
  const Problem<E>& p;
  const int tile, thread;
  const uint32_t shared;  // address of the stages
  float acc[MT][NT][4] = {};
  float t[NT][4] = {};

  __device__ __forceinline__ uint32_t address(int stage, int chunk) const {
    return shared + (stage * stage_rows(MT, NT) * kChunks + chunk) * 16;
  }

  __device__ __forceinline__ void copy(int stage, int block) {
    copy_block<NT, MT>(p, tile, block, thread, [&](int chunk, const E* source, int elements) {
      copy_async(address(stage, chunk), source, 2 * elements);
    });
  }

  __device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

  template <int N>
  __device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
  }

  __device__ __forceinline__ void sync() { __syncthreads(); }

  __device__ __forceinline__ void multiply(int stage) {
    const int lane = thread % 32, warp = thread / 32;
#pragma unroll
    for (int step = 0; step < kBlockK / 16; ++step) {
      uint32_t b[NT][2];
      if constexpr (NT == 1) {
        load_matrices(b[0], address(stage, n_chunk(lane % 16, x_begin(MT), step)));
      } else {
#pragma unroll
        for (int nt = 0; nt < NT; nt += 2) {
          uint32_t two[4];
          load_matrices(two, address(stage, n_chunk(lane, x_begin(MT) + 8 * nt, step)));
          b[nt][0] = two[0], b[nt][1] = two[1], b[nt + 1][0] = two[2], b[nt + 1][1] = two[3];
        }
      }
      uint32_t a[4];
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) {
        load_matrices(a, address(stage, m_chunk(lane, (warp * MT + mt) * 16, step)));
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) multiply_add<E>(acc[mt][nt], a, b[nt]);
      }
      if (p.shape.rank && shrink_warp(step) == warp) {
        load_matrices(a, address(stage, m_chunk(lane, a_begin(MT), step)));
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) multiply_add<E>(t[nt], a, b[nt]);
      }
    }
  }
};

static_assert(2 * shared_bytes(2, 8) <= 232448, "two blocks do not fit into Hopper's shared memory");

template <class E, int NT, int MT>
__global__ void __launch_bounds__(kThreads, 2) decode_linear(const __grid_constant__ Problem<E> p) {
  extern __shared__ __align__(128) char stages[];
  const int tile = blockIdx.x, split = blockIdx.y, thread = threadIdx.x;
  Machine<E, NT, MT> machine{p, tile, thread, static_cast<uint32_t>(__cvta_generic_to_shared(stages))};
  run_pipeline(machine, split_begin(p.shape, p.splits, split), split_begin(p.shape, p.splits, split + 1));
  float *put = reinterpret_cast<float*>(stages), *z = put + kWarps * kRank * 8 * NT;
  if (p.shape.rank) {
    __syncthreads();  // the last stage has been read
    put_t(put, thread, machine.t);
    __syncthreads();
    mix_block<NT>(p, tile, split, thread, put, z);
    __syncthreads();
  }
  finish_block<NT, MT>(p, tile, split, thread, machine.acc, z);
}

// A block finishes kThreads outputs of one row.
template <class E>
__global__ void __launch_bounds__(kThreads) decode_combine(const __grid_constant__ Problem<E> p) {
  __shared__ float z[kRank];
  const int row = blockIdx.y;
  if (threadIdx.x < p.shape.rank) z[threadIdx.x] = combine_z(p, row, threadIdx.x);
  __syncthreads();
  combine(p, row, blockIdx.x * kThreads + threadIdx.x, z);
}

template <class E, int NT, int MT>
cudaError_t launch(const Problem<E>& p, const Plan& plan, cudaStream_t stream) {
  constexpr int kShared = shared_bytes(MT, NT);
  const cudaError_t set = cudaFuncSetAttribute(decode_linear<E, NT, MT>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (set != cudaSuccess) return set;
  decode_linear<E, NT, MT><<<dim3(plan.tiles, plan.splits), kThreads, kShared, stream>>>(p);
  if (plan.splits > 1) {
    const int columns = p.shape.swiglu ? p.shape.n / 2 : p.shape.n;
    decode_combine<E><<<dim3(ceil_div(columns, kThreads), p.shape.rows), kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

template <class E>
cudaError_t run_decode_linear(const Problem<E>& p, const Plan& plan, cudaStream_t stream) {
  const bool tall = plan.mt == 2;
  switch (plan.nt) {
    case 1: return tall ? launch<E, 1, 2>(p, plan, stream) : launch<E, 1, 1>(p, plan, stream);
    case 2: return tall ? launch<E, 2, 2>(p, plan, stream) : launch<E, 2, 1>(p, plan, stream);
    case 4: return tall ? launch<E, 4, 2>(p, plan, stream) : launch<E, 4, 1>(p, plan, stream);
    default: return tall ? launch<E, 8, 2>(p, plan, stream) : launch<E, 8, 1>(p, plan, stream);
  }
}

}  // namespace tinylora
