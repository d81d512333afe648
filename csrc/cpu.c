/* The kernels of tinylora/kernels on a CPU, in fp32: what those of Triton are on a GPU. The formulas stand there.

Rows are independent and every sum runs in an order that depends on the row alone, eight lanes at a time: a row's bits depend
neither on its batch nor on the number of threads. Widths are multiples of 8, heads of 16. An entry returns 0; REFUSED where it
does not take its arguments, and it has then touched nothing; NO_MEMORY. Compiled by kernels/library.py, with the OpenMP runtime
that PyTorch has loaded. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float v8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef int64_t l64;

#define INLINE static inline __attribute__((always_inline))
#define ROWS 4 /* that share one read of a factor */
#define MOST 512 /* columns of a correction, as kernels/native.py knows too */
#define REFUSED 1
#define NO_MEMORY 2
#define EACH_BLOCK(T) \
    _Pragma("omp parallel for schedule(static) num_threads(threads)") for (l64 first = 0; first < T; first += ROWS)

INLINE v8 load(const float *p) { v8 x; memcpy(&x, p, sizeof x); return x; }
INLINE void store(float *p, v8 x) { memcpy(p, &x, sizeof x); }
INLINE v8 all(float x) { return (v8){x, x, x, x, x, x, x, x}; }
INLINE l64 least(l64 a, l64 b) { return a < b ? a : b; }
INLINE v8 where(i8 mask, v8 a, v8 b) { return (v8)((mask & (i8)a) | (~mask & (i8)b)); }

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (i8){__VA_ARGS__})
#endif

/* The sums of eight vectors in one, by halves; every vector's in the same order. */
INLINE v8 pairs(v8 a, v8 b) { return SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14) + SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15); }
INLINE v8 fours(v8 a, v8 b) { return SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15); }
INLINE v8 sums(const v8 *x) {
    v8 a = fours(pairs(x[0], x[1]), pairs(x[2], x[3])), b = fours(pairs(x[4], x[5]), pairs(x[6], x[7]));
    return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}
INLINE float sum(v8 x) {
    v8 a = x + SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6);
    a += SHUFFLE(a, a, 2, 3, 0, 1, 6, 7, 4, 5);
    return a[0] + a[4];
}

/* e^x to about an ulp: x = n ln 2 + f, |f| <= ln 2 / 2, and the polynomial of Cephes' expf. Below -87 it is 0. */
INLINE v8 exp8(v8 x) {
    x = where(x > 88.0f, all(88.0f), x);
    v8 clamped = where(x < -87.0f, all(-87.0f), x);
    v8 shifted = clamped * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the sum's low bits are n */
    v8 n = shifted - 12582912.0f;
    v8 f = clamped - n * 0.693359375f - n * -2.12194440e-4f;
    v8 p = 1.9875691500e-4f * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * (f * f) + f + 1.0f;
    v8 y = (v8)((i8)p + ((i8)shifted << 23));
    return where(x < -87.0f, all(0.0f), y);
}

INLINE v8 sigmoid(v8 x) { return 1.0f / (1.0f + exp8(-x)); }

/* ---- what an entry takes --------------------------------------------------------------------------------------------

Asked once a call, before anything is touched. How large a buffer is an entry cannot see: that it holds the rows, strides and
pages that are named is the caller's word. */

#define LIMIT ((l64)1 << 30) /* of a width, a count or a stride: products of two of them stay within 64 bits */

INLINE int is_count(l64 n) { return n >= 0 && n <= LIMIT; }
INLINE int is_multiple(l64 n, l64 of) { return n > 0 && n <= LIMIT && n % of == 0; }

/* Of a single row the stride says nothing. */
INLINE int apart(l64 rows, l64 stride, l64 width) { return rows < 2 || (stride >= width && stride <= LIMIT); }
INLINE int readable(l64 rows, l64 stride, l64 width) { return !stride || apart(rows, stride, width); } /* 0: one for all */

INLINE int within(const l64 *index, l64 n, l64 end) {
    for (l64 i = 0; i < n; i++)
        if (index[i] < 0 || index[i] >= end) return 0;
    return 1;
}

INLINE int takes_heads(l64 T, l64 heads, l64 kv_heads, l64 D, l64 threads) {
    if (!is_count(T) || !is_multiple(threads, 1)) return 0;
    return is_multiple(kv_heads, 1) && is_multiple(heads, kv_heads) && is_multiple(D, 16);
}

