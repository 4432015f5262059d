// A decoder of the Llama family over a paged cache, for rows of many streams: one call computes one step.
//
// Weights are int8 with a scale for every 64 inputs, or fp32. Answers wait for the weights to come from memory, so
// their activations have 15 bits, as two int8 halves, which keeps them out of the loss. Prompts wait for arithmetic:
// where a product is not `fine`, their activations are int8 with a scale for every 64. Sums inside a group are whole
// numbers, so they are exact.
//
// All threads run the same function; tickets share the work out, and a barrier ends each phase.
#include "crew.h"
#include "kernels.h"

#include <math.h>

extern "C" {

struct Linear {         // [n, k] weights as sixteen outputs side by side
    const void* weight; // int8: [n/16, k/4, 16, 4] unsigned, 128 is zero; fp32: [n/16, k, 16]; k filled up to 64
    const float* scale; // int8: [n/16, k/64, 16]
    const float* bias;  // [n] or null
    int32_t n, k, fine; // both filled up
};

struct Layer {
    const float *before_attention, *before_mlp, *query_norm, *key_norm; // the last two may be null
    Linear qkv, out, gate_up, down;
};

struct Model {
    int32_t layers, hidden, heads, kv_heads, dim, inner, quantised;
    float eps;
    const Layer* layer;
    const float* norm;
    const void* embedding;   // [vocabulary, hidden] bf16, or fp32 where weights are
    const float* turns;      // [context, dim/2, (cos, sin)]
    Linear head;
};

struct Lora {              // of one group of one adapter, all layers
    const void *down, *up; // [layers, parts * rank, in], [layers, parts, rank, out]: int8, or fp32 where weights are
    const float* scale;    // [layers, parts * rank] of both together
    const int32_t* reach;  // [parts * rank, (first, end)] which outputs of its part a rank reaches
    int32_t parts, rank;   // no effect where rank is 0
};

struct Adapter {
    Lora group[4];         // qkv, out, gate_up, down
};

struct Step {
    int32_t rows, prompt, wanted;   // the first `prompt` rows are tokens of prompts
    const int32_t *ids, *positions; // [rows]
    const int32_t *table;           // [rows] where in `tables` the blocks of the row's stream begin
    const int32_t *tables;
    const int32_t *wanted_rows;     // [wanted]
    const Adapter* const* adapters; // [rows] or null
    void *keys, *values;            // [layers, blocks, kv_heads, dim, 16], [layers, blocks, kv_heads, 16, dim]
    int64_t blocks;
    float* logits;                  // [wanted, vocabulary filled up to 16]
};
}

