// Attention of few rows a sequence over the paged cache, for CPUs: decoding, and flushes of stacks.
//
// A row reads its keys and values in their blocks, block after block: nothing is gathered, nothing
// padded. Scores, softmax and sums are of single precision, in the order of positions: a row's
// result does not depend on the rows beside it.

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "numbers.h"

#if defined(__AVX512BF16__) && defined(__AVX512VL__)
#include <immintrin.h>
#define FATHOM_BFLOAT16 1
#endif

namespace {

constexpr int kLanes = 16;
constexpr int kMost = 4;  // query heads that share one reading of a key

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

inline Floats load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

inline Floats load(const bfloat16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  const Words words = __builtin_convertvector(halves, Words) << 16;
  Floats values;
  std::memcpy(&values, &words, sizeof values);
  return values;
}

inline Floats add_pairs(Floats a, Floats b, Words first, Words second) {
  return __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, second);
}

// Lane i: the sum of vector i's lanes. Vectors are added in pairs, halves of which change places.
inline Floats sums(Floats (&v)[kLanes]) {
  for (int i = 0; i < 8; ++i)
    v[i] = add_pairs(v[2 * i], v[2 * i + 1],
                     Words{0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30},
                     Words{1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31});
  for (int i = 0; i < 4; ++i)
    v[i] = add_pairs(v[2 * i], v[2 * i + 1],
                     Words{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29},
                     Words{2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31});
  for (int i = 0; i < 2; ++i)
    v[i] = add_pairs(v[2 * i], v[2 * i + 1],
                     Words{0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27},
                     Words{4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31});
  return add_pairs(v[0], v[1], Words{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23},
                   Words{8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
}

// H query heads, to be multiplied with one key after the other: lanes of a product add up to it.
template <typename T, int D, int H, typename = void>
struct Queries {
  Floats parts[H][D / kLanes];

  explicit Queries(const T* q) {
    for (int h = 0; h < H; ++h)
      for (int i = 0; i < D / kLanes; ++i) parts[h][i] = load(q + h * D + i * kLanes);
  }

  void multiply(const T* key, Floats (&dots)[H]) const {
    for (int i = 0; i < D / kLanes; ++i) {
      const Floats part = load(key + i * kLanes);
      for (int h = 0; h < H; ++h)
        dots[h] = i == 0 ? parts[h][0] * part : dots[h] + parts[h][i] * part;
    }
  }
};

#if FATHOM_BFLOAT16

// Products of pairs, added in single precision.
template <int D, int H>
struct Queries<bfloat16, D, H, std::enable_if_t<D % (2 * kLanes) == 0>> {
  __m512bh parts[H][D / (2 * kLanes)];

  explicit Queries(const bfloat16* q) {
    for (int h = 0; h < H; ++h)
      for (int i = 0; i < D / (2 * kLanes); ++i)
        parts[h][i] = (__m512bh)_mm512_loadu_si512(q + h * D + i * 2 * kLanes);
  }

  void multiply(const bfloat16* key, Floats (&dots)[H]) const {
    for (int h = 0; h < H; ++h) dots[h] = Floats{};
    for (int i = 0; i < D / (2 * kLanes); ++i) {
      const __m512bh part = (__m512bh)_mm512_loadu_si512(key + i * 2 * kLanes);
      for (int h = 0; h < H; ++h)
        dots[h] = (Floats)_mm512_dpbf16_ps((__m512)dots[h], parts[h][i], part);
    }
  }
};

#endif

// One row of H query heads that share keys and values. D: head_dim, a multiple of 16.
template <typename T, int D, int H>
void attend(const Pass& pass, const int32_t* table, int length, const T* keys, const T* values,
            const T* q, float scale, T* out, std::vector<float>& scratch) {
  constexpr int kParts = D / kLanes;
  const int size = pass.block_size;
  const int stride = (length + kLanes - 1) / kLanes * kLanes;
  scratch.resize(static_cast<size_t>(H) * stride);
  float* scores = scratch.data();
  const Queries<T, D, H> queries(q);
  for (int first = 0; first < length; first += kLanes) {
    Floats dots[H][kLanes];
    const int count = std::min(kLanes, length - first);
    for (int i = 0; i < kLanes; ++i) {
      const int t = first + std::min(i, count - 1);  // the last one stands in for those past it
      const int64_t slot = static_cast<int64_t>(table[t / size]) * size + t % size;
      Floats own[H];
      queries.multiply(keys + slot * D, own);
      for (int h = 0; h < H; ++h) dots[h][i] = own[h];
    }
    for (int h = 0; h < H; ++h) {
      const Floats own = sums(dots[h]) * scale;
      std::memcpy(scores + h * stride + first, &own, sizeof own);
    }
  }
  float inverse[H];
  for (int h = 0; h < H; ++h) {
    float* own = scores + h * stride;
    float largest = own[0];
#pragma omp simd reduction(max : largest)
    for (int t = 0; t < length; ++t) largest = largest < own[t] ? own[t] : largest;
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int t = 0; t < length; ++t) {
      own[t] = exp_of(own[t] - largest);
      total += own[t];
    }
    inverse[h] = 1.0f / total;
  }
  Floats acc[H][kParts] = {};
  for (int first = 0; first < length; first += size) {
    const T* value = values + static_cast<int64_t>(table[first / size]) * size * D;
    const int stop = std::min(length, first + size);
    for (int t = first; t < stop; ++t, value += D)
      for (int i = 0; i < kParts; ++i) {
        const Floats part = load(value + i * kLanes);
        for (int h = 0; h < H; ++h) acc[h][i] += scores[h * stride + t] * part;
      }
  }
  for (int h = 0; h < H; ++h)
    for (int i = 0; i < kParts; ++i) {
      float parts[kLanes];
      const Floats scaled = acc[h][i] * inverse[h];
      std::memcpy(parts, &scaled, sizeof parts);
      for (int j = 0; j < kLanes; ++j) assign(out[h * D + i * kLanes + j], parts[j]);
    }
}

template <typename T, int D>
void attend_heads(int heads, const Pass& pass, const int32_t* table, int length, const T* keys,
                  const T* values, const T* q, float scale, T* out, std::vector<float>& scratch) {
  for (int h = 0; h < heads; h += kMost) {
    const T* own = q + h * D;
    T* target = out + h * D;
    switch (std::min(heads - h, kMost)) {
      case 1: attend<T, D, 1>(pass, table, length, keys, values, own, scale, target, scratch); break;
      case 2: attend<T, D, 2>(pass, table, length, keys, values, own, scale, target, scratch); break;
      case 3: attend<T, D, 3>(pass, table, length, keys, values, own, scale, target, scratch); break;
      default: attend<T, D, 4>(pass, table, length, keys, values, own, scale, target, scratch);
    }
  }
}

template <typename T>
void run(const Pass& pass, T* pool, int64_t slots, const T* q, int64_t q_stride, const T* kv,
         int64_t kv_stride, float scale, T* out, int64_t out_stride, int threads) {
  const int dim = pass.head_dim, kv_heads = pass.kv_heads, group = pass.heads / kv_heads;
  for (int64_t row = 0; row < pass.written; ++row)
    for (int head = 0; head < 2 * kv_heads; ++head)
      std::memcpy(pool + (head * slots + pass.slots[row]) * dim, kv + row * kv_stride + head * dim,
                  dim * sizeof(T));
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
  for (int64_t item = 0; item < pass.count * kv_heads; ++item) {
    static thread_local std::vector<float> scratch;
    const int64_t index = item / kv_heads, head = item % kv_heads, row = pass.rows[index];
    const int32_t* table = pass.tables + pass.sequences[index] * pass.width;
    const T* keys = pool + head * slots * dim;
    const T* values = pool + (kv_heads + head) * slots * dim;
    const T* own = q + row * q_stride + head * group * dim;
    T* target = out + row * out_stride + head * group * dim;
    const int length = pass.lengths[index];
    switch (dim) {
      case 16: attend_heads<T, 16>(group, pass, table, length, keys, values, own, scale, target, scratch); break;
      case 32: attend_heads<T, 32>(group, pass, table, length, keys, values, own, scale, target, scratch); break;
      case 64: attend_heads<T, 64>(group, pass, table, length, keys, values, own, scale, target, scratch); break;
      case 96: attend_heads<T, 96>(group, pass, table, length, keys, values, own, scale, target, scratch); break;
      case 128: attend_heads<T, 128>(group, pass, table, length, keys, values, own, scale, target, scratch); break;
      case 256: attend_heads<T, 256>(group, pass, table, length, keys, values, own, scale, target, scratch); break;
    }
  }
}

}  // namespace