/* ---- the correction: t = x F^T into `kept`, [M t | one | 0 ...] into the pad --------------------------------------- */

typedef struct {
    const float *factor, *m; /* (R, width); (adapters, segments, r, r) */
    const l64 *adapter;      /* (T,), or NULL */
    float *kept;             /* (T, R), or NULL */
    l64 factor_stride, kept_stride, adapters, rank, r, transposed;
} Correction;

#define CORRECTION \
    const float *factor, l64 factor_stride, const float *m, const l64 *adapter, float *kept, l64 kept_stride, \
    l64 adapters, l64 rank, l64 r, l64 transposed, l64 threads
#define THE_CORRECTION \
    const Correction c = {factor, m, adapter, kept, factor_stride, kept_stride, adapters, rank, r, transposed}

/* Rows of `width` are written at this stride, and behind each its R numbers and a tail. */
INLINE int takes_rows(l64 T, l64 width, l64 stride, l64 tail, const Correction *c, l64 threads) {
    if (!is_count(T) || !is_multiple(width, 8) || !is_count(tail) || !is_multiple(threads, 1)) return 0;
    if (!is_count(c->rank) || c->rank > MOST || !is_multiple(c->r, 1) || c->rank % c->r) return 0;
    if (stride < width + c->rank + tail || stride > LIMIT) return 0;
    if (!c->rank) return 1;
    if (!readable(c->rank, c->factor_stride, width) || (c->kept && !apart(T, c->kept_stride, c->rank))) return 0;
    return is_multiple(c->adapters, 1) && (!c->adapter || within(c->adapter, T, c->adapters));
}

/* Always four rows by two factors, the last of each repeated: a row's bits are then the same wherever it stands. */
INLINE void shrink_block(const float *x, l64 stride_x, l64 rows, l64 n, const Correction *c, float *t) {
    const float *row[ROWS];
    for (l64 i = 0; i < ROWS; i++) row[i] = x + least(i, rows - 1) * stride_x;
    for (l64 j = 0; j < c->rank; j += 2) {
        const float *f = c->factor + j * c->factor_stride, *g = j + 1 < c->rank ? f + c->factor_stride : f;
        v8 a[ROWS], b[ROWS];
        for (l64 i = 0; i < ROWS; i++) a[i] = b[i] = all(0.0f);
        for (l64 k = 0; k < n; k += 8)
            for (l64 i = 0; i < ROWS; i++) {
                a[i] += load(row[i] + k) * load(f + k);
                b[i] += load(row[i] + k) * load(g + k);
            }
        for (l64 i = 0; i < ROWS; i++) t[i * MOST + j] = sum(a[i]), t[i * MOST + j + 1] = sum(b[i]);
    }
}

/* x: the block's rows; pad: where its first row's z goes; tail: columns after the R of z, the first of which gets `one`. */
static void carry(const float *x, l64 stride_x, l64 first, l64 rows, l64 n, const Correction *c, float *pad, l64 stride_pad,
                  l64 tail, float one) {
    float t[ROWS * MOST];
    if (!c->rank) return;
    shrink_block(x, stride_x, rows, n, c, t);
    for (l64 i = 0; i < rows; i++) {
        l64 r = c->r;
        float *ti = t + i * MOST, *z = pad + i * stride_pad;
        const float *m = c->m + (c->adapter ? c->adapter[first + i] : 0) * c->rank * r;
        if (c->kept) memcpy(c->kept + (first + i) * c->kept_stride, ti, c->rank * sizeof(float));
        for (l64 g = 0; g < c->rank; g += r, m += r * r)
            for (l64 a = 0; a < r; a++) {
                float total = 0;
                for (l64 b = 0; b < r; b++) total += (c->transposed ? m[b * r + a] : m[a * r + b]) * ti[g + b];
                z[g + a] = total;
            }
        for (l64 k = 0; k < tail; k++) z[c->rank + k] = k ? 0.0f : one;
    }
}

int shrink(l64 T, l64 width, const float *x, l64 stride_x, float *z, CORRECTION) {
    THE_CORRECTION;
    if (!takes_rows(T, width, LIMIT, 0, &c, threads) || !readable(T, stride_x, width)) return REFUSED;
    EACH_BLOCK(T) {
        l64 rows = least(ROWS, T - first);
        carry(x + first * stride_x, stride_x, first, rows, width, &c, z + first * rank, rank, 0, 0);
    }
    return 0;
}

