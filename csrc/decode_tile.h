// What one thread of the decode linear copies, reads and finishes: index arithmetic, pipeline and epilogues.
//
//     t = x A^T    z = M t    y = x W^T + z B^T + bias, then + residual, or silu(gate) * up of y = [gate | up]
//
// W's rows are the m16 side of the tensor cores, x's the n8 side. All of it is plain C++ for host and device: the kernel adds
// copies, matrix instructions and barriers (decode_linear.cuh), tests/host/decode_linear_test.cpp stands in for these.
#pragma once

#include <cmath>
#include <cstdint>

#include "decode_plan.h"

namespace tinylora {

template <class E>
struct Problem {
  Shape shape;
  int splits;
  const E* x;              // (T, K), rows ldx apart
  const E* weight;         // (N, K), rows ldw apart
  const E* a;              // (R, K), rows lda apart
  const E* bt;             // (R, N), rows ldb apart: B transposed
  const E* bias;           // (N,) or null
  const E* residual;       // (T, N), rows ldr apart, or null
  const float* m;          // (adapters, segments, r, r)
  const int64_t* adapter;  // (T,) or null: adapter 0 for all
  E* y;                    // (T, N), or under SwiGLU (T, N / 2)
  float* partial;          // (splits, T, N): products over one split each
  float* shrunk;           // (splits, T, kRank): t over one split each
  int64_t ldx, ldw, lda, ldb, ldr;
};

// ---- into shared memory ---------------------------------------------------------------------------------------------------

// Where chunk c of a stage's row lies, in chunks. The eight rows that a matrix load reads at once fall on different banks.
TL_HD int swizzle(int row, int c) { return row * kChunks + (c ^ (row % kChunks)); }

// W's row in place i of a tile, or -1 beyond the end. Under SwiGLU sixteen places are eight rows of gate and their eight of
// up: the two values of an output are then in the same thread.
TL_HD int weight_row(const Shape& s, int mt, int tile, int i) {
  const int n = tile * 64 * mt + i;
  if (!s.swiglu) return n < s.n ? n : -1;
  const int column = n / 16 * 8 + n % 8, half = s.n / 2;
  return column < half ? column + (n % 16 < 8 ? 0 : half) : -1;
}

// What comes into place `row` of a stage: an address at K's beginning, or null for zeros.
template <class E>
TL_HD const E* source_row(const Problem<E>& p, int mt, int tile, int row) {
  const Shape& s = p.shape;
  if (row < a_begin(mt)) {
    const int n = weight_row(s, mt, tile, row);
    return n < 0 ? nullptr : p.weight + n * p.ldw;
  }
  if (row < x_begin(mt)) return row - a_begin(mt) < s.rank ? p.a + (row - a_begin(mt)) * p.lda : nullptr;
  return row - x_begin(mt) < s.rows ? p.x + (row - x_begin(mt)) * p.ldx : nullptr;
}

// Elements of a chunk that exist; the copy fills the others with zeros. Beside W's columns lies the pad of its buffer.
TL_HD int chunk_elements(const Shape& s, int k) {
  const int left = s.k - k;
  return left < 0 ? 0 : left < kChunk ? left : kChunk;
}

// Bring one block of K: each thread copies chunk thread % 8 of every sixteenth row. Copier: (chunk in shared memory, source,
// elements), where 0 elements are a chunk of zeros and the source is any valid address.
template <int NT, int MT, class E, class Copier>
TL_HD void copy_block(const Problem<E>& p, int tile, int block, int thread, Copier&& copy) {
  constexpr int kStep = kThreads / kChunks;
  const int c = thread % kChunks, k = block * kBlockK + c * kChunk;
  TL_UNROLL
  for (int first = 0; first < stage_rows(MT, NT); first += kStep) {
    const int row = first + thread / kChunks;
    if (first + kStep > stage_rows(MT, NT) && row >= stage_rows(MT, NT)) break;
    const E* source = source_row(p, MT, tile, row);
    const int elements = source ? chunk_elements(p.shape, k) : 0;
    copy(swizzle(row, c), elements ? source + k : p.x, elements);
  }
}

// ---- the pipeline ---------------------------------------------------------------------------------------------------------

// A ring of kStages stages. Machine: copy(stage, block) starts copies, commit() closes a group of them, wait<n>() returns when
// all but the newest n groups have landed, sync() is the block's barrier, multiply(stage) reads. A stage is overwritten one
// barrier after it was read; groups are also closed when empty, so their number alone says what has landed.
template <class Machine>
TL_HD void run_pipeline(Machine& machine, int first, int end) {
  for (int i = 0; i < kStages - 1; ++i) {
    if (first + i < end) machine.copy(i, first + i);
    machine.commit();
  }
  for (int block = first; block < end; ++block) {
    machine.template wait<kStages - 2>();
    machine.sync();
    const int next = block + kStages - 1;
    if (next < end) machine.copy((next - first) % kStages, next);
    machine.commit();
    machine.multiply((block - first) % kStages);
  }
}

// ---- out of shared memory -------------------------------------------------------------------------------------------------

// The chunk whose address a lane gives to a matrix load. Of the m16 side, four 8 x 8 matrices: rows 0-7 and 8-15 of k 0-7,
// then of k 8-15. Of the n8 side, two matrices for each eight rows: k 0-7, k 8-15. `step` counts 16 elements of K.
TL_HD int m_chunk(int lane, int row, int step) { return swizzle(row + lane % 16, 2 * step + lane / 16); }
TL_HD int n_chunk(int lane, int row, int step) { return swizzle(row + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2); }

// The warp that multiplies A's sixteen places with this step's x: one step in four each.
TL_HD int shrink_warp(int step) { return step % kWarps; }

// Where a lane's accumulator c of an m16n8 tile belongs: a place of the m16 side and a row of x.
TL_HD int acc_place(int lane, int c) { return lane / 4 + c / 2 * 8; }
TL_HD int acc_row(int lane, int c) { return lane % 4 * 2 + c % 2; }

// ---- the shrink -----------------------------------------------------------------------------------------------------------

// z[i] of one row: M is block-diagonal. t: j -> t[j].
template <class T>
TL_HD float mix(const Shape& s, const float* m, int64_t adapter, int i, T&& t) {
  const int segment = i / s.r * s.r;
  const float* row = m + adapter * s.rank * s.r + i * s.r;
  float z = 0;
  for (int j = 0; j < s.r; ++j) z += row[j] * t(segment + j);
  return z;
}

template <class E>
TL_HD int64_t adapter_of(const Problem<E>& p, int row) {
  return p.adapter ? p.adapter[row] : 0;
}

// Each warp has summed t over its own steps of K: put[warp][i][row].
template <int NT>
TL_HD void put_t(float* put, int thread, const float (&t)[NT][4]) {
  const int lane = thread % 32, warp = thread / 32;
  TL_UNROLL
  for (int nt = 0; nt < NT; ++nt) {
    TL_UNROLL
    for (int c = 0; c < 4; ++c) put[(warp * kRank + acc_place(lane, c)) * 8 * NT + 8 * nt + acc_row(lane, c)] = t[nt][c];
  }
}

// t of one row and place: the warps in their order.
template <int NT>
TL_HD float get_t(const float* put, int i, int row) {
  float t = 0;
  TL_UNROLL
  for (int warp = 0; warp < kWarps; ++warp) t += put[(warp * kRank + i) * 8 * NT + row];
  return t;
}

// Every thread takes some of (R, T): z[i][row] where this block has all of K; otherwise its part of t, for `combine`.
template <int NT, class E>
TL_HD void mix_block(const Problem<E>& p, int tile, int split, int thread, const float* put, float* z) {
  const Shape& s = p.shape;
  for (int place = thread; place < s.rank * s.rows; place += kThreads) {
    const int i = place / s.rows, row = place % s.rows;
    if (p.splits == 1) {
      z[i * 8 * NT + row] = mix(s, p.m, adapter_of(p, row), i, [&](int j) { return get_t<NT>(put, j, row); });
    } else if (tile == 0) {  // all tiles have the same
      p.shrunk[(static_cast<int64_t>(split) * s.rows + row) * kRank + i] = get_t<NT>(put, i, row);
    }
  }
}

// ---- the epilogues --------------------------------------------------------------------------------------------------------

TL_HD float silu(float x) { return x / (1.0f + expf(-x)); }

template <class E>
TL_HD float bias_of(const Problem<E>& p, int n) {
  return p.bias ? to_float(p.bias[n]) : 0.0f;
}

template <class E>
TL_HD void store(const Problem<E>& p, int row, int n, float value) {
  if (p.residual) value += to_float(p.residual[row * p.ldr + n]);
  p.y[static_cast<int64_t>(row) * p.shape.n + n] = from_float<E>(value);
}

template <class E>
TL_HD void store_swiglu(const Problem<E>& p, int row, int column, float gate, float up) {
  p.y[static_cast<int64_t>(row) * (p.shape.n / 2) + column] = from_float<E>(silu(gate) * up);
}

// A thread's accumulators, finished where this block has all of K; otherwise into `partial`. z: (R, 8 NT).
template <int NT, int MT, class E>
TL_HD void finish_block(const Problem<E>& p, int tile, int split, int thread, float (&acc)[MT][NT][4], const float* z) {
  const Shape& s = p.shape;
  const int lane = thread % 32, warp = thread / 32;
  TL_UNROLL
  for (int mt = 0; mt < MT; ++mt) {
    const int place = (warp * MT + mt) * 16 + acc_place(lane, 0);
    int n[2];  // W's rows of accumulators 0, 1 and of 2, 3
    TL_UNROLL
    for (int half = 0; half < 2; ++half) {
      n[half] = weight_row(s, MT, tile, place + 8 * half);
      if (n[half] < 0) continue;
      const float bias = p.splits == 1 ? bias_of(p, n[half]) : 0.0f;
      TL_UNROLL
      for (int nt = 0; nt < NT; ++nt) {
        TL_UNROLL
        for (int c = 2 * half; c < 2 * half + 2; ++c) acc[mt][nt][c] += bias;
      }
      for (int i = 0; p.splits == 1 && i < s.rank; ++i) {
        const float b = to_float(p.bt[i * p.ldb + n[half]]);
        TL_UNROLL
        for (int nt = 0; nt < NT; ++nt) {
          TL_UNROLL
          for (int c = 2 * half; c < 2 * half + 2; ++c) acc[mt][nt][c] += z[i * 8 * NT + 8 * nt + acc_row(lane, c)] * b;
        }
      }
    }
    TL_UNROLL
    for (int nt = 0; nt < NT; ++nt) {
      TL_UNROLL
      for (int c = 0; c < 4; ++c) {
        const int row = 8 * nt + acc_row(lane, c), column = n[c / 2];
        if (row >= s.rows || column < 0) continue;
        if (p.splits > 1) {
          p.partial[(static_cast<int64_t>(split) * s.rows + row) * s.n + column] = acc[mt][nt][c];
        } else if (!s.swiglu) {
          store(p, row, column, acc[mt][nt][c]);
        } else if (c < 2) {
          store_swiglu(p, row, column, acc[mt][nt][c], acc[mt][nt][c + 2]);
        }
      }
    }
  }
}

// ---- splits of K, put together --------------------------------------------------------------------------------------------

// Values of one place over all splits, `stride` apart: always from the first to the last, so that bits repeat.
TL_HD float sum_splits(const float* first, int splits, int64_t stride) {
  float sum = 0;
  for (int split = 0; split < splits; ++split) sum += first[split * stride];
  return sum;
}

template <class E>
TL_HD float combine_z(const Problem<E>& p, int row, int i) {
  const Shape& s = p.shape;
  const float* t = p.shrunk + row * kRank;
  const int64_t stride = static_cast<int64_t>(s.rows) * kRank;
  return mix(s, p.m, adapter_of(p, row), i, [&](int j) { return sum_splits(t + j, p.splits, stride); });
}

// y of one row and W's row n, unrounded. z: (R,) of this row.
template <class E>
TL_HD float combine_y(const Problem<E>& p, int row, int n, const float* z) {
  const Shape& s = p.shape;
  float y = sum_splits(p.partial + static_cast<int64_t>(row) * s.n + n, p.splits, static_cast<int64_t>(s.rows) * s.n);
  y += bias_of(p, n);
  for (int i = 0; i < s.rank; ++i) y += z[i] * to_float(p.bt[i * p.ldb + n]);
  return y;
}

// One output of the second kernel.
template <class E>
TL_HD void combine(const Problem<E>& p, int row, int column, const float* z) {
  const int columns = p.shape.swiglu ? p.shape.n / 2 : p.shape.n;
  if (column >= columns) return;
  const float y = combine_y(p, row, column, z);
  if (p.shape.swiglu) {
    store_swiglu(p, row, column, y, combine_y(p, row, column + columns, z));
  } else {
    store(p, row, column, y);
  }
}

}  // namespace tinylora