extern "C" {

// Whether heads of this size are compiled in.
int fathom_attends(int head_dim) {
  return head_dim == 16 || head_dim == 32 || head_dim == 64 || head_dim == 96 ||
         head_dim == 128 || head_dim == 256;
}

// Stores every row's keys and values in the pool of a layer, [2 * kv_heads][slots][head_dim], then
// attends for all rows.
// q [rows][heads][head_dim], kv [rows][2 * kv_heads][head_dim], out [rows][heads * head_dim], of one
// type, rows at their strides.
void fathom_attend(const Pass* pass, void* pool, int64_t slots, const void* q, int64_t q_stride,
                   const void* kv, int64_t kv_stride, float scale, void* out, int64_t out_stride,
                   int threads) {
  if (pass->is_bfloat16) {
    run(*pass, static_cast<bfloat16*>(pool), slots, static_cast<const bfloat16*>(q), q_stride,
        static_cast<const bfloat16*>(kv), kv_stride, scale, static_cast<bfloat16*>(out), out_stride,
        threads);
  } else {
    run(*pass, static_cast<float*>(pool), slots, static_cast<const float*>(q), q_stride,
        static_cast<const float*>(kv), kv_stride, scale, static_cast<float*>(out), out_stride,
        threads);
  }
  if (pass->span_count)
    fathom_attend_spans(pass, pool, slots, q, q_stride, scale, out, out_stride, threads);
}
}
