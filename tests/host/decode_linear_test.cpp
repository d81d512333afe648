// Runs the decode linear's plan, index arithmetic, pipeline and epilogues on a CPU, against a plain triple loop.
//
// Copies, matrix instructions and barriers are stood in for by what PTX says of them: a group of copies lands as late as the
// wait allows, or at once; a matrix load gives lane 4 i + j elements 2 j, 2 j + 1 of row i. What only a GPU can show, races
// and missing barriers, is not here. Inputs are small integers, so every sum is exact and must be equal.
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <set>
#include <vector>

namespace tinylora {
inline float to_float(float x) { return x; }
template <class E>
E from_float(float x) {
  return x;
}
}  // namespace tinylora

#include "decode_tile.h"

using namespace tinylora;

#define CHECK(condition, ...)                                  \
  do {                                                         \
    if (condition) break;                                      \
    std::printf("line %d: %s: ", __LINE__, #condition);        \
    std::printf(__VA_ARGS__), std::printf("\n"), std::exit(1); \
  } while (false)

static unsigned state = 1;
static int draw(int below) { return static_cast<int>((state = state * 1664525u + 1013904223u) >> 8) % below; }

// A tensor that ends where its last element does, so that AddressSanitizer sees a read past it; pads hold 1e9.
static std::vector<float> integers(int rows, int columns, int stride) {
  std::vector<float> x(rows ? static_cast<size_t>(rows - 1) * stride + columns : 0, 1e9f);
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) x[static_cast<size_t>(i) * stride + j] = draw(5) - 2;
  return x;
}

struct Case {
  Shape s;
  int segments, adapters;
  bool bias, residual;
};

struct Data {
  int half;
  std::vector<float> x, w, a, bt, bias, residual, m, y, partial, shrunk;
  std::vector<int64_t> adapter;
  Problem<float> p{};

  Data(const Case& c, int splits) : half(c.s.swiglu ? c.s.n / 2 : c.s.n) {
    const Shape& s = c.s;
    const int stride = s.k + 24, wide = s.n + 5;
    x = integers(s.rows, s.k, stride), w = integers(s.n, s.k, stride), a = integers(s.rank, s.k, stride);
    bt = integers(s.rank, s.n, wide);
    for (int i = 0; i < s.rank; ++i)  // B is zero outside of a segment's own rows of W
      for (int n = 0; n < s.n; ++n)
        if (n * c.segments / s.n != i / s.r) bt[i * wide + n] = 0;
    bias = integers(1, s.n, s.n), residual = integers(s.rows, half, wide);
    m = integers(std::abs(c.adapters) + 1, s.rank * s.r, s.rank * s.r);
    for (int i = 0; i < s.rows; ++i) adapter.push_back((i * 7 + 1) % (c.adapters + 1));
    y.assign(static_cast<size_t>(s.rows) * half, NAN);
    partial.assign(static_cast<size_t>(splits) * s.rows * s.n, NAN);
    shrunk.assign(static_cast<size_t>(splits) * s.rows * kRank, NAN);
    p = {s,
         splits,
         x.data(),
         w.data(),
         a.data(),
         bt.data(),
         c.bias ? bias.data() : nullptr,
         c.residual ? residual.data() : nullptr,
         m.data(),
         c.adapters ? adapter.data() : nullptr,
         y.data(),
         partial.data(),
         shrunk.data(),
         stride,
         stride,
         stride,
         wide,
         wide};
  }
};

// y of the formula, in fp64.
static double exact(const Problem<float>& p, int row, int n) {
  const Shape& s = p.shape;
  double y = p.bias ? p.bias[n] : 0;
  for (int k = 0; k < s.k; ++k) y += double(p.x[row * p.ldx + k]) * p.weight[n * p.ldw + k];
  const float* m = p.m + (p.adapter ? p.adapter[row] : 0) * s.rank * s.r;
  for (int j = 0; j < s.rank; ++j) {
    double t = 0;
    for (int k = 0; k < s.k; ++k) t += double(p.x[row * p.ldx + k]) * p.a[j * p.lda + k];
    for (int i = j / s.r * s.r; i < j / s.r * s.r + s.r; ++i) y += m[i * s.r + j % s.r] * t * p.bt[i * p.ldb + n];
  }
  return y;
}