/* ---- add_norm ------------------------------------------------------------------------------------------------------ */

int add_norm_forward(l64 T, l64 width, float eps, const float *x, l64 stride_x, const float *y, l64 stride_y,
                     const float *z, l64 inner_rank, const float *b, l64 stride_b, const float *w, float *new, float *h,
                     l64 stride_h, l64 tail, float *rstd, CORRECTION) {
    THE_CORRECTION;
    if (!takes_rows(T, width, stride_h, tail, &c, threads) || !readable(T, stride_x, width)) return REFUSED;
    if (y && (!readable(T, stride_y, width) || !is_count(inner_rank) || !readable(inner_rank, stride_b, width))) return REFUSED;
    EACH_BLOCK(T) {
        l64 rows = least(ROWS, T - first);
        for (l64 row = first; row < first + rows; row++) {
            const float *xi = x + row * stride_x;
            float *hi = h + row * stride_h;
            v8 squares = all(0.0f);
            if (y) {
                float *to = new + row * width;
                for (l64 k = 0; k < width; k += 8) {
                    v8 s = load(xi + k) + load(y + row * stride_y + k);
                    for (l64 i = 0; i < inner_rank; i++) s += z[row * inner_rank + i] * load(b + i * stride_b + k);
                    store(to + k, s);
                    squares += s * s;
                }
                xi = to;
            } else {
                for (l64 k = 0; k < width; k += 8) squares += load(xi + k) * load(xi + k);
            }
            float scale = rstd[row] = 1.0f / sqrtf(sum(squares) / width + eps);
            for (l64 k = 0; k < width; k += 8) store(hi + k, load(xi + k) * scale * load(w + k));
        }
        float *hb = h + first * stride_h;
        carry(hb, stride_h, first, rows, width, &c, hb + width, stride_h, tail, 1.0f);
    }
    return 0;
}

int add_norm_backward(l64 T, l64 width, const float *dnew, l64 stride_dnew, const float *dh, l64 stride_dh, const float *x,
                      const float *rstd, const float *w, float *dx, l64 stride_dx, l64 tail, CORRECTION) {
    THE_CORRECTION;
    if (!takes_rows(T, width, stride_dx, tail, &c, threads) || !readable(T, stride_dh, width)) return REFUSED;
    if (dnew && !readable(T, stride_dnew, width)) return REFUSED;
    EACH_BLOCK(T) {
        l64 rows = least(ROWS, T - first);
        for (l64 row = first; row < first + rows; row++) {
            const float *xi = x + row * width, *g = dh + row * stride_dh;
            v8 products = all(0.0f);
            for (l64 k = 0; k < width; k += 8) products += load(g + k) * load(w + k) * load(xi + k);
            float scale = rstd[row], slope = sum(products) / width * scale * scale;
            for (l64 k = 0; k < width; k += 8) {
                v8 d = scale * (load(g + k) * load(w + k) - load(xi + k) * slope);
                store(dx + row * stride_dx + k, dnew ? d + load(dnew + row * stride_dnew + k) : d);
            }
        }
        float *d = dx + first * stride_dx;
        carry(d, stride_dx, first, rows, width, &c, d + width, stride_dx, tail, 0.0f);
    }
    return 0;
}

/* ---- swiglu -------------------------------------------------------------------------------------------------------- */

int swiglu_forward(l64 T, l64 width, const float *x, l64 stride_x, float *h, l64 stride_h, l64 tail, CORRECTION) {
    THE_CORRECTION;
    if (!takes_rows(T, width, stride_h, tail, &c, threads) || !readable(T, stride_x, 2 * width)) return REFUSED;
    EACH_BLOCK(T) {
        l64 rows = least(ROWS, T - first);
        for (l64 row = first; row < first + rows; row++) {
            const float *gate = x + row * stride_x, *up = gate + width;
            for (l64 k = 0; k < width; k += 8)
                store(h + row * stride_h + k, load(gate + k) * sigmoid(load(gate + k)) * load(up + k));
        }
        float *hb = h + first * stride_h;
        carry(hb, stride_h, first, rows, width, &c, hb + width, stride_h, tail, 1.0f);
    }
    return 0;
}

