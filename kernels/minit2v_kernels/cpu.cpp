// Operations of the fast path on a CPU, in float32. cpu.py compiles this file and calls it.
//
// Tensors are in channels-last memory: (frames, height, width, channels), and their channels lie next to each other.
// A Vector holds LANES numbers, and one instruction computes with all of them.

#include <immintrin.h>
#include <omp.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#if defined(__AVX512F__)  // 32 registers of 16 numbers
constexpr int LANES = 16, ROWS = 4, COLUMNS = 6;
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#else  // 16 registers of 8 numbers
constexpr int LANES = 8, ROWS = 2, COLUMNS = 4;
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#endif
#if defined(__AVX512F__) && (defined(__AMX_BF16__) || defined(__AMXBF16__))  // as GCC and as Clang say it
#define MATRIX_UNITS
#endif
typedef int64_t Size;
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

static inline Vector load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
static inline void store(float* p, Vector x) { *reinterpret_cast<Unaligned*>(p) = x; }

// ------------------------------------------------------------------------------------------------------ Matrix product
//
// y = x w', where a row of w holds the weights of one output. So both are read along their rows, and w needs no copy.

constexpr Size PIECE = 1024;  // so many numbers of ROWS + COLUMNS rows fit into the first cache
constexpr Size MANY = 256;    // PIECE numbers of so many rows fit into the second cache

// The sums of neighbours: a0 + a1, a2 + a3, ..., b0 + b1, ...
static inline Vector add_neighbours(Vector a, Vector b) {
  return __builtin_shufflevector(a, b, EVEN) + __builtin_shufflevector(a, b, ODD);
}

// sums[r][c] = the dot product of row r of x and row c of w, k numbers each. It fetches rows of `next` from memory.
template <int R, int C>
static void dot_products(const float* x, Size x_row, const float* w, Size w_row, Size k, float* sums, const float* next,
                         Size next_row) {
  constexpr int ALL = (R * C + LANES - 1) / LANES * LANES;
  Vector sum[ALL] = {};
  for (Size i = 0; i < k; i += LANES) {
    Vector a[R];
    for (int r = 0; r < R; r++) a[r] = load(x + r * x_row + i);
    if (next) {
      __builtin_prefetch(next + i, 0, 2);
      if (next_row) __builtin_prefetch(next + next_row + i, 0, 2);
    }
    for (int c = 0; c < C; c++) {
      Vector b = load(w + c * w_row + i);
      for (int r = 0; r < R; r++) sum[r * C + c] += a[r] * b;
    }
  }
#pragma GCC unroll 8
  for (int first = 0; first < ALL; first += LANES) {
#pragma GCC unroll 8
    for (int n = LANES; n > 1; n /= 2)
#pragma GCC unroll 16
      for (int i = 0; i < n / 2; i++) sum[first + i] = add_neighbours(sum[first + 2 * i], sum[first + 2 * i + 1]);
    store(sums + first, sum[first]);
  }
}

typedef void (*DotProducts)(const float*, Size, const float*, Size, Size, float*, const float*, Size);
#define FOUR(r) dot_products<r, 1>, dot_products<r, 2>, dot_products<r, 3>, dot_products<r, 4>
#if defined(__AVX512F__)
#define SIX(r) {FOUR(r), dot_products<r, 5>, dot_products<r, 6>}
static const DotProducts DOT_PRODUCTS[ROWS][COLUMNS] = {SIX(1), SIX(2), SIX(3), SIX(4)};
#else
static const DotProducts DOT_PRODUCTS[ROWS][COLUMNS] = {{FOUR(1)}, {FOUR(2)}};
#endif

// x (m, k), w (n, k), bias (n) or null, residual (m, n) or null -> y (m, n). The rows lie *_row numbers apart.
static void vector_product(const float* x, Size m, Size x_row, const float* w, Size n, Size w_row, Size k,
                           const float* bias, const float* residual, float* y, Size y_row) {
  Size pieces = (k + PIECE - 1) / PIECE, piece = (k / LANES + pieces - 1) / pieces * LANES;
  for (Size top = 0; top < m; top += MANY)
    for (Size from = 0; from < k; from += piece)
      for (Size column = 0; column < n; column += COLUMNS) {
        Size bottom = std::min(m, top + MANY), size = std::min(piece, k - from);
        Size steps = (bottom - top + ROWS - 1) / ROWS, columns = std::min<Size>(COLUMNS, n - column);
        const float* panel = w + column * w_row + from;
        for (Size step = 0; step < steps; step++) {
          Size row = top + step * ROWS, rows = std::min<Size>(ROWS, bottom - row);
          // Each step fetches one or two rows of the next panel.
          const float* next = step < COLUMNS && column + 2 * COLUMNS <= n ? panel + (COLUMNS + step) * w_row : nullptr;
          Size next_row = step + steps < COLUMNS ? steps * w_row : 0;
          float sums[ROWS * COLUMNS + LANES];
          DOT_PRODUCTS[rows - 1][columns - 1](x + row * x_row + from, x_row, panel, w_row, size, sums, next, next_row);
          for (Size r = 0; r < rows; r++) {
            float *to = y + (row + r) * y_row + column, *sum = sums + r * columns;
            const float* more = from > 0 ? to : residual ? residual + (row + r) * y_row + column : nullptr;
            if (more)
              for (Size c = 0; c < columns; c++) sum[c] += more[c];
            if (bias && from == 0)
              for (Size c = 0; c < columns; c++) sum[c] += bias[column + c];
            if (columns == COLUMNS) std::memcpy(to, sum, sizeof(float) * COLUMNS);  // a size that the compiler knows
            else std::memcpy(to, sum, sizeof(float) * columns);
          }
        }
      }
}