// All threads of a block, one phase after another.
template <int NT, int MT>
struct Block {
  const Problem<float>& p;
  int tile;
  bool late;  // copies land when they are waited for; otherwise at once
  std::vector<float> shared = std::vector<float>(kStages * stage_rows(MT, NT) * kBlockK, NAN);
  std::vector<std::function<void()>> open = {};
  std::deque<std::vector<std::function<void()>>> groups = {};
  float acc[kThreads][MT][NT][4] = {}, t[kThreads][NT][4] = {};

  float* chunk(int stage, int i) {
    CHECK(0 <= i && i < stage_rows(MT, NT) * kChunks, "chunk %d", i);
    return &shared[(stage * stage_rows(MT, NT) * kChunks + i) * kChunk];
  }

  void copy(int stage, int block) {
    CHECK(0 <= stage && stage < kStages, "stage %d", stage);
    for (int thread = 0; thread < kThreads; ++thread)
      copy_block<NT, MT>(p, tile, block, thread, [&](int i, const float* source, int elements) {
        float* to = chunk(stage, i);
        auto land = [=] {
          for (int e = 0; e < kChunk; ++e) to[e] = e < elements ? source[e] : 0;
        };
        for (int e = 0; late && e < kChunk; ++e) to[e] = NAN;  // on its way: neither the old nor the new
        late ? open.push_back(land) : land();
      });
  }
  void commit() { groups.push_back(std::move(open)), open.clear(); }
  template <int N>
  void wait() {
    for (; groups.size() > N; groups.pop_front())
      for (auto& land : groups.front()) land();
  }
  void sync() {}

  // Matrix i of a load: the rows that lanes 8 i to 8 i + 7 point at.
  void load(int stage, std::function<int(int)> address, int matrices, float (*to)[32][2]) {
    for (int i = 0; i < matrices; ++i) {
      std::set<int> banks;
      for (int lane = 0; lane < 32; ++lane) {
        const int from = address(8 * i + lane / 4);
        banks.insert(from % 8);
        for (int e = 0; e < 2; ++e) to[i][lane][e] = chunk(stage, from)[lane % 4 * 2 + e];
      }
      CHECK(banks.size() == 8, "bank conflict");
    }
  }

  // D (16 x 8) += A (16 x 16) B (16 x 8), with the fragments of mma.m16n8k16: a0, a1: rows 0-7, 8-15 of k 0-7; a2, a3 of k
  // 8-15.
  static void multiply_add(float (*d)[4], int stride, float (*a)[32][2], float (*b)[32][2]) {
    for (int lane = 0; lane < 32; ++lane)
      for (int c = 0; c < 4; ++c) {
        const int i = lane / 4, j = lane % 4 * 2 + c % 2;
        for (int k = 0; k < 16; ++k)
          d[lane * stride][c] += a[k / 8 * 2 + c / 2][i * 4 + k % 8 / 2][k % 2] * b[k / 8][j * 4 + k % 8 / 2][k % 2];
      }
  }

  void multiply(int stage) {
    for (int warp = 0; warp < kWarps; ++warp)
      for (int step = 0; step < kBlockK / 16; ++step) {
        float a[4][32][2], b[NT + NT % 2][2][32][2];
        for (int nt = 0; nt < NT; nt += 2)
          load(stage, [&](int lane) { return n_chunk(lane, x_begin(MT) + 8 * nt, step); }, NT == 1 ? 2 : 4, b[nt]);
        auto tile_of = [&](int row, float (*d)[4], int stride) {
          load(stage, [&](int lane) { return m_chunk(lane, row, step); }, 4, a);
          for (int nt = 0; nt < NT; ++nt) multiply_add(d + nt, stride, a, b[nt]);
        };
        for (int mt = 0; mt < MT; ++mt) tile_of((warp * MT + mt) * 16, acc[32 * warp][mt], MT * NT);
        if (p.shape.rank && shrink_warp(step) == warp) tile_of(a_begin(MT), t[32 * warp], NT);
      }
  }
};