int swiglu_backward(l64 T, l64 width, const float *dh, l64 stride_dh, const float *x, l64 stride_x, float *dx,
                    l64 stride_dx, l64 tail, CORRECTION) {
    THE_CORRECTION;
    if (!is_multiple(width, 8) || !takes_rows(T, 2 * width, stride_dx, tail, &c, threads)) return REFUSED;
    if (!readable(T, stride_dh, width) || !readable(T, stride_x, 2 * width)) return REFUSED;
    EACH_BLOCK(T) {
        l64 rows = least(ROWS, T - first);
        for (l64 row = first; row < first + rows; row++) {
            const float *gate = x + row * stride_x, *up = gate + width, *d = dh + row * stride_dh;
            float *out = dx + row * stride_dx;
            for (l64 k = 0; k < width; k += 8) {
                v8 g = load(gate + k), s = sigmoid(g), di = load(d + k);
                store(out + k, di * load(up + k) * s * (1.0f + g * (1.0f - s)));
                store(out + width + k, di * g * s);
            }
        }
        float *d = dx + first * stride_dx;
        carry(d, stride_dx, first, rows, 2 * width, &c, d + 2 * width, stride_dx, tail, 0.0f);
    }
    return 0;
}

/* ---- a cache of keys and values ------------------------------------------------------------------------------------ */

typedef struct {
    const float *keys, *values; /* (pages, kv_heads, page_size, D) */
    const l64 *position;        /* (slots,): of the newest token */
    const int32_t *table;       /* (slots, most): the page of each page_size positions; NULL: slot i owns page i */
    l64 pages, most, page_size, kv_heads, D;
} Cache;

#define CACHE const l64 *position, const int32_t *table, l64 pages, l64 most, l64 page_size
#define THE_CACHE const Cache cache = {keys, values, position, table, pages, table ? most : 1, page_size, kv_heads, D}

/* Every position lies in a page that is there; `every`: and so do all before it. */
INLINE int takes_cache(const Cache *c, l64 slots, int every) {
    if (!is_count(c->pages) || !is_multiple(c->most, 1) || !is_multiple(c->page_size, 1)) return 0;
    if (!is_count(c->most * c->page_size) || !within(c->position, slots, c->most * c->page_size)) return 0;
    if (!c->table) return slots <= c->pages;
    for (l64 slot = 0; slot < slots; slot++)
        for (l64 last = c->position[slot] / c->page_size, i = every ? 0 : last; i <= last; i++) {
            l64 page = c->table[slot * c->most + i];
            if (page < 0 || page >= c->pages) return 0;
        }
    return 1;
}

/* ---- rope ---------------------------------------------------------------------------------------------------------- */

INLINE float head_rstd(const float *x, l64 D, float eps) {
    v8 squares = all(0.0f);
    for (l64 k = 0; k < D; k += 8) squares += load(x + k) * load(x + k);
    return 1.0f / sqrtf(sum(squares) / D + eps);
}

/* One head: normed where `w` is given, and turned. cos and sin: the second halves of the tables' rows. */
INLINE void turn(const float *x, const float *w, float eps, const float *cos, const float *sin, l64 D, float *out) {
    l64 half = D / 2;
    float scale = w ? head_rstd(x, D, eps) : 1.0f;
    for (l64 k = 0; k < half; k += 8) {
        v8 a = load(x + k), b = load(x + half + k), c = load(cos + k), s = load(sin + k);
        if (w) a = a * scale * load(w + k), b = b * scale * load(w + half + k);
        store(out + k, a * c - b * s);
        store(out + half + k, b * c + a * s);
    }
}

/* keys NULL: q and k go to out (T, heads + kv_heads, D). Otherwise q alone does, and k and v go into the cache. */
int rope_forward(l64 T, l64 heads, l64 kv_heads, l64 D, float eps, const float *qkv, l64 stride, const float *cos,
                 const float *sin, const float *q_norm, const float *k_norm, float *out, float *keys, float *values, CACHE,
                 l64 threads) {
    THE_CACHE;
    if (!takes_heads(T, heads, kv_heads, D, threads) || !readable(T, stride, (heads + 2 * kv_heads) * D)) return REFUSED;
    if (keys && !takes_cache(&cache, T, 0)) return REFUSED;
    EACH_BLOCK(T) for (l64 row = first; row < least(first + ROWS, T); row++) {
        const float *x = qkv + row * stride, *c = cos + row * D + D / 2, *s = sin + row * D + D / 2;
        float *q = out + row * (heads + (keys ? 0 : kv_heads)) * D;
        for (l64 h = 0; h < heads; h++) turn(x + h * D, q_norm, eps, c, s, D, q + h * D);
        l64 at = keys ? position[row] : 0, page = !keys ? 0 : table ? table[row * most + at / page_size] : row;
        for (l64 h = 0; h < kv_heads; h++) {
            l64 cell = ((page * kv_heads + h) * page_size + (table ? at % page_size : at)) * D;
            turn(x + (heads + h) * D, k_norm, eps, c, s, D, keys ? keys + cell : q + (heads + h) * D);
            if (keys) memcpy(values + cell, x + (heads + kv_heads + h) * D, D * sizeof(float));
        }
    }
    return 0;
}

