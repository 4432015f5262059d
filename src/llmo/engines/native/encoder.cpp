// An encoder of the BERT family at int8, for texts of any lengths at once: there is no padding, and no masks.
//
// Weights are int8 with a scale for every output, activations are rounded row by row, so the answer to a text does not
// depend on what stands beside it. Between two products a row stays where it is: sums, norms, activations and
// rounding are one pass over it. Where the head reads the first token alone, the last layer computes that token alone.
//
// Many texts are cut into groups, and each thread takes one group after another through the whole model, so that nobody
// waits for anybody. Where that would leave threads idle, all of them share the rows and columns of one group.
#include "crew.h"
#include "kernels.h"

#include <math.h>

extern "C" {

struct Matrix {           // [n, k] weights as sixteen outputs side by side, both filled up
    const int8_t* weight; // [n/16, k/4, 16, 4]
    const float* scale;   // [n]
    const int32_t* start; // [n] minus 128 times the sum of an output's weights: activations are stored plus 128
    const float* bias;    // [n]
    int32_t n, k;
};

struct Norm {
    const float *weight, *bias;
};

struct Layer {
    Matrix qkv, out, up, down;
    Norm attended, fed;
    int32_t heads;
};

struct Head {
    Matrix dense; // before the answer; none where n is 0
    const float *weight, *bias; // [labels, hidden]; none where labels is 0
    int32_t labels, activation, first;
};

struct Model {
    int32_t layers, hidden, dim, activation;
    float eps;
    const int8_t* words;     // [vocabulary, hidden]
    const float* word_scale; // [vocabulary]
    const float* places;     // [positions, hidden]
    Norm embedded;
    const Layer* layer;
    Head head;
};

struct Batch {
    int32_t texts;
    const int32_t* ids;    // of all texts, one after another
    const int32_t* begin;  // [texts + 1]
    float* logits;         // [texts, labels], or [tokens, labels]
    float* means;          // [texts, hidden] of the last layer: asked for instead of logits, else null
};
}