template <int NT, int MT>
static void run_blocks(const Problem<float>& p, const Plan& plan, bool late) {
  std::vector<float> put(kWarps * kRank * 8 * NT), z(kRank * 8 * NT);
  CHECK((put.size() + z.size()) * 4 <= size_t(shared_bytes(MT, NT)), "t and z do not fit where the stages were");
  for (int split = 0; split < plan.splits; ++split)
    for (int tile = 0; tile < plan.tiles; ++tile) {
      Block<NT, MT> block{p, tile, late};
      run_pipeline(block, split_begin(p.shape, plan.splits, split), split_begin(p.shape, plan.splits, split + 1));
      for (int thread = 0; thread < kThreads; ++thread) put_t(put.data(), thread, block.t[thread]);
      for (int thread = 0; thread < kThreads; ++thread) mix_block<NT>(p, tile, split, thread, put.data(), z.data());
      for (int thread = 0; thread < kThreads; ++thread)
        finish_block<NT, MT>(p, tile, split, thread, block.acc[thread], z.data());
    }
  if (plan.splits == 1) return;
  for (int row = 0; row < p.shape.rows; ++row) {
    for (int i = 0; i < p.shape.rank; ++i) z[i] = combine_z(p, row, i);
    for (int column = 0; column < p.shape.n + 3; ++column) combine(p, row, column, z.data());
  }
}

using Run = void (*)(const Problem<float>&, const Plan&, bool);

static void check_case(const Case& c, const Plan& plan) {
  const Run runs[4][2] = {{run_blocks<1, 1>, run_blocks<1, 2>},
                          {run_blocks<2, 1>, run_blocks<2, 2>},
                          {run_blocks<4, 1>, run_blocks<4, 2>},
                          {run_blocks<8, 1>, run_blocks<8, 2>}};
  Data d(c, plan.splits);
  const int log = plan.nt == 1 ? 0 : plan.nt == 2 ? 1 : plan.nt == 4 ? 2 : 3;
  runs[log][plan.mt - 1](d.p, plan, state % 2);
  for (int row = 0; row < c.s.rows; ++row)
    for (int n = 0; n < d.half; ++n) {
      double want = exact(d.p, row, n), got = d.y[row * d.half + n], allowed = 0;
      if (c.s.swiglu) {
        const double up = exact(d.p, row, n + d.half);
        want = want / (1 + std::exp(-want)) * up;
        allowed = 4e-7 * std::fabs(want) + 1e-30;
      } else if (c.residual) {
        want += d.residual[row * d.p.ldr + n];
      }
      CHECK(std::fabs(got - want) <= allowed,
            "rows %d n %d k %d rank %d r %d swiglu %d splits %d nt %d mt %d: y[%d][%d] %g not %g", c.s.rows, c.s.n, c.s.k,
            c.s.rank, c.s.r, c.s.swiglu, plan.splits, plan.nt, plan.mt, row, n, got, want);
    }
}

// A row's bits do not depend on the tile, nor on the rows beside it: values that do not sum exactly, 1 row and 64.
static void check_bits() {
  for (int splits : {1, 3})
    for (bool swiglu : {false, true}) {
      std::vector<std::vector<float>> found;
      for (int rows : {1, 64}) {
        Data d({{rows, 130, 400, 4, 2, swiglu}, 2, 1, true, false}, splits);
        for (auto* x : {&d.x, &d.w, &d.a, &d.bt, &d.bias, &d.m})
          for (size_t i = 0; i < x->size(); ++i) (*x)[i] = (i * 7919 % 1000) / 997.0f - 0.5f;
        rows == 1 ? run_blocks<1, 1>(d.p, {1, 1, 3, splits}, true) : run_blocks<8, 2>(d.p, {8, 2, 2, splits}, false);
        found.emplace_back(d.y.begin(), d.y.begin() + d.half);
      }
      CHECK(found[0] == found[1], "one row alone and among 64 differ");
    }
}