INLINE void turn_back(const float *d, const float *x, const float *w, float eps, const float *cos, const float *sin, l64 D,
                      float *out) {
    l64 half = D / 2;
    for (l64 k = 0; k < half; k += 8) {
        v8 a = load(d + k), b = load(d + half + k), c = load(cos + k), s = load(sin + k);
        store(out + k, a * c + b * s);
        store(out + half + k, b * c - a * s);
    }
    if (!w) return;
    float scale = head_rstd(x, D, eps);
    v8 products = all(0.0f);
    for (l64 k = 0; k < D; k += 8) products += load(out + k) * load(w + k) * load(x + k);
    float slope = sum(products) / D * scale * scale;
    for (l64 k = 0; k < D; k += 8) store(out + k, scale * (load(out + k) * load(w + k) - load(x + k) * slope));
}

int rope_backward(l64 T, l64 heads, l64 kv_heads, l64 D, float eps, const float *dq, l64 stride_q, l64 stride_q_head,
                  const float *dk, l64 stride_k, l64 stride_k_head, const float *dv, l64 stride_v, l64 stride_v_head,
                  const float *qkv, l64 stride_x, const float *cos, const float *sin, const float *q_norm,
                  const float *k_norm, float *dx, l64 stride_dx, l64 tail, CORRECTION) {
    THE_CORRECTION;
    if (!takes_heads(T, heads, kv_heads, D, threads)) return REFUSED;
    l64 width = (heads + 2 * kv_heads) * D;
    if (!takes_rows(T, width, stride_dx, tail, &c, threads)) return REFUSED;
    if (!readable(T, stride_q, D) || !readable(T, stride_k, D) || !readable(T, stride_v, D)) return REFUSED;
    if (!readable(heads, stride_q_head, D) || !readable(kv_heads, stride_k_head, D)) return REFUSED;
    if (!readable(kv_heads, stride_v_head, D)) return REFUSED;
    if ((q_norm || k_norm) && (!qkv || !readable(T, stride_x, width))) return REFUSED;
    if (!qkv) qkv = dx, stride_x = stride_dx; /* walked along, not read */
    EACH_BLOCK(T) {
        l64 rows = least(ROWS, T - first);
        for (l64 row = first; row < first + rows; row++) {
            const float *x = qkv + row * stride_x, *c = cos + row * D + D / 2, *s = sin + row * D + D / 2;
            float *out = dx + row * stride_dx;
            for (l64 h = 0; h < heads; h++, x += D, out += D)
                turn_back(dq + row * stride_q + h * stride_q_head, x, q_norm, eps, c, s, D, out);
            for (l64 h = 0; h < kv_heads; h++, x += D, out += D)
                turn_back(dk + row * stride_k + h * stride_k_head, x, k_norm, eps, c, s, D, out);
            for (l64 h = 0; h < kv_heads; h++, out += D)
                memcpy(out, dv + row * stride_v + h * stride_v_head, D * sizeof(float));
        }
        float *d = dx + first * stride_dx;
        carry(d, stride_dx, first, rows, width, &c, d + width, stride_dx, tail, 0.0f);
    }
    return 0;
}

/* ---- attention -----------------------------------------------------------------------------------------------------

A query's keys come in runs: the pages of a slot, or a prompt and what follows it. Sums go key after key, so their bits do not
depend on how keys are cut into runs: decode and update agree to the bit. */

typedef struct {
    const float *k, *v;
    float *dk, *dv;
    l64 n, stride_k, stride_v, stride_d; /* keys, and elements from one to the next */
} Run;