namespace {

enum { NONE, GELU, RELU, SILU, TANH };
constexpr int TILE_ROWS = 8;   // rows of a pass over the weights, and
constexpr int TILE_BLOCKS = 3; // blocks of sixteen outputs: what the registers hold
constexpr int STRIPE = 6;      // blocks of the smallest piece of a product that one thread takes
constexpr int GROUP_ROWS = 96; // tokens that go through the model together: their rows stay in a core's own cache
constexpr int SHARED_ROWS = 256;
constexpr int QUERIES = 8;     // that look at the keys together
constexpr int MOST_THREADS = 256;
constexpr float SHARING = 0.8f; // what sharing one group yields of what separate groups would, measured

struct Room { // working memory for one group
    float *x, *wide, *attended, *inner, *keys, *scores;
    uint8_t *rounded, *rounded_inner;
    float *unit, *unit_inner; // what one unit of a row is worth
    float** answers;
    int rows, longest;
};

struct Text {
    int number, row, length; // in the batch, in its group, in tokens
};

struct Group {
    int first, count, rows; // texts in the order of the plan, and their tokens
};

struct Phase { // how much of some work is taken, and done: whoever comes late finds nothing left, and goes on
    int32_t taken, done;
};

struct Encoder {
    Crew crew;
    Model model;
    Room* rooms; // one a thread
    const Batch* batch;
    Text* texts; // by length, the longest first
    Group* groups;
    int threads, group_count, plan_room;
    bool shared; // all threads take part in each group
    Phase all, *phases; // of the groups; of the steps of all groups where they are shared
    int phase_room;
};

inline f32x16 activate(f32x16 x, int kind) {
    switch (kind) {
        case GELU: { // x times the normal distribution, to 2e-4: a polynomial, for the result has 8 bits
            f32x16 c = larger(all(-4.0f), x < 4.0f ? x : all(4.0f)), t = c * c;
            f32x16 p = t * 2.27800475e-08f + -1.59853244e-06f;
            p = p * t + 4.79541584e-05f;
            p = p * t + -0.000814002549f;
            p = p * t + 0.00877232685f;
            p = p * t + -0.0645729779f;
            p = p * t + 0.397883255f;
            return x * (p * c + 0.5f);
        }
        case RELU: return larger(x, f32x16{});
        case SILU: return x / (1.0f + exponential(-x));
        case TANH: return 1.0f - 2.0f / (1.0f + exponential(2.0f * x));
        default: return x;
    }
}

// What one thread has of the work on a group: all of it, or a share.
struct Team {
    Encoder* e;
    bool shared;
    int phase;
    Room* own;
    template <class F> void share(int count, F work) {
        if (!shared) {
            for (int i = 0; i < count; i++) work(i);
            return;
        }
        Phase* p = &e->phases[phase++];
        int several = count / (e->crew.threads * 4) + 1;
        for (int i; (i = __atomic_fetch_add(&p->taken, several, __ATOMIC_RELAXED)) < count;) {
            int end = least(count, i + several);
            for (int j = i; j < end; j++) work(j);
            __atomic_fetch_add(&p->done, end - i, __ATOMIC_RELEASE);
        }
        for (int turn = 0; __atomic_load_n(&p->done, __ATOMIC_ACQUIRE) < count; turn++) rest(turn);
    }
};

struct Rows { // rounded activations
    const uint8_t* value;
    const float* unit;
    int count;
};

template <int R, int B>
void tile(const Matrix& w, int block, const Rows& a, int row, float* out, int stride, bool add) {
    const int k = w.k;
    const int8_t* weight = w.weight + (int64_t)block * k * LANES;
    const uint8_t* x = a.value + (int64_t)row * k;
    i32x16 total[R][B];
    for (int b = 0; b < B; b++) {
        i32x16 start = load_as<i32x16>(w.start + (block + b) * LANES);
        for (int r = 0; r < R; r++) total[r][b] = start;
    }
    for (int q = 0; q < k; q += 4) {
        i32x16 v[B];
        for (int b = 0; b < B; b++) v[b] = load_as<i32x16>(weight + ((int64_t)b * k + q) * LANES);
        for (int r = 0; r < R; r++) {
            i32x16 four = i32x16{} + load_as<int32_t>(x + (int64_t)r * k + q);
            for (int b = 0; b < B; b++) total[r][b] = dot_unsigned(total[r][b], four, v[b]);
        }
    }
    for (int b = 0; b < B; b++) {
        int n = (block + b) * LANES;
        f32x16 scale = load(w.scale + n), bias = load(w.bias + n);
        for (int r = 0; r < R; r++) {
            float* to = out + (int64_t)(row + r) * stride + n;
            f32x16 made = __builtin_convertvector(total[r][b], f32x16) * (scale * a.unit[row + r]) + bias;
            store(to, add ? load(to) + made : made);
        }
    }
}

template <int B> void tiles(const Matrix& w, int block, const Rows& a, float* out, int stride, bool add) {
    int count = (a.count + TILE_ROWS - 1) / TILE_ROWS;
    for (int t = 0; t < count; t++) {
        int row = (int)((int64_t)a.count * t / count), rows = (int)((int64_t)a.count * (t + 1) / count) - row;
        switch (rows) {
#define CASE(R) case R: tile<R, B>(w, block, a, row, out, stride, add); break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
        }
    }
}

// `out = a @ w.T + bias`, or is added to, for the outputs of blocks `from` to `to`.
void multiply(Team& team, const Matrix& w, int from, int to, const Rows& a, float* out, int stride, bool add) {
    team.share((to - from + STRIPE - 1) / STRIPE, [&](int i) {
        int end = least(to, from + (i + 1) * STRIPE), n = from + i * STRIPE;
        if (a.count <= 4 && n + STRIPE <= end) { // few rows: more blocks at once, so that enough sums are on their way
            switch (a.count) {
#define CASE(R) case R: tile<R, STRIPE>(w, n, a, 0, out, stride, add); break;
                CASE(1) CASE(2) CASE(3) CASE(4)
#undef CASE
            }
            return;
        }
        for (; n + TILE_BLOCKS <= end; n += TILE_BLOCKS) tiles<TILE_BLOCKS>(w, n, a, out, stride, add);
        for (; n < end; n++) tiles<1>(w, n, a, out, stride, add);
    });
}

// The largest magnitude. As integers NaN is above infinity, and that above all numbers: neither is lost.
inline float peak_of(i32x16 most) {
    int32_t bits = largest(most);
    float found;
    memcpy(&found, &bits, sizeof found);
    return found;
}
inline i32x16 magnitude(f32x16 v) { return (i32x16)v & 0x7fffffff; }

// A row of `size` values as bytes around 128, filled up to `k`.
void round_row(const float* x, int size, float most, uint8_t* to, int k, float* unit) {
    *unit = most / 127.0f;
    f32x16 per = all(most > 0 ? 127.0f / most : 0.0f);
    for (int i = 0; i < size; i += LANES) store((int8_t*)to + i, nearest(load(x + i) * per) + 128);
    for (int i = size; i < k; i++) to[i] = 128;
}

void round_row(const float* x, int size, uint8_t* to, int k, float* unit) {
    i32x16 most{};
    for (int i = 0; i < size; i += LANES) most = larger(most, magnitude(load(x + i)));
    round_row(x, size, peak_of(most), to, k, unit);
}

// In place; the largest magnitude of what became of it.
float normalise(float* x, const Norm& norm, int size, float eps) {
    f32x16 total{}, squares{};
    for (int i = 0; i < size; i += LANES) total += load(x + i);
    f32x16 mean = all(sum(total) / size);
    for (int i = 0; i < size; i += LANES) {
        f32x16 v = load(x + i) - mean;
        squares += v * v;
    }
    f32x16 scale = all(1.0f / sqrtf(sum(squares) / size + eps));
    i32x16 most{};
    for (int i = 0; i < size; i += LANES) {
        f32x16 v = (load(x + i) - mean) * scale * load(norm.weight + i) + load(norm.bias + i);
        most = larger(most, magnitude(v));
        store(x + i, v);
    }
    return peak_of(most);
}

// `[rows, 16 features]` to `[16 features, 16 rows]`, zero where there is no row.
inline void turn(const float* from, int stride, int rows, float* to, int to_stride) {
#if defined(__AVX512F__)
    if (rows == LANES) {
        __m512 r[16], t[16];
        for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(from + (int64_t)i * stride);
        for (int i = 0; i < 8; i++) {
            t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        for (int i = 0; i < 4; i++) {
            r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[4 * i]), _mm512_castps_pd(t[4 * i + 2])));
            r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[4 * i]), _mm512_castps_pd(t[4 * i + 2])));
            r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[4 * i + 1]), _mm512_castps_pd(t[4 * i + 3])));
            r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[4 * i + 1]), _mm512_castps_pd(t[4 * i + 3])));
        }
        for (int i = 0; i < 4; i++) {
            t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
            t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
            t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
            t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
        }
        for (int i = 0; i < 8; i++) {
            _mm512_storeu_ps(to + (int64_t)i * to_stride, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
            _mm512_storeu_ps(to + (int64_t)(i + 8) * to_stride, _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
        }
        return;
    }
#endif
    for (int f = 0; f < LANES; f++)
        for (int i = 0; i < LANES; i++) to[(int64_t)f * to_stride + i] = i < rows ? from[(int64_t)i * stride + f] : 0;
}