// Every tile, every epilogue, and with each of them the ranks, segments, adapters and ends of N, K and T in turn.
static int check_classes() {
  int count = 0;
  const int rows[4][3] = {{1, 5, 8}, {9, 13, 16}, {17, 30, 32}, {33, 57, 64}};
  const int ranks[6][2] = {{2, 1}, {1, 1}, {2, 3}, {4, 2}, {1, 0}, {8, 2}};  // r, segments
  const int ks[6] = {64, 200, 8, 384, 333, 577};
  for (int log = 0; log < 4; ++log)
    for (int mt = 1; mt <= 2; ++mt)
      for (int epilogue = 0; epilogue < 4; ++epilogue)
        for (int splits : {1, 2, 3, 5}) {
          const int* rank = ranks[count % 6];
          const int k = ks[count / 2 % 6], n = (epilogue == 3 ? 2 : 1) * (25 + 23 * (count % 5)),
                    shape_rows = rows[log][count % 3];
          Case c{{shape_rows, n, k, rank[0] * rank[1], rank[0], epilogue == 3},
                 rank[1] ? rank[1] : 1,
                 count % 2 * 2,
                 epilogue == 1,
                 epilogue == 2};
          Plan plan{1 << log, mt, ceil_div(n, 64 * mt), splits};
          CHECK(row_tiles(shape_rows) == plan.nt, "row_tiles(%d) = %d", shape_rows, row_tiles(shape_rows));
          if (plan.splits > k_blocks(c.s)) plan.splits = k_blocks(c.s);
          check_case(c, plan), ++count;
        }
  return count;
}

// Chunks of a row go to 8 banks and the copies of a stage to places of their own, all of them.
static void check_swizzle() {
  std::set<int> places;
  for (int row = 0; row < stage_rows(2, 8); ++row)
    for (int c = 0; c < kChunks; ++c) {
      CHECK(swizzle(row, c) / kChunks == row, "row %d", row);
      places.insert(swizzle(row, c));
    }
  CHECK(places.size() == size_t(stage_rows(2, 8) * kChunks), "%zu places", places.size());
  CHECK(*places.rbegin() == stage_rows(2, 8) * kChunks - 1, "a place beyond the stage");
}

// Splits cover K once, in order, and differ by at most one block; the sum over them runs from the first to the last.
static void check_splits() {
  for (int k = 1; k < 3000; k += 37)
    for (int splits = 1; splits <= kMaxSplits && splits <= ceil_div(k, kBlockK); ++splits) {
      const Shape s{1, 1, k, 0, 1, false};
      int end = 0;
      for (int i = 0; i < splits; ++i) {
        const int size = split_begin(s, splits, i + 1) - split_begin(s, splits, i);
        CHECK(split_begin(s, splits, i) == end, "k %d split %d of %d", k, i, splits);
        CHECK(size >= 1 && size >= k_blocks(s) / splits && size <= ceil_div(k_blocks(s), splits), "size %d", size);
        end = split_begin(s, splits, i + 1);
      }
      CHECK(end * kBlockK >= k && (end - 1) * kBlockK < k, "k %d ends at block %d", k, end);
    }
  const float values[4] = {1e8f, 1.0f, -1e8f, 1.0f};
  CHECK(sum_splits(values, 4, 1) == 1.0f, "%g: not in order", sum_splits(values, 4, 1));
}

