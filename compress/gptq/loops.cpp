// The solver's inner loops on the CPU. Plain loops over tiles that fit into registers and the first cache: what vectors
// they become is the compiler's business, which is why this file is built once per instruction set (see setup.py).
// Without Python.h, so that a compiler is all that an installation needs; `native.py` calls it through ctypes.
//
// The torch loops of columns.py, descent.py and grid.py say what is computed, and are what this is held against.
// Letters as there: O output rows, I input columns, G groups, g columns of a group. float32, row-major; `ld` is the
// distance of two rows. Per-row losses are float64, since many small changes are added up.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(_MSC_VER)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

using Size = int64_t; // `long` has 32 bits on Windows

namespace {

constexpr int kTile = 32;    // output rows side by side: four AVX2 registers, two of AVX-512, eight of NEON
constexpr int kBlock = 64;   // columns that `round_block` is given at most
constexpr int kLeaf = 64;    // columns of a triangle that `factor_leaf` is given at most
constexpr int kLanes = 16;   // codes that a sweep looks at together
constexpr int kLevels = 256; // entries of a table at most

// What codes may stand for: all integers from low to high, or the entries of a table, by number.
struct Grid {
    float low, high;
    const float* levels;
    int count;
};

// Adding 1.5 * 2^23 leaves no bits behind the point: round to nearest, ties to even, as torch does, on every machine.
inline float nearest_integer(float x, float low, float high) {
    x = std::min(std::max(x, low - 1.0f), high + 1.0f);
    x = (x + 12582912.0f) - 12582912.0f;
    return std::min(std::max(x, low), high);
}

struct Integers {
    float low, high;
    explicit Integers(const Grid& grid) : low(grid.low), high(grid.high) {}
    float value(int8_t code) const { return code; }
    float beside(int8_t code, bool up) const { return std::min(std::max(code + (up ? 1.0f : -1.0f), low), high); }
    float nearest(float x) const { return nearest_integer(x, low, high); }
    int8_t code(float value) const { return static_cast<int8_t>(value); }
};

struct Table {
    float levels[kLevels], middle[kLevels];
    int count;
    explicit Table(const Grid& grid) : count(std::min(grid.count, kLevels)) {
        for (int k = 0; k < count; k++) levels[k] = grid.levels[k];
        for (int k = 0; k + 1 < count; k++) middle[k] = 0.5f * (levels[k] + levels[k + 1]);
    }
    float value(int8_t code) const { return levels[static_cast<uint8_t>(code)]; }
    float beside(int8_t code, bool up) const {
        const int number = static_cast<uint8_t>(code);
        return levels[std::min(std::max(number + (up ? 1 : -1), 0), count - 1)];
    }
    float nearest(float x) const {
        float found = levels[0];
        for (int k = 0; k + 1 < count; k++) found = x > middle[k] ? levels[k + 1] : found;
        return found;
    }
    int8_t code(float value) const {
        int found = 0;
        for (int k = 0; k + 1 < count; k++) found += value > middle[k];
        return static_cast<int8_t>(found);
    }
};

enum Kind { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat8 = 3, kPower = 4 };

inline float to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float to_float16(float x) { // x in [2^-24, 65504]
    if (x < 6.103515625e-05f) {    // subnormal: multiples of 2^-24
        float scaled = x * 16777216.0f;
        return ((scaled + 12582912.0f) - 12582912.0f) / 16777216.0f;
    }
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = (bits + 0xfffu + ((bits >> 13) & 1u)) & 0xffffe000u;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float to_float8(float x) { // E4M3, x in [2^-9, 448]
    if (x < 0.015625f) {          // subnormal: multiples of 2^-9
        float scaled = x * 512.0f;
        return ((scaled + 12582912.0f) - 12582912.0f) / 512.0f;
    }
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = (bits + 0x7ffffu + ((bits >> 20) & 1u)) & 0xfff00000u;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float to_power(float x) { // E8M0: the nearest power of two, of two the larger; x is a normal number
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = (bits + 0x400000u) & 0x7f800000u;
    std::memcpy(&x, &bits, 4);
    return x;
}

// `grid.storable_scales`; with `either` a scale may be negative.
inline float storable(float s, int kind, bool either) {
    float sign = 1.0f;
    if (either && s < 0) sign = -1.0f, s = -s;
    s = s > 0 ? s : 1.0f;
    if (kind == kBFloat16) s = to_bfloat16(std::min(std::max(s, 1.17549435e-38f), 3.38953139e38f));
    if (kind == kFloat16) s = to_float16(std::min(std::max(s, 5.96046448e-08f), 65504.0f));
    if (kind == kFloat32) s = std::min(std::max(s, 1.17549435e-38f), 3.40282347e38f);
    if (kind == kFloat8) s = to_float8(std::min(std::max(s, 0.001953125f), 448.0f));
    if (kind == kPower) s = to_power(std::min(std::max(s, 1.17549435e-38f), 4.25352959e37f));
    return sign * s;
}

// The nearest multiple of a step by an integer within bounds: `grid.on_lattice`.
inline float on_lattice(float s, float step, float least, float most) {
    if (step == 0) return 0;
    return std::min(std::max(std::nearbyint(s / step), least), most) * step;
}

// One scale a row for a group, from coarse to fine, of a tile of up to kTile rows: see `grid.search_scales`.
template <class Codes> struct Search {
    const Codes& codes;
    const float *weight, *importance;
    Size ldw;
    int columns, rows, kind;
    bool either;
    float base[kTile], best[kTile], share[kTile], least[kTile];

    void attempt(const float* factor) {
        float scale[kTile], error[kTile];
        for (int t = 0; t < kTile; t++) scale[t] = 1, error[t] = 0;
        for (int t = 0; t < rows; t++) scale[t] = storable(base[t] * factor[t], kind, either);
        float inverse[kTile];
        for (int t = 0; t < kTile; t++) inverse[t] = 1.0f / scale[t];
        if (rows == kTile) {
            add<kTile>(scale, inverse, error, kTile);
        } else {
            add<0>(scale, inverse, error, rows);
        }
        for (int t = 0; t < rows; t++)
            if (error[t] < least[t]) least[t] = error[t], best[t] = scale[t], share[t] = factor[t];
    }

    template <int Fixed> void add(const float* scale, const float* inverse, float* error, int count) const {
        const int n = Fixed ? Fixed : count;
        for (int i = 0; i < columns; i++) {
            const float* w = weight + i * ldw;
            const float important = importance[i];
            for (int t = 0; t < n; t++) {
                float rest = w[t] - codes.nearest(w[t] * inverse[t]) * scale[t];
                error[t] += important * rest * rest;
            }
        }
    }
};

template <class Codes>
void search(const Grid& grid, const float* weight, Size ldw, const float* importance, int groups, int group, Size rows,
            int kind, int either, const float* factors, int count, float first_step, int halvings, float* scales,
            Size lds) {
    const Codes codes(grid);
    const float up = grid.high, down = grid.low, most = std::max(std::fabs(up), std::fabs(down));
    for (int index = 0; index < groups; index++) {
        const float* from = weight + static_cast<Size>(index) * group * ldw;
        for (Size row = 0; row < rows; row += kTile) {
            const int n = static_cast<int>(std::min<Size>(kTile, rows - row));
            float high[kTile], low[kTile], unclipped[kTile], factor[kTile];
            for (int t = 0; t < n; t++) high[t] = -INFINITY, low[t] = INFINITY;
            for (int i = 0; i < group; i++)
                for (int t = 0; t < n; t++) {
                    const float w = from[i * ldw + row + t];
                    high[t] = std::max(high[t], w), low[t] = std::min(low[t], w);
                }
            Search<Codes> found{codes, from + row,  importance + static_cast<Size>(index) * group,
                                ldw,   group,       n,
                                kind,  either != 0, {},
                                {},    {},          {}};
            for (int t = 0; t < n; t++) {
                const float largest = std::max(high[t], -low[t]);
                found.base[t] = largest / up;
                const float least = std::max(high[t] / up, low[t] / down);
                unclipped[t] = least / (found.base[t] > 0 ? found.base[t] : 1.0f);
                found.best[t] = storable(found.base[t], kind, false);
                found.share[t] = 1.0f, found.least[t] = INFINITY;
            }
            for (int k = 0; k < count; k++) {
                for (int t = 0; t < n; t++) factor[t] = factors[k];
                found.attempt(factor);
            }
            found.attempt(unclipped);
            if (either) { // the other way round: the Size side of the codes where the short one was
                for (int k = 0; k < count; k++) {
                    for (int t = 0; t < n; t++) factor[t] = -factors[k] * (up < most ? up / most : 1.0f);
                    found.attempt(factor);
                }
            }
            float step = first_step, middle[kTile];
            for (int h = 0; h < halvings; h++) {
                step /= 2;
                for (int t = 0; t < n; t++) middle[t] = found.share[t];
                for (int t = 0; t < n; t++) factor[t] = middle[t] + step;
                found.attempt(factor);
                for (int t = 0; t < n; t++) factor[t] = middle[t] - step;
                found.attempt(factor);
            }
            for (int t = 0; t < n; t++) scales[index * lds + row + t] = found.best[t];
        }
    }
}

// A block of GPTQ's columns, the last one first: see `columns.round_block`.
template <class Codes>
void round_columns(const Grid& grid, const float* feedback, Size ldf, const float* weight, Size ldw, const int* column,
                   const float* unit, Size ldu, const float* square, const int* group, const float* scales, Size lds,
                   int width, Size rows, int8_t* out, Size ldo, float* residual, Size ldr, float* errors, Size lde,
                   double* loss) {
    const Codes codes(grid);
    float down[kBlock][kBlock]; // down[j][i] = unit[i][j]: what column j takes of the residuals of those behind it
    for (int i = 0; i < width; i++)
        for (int j = 0; j < i; j++) down[j][i] = unit[i * ldu + j];
    alignas(64) float rest[kBlock][kTile];
    for (Size row = 0; row < rows; row += kTile) {
        const int n = static_cast<int>(std::min<Size>(kTile, rows - row));
        float lost[kTile] = {};
        for (int j = width - 1; j >= 0; j--) {
            alignas(64) float sum[kTile] = {}, w[kTile] = {}, s[kTile];
            for (int i = j + 1; i < width; i++) {
                const float factor = down[j][i];
                for (int t = 0; t < kTile; t++) sum[t] += factor * rest[i][t];
            }
            const float *wj = weight + column[j] * ldw + row, *sj = scales + group[j] * lds + row;
            for (int t = 0; t < kTile; t++) s[t] = 1;
            for (int t = 0; t < n; t++) w[t] = wj[t], s[t] = sj[t];
            if (feedback)
                for (int t = 0; t < n; t++) sum[t] += feedback[j * ldf + row + t];
            alignas(64) float q[kTile], e[kTile];
            for (int t = 0; t < kTile; t++) {
                const float x = w[t] + sum[t];
                q[t] = codes.nearest(x / s[t]);
                e[t] = x - q[t] * s[t];
                rest[j][t] = w[t] - q[t] * s[t];
            }
            for (int t = 0; t < kTile; t++) {
                const float weighed = square[j] * e[t];
                lost[t] += weighed * e[t];
                e[t] = weighed;
            }
            for (int t = 0; t < n; t++) {
                out[j * ldo + row + t] = codes.code(q[t]);
                residual[j * ldr + row + t] = rest[j][t];
                errors[j * lde + row + t] = e[t];
            }
        }
        for (int t = 0; t < n; t++) loss[row + t] += lost[t];
    }
}

// The best code of columns first to last of one row in turn, given all others; `changed` tells what one step does to
// the slopes. Returns whether a code changed.
template <class Codes, class Changed>
bool sweep(const Codes& codes, int8_t* code, const float* slope, const float* inverse, const float* diagonal,
           float scale, int first, int last, double* lost, const Changed& changed) {
    const float reciprocal = 1.0f / scale;
    bool any = false;
    auto settle = [&](int j) {
        const float before = codes.value(code[j]);
        const float after = codes.nearest(slope[j] * inverse[j] * reciprocal + before);
        if (after == before) return;
        const float step = (after - before) * scale;
        *lost += static_cast<double>(step) * (step * diagonal[j] - 2 * slope[j]);
        code[j] = codes.code(after);
        any = true;
        changed(j, step);
    };
    int j = first;
    for (; j + kLanes <= last; j += kLanes) {
        int differs = 0;
        for (int k = 0; k < kLanes; k++) {
            const float before = codes.value(code[j + k]);
            differs |= codes.nearest(slope[j + k] * inverse[j + k] * reciprocal + before) != before;
        }
        if (differs)
            for (int k = 0; k < kLanes; k++) settle(j + k);
    }
    for (; j < last; j++) settle(j);
    return any;
}

// The same of all columns of a row until none of its codes changes; `slope` stays true. Whether one did.
template <class Codes>
bool descend_row(const Codes& codes, const float* hessian, Size ldh, const float* inverse, const float* diagonal,
                 const float* ridge, int columns, int group, int sweeps, int8_t* code, const float* scales,
                 float* slope, double* lost) {
    auto changed = [&](int j, float step) {
        const float* h = hessian + j * ldh;
        for (int i = 0; i < columns; i++) slope[i] -= step * h[i];
        slope[j] -= step * ridge[j];
    };
    bool ever = false;
    for (int round = 0; round < sweeps; round++) {
        bool any = false;
        for (int first = 0; first < columns; first += group)
            any |= sweep(codes, code, slope, inverse, diagonal, scales[first / group], first, first + group, lost,
                         changed);
        if (!any) break;
        ever = true;
    }
    return ever;
}

template <class Codes>
void descend(const Grid& grid, const float* hessian, Size ldh, const float* inverse, const float* diagonal,
             const float* ridge, int columns, int group, Size rows, int sweeps, int8_t* code, Size ldc,
             const float* scales, Size lds, float* slope, Size ldl, double* loss) {
    const Codes codes(grid);
    for (Size row = 0; row < rows; row++)
        descend_row(codes, hessian, ldh, inverse, diagonal, ridge, columns, group, sweeps, code + row * ldc,
                    scales + row * lds, slope + row * ldl, loss + row);
}

// Rows one after the other, each given all others, in `rounds` or until none changes: see `two_sided`. What a row moves
// moves the slopes of the others by their shares; `moved` gets the sum of it, and `changed` whether there was any.
template <class Codes>
void descend_together(const Grid& grid, const float* hessian, Size ldh, const float* inverse, const float* diagonal,
                      const float* ridge, int columns, int group, Size rows, int sweeps, int rounds, const float* share,
                      Size ldb, int8_t* code, Size ldc, const float* scales, Size lds, float* slope, Size ldl,
                      float* moved, Size ldm, uint8_t* changed) {
    const Codes codes(grid);
    std::vector<float> before(columns);
    float* by = before.data();
    for (Size row = 0; row < rows; row++) changed[row] = 0, std::fill_n(moved + row * ldm, columns, 0.0f);
    for (int round = 0; round < rounds; round++) {
        bool any = false;
        for (Size row = 0; row < rows; row++) {
            float *s = slope + row * ldl, *m = moved + row * ldm;
            std::copy_n(s, columns, by);
            double lost = 0;
            if (!descend_row(codes, hessian, ldh, inverse, diagonal, ridge, columns, group, sweeps, code + row * ldc,
                             scales + row * lds, s, &lost))
                continue;
            any = true, changed[row] = 1;
            for (int i = 0; i < columns; i++) by[i] = s[i] - by[i], m[i] += by[i];
            for (Size other = 0; other < rows; other++) {
                if (other == row) continue;
                float* o = slope + other * ldl;
                const float part = share[other * ldb + row];
                for (int i = 0; i < columns; i++) o[i] += part * by[i];
            }
        }
        if (!any) break;
    }
}

// Sweeps in which a code may also move to the next level where that raises the loss a little: see `annealing`.
template <class Codes>
void anneal(const Grid& grid, const float* hessian, Size ldh, const float* diagonal, const float* ridge, int columns,
            int group, Size rows, int sweeps, const float* allowed, Size lda, int8_t* code, Size ldc,
            const float* scales, Size lds, float* slope, Size ldl, double* loss) {
    const Codes codes(grid);
    for (Size row = 0; row < rows; row++) {
        int8_t* c = code + row * ldc;
        float* s = slope + row * ldl;
        const float share = static_cast<float>(std::max(loss[row], 0.0)) / columns;
        for (int round = 0; round < sweeps; round++) {
            const float* raise = allowed + round * lda;
            for (int first = 0; first < columns; first += group) {
                const float scale = scales[row * lds + first / group];
                auto step = [&](int j) {
                    return (codes.beside(c[j], s[j] * scale > 0) - codes.value(c[j])) * scale;
                };
                auto moves = [&](int j, float by) {
                    return by != 0 && by * (by * diagonal[j] - 2 * s[j]) < share * raise[j];
                };
                auto settle = [&](int j) {
                    const float by = step(j);
                    if (!moves(j, by)) return;
                    loss[row] += static_cast<double>(by) * (by * diagonal[j] - 2 * s[j]);
                    c[j] = codes.code(codes.beside(c[j], s[j] * scale > 0));
                    const float* h = hessian + j * ldh;
                    for (int i = 0; i < columns; i++) s[i] -= by * h[i];
                    s[j] -= by * ridge[j];
                };
                const int last = first + group;
                int j = first;
                for (; j + kLanes <= last; j += kLanes) {
                    int any = 0;
                    for (int k = 0; k < kLanes; k++) any |= moves(j + k, step(j + k));
                    if (any)
                        for (int k = 0; k < kLanes; k++) settle(j + k);
                }
                for (; j < last; j++) settle(j);
            }
        }
    }
}

// Scales of one group to their least-squares values, then its codes: see `descent.refit_group`.
template <class Codes>
void refit(const Grid& grid, const float* hessian, Size ldh, const float* inverse, const float* diagonal,
           const float* ridge, int group, Size rows, int sweeps, int kind, int either, const float* response, Size ldp,
           int8_t* code, Size ldc, float* scales, Size lds, float* slope, Size ldl, float* change, Size ldd,
           const float* lattice, Size ldt, const float* zeros, Size ldz, float least, float most, double* loss) {
    const Codes codes(grid);
    for (Size row = 0; row < rows; row++) {
        const float zero = zeros ? zeros[row * ldz] : 0;
        int8_t* c = code + row * ldc;
        float *s = slope + row * ldl, *moved = change + row * ldd, &scale = scales[row * lds];
        const float* p = response + row * ldp;
        double gain = 0, curvature = 0;
        float gains[kLanes] = {}, curvatures[kLanes] = {}; // lanes, since sums are not to be reordered by a compiler
        auto weigh = [&](int j, int lane) {
            const float q = codes.value(c[j]) - zero;
            moved[j] = q;
            gains[lane] += q * s[j];
            curvatures[lane] += q * (p[j] + ridge[j] * q);
        };
        int done = 0;
        for (; done + kLanes <= group; done += kLanes)
            for (int lane = 0; lane < kLanes; lane++) weigh(done + lane, lane);
        for (; done < group; done++) weigh(done, 0);
        for (int lane = 0; lane < kLanes; lane++) gain += gains[lane], curvature += curvatures[lane];
        const float before = scale;
        float step = 0;
        if (curvature > 0) {
            const float wanted = before + static_cast<float>(gain / curvature);
            bool allowed = either ? (wanted < 0) == (before < 0) && wanted != 0 : wanted > 0;
            if (lattice) {
                const float after = on_lattice(wanted, lattice[row * ldt], least, most);
                allowed = allowed && after != 0;
                step = after - before;
            } else {
                step = storable(wanted, kind, either != 0) - before;
            }
            const double difference = step * (step * curvature - 2 * gain);
            if (allowed && difference < 0) {
                loss[row] += difference;
                scale = before + step;
                for (int j = 0; j < group; j++) s[j] -= step * (p[j] + ridge[j] * moved[j]);
            } else {
                step = 0;
            }
        }
        auto changed = [&](int j, float by) {
            const float* h = hessian + j * ldh;
            for (int i = 0; i < group; i++) s[i] -= by * h[i];
            s[j] -= by * ridge[j];
        };
        for (int round = 0; round < sweeps; round++)
            if (!sweep(codes, c, s, inverse, diagonal, scale, 0, group, loss + row, changed)) break;
        for (int j = 0; j < group; j++) moved[j] = (codes.value(c[j]) - zero) * scale - moved[j] * before;
    }
}

// What rounding to nearest leaves, in the order of solving.
template <class Codes>
void nearest(const Grid& grid, const float* weight, Size ldw, const int* column, const int* group, const float* scales,
             Size lds, int columns, Size rows, float* residual, Size ldr) {
    const Codes codes(grid);
    for (int j = 0; j < columns; j++) {
        const float *w = weight + column[j] * ldw, *s = scales + group[j] * lds;
        float* rest = residual + j * ldr;
        for (Size o = 0; o < rows; o++) rest[o] = w[o] - codes.nearest(w[o] / s[o]) * s[o];
    }
}

// Adds to every row's total the weighed squares of a few columns.
void add_squares(const float* in, Size ldi, const float* weight, int columns, Size rows, double* total) {
    for (Size row = 0; row < rows; row += kTile) {
        const int n = static_cast<int>(std::min<Size>(kTile, rows - row));
        for (int first = 0; first < columns; first += kBlock) {
            float some[kTile] = {}; // of a few columns: a float holds them well
            for (int p = first; p < std::min(first + kBlock, columns); p++)
                for (int t = 0; t < n; t++) some[t] += weight[p] * in[p * ldi + row + t] * in[p * ldi + row + t];
            for (int t = 0; t < n; t++) total[row + t] += some[t];
        }
    }
}

// out[o][index[p]] = in[p][o]
template <class Number>
void turn(const Number* in, Size ldi, const int* index, int columns, Size rows, Number* out, Size ldo) {
    constexpr Size kSide = 16;
    for (Size row = 0; row < rows; row += kSide) {
        const Size stop = std::min(row + kSide, rows);
        for (int p = 0; p < columns; p++)
            for (Size o = row; o < stop; o++) out[o * ldo + index[p]] = in[p * ldi + o];
    }
}

// Of every row: sum of ridge * (w - q)^2, and of ridge * w^2.
template <class Codes>
void squares(const Grid& grid, const float* weight, Size ldw, const int8_t* code, Size ldc, const float* scales,
             Size lds, const float* zeros, Size ldz, int columns, int group, Size rows, const float* ridge,
             double* left, double* whole) {
    const Codes codes(grid);
    for (Size row = 0; row < rows; row++) {
        double sum = 0, all = 0;
        for (int first = 0; first < columns; first += group) {
            const float* w = weight + row * ldw + first;
            const int8_t* c = code + row * ldc + first;
            const float s = scales[row * lds + first / group];
            const float zero = zeros ? zeros[row * ldz + first / group] : 0;
            float some[kLanes] = {}, every[kLanes] = {};
            auto add = [&](int j, int lane) {
                const float rest = w[j] - (codes.value(c[j]) - zero) * s;
                some[lane] += ridge[first + j] * rest * rest;
                every[lane] += ridge[first + j] * w[j] * w[j];
            };
            int j = 0;
            for (; j + kLanes <= group; j += kLanes)
                for (int lane = 0; lane < kLanes; lane++) add(j + lane, lane);
            for (; j < group; j++) add(j, 0);
            for (int lane = 0; lane < kLanes; lane++) sum += some[lane], all += every[lane];
        }
        left[row] = sum, whole[row] = all;
    }
}

} // namespace

EXPORT int moepress_version() { return 6; }

// Lower Cholesky factor in place, and its inverse [kLeaf, kLeaf] with zeros above; 0, or 1 where it is not positive.
EXPORT int moepress_factor_leaf(float* matrix, Size ld, int size, float* inverse) {
    double a[kLeaf][kLeaf], b[kLeaf][kLeaf];
    for (int i = 0; i < size; i++)
        for (int j = 0; j < size; j++) a[i][j] = matrix[std::max(i, j) * ld + std::min(i, j)], b[i][j] = i == j;
    // Rows of the transposed factor, so that every inner loop is contiguous; b becomes the inverse along the way.
    for (int k = 0; k < size; k++) {
        if (!(a[k][k] > 0) || !std::isfinite(a[k][k])) return 1;
        const double pivot = 1.0 / std::sqrt(a[k][k]);
        for (int j = k; j < size; j++) a[k][j] *= pivot;
        for (int j = 0; j <= k; j++) b[k][j] *= pivot;
        for (int i = k + 1; i < size; i++) {
            const double factor = a[k][i];
            for (int j = i; j < size; j++) a[i][j] -= factor * a[k][j];
            for (int j = 0; j <= k; j++) b[i][j] -= factor * b[k][j];
        }
    }
    for (int i = 0; i < size; i++)
        for (int j = 0; j <= i; j++) matrix[i * ld + j] = static_cast<float>(a[j][i]);
    for (int i = 0; i < kLeaf; i++)
        for (int j = 0; j < kLeaf; j++)
            inverse[i * kLeaf + j] = i < size && j <= i ? static_cast<float>(b[i][j]) : 0.0f;
    return 0;
}

#define GRID float low, float high, const float *levels, int count
#define WITH(function, ...)                                                                                            \
    const Grid grid{low, high, levels, count};                                                                         \
    return levels ? function<Table>(grid, __VA_ARGS__) : function<Integers>(grid, __VA_ARGS__)

EXPORT void moepress_search_scales(GRID, const float* weight, Size ldw, const float* importance, int groups, int group,
                                   Size rows, int kind, int either, const float* factors, int tried, float step,
                                   int halvings, float* scales, Size lds) {
    WITH(search, weight, ldw, importance, groups, group, rows, kind, either, factors, tried, step, halvings, scales,
         lds);
}

EXPORT void moepress_round_block(GRID, const float* feedback, Size ldf, const float* weight, Size ldw,
                                 const int* column, const float* unit, Size ldu, const float* square, const int* group,
                                 const float* scales, Size lds, int width, Size rows, int8_t* codes, Size ldc,
                                 float* residual, Size ldr, float* errors, Size lde, double* loss) {
    WITH(round_columns, feedback, ldf, weight, ldw, column, unit, ldu, square, group, scales, lds, width, rows, codes,
         ldc, residual, ldr, errors, lde, loss);
}

EXPORT void moepress_descend(GRID, const float* hessian, Size ldh, const float* inverse, const float* diagonal,
                             const float* ridge, int columns, int group, Size rows, int sweeps, int8_t* codes, Size ldc,
                             const float* scales, Size lds, float* slope, Size ldl, double* loss) {
    WITH(descend, hessian, ldh, inverse, diagonal, ridge, columns, group, rows, sweeps, codes, ldc, scales, lds, slope,
         ldl, loss);
}

EXPORT void moepress_descend_together(GRID, const float* hessian, Size ldh, const float* inverse, const float* diagonal,
                                      const float* ridge, int columns, int group, Size rows, int sweeps, int rounds,
                                      const float* share, Size ldb, int8_t* codes, Size ldc, const float* scales,
                                      Size lds, float* slope, Size ldl, float* moved, Size ldm, uint8_t* changed) {
    WITH(descend_together, hessian, ldh, inverse, diagonal, ridge, columns, group, rows, sweeps, rounds, share, ldb,
         codes, ldc, scales, lds, slope, ldl, moved, ldm, changed);
}

EXPORT void moepress_anneal(GRID, const float* hessian, Size ldh, const float* diagonal, const float* ridge, int columns,
                            int group, Size rows, int sweeps, const float* allowed, Size lda, int8_t* codes, Size ldc,
                            const float* scales, Size lds, float* slope, Size ldl, double* loss) {
    WITH(anneal, hessian, ldh, diagonal, ridge, columns, group, rows, sweeps, allowed, lda, codes, ldc, scales, lds,
         slope, ldl, loss);
}

EXPORT void moepress_refit_group(GRID, const float* hessian, Size ldh, const float* inverse, const float* diagonal,
                                 const float* ridge, int group, Size rows, int sweeps, int kind, int either,
                                 const float* response, Size ldp, int8_t* codes, Size ldc, float* scales, Size lds,
                                 float* slope, Size ldl, float* change, Size ldd, const float* lattice, Size ldt,
                                 const float* zeros, Size ldz, float least, float most, double* loss) {
    WITH(refit, hessian, ldh, inverse, diagonal, ridge, group, rows, sweeps, kind, either, response, ldp, codes, ldc,
         scales, lds, slope, ldl, change, ldd, lattice, ldt, zeros, ldz, least, most, loss);
}

EXPORT void moepress_nearest(GRID, const float* weight, Size ldw, const int* column, const int* group,
                             const float* scales, Size lds, int columns, Size rows, float* residual, Size ldr) {
    WITH(nearest, weight, ldw, column, group, scales, lds, columns, rows, residual, ldr);
}

EXPORT void moepress_squares(GRID, const float* weight, Size ldw, const int8_t* codes, Size ldc, const float* scales,
                             Size lds, const float* zeros, Size ldz, int columns, int group, Size rows,
                             const float* ridge, double* left, double* whole) {
    WITH(squares, weight, ldw, codes, ldc, scales, lds, zeros, ldz, columns, group, rows, ridge, left, whole);
}

EXPORT void moepress_add_squares(const float* in, Size ldi, const float* weight, int columns, Size rows,
                                 double* total) {
    add_squares(in, ldi, weight, columns, rows, total);
}

EXPORT void moepress_turn_floats(const float* in, Size ldi, const int* index, int columns, Size rows, float* out,
                                 Size ldo) {
    turn(in, ldi, index, columns, rows, out, ldo);
}

EXPORT void moepress_turn_codes(const int8_t* in, Size ldi, const int* index, int columns, Size rows, int8_t* out,
                                Size ldo) {
    turn(in, ldi, index, columns, rows, out, ldo);
}