template <int N> struct Number {
    static constexpr int value = N;
};

struct Lines { // rows at a distance
    const float* first;
    int stride;
    const float* row(int i) const { return first + (int64_t)i * stride; }
};

// One head of Q queries: their scores of all keys, the softmax, the mean of the values.
template <int Q>
void attend(Lines query, Lines value, const float* keys, int length, int dim, float* scores, float* out,
            int out_stride) {
    const int padded = up(length, LANES);
    const float scale = 1.0f / sqrtf((float)dim);
    auto look = [&](int j, auto two) {
        constexpr int B = decltype(two)::value;
        f32x16 found[Q][B] = {};
        for (int d = 0; d < dim; d++) {
            f32x16 k[B];
            for (int b = 0; b < B; b++) k[b] = load(keys + (int64_t)d * padded + j + b * LANES);
            for (int q = 0; q < Q; q++)
                for (int b = 0; b < B; b++) found[q][b] += k[b] * query.row(q)[d];
        }
        for (int q = 0; q < Q; q++)
            for (int b = 0; b < B; b++) store(scores + (int64_t)q * padded + j + b * LANES, found[q][b] * scale);
    };
    int j = 0;
    for (; j + 2 * LANES <= padded; j += 2 * LANES) look(j, Number<2>());
    if (j < padded) look(j, Number<1>());
    const i32x16 count = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int last = padded - LANES;
    float share[Q];
    for (int q = 0; q < Q; q++) {
        float* row = scores + (int64_t)q * padded;
        store(row + last, count < length - last ? load(row + last) : all(-INFINITY));
        f32x16 top = load(row), total{};
        for (int i = LANES; i < padded; i += LANES) top = larger(top, load(row + i));
        f32x16 most = all(largest(top));
        for (int i = 0; i < padded; i += LANES) {
            f32x16 e = exponential(load(row + i) - most);
            total += e;
            store(row + i, e);
        }
        share[q] = 1.0f / sum(total);
    }
    auto mix = [&](int d, auto two) {
        constexpr int B = decltype(two)::value;
        f32x16 made[Q][B] = {};
        for (int i = 0; i < length; i++) {
            f32x16 v[B];
            for (int b = 0; b < B; b++) v[b] = load(value.row(i) + d + b * LANES);
            for (int q = 0; q < Q; q++)
                for (int b = 0; b < B; b++) made[q][b] += v[b] * scores[(int64_t)q * padded + i];
        }
        for (int q = 0; q < Q; q++)
            for (int b = 0; b < B; b++) store(out + (int64_t)q * out_stride + d + b * LANES, made[q][b] * share[q]);
    };
    int d = 0;
    for (; d + 2 * LANES <= dim; d += 2 * LANES) mix(d, Number<2>());
    if (d < dim) mix(d, Number<1>());
}