/* The products of q with eight vectors, `stride` apart, of which `n` are there; the others repeat the last. */
INLINE v8 dots8(const float *q, const float *x, l64 stride, l64 n, l64 D) {
    const float *at[8];
    v8 total[8];
    for (int i = 0; i < 8; i++) at[i] = x + (i < n ? i : n - 1) * stride, total[i] = all(0.0f);
    for (l64 d = 0; d < D; d += 8)
        for (int i = 0; i < 8; i++) total[i] += load(q + d) * load(at[i] + d);
    return sums(total);
}

/* out (share, room): the products of `share` vectors with the keys or the values of the runs. Writes up to 7 beyond the
   last. */
static void products(const float *q, l64 stride_q, l64 share, l64 D, const Run *runs, l64 count, int of_keys, float *out,
                     l64 room) {
    for (l64 i = 0, n = 0; i < count; n += runs[i++].n)
        for (l64 j = 0; j < runs[i].n; j += 8) {
            l64 stride = of_keys ? runs[i].stride_k : runs[i].stride_v;
            const float *x = (of_keys ? runs[i].k : runs[i].v) + j * stride;
            for (l64 s = 0; s < share; s++)
                store(out + s * room + n + j, dots8(q + s * stride_q, x, stride, runs[i].n - j, D));
        }
}

/* p (share, room): probabilities of `share` queries over all keys of the runs, zeros up to a multiple of 8. */
static void probabilities(const float *q, l64 stride_q, l64 share, l64 D, const Run *runs, l64 count, float *p, l64 room) {
    float scale = 1.0f / sqrtf(D);
    l64 n = 0;
    for (l64 i = 0; i < count; i++) n += runs[i].n;
    products(q, stride_q, share, D, runs, count, 1, p, room);
    for (l64 s = 0; s < share; s++) {
        float *ps = p + s * room;
        v8 most = all(-INFINITY);
        for (l64 j = n; j % 8; j++) ps[j] = -INFINITY;
        for (l64 j = 0; j < n; j += 8) {
            v8 x = load(ps + j) * scale;
            store(ps + j, x);
            most = where(x > most, x, most);
        }
        float top = most[0];
        for (int i = 1; i < 8; i++) top = most[i] > top ? most[i] : top;
        v8 total = all(0.0f);
        for (l64 j = 0; j < n; j += 8) {
            v8 e = exp8(load(ps + j) - top);
            store(ps + j, e);
            total += e;
        }
        float share_of = 1.0f / sum(total);
        for (l64 j = 0; j < n; j += 8) store(ps + j, load(ps + j) * share_of);
    }
}

/* out[0 .. 8 * lanes) = sum over keys of weight times that part of v or k. */
INLINE void weighted(const float *p, const Run *runs, l64 count, int of_keys, l64 d, const int lanes, float *out) {
    v8 total[4];
    for (int i = 0; i < lanes; i++) total[i] = all(0.0f);
    for (l64 i = 0; i < count; i++) {
        const float *x = (of_keys ? runs[i].k : runs[i].v) + d;
        l64 stride = of_keys ? runs[i].stride_k : runs[i].stride_v;
        for (l64 j = 0; j < runs[i].n; j++, x += stride, p++)
            for (int l = 0; l < lanes; l++) total[l] += *p * load(x + 8 * l);
    }
    for (int i = 0; i < lanes; i++) store(out + d + 8 * i, total[i]);
}

static void weighted_sum(const float *p, const Run *runs, l64 count, int of_keys, l64 D, float *out) {
    l64 d = 0;
    for (; d + 32 <= D; d += 32) weighted(p, runs, count, of_keys, d, 4, out);
    for (; d < D; d += 16) weighted(p, runs, count, of_keys, d, 2, out);
}

static l64 room_for(l64 keys) { return least(keys, LIMIT) / 8 * 8 + 16; } /* with what `products` writes beyond */

/* The runs of a slot's pages in one kv head; returns how many. */
INLINE l64 cells(const Cache *c, l64 slot, l64 h, Run *runs) {
    l64 left = c->position[slot] + 1, count = 0, D = c->D;
    for (; left > 0; left -= c->page_size, count++) {
        l64 page = c->table ? c->table[slot * c->most + count] : slot, at = (page * c->kv_heads + h) * c->page_size * D;
        runs[count] = (Run){c->keys + at, c->values + at, 0, 0, least(left, c->page_size), D, D, 0};
    }
    return count;
}

INLINE void fetch(const float *p, l64 n) {
    for (l64 i = 0; i < n; i += 16) __builtin_prefetch(p + i);
}