namespace {

struct Shared { // one step's working memory; strides are the filled-up sizes
    float *x, *normal, *wide, *attended, *inner, *scores;
    int8_t* rounded;        // activations as the products read them: tile by tile, [k/64, rows, 64] or, of 15 bits,
                            // [k/64, rows, (high, low), 64]; 2 k bytes a row are kept for either. A cache line belongs
                            // to one row, so that threads which prepare rows do not wait for each other
    float* unit;            // [rows, k/64] what one unit of a row's activations is worth; of 15 bits [rows, 1]
    int32_t* start;         // [rows, k/64, (high, low)] where sums begin: minus 128 times the sum of the activations
    int32_t* tickets;
    int rows_room;
};

struct Decoder {
    Crew crew;
    Model model;
    int context, phase_count;
    Shared s;
    const Step* step;
};

constexpr int AHEAD = 4096; // bytes: weights are asked for so far before they are needed
struct Worker {
    Decoder* c;
    int id, phase;
    // Calls `work(i)` for the numbers below `count`, each in one thread, then waits for all. A ticket is for several.
    template <class F> void share(int count, F work) {
        share_spans(count, [&](int first, int end) {
            for (int i = first; i < end; i++) work(i);
        });
    }
    template <class F> void share_spans(int count, F work) {
        int32_t* ticket = &c->s.tickets[phase++];
        int several = count / (c->crew.threads * 8) + 1;
        for (int i; (i = __atomic_fetch_add(ticket, several, __ATOMIC_RELAXED)) < count;)
            work(i, least(count, i + several));
        c->crew.barrier();
    }
};

// Rows that a product treats alike, cut evenly into tiles.
struct Span {
    int begin, rows;
    bool fine;
    int tiles() const { return (rows + TILE - 1) / TILE; }
    int tile(int t) const { return begin + (int)((int64_t)rows * t / tiles()); }
    int tile_of(int row) const {
        int t = (int)((int64_t)(row - begin) * tiles() / rows);
        while (tile(t + 1) <= row) t++;
        return t;
    }
};

// The span of the prompts, or that of the answers.
Span span(const Linear& w, int rows, int prompt, bool answers) {
    if (w.fine) prompt = 0;
    return answers ? Span{prompt, rows - prompt, true} : Span{0, prompt, false};
}

// Products of R rows and B blocks of sixteen outputs, with activations of 15 bits if F.
template <int R, int B, bool F>
inline void product_int8(const Linear& w, int block, const Shared& s, int row, float* out, int stride, bool add) {
    const int k = w.k, groups = k / GROUP;
    const uint8_t* weight[B];
    for (int b = 0; b < B; b++) weight[b] = (const uint8_t*)w.weight + (int64_t)(block + b) * k * LANES;
    const int8_t* a = s.rounded + (int64_t)row * k * 2;
    f32x16 total[R][B];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) total[r][b] = f32x16{};
    for (int g = 0; g < groups; g++) {
        i32x16 high[R][B], low[R][B];
        for (int r = 0; r < R; r++) {
            const int32_t* start = s.start + ((int64_t)(row + r) * groups + g) * 2;
            for (int b = 0; b < B; b++) {
                high[r][b] = i32x16{} + start[0];
                if (F) low[r][b] = i32x16{} + start[1];
            }
        }
        for (int q = 0; q < GROUP / 4; q++) {
            i32x16 v[B];
            for (int b = 0; b < B; b++) {
                v[b] = load_as<i32x16>(weight[b]);
                __builtin_prefetch(weight[b] + AHEAD);
                weight[b] += 64;
            }
            for (int r = 0; r < R; r++)
                for (int b = 0; b < B; b++) {
                    const int8_t* four = a + r * (F ? 2 * GROUP : GROUP) + q * 4;
                    high[r][b] = dot(high[r][b], v[b], four);
                    if (F) low[r][b] = dot(low[r][b], v[b], four + GROUP);
                }
        }
        a += R * (F ? 2 * GROUP : GROUP);
        for (int b = 0; b < B; b++) {
            f32x16 scale = load(w.scale + ((int64_t)(block + b) * groups + g) * LANES);
            for (int r = 0; r < R; r++) {
                f32x16 found = __builtin_convertvector(F ? (high[r][b] << 7) + low[r][b] : high[r][b], f32x16);
                total[r][b] += F ? found * scale : found * (scale * s.unit[(int64_t)(row + r) * groups + g]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) {
            int n = (block + b) * LANES;
            float* to = out + (int64_t)(row + r) * stride + n;
            f32x16 made = F ? total[r][b] * s.unit[(int64_t)(row + r) * groups] : total[r][b];
            if (w.bias) made += load(w.bias + n);
            store(to, add ? load(to) + made : made);
        }
}

template <int R, int B>
inline void product_fp32(const Linear& w, int block, const float* x, int row, float* out, int stride, bool add) {
    f32x16 total[R][B];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) total[r][b] = f32x16{};
    const float* weight[B];
    for (int b = 0; b < B; b++) weight[b] = (const float*)w.weight + (int64_t)(block + b) * w.k * LANES;
    for (int k = 0; k < w.k; k++)
        for (int b = 0; b < B; b++) {
            f32x16 v = load(weight[b] + (int64_t)k * LANES);
            for (int r = 0; r < R; r++) total[r][b] += v * x[(int64_t)(row + r) * w.k + k];
        }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) {
            int n = (block + b) * LANES;
            float* to = out + (int64_t)(row + r) * stride + n;
            f32x16 made = total[r][b];
            if (w.bias) made += load(w.bias + n);
            store(to, add ? load(to) + made : made);
        }
}

template <int R, int B>
void product(const Decoder* c, const Linear& w, const Span& rows, int block, const float* x, int row, float* out,
             int stride, bool add) {
    if (!c->model.quantised) product_fp32<R, B>(w, block, x, row, out, stride, add);
    else if (rows.fine) product_int8<R, B, true>(w, block, c->s, row, out, stride, add);
    else product_int8<R, B, false>(w, block, c->s, row, out, stride, add);
}

// `out = x @ w.T`, or is added to. Few rows take several blocks at once, so that enough sums are on their way.
void multiply(Worker& me, const Linear& w, const float* x, int rows, int prompt, float* out, int stride, bool add) {
    Decoder* c = me.c;
    const Span spans[] = {span(w, rows, prompt, false), span(w, rows, prompt, true)};
    int most = spans[0].rows > spans[1].rows ? spans[0].rows : spans[1].rows;
    int blocks = w.n / LANES, wide = most <= 2 ? 4 : most <= 4 ? 2 : 1;
    int chunk = up(blocks / (c->crew.threads * 8) + 1, 4);
    auto tile = [&](const Span& span, int n, int b, int t) {
        int row = span.tile(t), count = span.tile(t + 1) - row;
#define CASE(R, B) case R * 8 + B: product<R, B>(c, w, span, n, x, row, out, stride, add); break;
        switch (count * 8 + b) {
            CASE(1, 1) CASE(2, 1) CASE(3, 1) CASE(4, 1) CASE(5, 1) CASE(6, 1) CASE(7, 1) CASE(8, 1)
            CASE(1, 2) CASE(2, 2) CASE(3, 2) CASE(4, 2) CASE(1, 4) CASE(2, 4)
        }
#undef CASE
    };
    me.share((blocks + chunk - 1) / chunk, [&](int i) {
        int end = least(blocks, (i + 1) * chunk);
        for (int n = i * chunk, b; n < end; n += b) {
            b = n + wide <= end ? wide : 1;
            for (const Span& span : spans)
                for (int t = 0; t < span.tiles(); t++) tile(span, n, b, t);
        }
    });
}

// The largest magnitude. As integers NaN is above infinity, and that above all numbers: neither is lost.
inline float peak(const float* x, int count) {
    i32x16 most{};
    for (int i = 0; i < count; i += LANES) most = larger(most, (i32x16)load(x + i) & 0x7fffffff);
    int32_t bits = largest(most);
    float found;
    memcpy(&found, &bits, sizeof found);
    return found;
}

// Round a row's activations for its product with `w`.
void prepare(const Decoder* c, const Linear& w, const float* x, int rows, int prompt, int row) {
    if (!c->model.quantised) return;
    const Shared& s = c->s;
    const int k = w.k, groups = k / GROUP;
    Span own = span(w, rows, prompt, w.fine || row >= prompt);
    int first = own.tile(own.tile_of(row)), count = own.tile(own.tile_of(row) + 1) - first;
    float* unit = s.unit + (int64_t)row * groups;
    int32_t* start = s.start + (int64_t)row * groups * 2;
    const int line = own.fine ? 2 * GROUP : GROUP;
    int8_t* to = s.rounded + (int64_t)first * k * 2 + (row - first) * line;
    float most = own.fine ? peak(x, k) : 0, full = own.fine ? 16319.0f : 127.0f;
    for (int g = 0; g < groups; g++, x += GROUP, to += count * line) {
        if (!own.fine) most = peak(x, GROUP);
        unit[own.fine ? 0 : g] = most / full;
        float per = most > 0 ? full / most : 0;
        i32x16 highs{}, lows{};
        for (int i = 0; i < GROUP; i += LANES) {
            i32x16 q = nearest(load(x + i) * per);
            i32x16 high = own.fine ? (q + 64) >> 7 : q, low = q - (high << 7);
            highs += high;
            store(to + i, high);
            if (own.fine) lows += low, store(to + GROUP + i, low);
        }
        start[2 * g] = -128 * sum(highs), start[2 * g + 1] = -128 * sum(lows);
    }
}

void normalise(const float* x, const float* weight, float* out, int size, int padded, float eps) {
    f32x16 squares{};
    for (int i = 0; i < padded; i += LANES) squares += load(x + i) * load(x + i);
    float scale = 1.0f / sqrtf(sum(squares) / size + eps);
    for (int i = 0; i < padded; i += LANES) store(out + i, load(x + i) * scale * load(weight + i));
}

struct Side { // one side of a product with an adapter, of several rows
    float* row;
    int stride, size;
};

// Add to Q rows of `out` what R ranks that reach the same outputs make of those of `x`.
template <class T, int R, int Q>
void adapt_ranks(const T* down, const T* rise, const float* scale, Side x, Side out, int part, const int32_t* reach) {
    f32x16 dots[Q][R] = {};
    for (int i = 0; i < x.size; i += LANES)
        for (int r = 0; r < R; r++) {
            f32x16 weight = load(down + r * x.size + i);
            for (int q = 0; q < Q; q++) dots[q][r] += load(x.row + q * x.stride + i) * weight;
        }
    float inner[Q][R];
    for (int q = 0; q < Q; q++)
        for (int r = 0; r < R; r++) inner[q][r] = sum(dots[q][r]) * scale[r];
    for (int i = reach[0]; i < reach[1]; i += LANES) {
        f32x16 made[Q];
        for (int q = 0; q < Q; q++) made[q] = load(out.row + q * out.stride + i);
        for (int r = 0; r < R; r++) {
            f32x16 weight = load(rise + r * part + i);
            for (int q = 0; q < Q; q++) made[q] += weight * inner[q][r];
        }
        for (int q = 0; q < Q; q++) store(out.row + q * out.stride + i, made[q]);
    }
}

// Add to Q rows of `out` what their adapter makes of `x`. One row is enough work for eight ranks at a time, several are
// for four: so many sums are on their way at once.
template <class T, int Q> void adapt(const Lora& l, int layer, Side x, Side out) {
    constexpr int MANY = Q == 1 ? 8 : 4;
    int ranks = l.parts * l.rank, part = out.size / l.parts;
    const T* down = (const T*)l.down + (int64_t)layer * ranks * x.size;
    const T* rise = (const T*)l.up + (int64_t)layer * ranks * part;
    const float* scale = l.scale + layer * ranks;
    for (int r = 0, took; r < ranks; r += took, down += took * x.size, rise += took * part, scale += took) {
        const int32_t* reach = l.reach + 2 * r;
        Side to = {out.row + r / l.rank * part, out.stride, part};
        int left = l.rank - r % l.rank, alike = 1;
        while (alike < left && reach[2 * alike] == reach[0] && reach[2 * alike + 1] == reach[1]) alike++;
        took = alike >= MANY ? MANY : alike >= 4 ? 4 : 1;
        if (took == MANY) adapt_ranks<T, MANY, Q>(down, rise, scale, x, to, part, reach);
        else if (took == 4) adapt_ranks<T, 4, Q>(down, rise, scale, x, to, part, reach);
        else adapt_ranks<T, 1, Q>(down, rise, scale, x, to, part, reach);
    }
}

// Rows `first` to `end`, each with its own adapter; four of one adapter read it together.
void adapt_rows(const Decoder* c, int group, int layer, int first, int end, Side x, Side out) {
    constexpr int SOME = 4;
    const Adapter* const* adapters = c->step->adapters;
    if (!adapters) return;
    for (int row = first, took; row < end; row += took) {
        const Adapter* own = adapters[row];
        bool alike = row + SOME <= end;
        for (int i = 1; alike && i < SOME; i++) alike = adapters[row + i] == own;
        took = alike ? SOME : 1;
        if (!own || !own->group[group].rank) continue;
        const Lora& l = own->group[group];
        Side from = {x.row + (int64_t)row * x.stride, x.stride, x.size};
        Side to = {out.row + (int64_t)row * out.stride, out.stride, out.size};
        if (c->model.quantised && alike) adapt<int8_t, SOME>(l, layer, from, to);
        else if (c->model.quantised) adapt<int8_t, 1>(l, layer, from, to);
        else if (alike) adapt<float, SOME>(l, layer, from, to);
        else adapt<float, 1>(l, layer, from, to);
    }
}

// Neighbouring features are one complex number, turned by the position.
void turn(float* x, const float* turns, int dim) {
    for (int i = 0; i < dim; i += LANES) {
        f32x16 v = load(x + i), t = load(turns + i);
        f32x16 real = __builtin_shufflevector(t, t, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14);
        f32x16 imaginary = __builtin_shufflevector(t, -t, 17, 1, 19, 3, 21, 5, 23, 7, 25, 9, 27, 11, 29, 13, 31, 15);
        f32x16 swapped = __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
        store(x + i, v * real + swapped * imaginary);
    }
}

// One row's queries and keys are turned; its keys and values go to the cache.
template <class T> void remember(const Decoder* c, int index, int row) {
    const Model& m = c->model;
    const Layer& layer = m.layer[index];
    const Step& step = *c->step;
    int position = step.positions[row], dim = m.dim;
    float* q = c->s.wide + (int64_t)row * layer.qkv.n;
    const float* turns = m.turns + (int64_t)position * dim;
    for (int h = 0; h < m.heads + m.kv_heads; h++) {
        const float* norm = h < m.heads ? layer.query_norm : layer.key_norm;
        if (norm) normalise(q + h * dim, norm, q + h * dim, dim, dim, m.eps);
        turn(q + h * dim, turns, dim);
    }
    int64_t block = (int64_t)index * step.blocks + step.tables[step.table[row] + position / BLOCK];
    int slot = position % BLOCK;
    const float *k = q + m.heads * dim, *v = k + m.kv_heads * dim;
    for (int h = 0; h < m.kv_heads; h++, k += dim, v += dim) {
        T* keys = (T*)step.keys + (block * m.kv_heads + h) * dim * BLOCK;
        for (int i = 0; i < dim; i++) put(keys + i * BLOCK + slot, k[i]);
        T* values = (T*)step.values + ((block * m.kv_heads + h) * BLOCK + slot) * dim;
        for (int i = 0; i < dim; i += LANES) store(values + i, load(v + i));
    }
}

// V queries of one head of keys, from one stream: scores of all blocks, their softmax, the mean of the values. Of
// `room`, the queries take `[dim, V]`, and what becomes of their scores `[blocks, V, 16]`.
template <class T, int V>
void attend(const Decoder* c, int index, int head, const int* table, const float* const* query, const int* seen,
            float* const* out, float* room) {
    const Model& m = c->model;
    const Step& step = *c->step;
    const int dim = m.dim;
    float *packed = room, *scores = room + dim * V, scale = 1.0f / sqrtf((float)dim);
    int most = 0;
    for (int v = 0; v < V; v++) {
        for (int i = 0; i < dim; i++) packed[i * V + v] = query[v][i] * scale;
        most = seen[v] > most ? seen[v] : most;
    }
    const int blocks = most / BLOCK + 1;
    auto place = [&](int b) { return (((int64_t)index * step.blocks + table[b]) * m.kv_heads + head) * dim * BLOCK; };
    for (int b = 0; b < blocks; b++) {
        const T* keys = (const T*)step.keys + place(b);
        const T* ahead = (const T*)step.keys + place(least(b + 2, blocks - 1));
        const T* later = (const T*)step.values + place(b);
        f32x16 even[V], odd[V]; // two sums each, for one would wait for itself
        for (int v = 0; v < V; v++) even[v] = odd[v] = f32x16{};
        for (int i = 0; i < dim; i += 2) {
            f32x16 k = load(keys + i * BLOCK), next = load(keys + (i + 1) * BLOCK);
            __builtin_prefetch(ahead + i * BLOCK);
            __builtin_prefetch(later + i * BLOCK, 0, 2);
            for (int v = 0; v < V; v++) even[v] += k * packed[i * V + v], odd[v] += next * packed[(i + 1) * V + v];
        }
        for (int v = 0; v < V; v++) store(scores + (b * V + v) * BLOCK, even[v] + odd[v]);
    }
    const i32x16 count = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    float share[V];
    for (int v = 0; v < V; v++) {
        float* row = scores + v * BLOCK;
        int last = seen[v] / BLOCK;
        f32x16 top = all(-INFINITY), total{}, end = load(row + last * V * BLOCK);
        store(row + last * V * BLOCK, count > seen[v] % BLOCK ? all(-INFINITY) : end);
        for (int b = 0; b <= last; b++) top = larger(top, load(row + b * V * BLOCK));
        float peak = largest(top);
        for (int b = 0; b < blocks; b++) {
            f32x16 weight = b <= last ? exponential(load(row + b * V * BLOCK) - peak) : f32x16{};
            store(row + b * V * BLOCK, weight);
            total += weight;
        }
        share[v] = 1.0f / sum(total);
    }
    for (int i = 0; i < dim; i += 2 * LANES) {
        const int second = i + LANES < dim ? LANES : 0; // of a head's last sixteen features alone, both are the same
        f32x16 left[V], right[V];
        for (int v = 0; v < V; v++) left[v] = right[v] = f32x16{};
        for (int b = 0; b < blocks; b++) {
            const T* values = (const T*)step.values + place(b) + i;
            const float* weight = scores + b * V * BLOCK;
            const int end = b + 1 < blocks ? BLOCK : most % BLOCK + 1; // behind it lies what others left
            for (int t = 0; t < end; t++, values += dim) {
                f32x16 x = load(values), y = load(values + second);
                for (int v = 0; v < V; v++)
                    left[v] += x * weight[v * BLOCK + t], right[v] += y * weight[v * BLOCK + t];
            }
        }
        for (int v = 0; v < V; v++)
            store(out[v] + i, left[v] * share[v]), store(out[v] + i + second, right[v] * share[v]);
    }
}

constexpr int MOST = 12; // queries that look at the same keys together

template <class T>
void attend_many(const Decoder* c, int index, int head, const int* table, int count, const float* const* query,
                 const int* seen, float* const* out, float* scores) {
    switch (count) {
#define CASE(V) case V: attend<T, V>(c, index, head, table, query, seen, out, scores); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
    }
}

int64_t scores_size(const Decoder* c) { return (int64_t)MOST * (up(c->context, BLOCK) + c->model.dim); }

// Rows `first` to `end`, of one stream, and one head of keys with all its queries.
void look(const Decoder* c, int index, int head, int first, int end, float* scores) {
    const Model& m = c->model;
    const Step& step = *c->step;
    int group = m.heads / m.kv_heads, wide = m.layer[index].qkv.n, out_wide = m.layer[index].out.k;
    const float* query[MOST];
    float* out[MOST];
    int seen[MOST], count = 0;
    auto run = [&] {
        const int* table = step.tables + step.table[first];
        if (m.quantised) attend_many<bf16>(c, index, head, table, count, query, seen, out, scores);
        else attend_many<float>(c, index, head, table, count, query, seen, out, scores);
        count = 0;
    };
    for (int row = first; row < end; row++)
        for (int h = head * group; h < (head + 1) * group; h++) {
            query[count] = c->s.wide + (int64_t)row * wide + h * m.dim;
            out[count] = c->s.attended + (int64_t)row * out_wide + h * m.dim;
            seen[count++] = step.positions[row];
            if (count == MOST) run();
        }
    if (count) run();
}

// A row's state, normalised, as `next` reads it.
void enter(const Decoder* c, const Linear& next, const float* weight, int row) {
    int64_t at = (int64_t)row * up(c->model.hidden, GROUP);
    normalise(c->s.x + at, weight, c->s.normal + at, c->model.hidden, up(c->model.hidden, GROUP), c->model.eps);
    prepare(c, next, c->s.normal + at, c->step->rows, c->step->prompt, row);
}

void run_step(Worker& me) {
    Decoder* c = me.c;
    const Model& m = c->model;
    const Step& step = *c->step;
    Shared& s = c->s;
    const int rows = step.rows, prompt = step.prompt, hidden = up(m.hidden, GROUP), head_wide = m.heads * m.dim;
    float* scores = s.scores + me.id * scores_size(c);
    // Rows of one stream that look at the cache together.
    int together = MOST / (m.heads / m.kv_heads), looks = 0;
    if (together < 1) together = 1;
    int* look_start = s.tickets + c->phase_count; // behind the tickets: [rows + 1]
    if (me.id == 0) {
        for (int row = 0; row < rows; row++)
            if (row == 0 || step.table[row] != step.table[row - 1] || row - look_start[looks - 1] == together)
                look_start[looks++] = row;
        look_start[looks] = rows;
        look_start[rows + 1] = looks;
    }
    me.share(rows, [&](int row) {
        float* x = s.x + (int64_t)row * hidden;
        for (int i = 0; i < hidden; i++) x[i] = 0;
        for (int i = 0; i < m.hidden; i++) {
            if (m.quantised) {
                uint32_t bits = (uint32_t)((const bf16*)m.embedding)[(int64_t)step.ids[row] * m.hidden + i] << 16;
                memcpy(x + i, &bits, 4);
            } else x[i] = ((const float*)m.embedding)[(int64_t)step.ids[row] * m.hidden + i];
        }
        enter(c, m.layer[0].qkv, m.layer[0].before_attention, row);
    });
    looks = look_start[rows + 1];
    const Side state = {s.x, hidden, m.hidden}, normal = {s.normal, hidden, m.hidden};
    for (int index = 0; index < m.layers; index++) {
        const Layer& l = m.layer[index];
        multiply(me, l.qkv, s.normal, rows, prompt, s.wide, l.qkv.n, false);
        me.share_spans(rows, [&](int first, int end) {
            adapt_rows(c, 0, index, first, end, normal, {s.wide, l.qkv.n, head_wide + 2 * m.kv_heads * m.dim});
            for (int row = first; row < end; row++) {
                if (m.quantised) remember<bf16>(c, index, row);
                else remember<float>(c, index, row);
            }
        });
        me.share(looks * m.kv_heads, [&](int i) {
            int which = i / m.kv_heads;
            look(c, index, i % m.kv_heads, look_start[which], look_start[which + 1], scores);
        });
        me.share(rows, [&](int row) { prepare(c, l.out, s.attended + (int64_t)row * l.out.k, rows, prompt, row); });
        multiply(me, l.out, s.attended, rows, prompt, s.x, hidden, true);
        me.share_spans(rows, [&](int first, int end) {
            adapt_rows(c, 1, index, first, end, {s.attended, l.out.k, head_wide}, state);
            for (int row = first; row < end; row++) enter(c, l.gate_up, l.before_mlp, row);
        });
        multiply(me, l.gate_up, s.normal, rows, prompt, s.wide, l.gate_up.n, false);
        me.share_spans(rows, [&](int first, int end) {
            adapt_rows(c, 2, index, first, end, normal, {s.wide, l.gate_up.n, 2 * m.inner});
            for (int row = first; row < end; row++) {
                float *both = s.wide + (int64_t)row * l.gate_up.n, *to = s.inner + (int64_t)row * l.down.k;
                for (int i = 0; i < m.inner; i += LANES) {
                    f32x16 gate = load(both + i);
                    store(to + i, gate / (1.0f + exponential(-gate)) * load(both + m.inner + i));
                }
                for (int i = m.inner; i < l.down.k; i++) to[i] = 0;
                prepare(c, l.down, to, rows, prompt, row);
            }
        });
        multiply(me, l.down, s.inner, rows, prompt, s.x, hidden, true);
        bool last = index + 1 == m.layers;
        Side inner = {s.inner, l.down.k, m.inner};
        if (last) {
            me.share(step.wanted, [&](int i) {
                int row = step.wanted_rows[i];
                float* made = s.normal + (int64_t)i * hidden;
                adapt_rows(c, 3, index, row, row + 1, inner, state);
                normalise(s.x + (int64_t)row * hidden, m.norm, made, m.hidden, hidden, m.eps);
                prepare(c, m.head, made, step.wanted, 0, i);
            });
        } else {
            const Layer& next = m.layer[index + 1];
            me.share_spans(rows, [&](int first, int end) {
                adapt_rows(c, 3, index, first, end, inner, state);
                for (int row = first; row < end; row++) enter(c, next.qkv, next.before_attention, row);
            });
        }
    }
    if (step.wanted) multiply(me, m.head, s.normal, step.wanted, 0, step.logits, m.head.n, false);
}

void work(void* given, int id) {
    Worker me = {(Decoder*)given, id, 0};
    run_step(me);
}

// Working memory for so many rows. False where there is none.
bool make_room(Decoder* c, int rows, int wanted) {
    Shared& s = c->s;
    rows = rows > wanted ? rows : wanted;
    if (rows <= s.rows_room) return true;
    const Model& m = c->model;
    const Layer& l = m.layer[0];
    int64_t hidden = up(m.hidden, GROUP), wide = l.qkv.n > l.gate_up.n ? l.qkv.n : l.gate_up.n;
    int64_t most = hidden > l.down.k ? hidden : l.down.k;
    most = most > l.out.k ? most : l.out.k;
    s.rows_room = 0;
    bool made = room(s.x, rows * hidden) && room(s.normal, rows * hidden) && room(s.wide, rows * wide) &&
                room(s.attended, rows * (int64_t)l.out.k) && room(s.inner, rows * (int64_t)l.down.k) &&
                room(s.rounded, rows * most * 2) && room(s.unit, rows * (most / GROUP)) &&
                room(s.start, rows * (most / GROUP) * 2) &&
                room(s.tickets, c->phase_count + rows + 2);
    if (made) s.rows_room = rows;
    return made;
}

} // namespace