// One head of one text: the first `queries` of its tokens look at all of them.
void attend_text(const Model& m, const Layer& l, Room& own, const float* query, int query_stride, const float* wide,
                 int length, int head, int queries, float* out) {
    const int dim = m.dim, stride = l.qkv.n, width = l.heads * dim, padded = up(length, LANES);
    const float *key = wide + width + head * dim, *value = key + width;
    for (int i = 0; i < length; i += LANES)
        for (int d = 0; d < dim; d += LANES)
            turn(key + (int64_t)i * stride + d, stride, least(LANES, length - i), own.keys + (int64_t)d * padded + i,
                 padded);
    for (int q = 0; q < queries; q += QUERIES) {
        const float* from = query + (int64_t)q * query_stride + head * dim;
        float* to = out + (int64_t)q * l.out.k + head * dim;
        switch (least(QUERIES, queries - q)) {
#define CASE(Q) case Q: attend<Q>({from, query_stride}, {value, stride}, own.keys, length, dim, own.scores, to, l.out.k); break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
        }
    }
}

// The rows of the first tokens alone, one after another.
void keep_firsts(Room& g, const Text* texts, int count, int hidden, int k) {
    for (int i = 0; i < count; i++) {
        int row = texts[i].row;
        g.unit[i] = g.unit[row];
        memmove(g.x + (int64_t)i * hidden, g.x + (int64_t)row * hidden, sizeof(float) * (size_t)hidden);
        memmove(g.rounded + (int64_t)i * k, g.rounded + (int64_t)row * k, (size_t)k);
    }
}