// ------------------------------------------------------------------------------------------------------- Matrix units
//
// Some processors multiply tiles of 16 rows of bfloat16 (AMX). Such a number has 8 binary digits, a float32 has 24. So
// x = high + middle + low, three numbers of bfloat16, and six products of the parts give the digits of a float32:
// high high + high middle + middle high + middle middle + high low + low high. The others are below its last digit.
// Infinity, and numbers above 3.39e38, give NaN. Numbers and results below 1e-33 lose digits.

#ifdef MATRIX_UNITS

typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
struct Tile {
  Vector row[16];  // two numbers of bfloat16 in each place
};
constexpr Size PARTS = 3, DEPTH = 32;  // a step multiplies DEPTH numbers of each row
constexpr Size MOST_STEPS = 20;        // in one sum: each step rounds it six times, so a long sum would lose digits
constexpr Size MOST_SIDE = 16;         // tiles side by side: with so many steps, they fit into the second cache
constexpr Size MOST_TAPS = 9;

// A process must ask Linux once before it may use the matrix units.
static bool has_matrix_units() {
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18;
  static const bool granted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
  return granted;
}

// The memory for tiles of this thread, in one page of 2 MiB if Linux allows it.
static Tile* tiles() {
  struct Memory {
    void* place;
    Memory() : place(std::aligned_alloc(1 << 21, 1 << 21)) {
      if (!place) throw std::bad_alloc();
      madvise(place, 1 << 21, MADV_HUGEPAGE);
    }
    ~Memory() { std::free(place); }
  };
  static_assert((MOST_SIDE + 4) * MOST_STEPS * PARTS * sizeof(Tile) <= 1 << 21);
  static thread_local Memory memory;
  return static_cast<Tile*>(memory.place);
}

