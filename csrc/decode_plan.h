// How the decode linear cuts its work: tiles of W's rows, splits of K. Host and device, no CUDA needed.
#pragma once

#ifdef __CUDACC__
#define TL_HD __host__ __device__ __forceinline__
#else
#define TL_HD inline
#endif

#ifdef __CUDA_ARCH__
#define TL_UNROLL _Pragma("unroll")
#else
#define TL_UNROLL
#endif

namespace tinylora {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kStages = 4;   // of the pipeline: three blocks of K on their way while one is multiplied
constexpr int kBlockK = 64;  // elements of K in a stage: rows of 128 bytes, which the swizzle needs
constexpr int kChunk = 8;    // elements that one copy moves: 16 bytes
constexpr int kChunks = kBlockK / kChunk;
constexpr int kMaxRows = 64;  // of x
constexpr int kRank = 16;     // most rows of A: one more m16 tile beside W's
constexpr int kMaxSplits = 32;

struct Shape {
  int rows;     // T of x (T, K), 1 to kMaxRows
  int n;        // N of W (N, K); under SwiGLU gate's rows, then up's
  int k;        // K
  int rank;     // R of A (R, K), 0 to kRank: segments * r
  int r;        // M is (adapters, segments, r, r)
  bool swiglu;  // y (T, N / 2) = silu(gate) * up
};

struct Device {
  int processors;
  int shared_per_processor;  // bytes
  int shared_per_block;      // bytes
  double bytes_per_ns;       // of its memory
};

// A thread block multiplies 64 MT rows of W and all of A with 8 NT rows of x, over one split of K.
struct Plan {
  int nt;      // 1, 2, 4, 8
  int mt;      // 1, 2
  int tiles;   // of W's rows
  int splits;  // of K; with more than one, a second kernel sums them and finishes
};

TL_HD int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Rows of 128 bytes in a stage: W's, then A's, then x's.
TL_HD constexpr int a_begin(int mt) { return 64 * mt; }
TL_HD constexpr int x_begin(int mt) { return 64 * mt + kRank; }
TL_HD constexpr int stage_rows(int mt, int nt) { return 64 * mt + kRank + 8 * nt; }
TL_HD constexpr int shared_bytes(int mt, int nt) { return kStages * stage_rows(mt, nt) * kBlockK * 2; }

TL_HD int weight_tiles(const Shape& s, int mt) { return ceil_div(s.n, 64 * mt); }

// Splits share the blocks of K as evenly as they can: split i takes [split_begin(i), split_begin(i + 1)), never empty.
TL_HD int k_blocks(const Shape& s) { return ceil_div(s.k, kBlockK); }
TL_HD int split_begin(const Shape& s, int splits, int split) {
  return static_cast<int>(static_cast<long long>(k_blocks(s)) * split / splits);
}

inline int row_tiles(int rows) {
  int nt = 1;
  while (8 * nt < rows) nt *= 2;
  return nt;
}

// Blocks that run at once. The driver keeps 1 KB of shared memory for each.
inline int slots(const Device& d, int mt, int nt) {
  const int each = d.shared_per_processor / (shared_bytes(mt, nt) + 1024);
  return d.processors * (each > 0 ? each : 1);
}

// What a plan should take. Only the order of plans matters, so the constants are round ones.
inline double plan_ns(const Shape& s, const Device& d, const Plan& p) {
  constexpr double kLatency = 800;        // ns from asking for bytes of a busy memory to having them
  constexpr double kShare = 1.3;          // of the memory that one processor can take in, where 1 is its even share
  constexpr double kCacheShare = 0.35;    // time of a byte from L2, which is where x and A come from, to one from memory
  constexpr double kSecondLaunch = 2000;  // ns for the kernel that combines splits
  const int units = p.tiles * p.splits, wave = slots(d, p.mt, p.nt);
  const double stage = 2.0 * kBlockK * (64 * p.mt + kCacheShare * (s.rank + s.rows));
  const double unit = stage * ceil_div(k_blocks(s), p.splits);
  // Of so many units at once: bounded by the memory, by what they have on its way, and by the processors they are on.
  auto rate = [&](int at_once) {
    const double flying = at_once * stage * (kStages - 1) / kLatency, share = kShare * at_once / d.processors * d.bytes_per_ns;
    const double most = flying < share ? flying : share;
    return most < d.bytes_per_ns ? most : d.bytes_per_ns;
  };
  double ns = kLatency * ceil_div(units, wave);
  if (const int full = units / wave) ns += full * (wave * unit / rate(wave));
  if (const int rest = units % wave) ns += rest * unit / rate(rest);
  if (p.splits > 1) ns += kSecondLaunch + kCacheShare * 8.0 * p.splits * s.rows * s.n / d.bytes_per_ns;  // written and read
  return ns;
}

// The quickest plan whose stages fit into a block's shared memory; false where none does. K is split only where W's tiles do
// not fill the chip, and as is best for 16 rows, whatever their number: the order of a row's sums, and so its bits, do not
// depend on the rows that came with it.
inline bool make_plan(const Shape& s, const Device& d, Plan* best) {
  Shape middle = s;
  middle.rows = 16;
  const int nt = row_tiles(middle.rows);
  int splits = 1;
  double least = -1;
  for (int mt = 1; mt <= 2; ++mt)
    for (int i = 1, tiles = weight_tiles(s, mt); i <= kMaxSplits && i <= k_blocks(s); ++i) {
      if (i > 1 && tiles >= slots(d, mt, nt)) break;
      const double ns = plan_ns(middle, d, {nt, mt, tiles, i});
      if (least < 0 || ns < least) least = ns, splits = i;
    }
  least = -1;
  for (int mt = 1; mt <= 2; ++mt) {
    const Plan p{row_tiles(s.rows), mt, weight_tiles(s, mt), splits};
    if (shared_bytes(mt, p.nt) > d.shared_per_block) continue;
    const double ns = plan_ns(s, d, p);
    if (least < 0 || ns < least) least = ns, *best = p;
  }
  return least >= 0;
}

}  // namespace tinylora