// One layer of a group, after which `rows` is the number of rows that are left: with `firsts`, one a text.
void run_layer(Team& team, Room& g, const Layer& l, const Text* texts, int count, int& rows, bool firsts) {
    const Model& m = team.e->model;
    const int hidden = m.hidden, width = l.heads * m.dim, blocks = l.qkv.n / LANES, third = width / LANES;
    const float* query = g.wide;
    int query_stride = l.qkv.n;
    if (firsts) {
        multiply(team, l.qkv, third, blocks, {g.rounded, g.unit, rows}, g.wide, l.qkv.n, false);
        team.share(1, [&](int) { keep_firsts(g, texts, count, hidden, l.qkv.k); });
        query = g.inner, query_stride = width, rows = count;
        multiply(team, l.qkv, 0, third, {g.rounded, g.unit, rows}, g.inner, width, false);
    } else multiply(team, l.qkv, 0, blocks, {g.rounded, g.unit, rows}, g.wide, l.qkv.n, false);
    team.share(count * l.heads, [&](int i) {
        const Text& t = texts[i / l.heads];
        const int64_t row = firsts ? i / l.heads : t.row;
        attend_text(m, l, *team.own, query + row * query_stride, query_stride, g.wide + (int64_t)t.row * l.qkv.n,
                    t.length, i % l.heads, firsts ? 1 : t.length, g.attended + row * l.out.k);
    });
    team.share(rows, [&](int i) {
        round_row(g.attended + (int64_t)i * l.out.k, width, g.rounded + (int64_t)i * l.out.k, l.out.k, g.unit + i);
    });
    multiply(team, l.out, 0, l.out.n / LANES, {g.rounded, g.unit, rows}, g.x, hidden, true);
    team.share(rows, [&](int i) {
        float* x = g.x + (int64_t)i * hidden;
        round_row(x, hidden, normalise(x, l.attended, hidden, m.eps), g.rounded + (int64_t)i * l.up.k, l.up.k, g.unit + i);
    });
    for (int from = 0; from < rows; from += GROUP_ROWS) {
        const int some = least(GROUP_ROWS, rows - from);
        multiply(team, l.up, 0, l.up.n / LANES, {g.rounded + (int64_t)from * l.up.k, g.unit + from, some}, g.inner,
                 l.up.n, false);
        team.share(some, [&](int i) {
            float* x = g.inner + (int64_t)i * l.up.n;
            i32x16 most{};
            for (int j = 0; j < l.up.n; j += LANES) {
                f32x16 v = activate(load(x + j), m.activation);
                most = larger(most, magnitude(v));
                store(x + j, v);
            }
            round_row(x, l.up.n, peak_of(most), g.rounded_inner + (int64_t)i * l.down.k, l.down.k, g.unit_inner + i);
        });
        multiply(team, l.down, 0, l.down.n / LANES, {g.rounded_inner, g.unit_inner, some}, g.x + (int64_t)from * hidden,
                 hidden, true);
    }
    team.share(rows, [&](int i) {
        float* x = g.x + (int64_t)i * hidden;
        round_row(x, hidden, normalise(x, l.fed, hidden, m.eps), g.rounded + (int64_t)i * l.qkv.k, l.qkv.k, g.unit + i);
    });
}

// Logits of rows that went through all layers; row `i` answers for `to + i * labels`.
void answer(Team& team, Room& g, int rows, float* const* to) {
    const Model& m = team.e->model;
    const Head& h = m.head;
    const float* x = g.x;
    if (h.dense.n) {
        multiply(team, h.dense, 0, h.dense.n / LANES, {g.rounded, g.unit, rows}, g.inner, m.hidden, false);
        x = g.inner;
    }
    team.share(rows, [&](int i) {
        float* row = (float*)x + (int64_t)i * m.hidden;
        if (h.dense.n)
            for (int j = 0; j < m.hidden; j += LANES) store(row + j, activate(load(row + j), h.activation));
        for (int label = 0; label < h.labels; label++) {
            f32x16 total{};
            for (int j = 0; j < m.hidden; j += LANES) total += load(row + j) * load(h.weight + (int64_t)label * m.hidden + j);
            to[i][label] = sum(total) + h.bias[label];
        }
    });
}