struct TileSizes {  // what _tile_loadconfig reads: eight tiles of 16 rows of 64 bytes
  uint8_t palette = 1, start = 0, unused[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Where a convolution reads: the image, the size of the result, and the kernel's width, step and border.
struct Window {
  Size height, width, result_height, result_width, kernel_width, step_y, step_x, border_y, border_x;
};

// One factor of a product. A row has c numbers for each tap, and a tap is a place in the kernel of a convolution.
struct Factor {
  const float* from;
  Size rows, row_size, c, taps = 1, apart = 1;  // apart: how far the numbers of one tap lie apart
  const Window* window = nullptr;               // if null, every row lies at from + row * row_size
  Size first = 0;                               // the number of the first row
};

// At most 32 rows of a factor. As tiles, they are at to[(step * tiles + row / 16) * PARTS + part].
struct Panel {
  const float* place[MOST_TAPS][32];  // the first number of each row, or null
  Integers lanes;
  Size first_step, c, taps, apart, ahead, tiles;
  Tile* to;

  void set(const Factor& f, Size row, Size first, Tile* tiles_at) {
    first_step = first, to = tiles_at, tiles = f.rows - row > 16 ? 2 : 1;
    c = f.c, taps = f.taps, apart = f.apart, ahead = 32 * (f.window ? f.window->step_x * f.c : f.row_size);
    for (int lane = 0; lane < LANES; lane++) lanes[lane] = lane * apart;
    for (Size i = 0; i < 16 * tiles; i++)
      if (row + i >= f.rows)
        for (Size tap = 0; tap < taps; tap++) place[tap][i] = nullptr;
      else if (f.window)
        find_pixels(f, f.first + row + i, i);
      else
        for (Size tap = 0; tap < taps; tap++) place[tap][i] = f.from + (f.first + row + i) * f.row_size + tap;
  }

  // The pixels that the taps read for one pixel of the result. Outside of the image there are none.
  void find_pixels(const Factor& f, Size pixel, Size i) {
    const Window& w = *f.window;
    Size line = pixel / w.result_width, frame = line / w.result_height;
    Size top = (line - frame * w.result_height) * w.step_y - w.border_y;
    Size left = (pixel - line * w.result_width) * w.step_x - w.border_x;
    for (Size tap = 0; tap < taps; tap++) {
      Size y = top + tap / w.kernel_width, x = left + tap % w.kernel_width;
      bool inside = y >= 0 && y < w.height && x >= 0 && x < w.width;
      place[tap][i] = inside ? f.from + ((frame * w.height + y) * w.width + x) * c : nullptr;
    }
  }

  // Writes DEPTH numbers of some rows in parts. Places without a number get 0.
  void split(Size step, Size first, Size last) const {
    if (first == last) return;
    Size at = first_step + step, tap = at % taps, channel = at / taps * DEPTH;
    for (Size row = first; row < last; row++) {
      Vector a = {}, b = {};
      if (const float* from = place[tap][row]) {
        from += channel * apart;
        a = get(from);
        if (channel + LANES < c) b = get(from + LANES * apart);
        const float* next = (apart == 1 ? from : place[0][row] + at * DEPTH) + ahead;  // of the panel after it
        __builtin_prefetch(next, 0, 2);
        __builtin_prefetch(next + LANES, 0, 2);
      }
      Tile* tile = to + (step * tiles + row / 16) * PARTS;
      for (int part = 0; part < PARTS; part++) {
        Bits half = Bits{} + (part < PARTS - 1 ? 0x8000 : 0);  // for rounding; the last part is exact, and keeps NaN
        Bits low = ((Bits)a + half) & 0xffff0000, high = ((Bits)b + half) & 0xffff0000;
        tile[part].row[row % 16] = (Vector)(low >> 16 | high);
        a -= (Vector)low, b -= (Vector)high;
      }
    }
  }

  Vector get(const float* from) const {
    return apart == 1 ? load(from) : (Vector)_mm512_mask_i32gather_ps(__m512{}, 0xffff, (__m512i)lanes, from, 4);
  }
};

// Rows become columns.
static void transpose(Vector* x) {
#define STAGE(step, first, second)                                         \
  for (int i = 0; i < 16; i++)                                             \
    if (!(i & step)) {                                                     \
      Vector a = x[i], b = x[i + step];                                    \
      x[i] = __builtin_shufflevector(a, b, first);                         \
      x[i + step] = __builtin_shufflevector(a, b, second);                 \
    }
#define ARGS(...) __VA_ARGS__
  STAGE(1, ARGS(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
        ARGS(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
  STAGE(2, ARGS(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
        ARGS(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
  STAGE(4, ARGS(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
        ARGS(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
  STAGE(8, ARGS(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
        ARGS(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
}

// sums[r][c] = tiles of a times tiles of b, for R x C pairs. Meanwhile the vector units split rows of the next panel.
// The order of the parts makes the same sums, to the last bit, whether a is x and b is w or the other way round.
template <bool A_IS_X, int R, int C>
static void multiply(const Tile* a, const Tile* b, Size steps, Tile* sums, const Panel& next, Size first, Size last) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (Size step = 0; step < steps; step++, a += R * PARTS, b += C * PARTS) {
    static constexpr int OF_X[] = {2, 1, 1, 0, 0, 0}, OF_W[] = {0, 0, 1, 1, 2, 0};  // the smallest first
    constexpr auto &OF_A = A_IS_X ? OF_X : OF_W, &OF_B = A_IS_X ? OF_W : OF_X;
#pragma GCC unroll 6
    for (int i = 0; i < 6; i++) {
      if (i == 0 || OF_A[i] != OF_A[i - 1]) {
        _tile_loadd(4, a + OF_A[i], 64);
        if (R == 2) _tile_loadd(5, a + PARTS + OF_A[i], 64);
      }
      if (i == 0 || OF_B[i] != OF_B[i - 1]) {
        _tile_loadd(6, b + OF_B[i], 64);
        if (C == 2) _tile_loadd(7, b + PARTS + OF_B[i], 64);
      }
      next.split(step, first + (last - first) * i / 6, first + (last - first) * (i + 1) / 6);
      _tile_dpbf16ps(0, 4, 6);
      if (C == 2) _tile_dpbf16ps(1, 4, 7);
      if (R == 2) _tile_dpbf16ps(2, 5, 6);
      if (R == 2 && C == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  if (C == 2) _tile_stored(1, sums + 1, 64);
  if (R == 2) _tile_stored(2, sums + C, 64);
  if (R == 2 && C == 2) _tile_stored(3, sums + 3, 64);
}

typedef void (*Multiply)(const Tile*, const Tile*, Size, Tile*, const Panel&, Size, Size);
#define ONE_OR_TWO(a_is_x, r) {multiply<a_is_x, r, 1>, multiply<a_is_x, r, 2>}
static const Multiply MULTIPLY[2][2][2] = {{ONE_OR_TWO(false, 1), ONE_OR_TWO(false, 2)},
                                           {ONE_OR_TWO(true, 1), ONE_OR_TWO(true, 2)}};

// y = tile + bias + more, for a tile of y at `row` and `column`.
static void add_tile(const Tile& tile, Size row, Size rows, Size column, Size columns, const float* bias,
                     const float* more, float* y, Size y_row) {
  for (Size i = 0; i < rows; i++) {
    Size place = (row + i) * y_row + column;
    if (columns == 16) {
      Vector sum = tile.row[i];
      if (more) sum += load(more + place);
      if (bias) sum += load(bias + column);
      store(y + place, sum);
    } else
      for (Size j = 0; j < columns; j++)
        y[place + j] = tile.row[i][j] + (more ? more[place + j] : 0) + (bias ? bias[column + j] : 0);
  }
}

// y (rows of x, rows of w) = x w' + bias + residual. The factor with fewer rows is kept as tiles. The other passes by.
static void tile_product(Factor x, Factor w, const float* bias, const float* residual, float* y, Size y_row) {
  if (x.rows == 0 || w.rows == 0) return;
  TileSizes sizes;
  _tile_loadconfig(&sizes);
  bool x_passes = x.rows > w.rows;
  const Factor &passing = x_passes ? x : w, &kept = x_passes ? w : x;
  Size all = (x.c + DEPTH - 1) / DEPTH * x.taps, side = std::min(MOST_SIDE, (kept.rows + 15) / 16);
  Size pieces = (all + MOST_STEPS - 1) / MOST_STEPS, piece = (all + pieces - 1) / pieces;
  Tile *of_kept = tiles(), *of_passing = of_kept + side * piece * PARTS, *of_next = of_passing + 2 * piece * PARTS;
  Panel panels[2], *panel = panels, *next = panels + 1;
  for (Size left = 0; left < kept.rows; left += 16 * side)
    for (Size from = 0; from < all; from += piece) {
      Size steps = std::min(piece, all - from), right = std::min(kept.rows, left + 16 * side);
      Size pairs = (right - left + 31) / 32;
      for (Size pair = 0; pair < pairs; pair++) {
        panel->set(kept, left + 32 * pair, from, of_kept + pair * 2 * steps * PARTS);
        for (Size step = 0; step < steps; step++) {
          panel->split(step, 0, 16 * panel->tiles);
          for (Size i = 0; i < panel->tiles * PARTS; i++) transpose(panel->to[step * panel->tiles * PARTS + i].row);
        }
      }
      panel->set(passing, 0, from, of_passing);
      for (Size step = 0; step < steps; step++) panel->split(step, 0, 16 * panel->tiles);
      for (Size top = 0; top < passing.rows; top += 32) {
        Size todo = 0;
        if (top + 32 < passing.rows) {
          next->set(passing, top + 32, from, panel->to == of_passing ? of_next : of_passing);
          todo = 16 * next->tiles;
        }
        for (Size pair = 0; pair < pairs; pair++) {
          Size r = panel->tiles, c = right - left - 32 * pair > 16 ? 2 : 1;
          Tile sums[4];
          MULTIPLY[x_passes][r - 1][c - 1](panel->to, of_kept + pair * 2 * steps * PARTS, steps, sums, *next,
                                           todo * pair / pairs, todo * (pair + 1) / pairs);
          for (Size i = 0; i < r * c; i++) {
            Size row = top + i / c * 16, column = left + 32 * pair + i % c * 16;
            if (!x_passes) std::swap(row, column), transpose(sums[i].row);
            add_tile(sums[i], row, std::min<Size>(16, x.rows - row), column, std::min<Size>(16, w.rows - column),
                     from == 0 ? bias : nullptr, from == 0 ? residual : y, y, y_row);
          }
        }
        std::swap(panel, next);
      }
    }
  _tile_release();
}

// The same with several threads.
static void tile_product_in_parallel(Factor x, Factor w, const float* bias, const float* residual, float* y,
                                     int threads) {
  Size n = w.rows;
  bool by_rows = x.rows >= threads * MANY || ((n + 31) / 32 < threads && x.rows > n);  // else by columns
  Size panels = ((by_rows ? x.rows : n) + 31) / 32;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (Size part = 0; part < threads; part++) {
    Factor my_x = x, my_w = w, &mine = by_rows ? my_x : my_w;
    mine.first = panels * part / threads * 32;
    mine.rows = std::min(mine.rows, panels * (part + 1) / threads * 32) - mine.first;
    Size place = by_rows ? my_x.first * n : my_w.first;
    tile_product(my_x, my_w, bias ? bias + my_w.first : nullptr, residual ? residual + place : nullptr, y + place, n);
  }
}

// A convolution of x (frames, height, width, c) with w (n, c, kernel height, kernel width), bias (n) or null, and a
// residual as y or null -> y (frames, result height, result width, n). The pairs are for height and width.
extern "C" void conv(const float* x, Size frames, const Size* size, Size c, const float* w, Size n, const Size* kernel,
                     const Size* step, const Size* border, const Size* result, const float* bias, const float* residual,
                     float* y, int threads) {
  Window window = {size[0], size[1], result[0], result[1], kernel[1], step[0], step[1], border[0], border[1]};
  Size taps = kernel[0] * kernel[1];
  Factor pixels = {x, frames * result[0] * result[1], 0, c, taps, 1, &window};
  tile_product_in_parallel(pixels, {w, n, c * taps, c, taps, taps}, bias, residual, y, threads);
}
#endif

// Whether there are matrix units, and Linux grants them. To be called first.
extern "C" int ask_for_matrix_units() {
#ifdef MATRIX_UNITS
  return has_matrix_units();
#endif
  return 0;
}

// As vector_product.
static void product(const float* x, Size m, Size x_row, const float* w, Size n, Size w_row, Size k, const float* bias,
                    const float* residual, float* y, Size y_row) {
#ifdef MATRIX_UNITS
  if (has_matrix_units()) return tile_product({x, m, x_row, k}, {w, n, w_row, k}, bias, residual, y, y_row);
#endif
  vector_product(x, m, x_row, w, n, w_row, k, bias, residual, y, y_row);
}

// x (m, k), w (n, k), bias (n) or null, residual (m, n) or null -> y (m, n).
extern "C" void linear(const float* x, Size m, const float* w, Size n, Size k, const float* bias, const float* residual,
                       float* y, int threads) {
#ifdef MATRIX_UNITS
  if (has_matrix_units()) return tile_product_in_parallel({x, m, k, k}, {w, n, k, k}, bias, residual, y, threads);
#endif
  Size panels = (n + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (Size part = 0; part < threads; part++) {
    Size from = std::min(n, panels * part / threads * COLUMNS);
    Size to = std::min(n, panels * (part + 1) / threads * COLUMNS);
    vector_product(x, m, k, w + from * k, to - from, k, k, bias ? bias + from : nullptr,
                   residual ? residual + from : nullptr, y + from, n);
  }
}

// ------------------------------------------------------------------------------------------------------------ Winograd
//
// 2x2 results of a 3x3 convolution with 16 products, not 36: F(2x2, 3x3) of Lavin and Gray 2015, arXiv:1509.09308.
// y = A' [(G w G') * (B' x B)] A. The products are matrix products over the channels. If every pixel of the image is
// doubled in height and width, 2x2 results read only 3x3 different pixels, and 9 products suffice.
//
// N is 4, or 3 for doubled pixels: a tile reads N x N pixels.

template <int N>
static inline void transform_input(Vector* x, int step) {  // B'
  if (N == 4) {
    Vector x1 = x[step], x2 = x[2 * step];
    x[0] -= x2;
    x[step] = x1 + x2;
    x[2 * step] = x2 - x1;
    x[3 * step] = x1 - x[3 * step];
  } else {
    x[0] -= x[step];
    x[2 * step] = x[step] - x[2 * step];
  }
}

template <int N>
static inline void transform_output(Vector* y, int step) {  // A': the two results are in the first two places
  if (N == 4) {
    Vector y1 = y[step];
    y[0] += y1 + y[2 * step];
    y[step] = y1 - y[2 * step] - y[3 * step];
  } else {
    y[0] += y[step];
    y[step] -= y[2 * step];
  }
}

struct Image {
  Size height, width, channels;
};

template <int N>
static void read_tile(const float* x, Image image, Size row, Size column, const float* zeros, float* to, Size apart) {
  const float* pixels[N * N];
  for (int i = 0; i < N; i++)
    for (int j = 0; j < N; j++) {
      Size r = row + i, c = column + j;
      bool inside = r >= 0 && r < image.height && c >= 0 && c < image.width;
      pixels[i * N + j] = inside ? x + (r * image.width + c) * image.channels : zeros;
    }
  for (Size channel = 0; channel < image.channels; channel += LANES) {
    Vector v[N * N];
    for (int i = 0; i < N * N; i++) v[i] = load(pixels[i] + channel);
    for (int i = 0; i < N; i++) transform_input<N>(v + i, N);
    for (int i = 0; i < N; i++) transform_input<N>(v + i * N, 1);
    for (int i = 0; i < N * N; i++) store(to + i * apart + channel, v[i]);
  }
}

template <int N>
static void write_tile(const float* from, Size apart, const float* bias, float* y, Image image) {
  for (Size channel = 0; channel < image.channels; channel += LANES) {
    Vector v[N * N];
    for (int i = 0; i < N * N; i++) v[i] = load(from + i * apart + channel);
    for (int i = 0; i < N; i++) transform_output<N>(v + i, N);
    for (int i = 0; i < 2; i++) transform_output<N>(v + i * N, 1);
    for (int i = 0; i < 4; i++) {
      Size pixel = (i / 2 * image.width + i % 2) * image.channels + channel;
      Vector sum = v[i / 2 * N + i % 2];
      if (bias) sum += load(bias + channel);
      store(y + pixel, sum);
    }
  }
}

template <int N>
static void convolve(const float* x, Size frames, Image image, const float* w, Size c_out, const float* bias, float* y,
                     Size some, float* scratch, int threads) {
  Size h = N == 4 ? image.height / 2 : image.height, wide = N == 4 ? image.width / 2 : image.width;
  Size c = image.channels, tiles = frames * h * wide;
  Image result = {2 * h, 2 * wide, c_out};
  std::vector<float> zeros(c);
  threads = std::max<Size>(1, std::min<Size>(threads, (tiles + some - 1) / some));  // scratch is for so many
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (Size first = 0; first < tiles; first += some) {
    Size count = std::min(some, tiles - first);
    float* inputs = scratch + omp_get_thread_num() * N * N * some * (c + c_out);
    float* outputs = inputs + N * N * some * c;
    for (Size t = 0; t < count; t++) {
      Size frame = (first + t) / (h * wide), row = (first + t) / wide % h, column = (first + t) % wide;
      int step = N == 4 ? 2 : 1;
      read_tile<N>(x + frame * image.height * image.width * c, image, step * row - 1, step * column - 1, zeros.data(),
                   inputs + t * c, some * c);
    }
    for (int i = 0; i < N * N; i++)
      product(inputs + i * some * c, count, c, w + i * c_out * c, c_out, c, c, nullptr, nullptr,
              outputs + i * some * c_out, c_out);
    for (Size t = 0; t < count; t++) {
      Size frame = (first + t) / (h * wide), row = (first + t) / wide % h, column = (first + t) % wide;
      Size place = ((frame * 2 * h + 2 * row) * 2 * wide + 2 * column) * c_out;
      write_tile<N>(outputs + t * c_out, some * c_out, bias, y + place, result);
    }
  }
}

// x (frames, height, width, c), w (16, c_out, c) of `transform_weight` -> y (frames, height, width, c_out).
// doubled: w (9, c_out, c), y (frames, 2 height, 2 width, c_out). some: tiles at a time. scratch: for each thread that
// has tiles, 16 (or 9) x some x (c + c_out).
extern "C" void winograd(const float* x, Size frames, Size height, Size width, Size c, const float* w, Size c_out,
                         const float* bias, float* y, int doubled, Size some, float* scratch, int threads) {
  auto run = doubled ? convolve<3> : convolve<4>;
  run(x, frames, {height, width, c}, w, c_out, bias, y, some, scratch, threads);
}

// w (c_out, c, 3, 3) -> G w G' (16, c_out, c), or (9, c_out, c) for doubled pixels.
extern "C" void transform_weight(const float* w, Size c_out, Size c, float* to, int doubled, int threads) {
  Size all = c_out * c;
#pragma omp parallel for num_threads(threads)
  for (Size first = 0; first < all; first += LANES) {
    int n = doubled ? 3 : 4;
    float rows[4][3][LANES];
    for (int lane = 0; lane < LANES; lane++)
      for (int j = 0; j < 3; j++) {
        const float* from = w + (first + lane) * 9 + j;
        float w0 = from[0], w1 = from[3], w2 = from[6];
        rows[0][j][lane] = w0;
        rows[1][j][lane] = doubled ? w0 + w1 + w2 : 0.5f * (w0 + w1 + w2);
        rows[2][j][lane] = doubled ? w2 : 0.5f * (w0 - w1 + w2);
        rows[3][j][lane] = w2;
      }
    for (int i = 0; i < n; i++) {
      Vector w0 = load(rows[i][0]), w1 = load(rows[i][1]), w2 = load(rows[i][2]);
      float* place = to + i * n * all + first;
      store(place, w0);
      store(place + all, doubled ? w0 + w1 + w2 : 0.5f * (w0 + w1 + w2));
      store(place + 2 * all, doubled ? w2 : 0.5f * (w0 - w1 + w2));
      if (!doubled) store(place + 3 * all, w2);
    }
  }
}

// -------------------------------------------------------------------------------------------------- Norm and attention

// e^x, with a relative error of 1e-7. x = n log 2 + r, and e^r is its Taylor series of degree 7, |r| < 0.35.
static inline Vector exponential(Vector x) {
  const Vector LEAST = Vector{} - 87.0f, MOST = Vector{} + 88.0f;
  x = x < LEAST ? LEAST : x > MOST ? MOST : x;
  const float ROUND = 12582912.0f;  // 1.5 x 2^23: adding it rounds to a whole number, which is in the lowest bits
  Vector rounded = x * 1.44269504f + ROUND, n = rounded - ROUND;
  Vector r = x - n * 0.693359375f + n * 2.12194440e-4f, sum = r * (1.0f / 5040) + 1.0f / 720;
  const float TERMS[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (float term : TERMS) sum = sum * r + term;
  return x == x ? (Vector)((Integers)sum + ((Integers)rounded << 23)) : x;  // NaN stays NaN
}

// The error function, as Eigen computes it: x P(x^2) / Q(x^2), whose coefficients are fitted for |x| < 4.
static inline Vector erf(Vector x) {
  const Vector MOST = Vector{} + 4.0f;
  x = x > MOST ? MOST : x < -MOST ? -MOST : x;
  const float P[] = {2.77068142495902e-08f,  -2.10102402082508e-06f, -5.69250639462346e-05f,
                     -7.34990630326855e-04f, -2.95459980854025e-03f, -1.60960333262415e-02f};
  const float Q[] = {-2.13374055278905e-04f, -1.68282697438203e-03f, -7.37332916720468e-03f, -1.42647390514189e-02f};
  Vector square = x * x, p = Vector{} - 2.72614225801306e-10f, q = Vector{} - 1.45660718464996e-05f;
  for (float term : P) p = p * square + term;
  for (float term : Q) q = q * square + term;
  return x * p / q;
}

// value, gate (rows, d), bias (2 d) of both or null: value times GELU of gate, in place of value.
extern "C" void geglu(float* value, const float* gate, Size rows, Size d, const float* bias, int threads) {
#pragma omp parallel for num_threads(threads)
  for (Size row = 0; row < rows; row++)
    for (Size i = 0; i < d; i += LANES) {
      float* place = value + row * d + i;
      Vector v = load(place), g = load(gate + row * d + i);
      if (bias) v += load(bias + i), g += load(bias + d + i);
      store(place, v * g * 0.5f * (1 + erf(g * 0.70710678f)));
    }
}

static inline float total(Vector x) {
  float sum = 0;
  for (int lane = 0; lane < LANES; lane++) sum += x[lane];
  return sum;
}

// x (rows, d) becomes x + residual, unless that is null -> y = LayerNorm(x) + positions. positions (frames, d) or null:
// each is for `pixels` rows, one after the other.
extern "C" void layer_norm(float* x, const float* residual, Size rows, Size d, const float* weight, const float* bias,
                           float eps, const float* positions, Size frames, Size pixels, float* y, int threads) {
#pragma omp parallel for num_threads(threads)
  for (Size row = 0; row < rows; row++) {
    float* from = x + row * d;
    Vector sum = {}, square = {};
    for (Size i = 0; i < d; i += LANES) {
      Vector v = load(from + i);
      if (residual) store(from + i, v += load(residual + row * d + i));
      sum += v;
    }
    float mean = total(sum) / d;
    sum = Vector{};
    for (Size i = 0; i < d; i += LANES) {
      Vector apart = load(from + i) - mean;
      sum += apart, square += apart * apart;
    }
    float rest = total(sum) / d, over = 1 / std::sqrt(total(square) / d - rest * rest + eps);  // rest: of the mean
    for (Size i = 0; i < d; i += LANES) {
      Vector v = (load(from + i) - mean - rest) * over * load(weight + i) + load(bias + i);
      if (positions) v += load(positions + row / pixels % frames * d + i);
      store(y + row * d + i, v);
    }
  }
}

// GroupNorm over `span` frames, then SiLU if `silu`: x (frames, pixels, c) -> y. Means and squares are of SOME pixels at
// a time, so that they need one reading of x and lose no digits (Chan et al. 1979).
extern "C" void group_norm(const float* x, Size frames, Size pixels, Size c, Size groups, Size span, const float* weight,
                           const float* bias, float eps, int silu, float* y, int threads) {
  constexpr Size SOME = 32;  // pixels whose numbers fit into the second cache
  Size parts = (pixels + SOME - 1) / SOME, size = c / groups;
  std::vector<double> partial(frames * parts * groups * 2);  // mean, and sum of the squared distances from it
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> means(c), squares(c), scale(c), shift(c);
#pragma omp for
    for (Size part = 0; part < frames * parts; part++) {
      Size first = part % parts * SOME, count = std::min(SOME, pixels - first);
      const float* from = x + (part / parts * pixels + first) * c;
      for (Size i = 0; i < c; i += LANES) {
        Vector sum = {}, square = {};
        for (Size p = 0; p < count; p++) sum += load(from + p * c + i);
        Vector mean = sum / (float)count;
        for (Size p = 0; p < count; p++) {
          Vector d = load(from + p * c + i) - mean;
          square += d * d;
        }
        store(&means[i], mean);
        store(&squares[i], square);
      }
      for (Size g = 0; g < groups; g++) {
        double mean = 0, square = 0;
        for (Size i = g * size; i < (g + 1) * size; i++) mean += means[i];
        mean /= size;
        for (Size i = g * size; i < (g + 1) * size; i++)
          square += squares[i] + count * (means[i] - mean) * (means[i] - mean);
        partial[(part * groups + g) * 2] = mean;
        partial[(part * groups + g) * 2 + 1] = square;
      }
    }
    Size video = -1;
#pragma omp for
    for (Size part = 0; part < frames * parts; part++) {
      Size first = part % parts * SOME, count = std::min(SOME, pixels - first), begin = part / parts / span * span;
      if (begin != video) {
        video = begin;
        for (Size g = 0; g < groups; g++) {
          double mean = 0, square = 0, seen = 0;
          for (Size q = begin * parts; q < (begin + span) * parts; q++) {
            double more = size * std::min(SOME, pixels - q % parts * SOME), apart = partial[(q * groups + g) * 2] - mean;
            mean += apart * more / (seen + more);
            square += partial[(q * groups + g) * 2 + 1] + apart * apart * seen * more / (seen + more);
            seen += more;
          }
          double over = 1 / std::sqrt(square / seen + eps);
          for (Size i = g * size; i < (g + 1) * size; i++) {
            scale[i] = weight[i] * over;
            shift[i] = bias[i] - weight[i] * over * mean;
          }
        }
      }
      Size place = (part / parts * pixels + first) * c;
      for (Size p = 0; p < count; p++)
        for (Size i = 0; i < c; i += LANES) {
          Vector v = load(x + place + p * c + i) * load(&scale[i]) + load(&shift[i]);
          if (silu) v = v / (1 + exponential(-v));
          store(y + place + p * c + i, v);
        }
    }
  }
}

// Attention across at most 64 frames: q, k, v (videos, frames, pixels, heads, d) -> y, contiguous. *_at: how many
// numbers lie between two videos, frames, pixels, heads.
extern "C" void frame_attention(const float* q, const Size* q_at, const float* k, const Size* k_at, const float* v,
                                const Size* v_at, Size videos, Size frames, Size pixels, Size heads, Size d, float* y,
                                int threads) {
  constexpr Size MOST = 64;
  float factor = 1 / std::sqrt((float)d);
  Size padded = (frames + LANES - 1) / LANES * LANES;
#pragma omp parallel for num_threads(threads)
  for (Size pixel = 0; pixel < videos * pixels; pixel++)
    for (Size head = 0; head < heads; head++) {
      Size at[3] = {pixel / pixels, pixel % pixels, head};
      auto begin = [&](const float* x, const Size* s) { return x + at[0] * s[0] + at[1] * s[2] + at[2] * s[3]; };
      float scores[MOST * MOST];
      vector_product(begin(q, q_at), frames, q_at[1], begin(k, k_at), frames, k_at[1], d, nullptr, nullptr, scores,
                     padded);
      for (Size i = 0; i < frames; i++) {
        float *row = scores + i * padded, most = *std::max_element(row, row + frames), sum = 0;
        std::fill(row + frames, row + padded, -INFINITY);
        for (Size j = 0; j < padded; j += LANES) store(row + j, exponential((load(row + j) - most) * factor));
        for (Size j = 0; j < frames; j++) sum += row[j];
        float* to = y + (((at[0] * frames + i) * pixels + at[1]) * heads + head) * d;
        for (Size channel = 0; channel < d; channel += LANES) {
          Vector mixed = {};
          for (Size j = 0; j < frames; j++) mixed += row[j] * load(begin(v, v_at) + j * v_at[1] + channel);
          store(to + channel, mixed / sum);
        }
      }
    }
}
