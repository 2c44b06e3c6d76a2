// Attention of many rows a sequence over the paged cache, for CPUs: prompts.
//
// Tiles of keys against blocks of query rows with a running softmax (FlashAttention-2, Dao 2023,
// algorithm 1): no mask, no matrix of scores. Query heads that share keys are rows of one block. A
// tile of keys and values is laid out once for all of a span's rows, out of the blocks where it lies.
// Products are of bfloat16 where the CPU has them, else of single precision; scores, softmax and sums
// are of single precision. Probabilities are rounded to the products' type, as in torch.
//
// Tiles begin at multiples of kTile of the position, and what a row does not see adds zeros: a row's
// result depends neither on the rows beside it nor on where its span begins.

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "numbers.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define FATHOM_BFLOAT16 1
#endif

namespace {

// A register's lanes, and how many registers of results each of kRows query rows has at once: what
// the register file holds, for GCC keeps longer vectors than the machine's in memory.
constexpr int kRows = 6;
#if defined(__AVX512F__)
constexpr int kLanes = 16, kWide = 4;
#elif defined(__AVX__)
constexpr int kLanes = 8, kWide = 2;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kWide = 4;
#else
constexpr int kLanes = 4, kWide = 2;
#endif
constexpr int kStrip = kWide * kLanes;  // keys
constexpr int kTile = 512;              // keys that share one step of the softmax

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

template <typename Vector>
inline Vector load(const void* from) {
  Vector values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

template <typename Vector>
inline void store(void* to, Vector values) {
  std::memcpy(to, &values, sizeof values);
}

struct alignas(64) Line {
  char bytes[64];
};

// Memory of a thread, kept for its next span; vectors in it lie on cache lines.
struct Scratch {
  std::vector<Line> lines[8];

  template <typename T>
  T* take(int which, int64_t count) {
    lines[which].resize((count * sizeof(T) + sizeof(Line) - 1) / sizeof(Line));
    return reinterpret_cast<T*>(lines[which].data());
  }
};

// E: what is multiplied. kPair of them, along the summed axis, are an item of 4 bytes.
template <typename E>
constexpr int kPair = 4 / sizeof(E);

inline Floats add_products(Floats acc, const float* b, const float* item) {
  return acc + load<Floats>(b) * *item;
}

inline void store_as(float* to, Floats values) { store(to, values); }

#if FATHOM_BFLOAT16

inline Floats add_products(Floats acc, const bfloat16* b, const bfloat16* item) {
  const __m512i both = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(item));
  return (Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_load_si512(b), (__m512bh)both);
}

inline void store_as(bfloat16* to, Floats values) {
  store(to, _mm512_cvtneps_pbh((__m512)values));
}

#endif

// acc[r][n] += sum over steps of an item of row r of `a` times 16 columns of `b`.
template <typename E, int N>
inline void multiply(const E* a, int64_t a_stride, const E* b, int64_t b_stride, int64_t steps,
                     Floats (&acc)[kRows][N]) {
  for (int64_t k = 0; k < steps; ++k, a += kPair<E>, b += b_stride)
    for (int r = 0; r < kRows; ++r)
      for (int n = 0; n < N; ++n)
        acc[r][n] = add_products(acc[r][n], b + n * kLanes * kPair<E>, a + r * a_stride);
}

// The second where either is NaN.
inline Floats larger_of(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// 2^x for x <= 0 by minimax polynomials, to 2 units in the last place of a float, to 1e-4 for
// bfloat16, which rounds by 4e-3; from -126 on 2^-126. 2^0 is 1 exactly, NaN stays NaN.
template <typename E>
inline Floats exp2_of(Floats x) {
  x = larger_of(Floats{} - 126.0f, x);
  const Floats shifted = x + 12582912.0f;  // rounds to a whole number
  const Floats r = x - (shifted - 12582912.0f);
  Floats y;
  if constexpr (kPair<E> == 1) {
    y = r * 1.535336188e-4f + 1.339887440e-3f;
    y = y * r + 9.618437357e-3f;
    y = y * r + 5.550332471e-2f;
    y = y * r + 2.402264791e-1f;
    y = y * r + 6.931472028e-1f;
  } else {
    y = r * 5.500860537e-2f + 2.422110072e-1f;
    y = y * r + 6.932829674e-1f;
  }
  y = y * r + 1.0f;
  return y * (Floats)(((Words)shifted << 23) + 0x3f800000u);
}

inline float largest_of(Floats values) {
  float parts[kLanes], largest = -INFINITY;
  store(parts, values);
#pragma omp simd reduction(max : largest)
  for (int i = 0; i < kLanes; ++i) largest = largest < parts[i] ? parts[i] : largest;
  return largest;
}

inline float sum_of(Floats values) {
  float parts[kLanes], total = 0.0f;
  store(parts, values);
#pragma omp simd reduction(+ : total)
  for (int i = 0; i < kLanes; ++i) total += parts[i];
  return total;
}

inline Ints lane_numbers() {
  Ints numbers;
  for (int i = 0; i < kLanes; ++i) numbers[i] = i;
  return numbers;
}

// A row's scores of a tile become probabilities, relative to the largest score so far; those from
// `seen` on are 0. Returns what earlier sums are to be multiplied with.
template <typename E>
inline Floats soften(float* scores, int seen, int keys, float scale, float& largest, Floats& total,
                     E* out) {
  const int whole = seen / kLanes, rest = seen % kLanes;
  const auto is_seen = lane_numbers() < rest;
  Floats most = Floats{} - INFINITY;
  for (int i = 0; i < whole; ++i) {
    const Floats own = load<Floats>(scores + i * kLanes);
    most = larger_of(own, most);
  }
  if (rest) {
    const Floats own = load<Floats>(scores + whole * kLanes);
    most = (is_seen & (most < own)) ? own : most;
  }
  const float before = largest;
  largest = std::max(before, largest_of(most));
  const Floats factor = exp2_of<float>(Floats{} + (before - largest) * scale);
  Floats sum = {};
  for (int i = 0; i < whole; ++i) {
    const Floats own = exp2_of<E>((load<Floats>(scores + i * kLanes) - largest) * scale);
    sum += own;
    store_as(out + i * kLanes, own);
  }
  int done = whole * kLanes;
  if (rest) {
    const Floats own = exp2_of<E>((load<Floats>(scores + done) - largest) * scale);
    const Floats seen_only = is_seen ? own : Floats{};
    sum += seen_only;
    store_as(out + done, seen_only);
    done += kLanes;
  }
  for (; done < keys; done += kLanes) store_as(out + done, Floats{});
  total = total * factor + sum;
  return factor;
}

#if defined(__AVX512F__)

// 16 rows of 16 items: four times, the first half of the rows is shuffled into the second.
inline void transpose(Words (&rows)[kLanes]) {
  for (int round = 0; round < 4; ++round) {
    Words next[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      const Words a = rows[i], b = rows[i + kLanes / 2];
      next[2 * i] = __builtin_shuffle(
          a, b, Words{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
      next[2 * i + 1] = __builtin_shuffle(
          a, b, Words{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
    }
    std::memcpy(rows, next, sizeof next);
  }
}

#endif

template <typename T>
inline void convert(float* to, const T* from, int count) {
  for (int i = 0; i < count; ++i) to[i] = to_float(from[i]);
}

inline void convert(bfloat16* to, const bfloat16* from, int count) {
  std::memcpy(to, from, count * sizeof *to);
}

// Where the keys and values of a sequence's KV head lie.
template <typename T>
struct Head {
  const int32_t* table;
  const T* keys;
  const T* values;
  int block_size;
  int dim;

  const T* at(const T* base, int64_t position) const {
    const int64_t slot = static_cast<int64_t>(table[position / block_size]) * block_size;
    return base + (slot + position % block_size) * dim;
  }
};

// A strip's keys as [dim / kPair][kStrip] items, its values as [kStrip / kPair][dim] items. What is
// past `stop` is nobody's and becomes zeros. staged: [kLanes][dim].
template <typename T, typename E>
void lay_out(const Head<T>& head, int64_t first, int64_t stop, E* keys, E* values, E* staged) {
  const int dim = head.dim, items = dim / kPair<E>;
  const auto fill = [&](const T* base, int64_t from) {
    for (int i = 0; i < kLanes; ++i) {
      if (from + i < stop) {
        convert(staged + i * dim, head.at(base, from + i), dim);
      } else {
        std::fill(staged + i * dim, staged + (i + 1) * dim, E{});
      }
    }
  };
  for (int part = 0; part < kStrip; part += kLanes) {
    fill(head.keys, first + part);
    const char* rows = reinterpret_cast<const char*>(staged);
    char* target = reinterpret_cast<char*>(keys) + part * 4;
    int item = 0;
#if defined(__AVX512F__)
    for (; item + kLanes <= items; item += kLanes) {
      Words square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = load<Words>(rows + (i * items + item) * 4);
      transpose(square);
      for (int i = 0; i < kLanes; ++i) store(target + (item + i) * kStrip * 4, square[i]);
    }
#endif
    for (; item < items; ++item)
      for (int i = 0; i < kLanes; ++i)
        std::memcpy(target + (item * kStrip + i) * 4, rows + (i * items + item) * 4, 4);
    fill(head.values, first + part);
    if constexpr (kPair<E> == 2) {
      for (int i = 0; i < kLanes; i += 2)
        for (int d = 0; d < dim; d += kLanes) {
          const Halves even = load<Halves>(staged + i * dim + d);
          const Halves odd = load<Halves>(staged + (i + 1) * dim + d);
          store(values + (part + i) * dim + 2 * d, __builtin_convertvector(even, Words) |
                                                       __builtin_convertvector(odd, Words) << 16);
        }
    } else {
      std::memcpy(values + part * dim, staged, kLanes * dim * sizeof(E));
    }
  }
}

// sums [kRows][dim], times each row's factor, plus probabilities times N vectors of values.
template <typename E, int N>
inline void add_values(const E* probabilities, const E* values, int keys, int dim,
                       const Floats* factors, float* sums) {
  Floats acc[kRows][N];
  for (int r = 0; r < kRows; ++r)
    for (int n = 0; n < N; ++n)
      acc[r][n] = load<Floats>(sums + r * dim + n * kLanes) * factors[r];
  multiply<E, N>(probabilities, kTile, values, dim * kPair<E>, keys / kPair<E>, acc);
  for (int r = 0; r < kRows; ++r)
    for (int n = 0; n < N; ++n) store(sums + r * dim + n * kLanes, acc[r][n]);
}

template <typename E>
void add_all_values(const E* probabilities, const E* values, int keys, int dim,
                    const Floats* factors, float* sums) {
  for (int d = 0; d < dim;) {
    const int wide = std::min(kWide, (dim - d) / kLanes);
    const E* own = values + d * kPair<E>;
    switch (wide) {
      case 1: add_values<E, 1>(probabilities, own, keys, dim, factors, sums + d); break;
      case 2: add_values<E, 2>(probabilities, own, keys, dim, factors, sums + d); break;
      case 3: add_values<E, 3>(probabilities, own, keys, dim, factors, sums + d); break;
      default: add_values<E, 4>(probabilities, own, keys, dim, factors, sums + d);
    }
    d += wide * kLanes;
  }
}

// One span's rows of `group` query heads that share a KV head. q, out: of the span's first row.
template <typename T, typename E>
void attend(const Head<T>& head, const Span& span, int group, const T* q, int64_t q_stride,
            float scale, T* out, int64_t out_stride, Scratch& scratch) {
  const int dim = head.dim, count = span.count * group;
  const int padded = (count + kRows - 1) / kRows * kRows;
  const int64_t stop = static_cast<int64_t>(span.start) + span.count;
  const float by_log = scale * 1.44269504f;  // 2^x is cheaper than e^x
  E* queries = scratch.take<E>(0, static_cast<int64_t>(padded) * dim);
  float* sums = scratch.take<float>(1, static_cast<int64_t>(padded) * dim);
  Floats* totals = scratch.take<Floats>(2, padded);
  float* largest = scratch.take<float>(3, padded);
  E* keys = scratch.take<E>(4, kTile * dim);
  E* values = scratch.take<E>(5, kTile * dim);
  E* staged = scratch.take<E>(6, kLanes * dim);
  alignas(64) float scores[kRows][kTile];
  alignas(64) E probabilities[kRows][kTile];

  for (int row = 0; row < span.count; ++row)
    convert(queries + row * group * dim, q + row * q_stride, group * dim);
  std::fill(queries + count * dim, queries + padded * dim, E{});
  std::fill(sums, sums + padded * dim, 0.0f);
  std::fill(totals, totals + padded, Floats{});
  std::fill(largest, largest + padded, -INFINITY);

  for (int64_t first = 0; first < stop; first += kTile) {
    const int own_keys = static_cast<int>(std::min<int64_t>(kTile, stop - first));
    for (int key = 0; key < own_keys; key += kStrip)
      lay_out<T, E>(head, first + key, stop, keys + key * dim, values + key * dim, staged);
    for (int row = 0; row < padded; row += kRows) {
      const auto seen_by = [&](int i) {  // keys of the tile that a row sees
        const int64_t length = span.start + std::min(i, count - 1) / group + 1;
        return static_cast<int>(std::clamp<int64_t>(length - first, 0, kTile));
      };
      const int most = seen_by(row + kRows - 1);
      if (most == 0) continue;
      const int used = (most + kStrip - 1) / kStrip * kStrip;
      for (int key = 0; key < used; key += kStrip) {
        Floats acc[kRows][kWide] = {};
        multiply<E, kWide>(queries + row * dim, dim, keys + key * dim, kStrip * kPair<E>,
                           dim / kPair<E>, acc);
        for (int r = 0; r < kRows; ++r)
          for (int n = 0; n < kWide; ++n) store(scores[r] + key + n * kLanes, acc[r][n]);
      }
      Floats factors[kRows];
      for (int r = 0; r < kRows; ++r)
        factors[r] = soften<E>(scores[r], seen_by(row + r), used, by_log, largest[row + r],
                               totals[row + r], probabilities[r]);
      add_all_values<E>(probabilities[0], values, used, dim, factors, sums + row * dim);
    }
  }
  for (int i = 0; i < count; ++i) {
    const float inverse = 1.0f / sum_of(totals[i]);
    T* own = out + i / group * out_stride + i % group * dim;
    for (int d = 0; d < dim; ++d) assign(own[d], sums[i * dim + d] * inverse);
  }
}

template <typename T, typename E>
void run(const Pass& pass, const T* pool, int64_t slots, const T* q, int64_t q_stride, float scale,
         T* out, int64_t out_stride, int threads) {
  const int dim = pass.head_dim, kv_heads = pass.kv_heads, group = pass.heads / kv_heads;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
  for (int64_t item = 0; item < pass.span_count * kv_heads; ++item) {
    static thread_local Scratch scratch;
    const int64_t kv_head = item % kv_heads;
    const Span& span = pass.spans[pass.span_count - 1 - item / kv_heads];  // the longest first
    const Head<T> head{pass.tables + span.table * pass.width, pool + kv_head * slots * dim,
                       pool + (kv_heads + kv_head) * slots * dim, pass.block_size, dim};
    const int64_t column = kv_head * group * dim;
    attend<T, E>(head, span, group, q + span.row * q_stride + column, q_stride, scale,
                 out + span.row * out_stride + column, out_stride, scratch);
  }
}

#if FATHOM_BFLOAT16
using Multiplied = bfloat16;
#else
using Multiplied = float;
#endif

}  // namespace

extern "C" {

// Attends for the rows of the pass's spans, whose keys and values are in the pool. As fathom_attend.
void fathom_attend_spans(const Pass* pass, const void* pool, int64_t slots, const void* q,
                         int64_t q_stride, float scale, void* out, int64_t out_stride,
                         int threads) {
  if (pass->is_bfloat16) {
    run<bfloat16, Multiplied>(*pass, static_cast<const bfloat16*>(pool), slots,
                              static_cast<const bfloat16*>(q), q_stride, scale,
                              static_cast<bfloat16*>(out), out_stride, threads);
  } else {
    run<float, float>(*pass, static_cast<const float*>(pool), slots, static_cast<const float*>(q),
                      q_stride, scale, static_cast<float*>(out), out_stride, threads);
  }
}
}