// A group of texts from their ids to what was asked for.
void run_group(Team& team, Room& g, const Text* texts, int count, int rows) {
    Encoder* e = team.e;
    const Model& m = e->model;
    const Batch& batch = *e->batch;
    const int hidden = m.hidden;
    team.share(count, [&](int n) {
        const Text& t = texts[n];
        for (int p = 0; p < t.length; p++) {
            const int64_t id = batch.ids[batch.begin[t.number] + p], row = t.row + p;
            float* x = g.x + row * hidden;
            f32x16 scale = all(m.word_scale[id]);
            for (int i = 0; i < hidden; i += LANES)
                store(x + i, load(m.words + id * hidden + i) * scale + load(m.places + (int64_t)p * hidden + i));
            const Matrix& next = m.layer[0].qkv;
            round_row(x, hidden, normalise(x, m.embedded, hidden, m.eps), g.rounded + row * next.k, next.k, g.unit + row);
        }
    });
    const bool firsts = m.head.labels && m.head.first && !batch.means;
    for (int i = 0; i < m.layers; i++)
        run_layer(team, g, m.layer[i], texts, count, rows, firsts && i + 1 == m.layers);
    if (batch.means) {
        team.share(count, [&](int n) {
            const Text& t = texts[n];
            float* to = batch.means + (int64_t)t.number * hidden;
            for (int i = 0; i < hidden; i += LANES) {
                f32x16 total{};
                for (int p = 0; p < t.length; p++) total += load(g.x + (int64_t)(t.row + p) * hidden + i);
                store(to + i, total / (float)t.length);
            }
        });
        return;
    }
    team.share(1, [&](int) {
        for (int n = 0; n < count; n++)
            for (int p = 0; p < (firsts ? 1 : texts[n].length); p++)
                g.answers[firsts ? n : texts[n].row + p] =
                    batch.logits + (int64_t)(firsts ? texts[n].number : batch.begin[texts[n].number] + p) * m.head.labels;
    });
    answer(team, g, rows, g.answers);
}

// Memory for so many rows, and for keys of a text of `longest` tokens. False where there is none.
bool make_room(const Encoder* e, Room& r, int rows, int longest) {
    const Model& m = e->model;
    int64_t wide = 0, narrow = m.hidden, k = m.hidden, inner = m.hidden, inner_k = 0;
    auto grow = [](int64_t& size, int64_t to) { size = size > to ? size : to; };
    for (int i = 0; i < m.layers; i++) {
        const Layer& l = m.layer[i];
        grow(wide, l.qkv.n), grow(narrow, l.out.k), grow(inner, l.up.n), grow(inner_k, l.down.k);
        grow(k, l.qkv.k), grow(k, l.out.k), grow(k, l.up.k);
    }
    grow(k, m.head.dense.k);
    if (rows > r.rows) {
        r.rows = 0;
        const int64_t some = least(rows, GROUP_ROWS), narrowest = rows * narrow; // queries and answers lie in `inner` too
        if (!room(r.x, rows * (int64_t)m.hidden) || !room(r.wide, rows * wide) || !room(r.attended, rows * narrow) ||
            !room(r.rounded, rows * k) || !room(r.unit, rows) || !room(r.answers, rows) ||
            !room(r.inner, some * inner > narrowest ? some * inner : narrowest) ||
            !room(r.rounded_inner, some * inner_k) || !room(r.unit_inner, some))
            return false;
        r.rows = rows;
    }
    if (longest > r.longest) {
        r.longest = 0;
        int64_t padded = up(longest, LANES);
        if (!room(r.keys, padded * m.dim) || !room(r.scores, padded * QUERIES)) return false;
        r.longest = longest;
    }
    return true;
}

// What each thread does with a batch.
void work(void* given, int id) {
    Encoder* e = (Encoder*)given;
    Team team = {e, e->shared, 0, &e->rooms[id]};
    if (e->shared) {
        for (int i = 0; i < e->group_count; i++) {
            const Group& group = e->groups[i];
            run_group(team, e->rooms[0], e->texts + group.first, group.count, group.rows);
        }
        return;
    }
    for (int i; (i = __atomic_fetch_add(&e->all.taken, 1, __ATOMIC_RELAXED)) < e->group_count;) {
        const Group& group = e->groups[i];
        run_group(team, e->rooms[id], e->texts + group.first, group.count, group.rows);
        __atomic_fetch_add(&e->all.done, 1, __ATOMIC_RELEASE);
    }
    for (int turn = 0; !id && __atomic_load_n(&e->all.done, __ATOMIC_ACQUIRE) < e->group_count; turn++) rest(turn);
}

// Cut the texts, longest first, into groups of at most `most` tokens, or of one longer text.
void cut(Encoder* e, int count, int most) {
    e->group_count = 0;
    for (int i = 0; i < count; i++) {
        Text& t = e->texts[i];
        Group* last = e->group_count ? &e->groups[e->group_count - 1] : nullptr;
        if (!last || last->rows + t.length > most) {
            last = &e->groups[e->group_count++];
            *last = {i, 0, 0};
        }
        t.row = last->rows;
        last->rows += t.length;
        last->count++;
    }
}