#pragma GCC visibility push(default)
extern "C" {

void llmo_close(Decoder* c) {
    c->crew.dismiss();
    Shared& s = c->s;
    free(s.x), free(s.normal), free(s.wide), free(s.attended), free(s.inner), free(s.scores);
    free(s.rounded), free(s.unit), free(s.start), free(s.tickets), free(c);
}

// A crew of threads over a model, whose arrays stay the caller's. Null where memory or threads do not suffice.
Decoder* llmo_open(const Model* model, int threads, int context) {
    Decoder* c = (Decoder*)calloc(1, sizeof(Decoder));
    if (!c) return nullptr;
    c->model = *model;
    c->context = context;
    c->phase_count = model->layers * 10 + 4;
    bool hired = c->crew.hire(threads, work, c);
    if (hired && room(c->s.scores, threads * scores_size(c)) && make_room(c, 64, 0)) return c;
    llmo_close(c);
    return nullptr;
}

// Computes one step; 0, or 1 where memory does not suffice.
int llmo_step(Decoder* c, const Step* step) {
    if (!make_room(c, step->rows, step->wanted)) return 1;
    memset(c->s.tickets, 0, sizeof(int32_t) * (size_t)c->phase_count);
    c->step = step;
    c->crew.run();
    return 0;
}

int64_t llmo_size(int which) {
    const int64_t sizes[] = {sizeof(Linear), sizeof(Layer), sizeof(Model), sizeof(Adapter), sizeof(Step)};
    return sizes[which];
}
}