// The planner on A100, H100, B200 and a small card, at real layers and odd ones: legal, and better than what it passed over.
static int check_planner() {
  const Device devices[] = {
      {108, 167936, 166912, 2039}, {132, 233472, 232448, 3350}, {148, 233472, 232448, 8000}, {40, 102400, 101376, 300}};
  const int layers[][3] = {{1152, 896, 0},   {896, 896, 0},   {9728, 896, 1},  {896, 4864, 0},  {2048, 1536, 0},
                           {17920, 1536, 1}, {1536, 8960, 0}, {4608, 3584, 0}, {3584, 3584, 0}, {37888, 3584, 1},
                           {3584, 18944, 0}, {40, 8, 0},      {1, 1, 0}};
  std::set<int> classes;
  for (const Device& d : devices)
    for (const auto& layer : layers)
      for (int rows : {1, 2, 7, 8, 9, 16, 17, 27, 32, 33, 63, 64}) {
        const Shape s{rows, layer[0], layer[1], 2, 2, layer[2] != 0};
        Plan p{};
        CHECK(make_plan(s, d, &p), "no plan");
        CHECK(shared_bytes(p.mt, p.nt) <= d.shared_per_block, "%d bytes", shared_bytes(p.mt, p.nt));
        CHECK(8 * p.nt >= rows && (p.nt == 1 || 4 * p.nt < rows), "rows %d in %d tiles", rows, p.nt);
        CHECK(p.tiles * 64 * p.mt >= s.n && (p.tiles - 1) * 64 * p.mt < s.n, "n %d in %d tiles of %d", s.n, p.tiles, 64 * p.mt);
        CHECK(1 <= p.splits && p.splits <= k_blocks(s), "%d splits", p.splits);
        Plan one{}, other{p.nt, 3 - p.mt, ceil_div(s.n, 64 * (3 - p.mt)), p.splits};
        make_plan({1, s.n, s.k, 2, 2, s.swiglu}, d, &one);
        CHECK(p.splits == one.splits, "%d splits for %d rows, %d for one", p.splits, rows, one.splits);
        CHECK(shared_bytes(other.mt, p.nt) > d.shared_per_block || plan_ns(s, d, p) <= plan_ns(s, d, other), "the slower tile");
        // No plan beats the memory, and a plan with work for everybody comes near it.
        const double least = 2.0 * s.n * s.k / d.bytes_per_ns;
        CHECK(plan_ns(s, d, p) > least, "%g ns, under %g", plan_ns(s, d, p), least);
        if (2.0 * s.n * s.k > 1e8 && rows <= 16)
          CHECK(plan_ns(s, d, p) < 1.2 * least + 3000, "%g ns of %g", plan_ns(s, d, p), least);
        classes.insert(p.nt * 100 + p.mt * 10 + (p.splits > 1));
        if (d.processors == 132 && (rows == 1 || rows == 16 || rows == 64) && s.k >= 896)
          std::printf("H100, %2d rows, %5d x %5d: %3d rows of W, %3d tiles, %2d splits, %.1f us, %.0f %% of bandwidth\n", rows,
                      s.n, s.k, 64 * p.mt, p.tiles, p.splits, plan_ns(s, d, p) / 1e3, 100 * least / plan_ns(s, d, p));
      }
  // Many tiles need no splits, few do, and a tall tile does not fit everywhere.
  Plan p{};
  make_plan({8, 37888, 3584, 2, 2, true}, devices[1], &p);
  CHECK(p.splits == 1, "gate and up in %d splits", p.splits);
  make_plan({8, 896, 4864, 2, 2, false}, devices[1], &p);
  CHECK(p.splits > 4, "a small down in %d splits", p.splits);
  make_plan({64, 37888, 3584, 2, 2, true}, devices[3], &p);
  CHECK(p.mt == 1, "%d bytes of shared memory", shared_bytes(2, 8));
  CHECK(!make_plan({64, 64, 64, 0, 1, false}, {1, 1000, 1000, 1}, &p), "a plan for no shared memory");
  return classes.size();
}

int main(int, [[maybe_unused]] char** argv) {
#ifdef TL_FAULTS
  fault = std::atoi(argv[1]);  // tests/test_csrc.py has put faults into the headers, none of which is number 0
#endif
  check_swizzle();
  check_splits();
  check_bits();
  const int classes = check_planner();
  const int cases = check_classes();
  std::printf("%d classes of plans, %d cases, all exact\n", classes, cases);
}