// How many tokens the busiest thread computes if each takes the next group when it is free.
int busiest(const Encoder* e) {
    int load[MOST_THREADS] = {}, most = 0;
    for (int i = 0; i < e->group_count; i++) {
        int* least_busy = load;
        for (int t = 1; t < e->crew.threads; t++)
            if (load[t] < *least_busy) least_busy = load + t;
        *least_busy += e->groups[i].rows;
        if (*least_busy > most) most = *least_busy;
    }
    return most;
}

int by_length(const void* a, const void* b) {
    const Text *one = (const Text*)a, *other = (const Text*)b;
    return one->length != other->length ? other->length - one->length : one->number - other->number;
}

// False where memory does not suffice.
bool plan(Encoder* e) {
    const Batch& b = *e->batch;
    const int threads = e->crew.threads, tokens = b.begin[b.texts] - b.begin[0];
    if (b.texts > e->plan_room) {
        e->plan_room = 0;
        if (!room(e->texts, b.texts) || !room(e->groups, b.texts)) return false;
        e->plan_room = b.texts;
    }
    for (int i = 0; i < b.texts; i++) e->texts[i] = {i, 0, b.begin[i + 1] - b.begin[i]};
    qsort(e->texts, (size_t)b.texts, sizeof(Text), by_length);
    cut(e, b.texts, least(GROUP_ROWS, tokens / threads + 1));
    e->shared = threads > 1 && busiest(e) * threads * SHARING > tokens;
    if (e->shared) cut(e, b.texts, SHARED_ROWS);
    int rows = 0, longest = e->texts[0].length;
    for (int i = 0; i < e->group_count; i++) rows = rows > e->groups[i].rows ? rows : e->groups[i].rows;
    for (int i = 0; i < threads; i++)
        if (!make_room(e, e->rooms[i], e->shared && i ? 0 : rows, longest)) return false;
    if (e->shared) {
        int64_t phases = e->group_count * (int64_t)(8 + e->model.layers * (8 + 3 * (rows / GROUP_ROWS + 1)));
        if (phases > e->phase_room) {
            e->phase_room = 0;
            if (!room(e->phases, phases)) return false;
            e->phase_room = (int)phases;
        } else memset(e->phases, 0, sizeof(Phase) * (size_t)phases);
    }
    e->all = {0, 0};
    return true;
}

} // namespace

#pragma GCC visibility push(default)
extern "C" {

void llmo_encoder_close(Encoder* e) {
    e->crew.dismiss();
    for (int i = 0; e->rooms && i < e->threads; i++) {
        Room& r = e->rooms[i];
        free(r.x), free(r.wide), free(r.attended), free(r.inner), free(r.keys), free(r.scores), free(r.rounded);
        free(r.rounded_inner), free(r.unit), free(r.unit_inner), free(r.answers);
    }
    free(e->rooms), free(e->texts), free(e->groups), free(e->phases), free(e);
}

// A crew of threads over a model, whose arrays stay the caller's. Null where memory or threads do not suffice.
Encoder* llmo_encoder_open(const Model* model, int threads) {
    Encoder* e = (Encoder*)calloc(1, sizeof(Encoder));
    if (!e) return nullptr;
    threads = least(threads, MOST_THREADS);
    e->model = *model;
    e->threads = threads;
    e->rooms = (Room*)calloc((size_t)threads, sizeof(Room));
    if (e->crew.hire(threads, work, e) && e->rooms) return e;
    llmo_encoder_close(e);
    return nullptr;
}

// Computes one batch; 0, or 1 where memory does not suffice.
int llmo_encode(Encoder* e, const Batch* batch) {
    e->batch = batch;
    if (!plan(e)) return 1;
    e->crew.run();
    return 0;
}

int64_t llmo_encoder_size(int which) {
    const int64_t sizes[] = {sizeof(Matrix), sizeof(Layer), sizeof(Head), sizeof(Model), sizeof(Batch)};
    return sizes[which];
}
}
