/* Every entry of csrc/cpu.c on shapes it takes and shapes it does not, for AddressSanitizer and UBSan.

A buffer ends where the contract's last number does. At most one number of a call is wrong: of no width that is walked in
eights, negative, beyond any limit, an index one too far. Such a call must be refused and change nothing; any other must write
all that it promises, and nothing else. */
#include <stdio.h>

#include "cpu.c"

#define BEYOND ((l64)1 << 40)
#define CHECK(condition, ...)                             \
    do {                                                  \
        if (condition) break;                             \
        printf("case %d, %s: %s: ", at, name, #condition); \
        printf(__VA_ARGS__), printf("\n"), exit(1);       \
    } while (0)

const char *__asan_default_options(void) { return "allocator_may_return_null=1:max_allocation_size_mb=1024"; }

static int at, wrong; /* the case; whether one of its numbers is wrong */
static const char *name;
static char numbers[1000];
static unsigned state;
static l64 draw(l64 below) { return (l64)((state = state * 1664525u + 1013904223u) >> 8) % below; }

/* `good`, or now and then, where none was before in this case, one of the others, which are wrong. */
static l64 maybe(const char *what, l64 good, const l64 *others, l64 n) {
    if (wrong || draw(12)) return good;
    wrong = 1;
    l64 x = others[draw(n)];
    snprintf(numbers, sizeof numbers, "%s %lld", what, (long long)x);
    return x;
}
#define MAYBE(what, good, ...) maybe(what, good, (l64[]){__VA_ARGS__}, sizeof((l64[]){__VA_ARGS__}) / sizeof(l64))

/* n as a whole number; wrong ones of any size meet in it. */
static l64 whole(double n) { return n > 1e18 ? (l64)1e18 : n < -1e18 ? -(l64)1e18 : (l64)n; }

/* ---- buffers -------------------------------------------------------------------------------------------------------- */

typedef enum { READ, WRITTEN, CHANGED } Use; /* CHANGED: some of it is written */
static struct {
    float *x, *was;
    size_t n;
    l64 rows, width, stride;
    Use use;
} buffers[40];
static void *indices[40];
static int buffer_count, index_count;

/* (rows, width) at a stride, that end with the last number. Where a number is wrong they may be none at all. */
static float *matrix(l64 rows, l64 width, l64 stride, Use use) {
    double n = rows > 0 && width > 0 ? (double)(rows - 1) * (double)stride + (double)width : 0;
    size_t size = n > 0 && n < 1e6 ? (size_t)n : 0;
    float *x = malloc(size * sizeof(float)), *was = malloc(size * sizeof(float));
    for (size_t i = 0; i < size; i++) x[i] = use == WRITTEN ? NAN : (float)(draw(2001) - 1000) / 1000;
    memcpy(was, x, size * sizeof(float));
    buffers[buffer_count].x = x, buffers[buffer_count].was = was, buffers[buffer_count].n = size;
    buffers[buffer_count].rows = rows, buffers[buffer_count].width = width, buffers[buffer_count].stride = stride;
    buffers[buffer_count++].use = use;
    return x;
}
static float *vector(double n, Use use) { return matrix(1, whole(n), 0, use); }

static void *ints(l64 n, size_t size) { return indices[index_count++] = malloc(n > 0 && n < 1000 ? n * size : 0); }

/* (n,) each below `end`; or one of them not. */
static l64 *below(const char *what, l64 n, l64 end) {
    l64 *x = ints(n, sizeof(l64)), some = n > 0 && n < 1000 ? n : 0;
    for (l64 i = 0; i < some; i++) x[i] = end > 0 ? draw(end) : 0;
    if (some) {
        l64 i = draw(some);
        x[i] = MAYBE(what, x[i], -1, end, end + 5, -BEYOND, BEYOND, INT64_MAX, INT64_MIN);
    }
    return x;
}

static void finish(int status) {
    CHECK(status == (wrong ? REFUSED : 0), "returned %d; %s", status, wrong ? numbers : "nothing is wrong");
    for (int b = 0; b < buffer_count; b++) {
        const float *x = buffers[b].x, *was = buffers[b].was;
        l64 n = (l64)buffers[b].n, width = buffers[b].width, stride = buffers[b].rows > 1 ? buffers[b].stride : n;
        Use use = wrong ? READ : buffers[b].use;
        for (l64 i = 0; i < n; i++) {
            if (use == READ || (use == WRITTEN && i % stride >= width))
                CHECK(!memcmp(x + i, was + i, sizeof(float)), "number %lld of buffer %d changed; %s", (long long)i, b, numbers);
            else
                CHECK(isfinite(x[i]), "number %lld of buffer %d is %g", (long long)i, b, x[i]);
        }
        free(buffers[b].x), free(buffers[b].was);
    }
    while (index_count) free(indices[--index_count]);
    buffer_count = 0;
}

/* ---- shapes --------------------------------------------------------------------------------------------------------- */

static l64 rows_(void) { return MAYBE("T", draw(11), -1, -BEYOND, BEYOND, INT64_MAX, INT64_MIN); }
static l64 threads_(void) { return MAYBE("threads", 1 + draw(3), 0, -1, BEYOND); }
static l64 width_(void) {
    return MAYBE("width", 8 * (1 + draw(7)), 0, -8, 1, 4, 7, 9, 12, 17, 20, 33, 36, BEYOND, INT64_MAX, INT64_MIN);
}
static l64 head_dim(void) {
    return MAYBE("D", 16 * (1 + draw(5)), 0, -16, 1, 2, 3, 8, 12, 17, 24, 33, 40, 49, 56, BEYOND, INT64_MAX, INT64_MIN);
}

/* Of rows that are read: with a gap, without, all in one place; of a single row anything. Below `least` it is wrong. */
static l64 stride_of(l64 rows, l64 width, l64 least) {
    if (rows < 2) return draw(3) - 1;
    return MAYBE("stride", draw(4) ? whole((double)width + draw(10)) : 0, whole((double)least - 1), -1, whole(-(double)width),
                 BEYOND, INT64_MAX, INT64_MIN);
}
static l64 read_stride(l64 rows, l64 width) { return stride_of(rows, width, width); }
static l64 written_stride(l64 columns) {
    return MAYBE("stride", whole((double)columns + draw(2) * 3), whole((double)columns - 1), 0, -1, BEYOND, INT64_MAX);
}

typedef struct {
    float *factor, *m, *kept;
    l64 *adapter, factor_stride, kept_stride, adapters, rank, r, transposed, threads;
} Mixing;

static Mixing mixing(l64 T, l64 width) {
    Mixing x = {.r = 1, .threads = threads_(), .transposed = draw(2)};
    if (draw(5) == 0) return x;
    x.r = 1 + draw(4);
    x.rank = draw(12) ? x.r * (1 + draw(5)) : MOST / x.r * x.r;
    x.rank = MAYBE("rank", x.rank, -1, -x.r, MOST / x.r * x.r + x.r, 3 * MOST / x.r * x.r, BEYOND, INT64_MAX, INT64_MIN);
    x.r = MAYBE("r", x.r, 0, -1, 23, MOST + 1, BEYOND, INT64_MIN);
    x.adapters = MAYBE("adapters", 1 + draw(4), 0, -1);
    x.factor_stride = read_stride(x.rank, width);
    x.factor = matrix(x.rank, width, x.factor_stride, READ);
    x.m = vector((double)x.adapters * (double)x.rank * (double)x.r, READ);
    if (draw(2)) x.adapter = below("adapter", T, x.adapters);
    if (draw(2)) {
        x.kept_stride = T < 2 ? draw(2) : written_stride(x.rank);
        x.kept = matrix(T, x.rank, x.kept_stride, WRITTEN);
    }
    return x;
}
#define MIXING(x) \
    x.factor, x.factor_stride, x.m, x.adapter, x.kept, x.kept_stride, x.adapters, x.rank, x.r, x.transposed, x.threads

/* Rows that carry a correction, and a tail with it. */
static float *carrying(l64 T, l64 width, const Mixing *c, l64 *tail, l64 *stride) {
    *tail = MAYBE("tail", c->rank ? draw(9) : 0, -1, -BEYOND, BEYOND, INT64_MAX);
    l64 columns = whole((double)width + (double)c->rank + (double)*tail);
    *stride = written_stride(columns);
    return matrix(T, columns, *stride, WRITTEN);
}

/* ---- entries -------------------------------------------------------------------------------------------------------- */

static int a_shrink(void) {
    l64 T = rows_(), width = width_(), stride = read_stride(T, width);
    Mixing c = mixing(T, width);
    return shrink(T, width, matrix(T, width, stride, READ), stride, vector((double)T * (double)c.rank, WRITTEN), MIXING(c));
}

static int an_add_norm_forward(void) {
    l64 T = rows_(), width = width_(), stride_x = read_stride(T, width), has_y = draw(3), tail, stride_h;
    l64 stride_y = 0, inner = 0, stride_b = 0;
    float *y = NULL, *z = NULL, *b = NULL, *new = NULL;
    if (has_y) {
        inner = MAYBE("inner rank", draw(4), -1, BEYOND, INT64_MIN);
        stride_y = read_stride(T, width), stride_b = read_stride(inner, width);
        y = matrix(T, width, stride_y, READ), z = vector((double)T * (double)inner, READ);
        b = matrix(inner, width, stride_b, READ), new = vector((double)T * (double)width, WRITTEN);
    }
    Mixing c = mixing(T, width);
    float *h = carrying(T, width, &c, &tail, &stride_h), *x = matrix(T, width, stride_x, READ);
    return add_norm_forward(T, width, 1e-6f, x, stride_x, y, stride_y, z, inner, b, stride_b, vector(width, READ), new, h,
                            stride_h, tail, vector(T, WRITTEN), MIXING(c));
}

static int an_add_norm_backward(void) {
    l64 T = rows_(), width = width_(), stride_dh = read_stride(T, width), tail, stride_dx, stride_dnew = 0;
    float *dnew = NULL;
    if (draw(2)) stride_dnew = read_stride(T, width), dnew = matrix(T, width, stride_dnew, READ);
    Mixing c = mixing(T, width);
    float *dx = carrying(T, width, &c, &tail, &stride_dx), *dh = matrix(T, width, stride_dh, READ);
    float *x = vector((double)T * (double)width, READ);
    return add_norm_backward(T, width, dnew, stride_dnew, dh, stride_dh, x, vector(T, READ), vector(width, READ), dx, stride_dx,
                             tail, MIXING(c));
}

static int a_swiglu_forward(void) {
    l64 T = rows_(), width = width_(), both = whole(2 * (double)width), stride_x = read_stride(T, both), tail, stride_h;
    Mixing c = mixing(T, width);
    float *h = carrying(T, width, &c, &tail, &stride_h);
    return swiglu_forward(T, width, matrix(T, both, stride_x, READ), stride_x, h, stride_h, tail, MIXING(c));
}

static int a_swiglu_backward(void) {
    l64 T = rows_(), width = width_(), both = whole(2 * (double)width), stride_x = read_stride(T, both), tail, stride_dx;
    l64 stride_dh = read_stride(T, width);
    Mixing c = mixing(T, both);
    float *dx = carrying(T, both, &c, &tail, &stride_dx), *dh = matrix(T, width, stride_dh, READ);
    return swiglu_backward(T, width, dh, stride_dh, matrix(T, both, stride_x, READ), stride_x, dx, stride_dx, tail, MIXING(c));
}

typedef struct {
    l64 kv_heads, heads, D, width; /* width: of q, k and v together */
} Shape;

static Shape shape(void) {
    l64 groups = 1 + draw(3), good = groups * (1 + draw(4)), D = head_dim();
    l64 kv_heads = MAYBE("kv_heads", groups, 0, -1, -groups, good + 1, BEYOND, INT64_MAX, INT64_MIN);
    l64 heads = MAYBE("heads", good, 0, -good, groups > 1 ? good + 1 : -1, BEYOND, INT64_MAX, INT64_MIN);
    return (Shape){kv_heads, heads, D, whole(((double)heads + 2 * (double)kv_heads) * (double)D)};
}

typedef struct {
    float *keys, *values;
    l64 *position;
    int32_t *table;
    l64 pages, most, page_size;
} Pages;

/* every: all pages of a slot are read, not the newest alone. What is in the table beyond is rubbish. */
static Pages pages(l64 T, const Shape *s, int every, Use use) {
    Pages p = {.page_size = MAYBE("page_size", 1 + draw(9), 0, -1, BEYOND, INT64_MAX, INT64_MIN)};
    l64 some = T > 0 && T < 100 ? T : 0, paged = draw(2);
    p.most = paged ? MAYBE("most", 1 + draw(4), 0, -1, BEYOND, INT64_MAX) : draw(2) * 7;
    p.pages = paged ? 1 + draw(9) : some && !draw(3) ? MAYBE("pages", T, T - 1, -1, BEYOND) : some + draw(3);
    double room = (double)(paged ? p.most : 1) * (double)p.page_size;
    p.position = below("position", T, whole(room));
    if (paged) {
        l64 cells = T > 0 && p.most > 0 && (double)T * (double)p.most < 1000 ? T * p.most : 0;
        p.table = ints(cells, sizeof(int32_t));
        for (l64 i = 0; i < cells; i++) p.table[i] = -1 - (int32_t)draw(1000);
        for (l64 slot = 0; slot < some && cells; slot++) {
            l64 last = p.page_size > 0 ? p.position[slot] / p.page_size : 0;
            if (last < 0 || last >= p.most) continue;
            for (l64 i = every ? 0 : last; i <= last; i++)
                p.table[slot * p.most + i] = (int32_t)MAYBE("page", draw(p.pages), -1, p.pages, INT32_MAX, INT32_MIN);
        }
    }
    double size = (double)p.pages * (double)s->kv_heads * (double)p.page_size * (double)s->D;
    p.keys = vector(size, use), p.values = vector(size, use);
    return p;
}

static int a_rope_forward(void) {
    l64 T = rows_();
    Shape s = shape();
    l64 stride = read_stride(T, s.width), cached = draw(2), normed = draw(2), threads = threads_();
    float *qkv = matrix(T, s.width, stride, READ), *cos = vector((double)T * (double)s.D, READ);
    float *sin = vector((double)T * (double)s.D, READ), *q_norm = normed ? vector(s.D, READ) : NULL;
    float *k_norm = normed ? vector(s.D, READ) : NULL;
    Pages p = {0};
    if (cached) p = pages(T, &s, 0, CHANGED);
    float *out = vector((double)T * ((double)s.heads + (cached ? 0 : (double)s.kv_heads)) * (double)s.D, WRITTEN);
    return rope_forward(T, s.heads, s.kv_heads, s.D, 1e-6f, qkv, stride, cos, sin, q_norm, k_norm, out, p.keys, p.values,
                        p.position, p.table, p.pages, p.most, p.page_size, threads);
}

/* Rows (T, heads, D), or (heads, T, D) with both turned. */
static float *heads_of(l64 T, l64 heads, l64 D, l64 *stride, l64 *stride_head) {
    if (draw(2)) {
        *stride_head = read_stride(heads, D);
        l64 width = whole((double)(heads - (heads > 0)) * (double)*stride_head + (double)D);
        *stride = stride_of(T, width, D);
        return matrix(T, width, *stride, READ);
    }
    *stride = read_stride(T, D);
    l64 width = whole((double)(T - (T > 0 && T < 100)) * (double)*stride + (double)D);
    *stride_head = stride_of(heads, width > 0 ? width : D, D);
    return matrix(heads, width, *stride_head, READ);
}

static int a_rope_backward(void) {
    l64 T = rows_();
    Shape s = shape();
    l64 stride_q, stride_k, stride_v, head_q, head_k, head_v, stride_x = 0, stride_dx, tail;
    float *dq = heads_of(T, s.heads, s.D, &stride_q, &head_q), *dk = heads_of(T, s.kv_heads, s.D, &stride_k, &head_k);
    float *dv = heads_of(T, s.kv_heads, s.D, &stride_v, &head_v), *cos = vector((double)T * (double)s.D, READ);
    float *sin = vector((double)T * (double)s.D, READ), *qkv = NULL, *q_norm = NULL, *k_norm = NULL;
    if (draw(2)) {
        stride_x = read_stride(T, s.width), q_norm = vector(s.D, READ), k_norm = vector(s.D, READ);
        if (MAYBE("qkv", 1, 0)) qkv = matrix(T, s.width, stride_x, READ);
    }
    Mixing c = mixing(T, s.width);
    float *dx = carrying(T, s.width, &c, &tail, &stride_dx);
    return rope_backward(T, s.heads, s.kv_heads, s.D, 1e-6f, dq, stride_q, head_q, dk, stride_k, head_k, dv, stride_v, head_v,
                         qkv, stride_x, cos, sin, q_norm, k_norm, dx, stride_dx, tail, MIXING(c));
}

static int a_decode_attention(void) {
    l64 T = rows_(), threads = threads_();
    Shape s = shape();
    Pages p = pages(T, &s, 1, READ);
    double n = (double)T * (double)s.heads * (double)s.D;
    return decode_attention(T, s.heads, s.kv_heads, s.D, vector(n, READ), p.keys, p.values, p.position, p.table, p.pages,
                            p.most, p.page_size, vector(n, WRITTEN), threads);
}

static int a_packed_attention(int backward) {
    Shape s = shape();
    l64 whole_ = 1 + draw(3), n = whole_ + draw(4), T = 0, longest = 0, threads = threads_();
    l64 *start = ints(n, 8), *length = ints(n, 8), *parent = ints(n, 8);
    for (l64 i = 0; i < n; i++) {
        start[i] = T, length[i] = draw(4) ? 1 + draw(20) : 0, parent[i] = i < whole_ ? -1 : draw(whole_);
        T += length[i];
        l64 keys = length[i] + (parent[i] < 0 ? 0 : length[parent[i]]);
        longest = keys > longest ? keys : longest;
    }
    l64 *sequence = ints(T, 8), *place = ints(T, 8), *members = ints(n, 8), *family = ints(whole_ + 1, 8), end = 0;
    for (l64 i = 0; i < n; i++)
        for (l64 j = 0; j < length[i]; j++) sequence[start[i] + j] = i, place[start[i] + j] = j;
    for (l64 f = 0; f < whole_; f++) {
        family[f] = end;
        for (l64 i = 0; i < n; i++)
            if (i == f || parent[i] == f) members[end++] = i;
    }
    family[whole_] = end;
    const double rows = (double)T, kv = (double)s.kv_heads * (double)s.D, wide = (double)s.heads * (double)s.D;
    l64 stride_q = read_stride(T, whole(wide)), stride_k = read_stride(T, whole(kv)), stride_v = read_stride(T, whole(kv));
    float *q = matrix(T, whole(wide), stride_q, READ), *k = matrix(T, whole(kv), stride_k, READ);
    float *v = matrix(T, whole(kv), stride_v, READ);
    l64 i = draw(n), row = T ? draw(T) : 0, f = draw(whole_ + 1), families = whole_;
    l64 late = T - length[i] + 1, many = T - start[i] + 1; /* one more than there is room for */
    start[i] = MAYBE("start", start[i], -1, late, BEYOND, INT64_MAX, INT64_MIN);
    length[i] = MAYBE("length", length[i], -1, many, BEYOND, INT64_MAX, INT64_MIN);
    parent[i] = MAYBE("parent", parent[i], -2, n, BEYOND, INT64_MIN);
    longest = MAYBE("longest", longest, longest - 1, -1, BEYOND, INT64_MAX, INT64_MIN);
    if (length[n - 1] > 0) T = MAYBE("T", T, T - 1, -1, BEYOND, INT64_MAX);
    if (!backward) {
        if (rows > 0) {
            sequence[row] = MAYBE("sequence", sequence[row], -1, n, BEYOND, INT64_MIN);
            if (!wrong) place[row] = MAYBE("place", place[row], -1, length[sequence[row]], BEYOND, INT64_MIN);
        }
        return packed_attention_forward(T, s.heads, s.kv_heads, s.D, longest, q, stride_q, k, stride_k, v, stride_v, n, start,
                                        length, parent, sequence, place, vector(rows * wide, WRITTEN), threads);
    }
    members[i] = MAYBE("member", members[i], -1, n, BEYOND, INT64_MIN);
    family[f] = MAYBE("family", family[f], -1, n + 1, BEYOND, INT64_MIN);
    families = MAYBE("families", families, -1, BEYOND, INT64_MIN);
    float *dout = vector(rows * wide, READ), *dq = vector(rows * wide, WRITTEN), *dk = vector(rows * kv, CHANGED);
    return packed_attention_backward(T, s.heads, s.kv_heads, s.D, longest, q, stride_q, k, stride_k, v, stride_v, n, start,
                                     length, parent, dout, dq, dk, vector(rows * kv, CHANGED), members, family, families,
                                     threads);
}
static int a_packed_attention_forward(void) { return a_packed_attention(0); }
static int a_packed_attention_backward(void) { return a_packed_attention(1); }

/* Attention over more keys than there is memory for. */
static void no_memory(void) {
    l64 zero = 0, one = 1, none = -1, ends[2] = {0, 1}, many = LIMIT;
    float x[16] = {0}, out[16];
    CHECK(decode_attention(1, 1, 1, 16, x, x, x, &zero, NULL, 1, 0, many, out, 1) == NO_MEMORY, "decode");
    CHECK(packed_attention_forward(1, 1, 1, 16, many, x, 16, x, 16, x, 16, 1, &zero, &one, &none, &zero, &zero, out, 2) ==
              NO_MEMORY, "forward");
    CHECK(packed_attention_backward(1, 1, 1, 16, many, x, 16, x, 16, x, 16, 1, &zero, &one, &none, x, out, out, out, &zero,
                                    ends, 1, 1) == NO_MEMORY, "backward");
}

int main(int argc, char **argv) {
    fault = argc > 1 ? atoi(argv[1]) : 0; /* tests/kernels/test_native.py has put faults into cpu.c, none of which is number 0 */
    static const struct {
        const char *name;
        int (*run)(void);
    } entries[] = {
#define ENTRY(article, entry) {#entry, article##_##entry}
        ENTRY(a, shrink),           ENTRY(an, add_norm_forward), ENTRY(an, add_norm_backward), ENTRY(a, swiglu_forward),
        ENTRY(a, swiglu_backward),  ENTRY(a, rope_forward),      ENTRY(a, rope_backward),      ENTRY(a, decode_attention),
        ENTRY(a, packed_attention_forward),                      ENTRY(a, packed_attention_backward),
    };
    const int count = sizeof entries / sizeof *entries, cases = 3000;
    int refused[sizeof entries / sizeof *entries] = {0};
    for (at = 0; at < cases; at++) {
        name = entries[at % count].name, state = at * 2654435761u + 1, wrong = 0, numbers[0] = 0;
        int status = entries[at % count].run();
        refused[at % count] += wrong;
        finish(status);
    }
    name = "no memory";
    no_memory();
    for (int i = 0; i < count; i++) printf("%s: %d refused of %d\n", entries[i].name, refused[i], cases / count);
}