/* One query a slot against its pages. The keys of one head after another are too short for the processor to see them come, so
   values are asked for before this head's keys are read, and the next head's keys too. */
int decode_attention(l64 slots, l64 heads, l64 kv_heads, l64 D, const float *q, const float *keys, const float *values,
                     CACHE, float *out, l64 threads) {
    THE_CACHE;
    if (!takes_heads(slots, heads, kv_heads, D, threads) || !takes_cache(&cache, slots, 1)) return REFUSED;
    l64 share = heads / kv_heads, room = room_for(cache.most * page_size);
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *p = malloc(share * room * sizeof(float));
        Run *runs = malloc(cache.most * sizeof(Run)), *next = malloc(cache.most * sizeof(Run));
        failed = p && runs && next ? 0 : NO_MEMORY;
#pragma omp for schedule(dynamic, 16)
        for (l64 slot = 0; slot < slots; slot++)
            for (l64 h = 0; h < kv_heads && !failed; h++) {
                l64 count = cells(&cache, slot, h, runs), last = h + 1 == kv_heads;
                for (l64 i = 0; i < count; i++) fetch(runs[i].v, runs[i].n * D);
                if (!last || slot + 1 < slots)
                    for (l64 i = cells(&cache, slot + last, last ? 0 : h + 1, next); i-- > 0;) fetch(next[i].k, next[i].n * D);
                l64 first = (slot * heads + h * share) * D;
                probabilities(q + first, D, share, D, runs, count, p, room);
                for (l64 s = 0; s < share; s++) weighted_sum(p + s * room, runs, count, 0, D, out + first + s * D);
            }
        free(p);
        free(runs);
        free(next);
    }
    return failed;
}

typedef struct {
    l64 heads, kv_heads, D, room; /* room: for the keys of any query */
    const float *q, *k, *v;
    l64 stride_q, stride_k, stride_v;
    const l64 *start, *length, *parent; /* of each sequence; parent: the one it continues, or -1 */
    const float *dout;                  /* (T, heads, D), as dq; dk and dv (T, kv_heads, D) */
    float *dq, *dk, *dv;
} Pack;

#define PACK \
    l64 T, l64 heads, l64 kv_heads, l64 D, l64 longest, const float *q, l64 stride_q, const float *k, l64 stride_k, \
    const float *v, l64 stride_v, l64 sequences, const l64 *start, const l64 *length, const l64 *parent
#define THE_PACK(dout, dq, dk, dv) \
    const Pack a = {heads, kv_heads, D, room_for(longest), q, k, v, stride_q, stride_k, stride_v, start, length, \
                    parent, dout, dq, dk, dv}

/* Every sequence lies in the pack, and none of its queries sees more than `longest` keys. */
INLINE int takes_pack(const Pack *a, l64 T, l64 longest, l64 sequences, l64 threads) {
    if (!takes_heads(T, a->heads, a->kv_heads, a->D, threads) || !is_count(longest) || !is_count(sequences)) return 0;
    if (!readable(T, a->stride_q, a->heads * a->D) || !readable(T, a->stride_k, a->kv_heads * a->D)) return 0;
    if (!readable(T, a->stride_v, a->kv_heads * a->D)) return 0;
    for (l64 i = 0; i < sequences; i++) {
        l64 n = a->length[i], parent = a->parent[i];
        if (n < 0 || n > least(T, longest) || a->start[i] < 0 || a->start[i] > T - n) return 0;
        if (parent < -1 || parent >= sequences || (parent >= 0 && a->length[parent] > longest - n)) return 0;
    }
    return 1;
}

/* The runs that the query at `place` of a sequence sees in one kv head; returns how many. */
INLINE l64 visible(const Pack *a, l64 sequence, l64 place, l64 h, Run *runs) {
    l64 from[2] = {a->parent[sequence], sequence}, count = 0;
    for (int i = 0; i < 2; i++) {
        if (from[i] < 0) continue;
        l64 row = a->start[from[i]], cell = (row * a->kv_heads + h) * a->D, n = i ? place + 1 : a->length[from[i]];
        const float *k = a->k + row * a->stride_k + h * a->D, *v = a->v + row * a->stride_v + h * a->D;
        float *dk = a->dk ? a->dk + cell : 0, *dv = a->dv ? a->dv + cell : 0;
        runs[count++] = (Run){k, v, dk, dv, n, a->stride_k, a->stride_v, a->kv_heads * a->D};
    }
    return count;
}

int packed_attention_forward(PACK, const l64 *sequence, const l64 *place, float *out, l64 threads) {
    THE_PACK(0, 0, 0, 0);
    if (!takes_pack(&a, T, longest, sequences, threads) || !within(sequence, T, sequences)) return REFUSED;
    for (l64 row = 0; row < T; row++)
        if (!within(place + row, 1, length[sequence[row]])) return REFUSED;
    l64 share = heads / kv_heads;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *p = malloc(share * a.room * sizeof(float));
        Run runs[2];
        failed = p ? 0 : NO_MEMORY;
#pragma omp for schedule(dynamic, 16)
        for (l64 row = 0; row < T; row++)
            for (l64 h = 0; h < kv_heads && !failed; h++) {
                l64 count = visible(&a, sequence[row], place[row], h, runs), head = h * share;
                probabilities(q + row * stride_q + head * D, D, share, D, runs, count, p, a.room);
                for (l64 s = 0; s < share; s++)
                    weighted_sum(p + s * a.room, runs, count, 0, D, out + (row * heads + head + s) * D);
            }
        free(p);
    }
    return failed;
}

/* p and ds: (share, room). dk and dv are added to, dq is written. */
static void backward_row(const Pack *a, l64 sequence, l64 place, l64 h, float *p, float *ds) {
    Run runs[2];
    l64 share = a->heads / a->kv_heads, D = a->D, row = a->start[sequence] + place, head = h * share;
    l64 count = visible(a, sequence, place, h, runs);
    const float *q = a->q + row * a->stride_q + head * D, *dout = a->dout + (row * a->heads + head) * D;
    float *dq = a->dq + (row * a->heads + head) * D, scale = 1.0f / sqrtf(D);
    probabilities(q, D, share, D, runs, count, p, a->room);
    l64 n = 0;
    for (l64 i = 0; i < count; i++) n += runs[i].n;
    products(dout, D, share, D, runs, count, 0, ds, a->room);
    for (l64 s = 0; s < share; s++) {
        float *dp = ds + s * a->room, *ps = p + s * a->room;
        for (l64 j = n; j % 8; j++) dp[j] = 0.0f;
        v8 total = all(0.0f);
        for (l64 j = 0; j < n; j += 8) total += load(ps + j) * load(dp + j);
        float delta = sum(total);
        for (l64 j = 0; j < n; j += 8) store(dp + j, load(ps + j) * (load(dp + j) - delta) * scale);
        weighted_sum(dp, runs, count, 1, D, dq + s * D);
    }
    n = 0;
    for (l64 i = 0; i < count; i++)
        for (l64 j = 0; j < runs[i].n; j++, n++) {
            float *dk = runs[i].dk + j * runs[i].stride_d, *dv = runs[i].dv + j * runs[i].stride_d;
            for (l64 d = 0; d < D; d += 8) {
                v8 gk = load(dk + d), gv = load(dv + d);
                for (l64 s = 0; s < share; s++) {
                    gk += ds[s * a->room + n] * load(q + s * D + d);
                    gv += p[s * a->room + n] * load(dout + s * D + d);
                }
                store(dk + d, gk);
                store(dv + d, gv);
            }
        }
}

/* A family, a whole sequence and all that continue it, is one thread's: its dk and dv add up in the order of the pack.
   `members`: the sequences by family, family f from `family[f]` to `family[f + 1]`. */
int packed_attention_backward(PACK, const float *dout, float *dq, float *dk, float *dv, const l64 *members,
                              const l64 *family, l64 families, l64 threads) {
    THE_PACK(dout, dq, dk, dv);
    if (!takes_pack(&a, T, longest, sequences, threads) || !is_count(families)) return REFUSED;
    if (!within(family, families + 1, sequences + 1) || !within(members, sequences, sequences)) return REFUSED;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *p = malloc(2 * heads / kv_heads * a.room * sizeof(float));
        failed = p ? 0 : NO_MEMORY;
#pragma omp for schedule(dynamic)
        for (l64 task = 0; task < families * kv_heads; task++)
            for (l64 i = family[task / kv_heads]; i < family[task / kv_heads + 1] && !failed; i++)
                for (l64 place = 0; place < length[members[i]]; place++)
                    backward_row(&a, members[i], place, task % kv_heads, p, p + heads / kv_heads * a.room);
        free(p);
    }
    return failed;
}
