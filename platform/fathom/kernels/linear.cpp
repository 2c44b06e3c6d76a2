// Products of activations with weights of 4, 8 or 16 bits, for CPUs.
//
// 4 and 8 bits. A weight is d * q + m: q in [0, 2^bits), and d, m of half precision for every 32 weights of a row
// (llama.cpp's Q4_1). An activation is a * p: p in [-127, 127], and a for every 32 activations of a
// row. For a group
//
//     sum_k (d q_k + m) (a p_k)  =  d a (sum_k q_k p_k) + m (a sum_k p_k)
//
// of which the first sum is exact, in integers: AVX-512 VNNI takes 64 products at a time, unsigned
// times signed. Groups are added in their order, in single precision.
//
// 16 bits: bfloat16 times bfloat16, two products at a time, added in single precision in their
// order.
//
// Nothing of this depends on the number of rows: a row's result is the same whatever rows are
// beside it.
//
// Layout of q: blocks of 32 outputs; in one, groups; in one, 8 steps of [32 outputs][4 inputs]. With
// 4 bits, a byte holds an even step in its low half and the next odd one in its high half.
// Layout of the scales: [block][group][d, m][32 outputs].
// Layout of 16 bits: blocks of 32 outputs; in one, steps of [32 outputs][2 inputs].

#include <cmath>
#include <vector>

#include "kernels.h"
#include "numbers.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define FATHOM_VNNI 1
#if defined(__AVX512BF16__)
#define FATHOM_BFLOAT16 1
#endif
#endif

namespace {

constexpr int kGroup = 32;
constexpr int kLanes = 16;  // of 4 bytes, in 64
constexpr int kCols = 2 * kLanes;
constexpr int kSteps = kGroup / 4;
constexpr int kTile = 4;  // rows that share one unpacking of the weights

// Activations. For 4 and 8 bits: p [rows][inputs]; a, and a * sum p, [rows][groups] each. For 16
// bits: halves [rows][inputs].
struct Rows {
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<float> sums;
  std::vector<bfloat16> halves;
};

inline float load(const void* base, int64_t index, bool is_bfloat16) {
  return is_bfloat16 ? to_float(static_cast<const bfloat16*>(base)[index])
                     : static_cast<const float*>(base)[index];
}

inline void store(void* base, int64_t index, bool is_bfloat16, float value) {
  if (is_bfloat16) {
    assign(static_cast<bfloat16*>(base)[index], value);
  } else {
    static_cast<float*>(base)[index] = value;
  }
}

inline float silu(float x) { return x / (1.0f + exp_of(-x)); }

// One row to 8 bits. A group with a value that is not finite makes the row's results NaN.
void quantize_row(const float* values, int64_t inputs, int8_t* codes, float* scales, float* sums) {
  for (int64_t group = 0; group < inputs / kGroup; ++group) {
    const float* own = values + group * kGroup;
    float largest = 0.0f, nothing = 0.0f;
#pragma omp simd reduction(max : largest) reduction(+ : nothing)
    for (int i = 0; i < kGroup; ++i) {
      const float size = std::fabs(own[i]);
      largest = largest < size ? size : largest;
      nothing += own[i] * 0.0f;  // NaN where one is not finite
    }
    const float scale = nothing == 0.0f ? largest / 127.0f : NAN;
    const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < kGroup; ++i) {
      float scaled = own[i] * inverse;
      scaled = scaled < -127.0f ? -127.0f : (scaled > 127.0f ? 127.0f : scaled);
      const int32_t code = static_cast<int32_t>(scaled + (scaled < 0.0f ? -0.5f : 0.5f));
      codes[group * kGroup + i] = static_cast<int8_t>(code);
      sum += code;
    }
    scales[group] = scale;
    sums[group] = scale * static_cast<float>(sum);
  }
}

// RMSNorm in place: x / sqrt(mean(x^2) + eps) * weight. For bfloat16, what is scaled is rounded
// before it meets the weight, as in transformers.
void rms_norm(float* values, int64_t inputs, const float* weight, float eps, bool rounds) {
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < inputs; ++i) total += values[i] * values[i];
  const float factor = 1.0f / std::sqrt(total / static_cast<float>(inputs) + eps);
  if (rounds) {
#pragma omp simd
    for (int64_t i = 0; i < inputs; ++i) values[i] = rounded<bfloat16>(values[i] * factor) * weight[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < inputs; ++i) values[i] = values[i] * factor * weight[i];
  }
}

void prepare(const Weight& weight, const void* x, bool is_bfloat16, int64_t rows, int64_t stride,
             const float* norm, float eps, Rows& out, int threads) {
  const int64_t inputs = weight.inputs, groups = inputs / kGroup;
  const bool halves = weight.bits == 16;
  if (halves) {
    out.halves.resize(rows * inputs);
  } else {
    out.codes.resize(rows * inputs);
    out.scales.resize(rows * groups);
    out.sums.resize(rows * groups);
  }
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows > kTile) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    static thread_local std::vector<float> buffer;
    buffer.resize(inputs);
    float* values = buffer.data();
    if (is_bfloat16) {
      const bfloat16* own = static_cast<const bfloat16*>(x) + row * stride;
      if (halves && norm == nullptr) {
        std::memcpy(&out.halves[row * inputs], own, inputs * sizeof(bfloat16));
        continue;
      }
#pragma omp simd
      for (int64_t i = 0; i < inputs; ++i) values[i] = to_float(own[i]);
    } else {
      std::memcpy(values, static_cast<const float*>(x) + row * stride, inputs * 4);
    }
    if (norm != nullptr) rms_norm(values, inputs, norm, eps, halves);
    if (halves) {
      bfloat16* own = &out.halves[row * inputs];
#pragma omp simd
      for (int64_t i = 0; i < inputs; ++i) assign(own[i], values[i]);
    } else {
      quantize_row(values, inputs, &out.codes[row * inputs], &out.scales[row * groups],
                   &out.sums[row * groups]);
    }
  }
}

#if FATHOM_VNNI

inline int32_t four_at(const int8_t* codes) {
  int32_t four;
  std::memcpy(&four, codes, 4);
  return four;
}

// acc[r][j] = output j of the block, for M rows from `row` on. Every step's weights are unpacked
// once for all rows, and every row's four activations broadcast once for all outputs.
template <int M, int BITS>
void tile_of(const Weight& weight, int64_t block, const Rows& rows, int64_t row,
             float acc[kTile][kCols]) {
  const int64_t groups = weight.inputs / kGroup;
  const uint8_t* codes = weight.codes + block * groups * (kGroup * kCols * BITS / 8);
  const uint16_t* scales = weight.scales + block * groups * 2 * kCols;
  const int8_t* p = rows.codes.data() + row * weight.inputs;
  const float* a = rows.scales.data() + row * groups;
  const float* s = rows.sums.data() + row * groups;
  const __m512i low = _mm512_set1_epi8(0x0f);
  __m512 sums[M][2];
  for (int r = 0; r < M; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  for (int64_t group = 0; group < groups; ++group) {
    __m512i dots[M][2];
    for (int r = 0; r < M; ++r) dots[r][0] = dots[r][1] = _mm512_setzero_si512();
    const auto add = [&](int step, __m512i left, __m512i right) {
      for (int r = 0; r < M; ++r) {
        const __m512i four = _mm512_set1_epi32(four_at(p + r * weight.inputs + 4 * step));
        dots[r][0] = _mm512_dpbusd_epi32(dots[r][0], left, four);
        dots[r][1] = _mm512_dpbusd_epi32(dots[r][1], right, four);
      }
    };
    for (int step = 0; step < kSteps; step += BITS == 4 ? 2 : 1) {
      const __m512i left = _mm512_loadu_si512(codes), right = _mm512_loadu_si512(codes + 64);
      codes += 128;
      if (BITS == 8) {
        add(step, left, right);
      } else {
        add(step, _mm512_and_si512(left, low), _mm512_and_si512(right, low));
        add(step + 1, _mm512_and_si512(_mm512_srli_epi16(left, 4), low),
            _mm512_and_si512(_mm512_srli_epi16(right, 4), low));
      }
    }
    for (int half = 0; half < 2; ++half, scales += kLanes) {
      const __m512 d = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)scales));
      const __m512 m = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(scales + kCols)));
      for (int r = 0; r < M; ++r) {
        const __m512 scale = _mm512_mul_ps(d, _mm512_set1_ps(a[r * groups + group]));
        const __m512 dot = _mm512_cvtepi32_ps(dots[r][half]);
        sums[r][half] = _mm512_fmadd_ps(dot, scale, sums[r][half]);
        sums[r][half] = _mm512_fmadd_ps(m, _mm512_set1_ps(s[r * groups + group]), sums[r][half]);
      }
    }
    scales += kCols;
    p += kGroup;
  }
  for (int r = 0; r < M; ++r)
    for (int half = 0; half < 2; ++half) _mm512_storeu_ps(acc[r] + half * kLanes, sums[r][half]);
}

#if FATHOM_BFLOAT16

// The same for 16 bits.
template <int M>
void tile_of_halves(const Weight& weight, int64_t block, const Rows& rows, int64_t row,
                    float acc[kTile][kCols]) {
  const int64_t inputs = weight.inputs;
  const uint8_t* pairs = weight.codes + block * inputs * kCols * 2;
  const bfloat16* x = rows.halves.data() + row * inputs;
  __m512 sums[M][2];
  for (int r = 0; r < M; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < inputs; k += 2, pairs += 128) {
    const __m512bh left = (__m512bh)_mm512_loadu_si512(pairs);
    const __m512bh right = (__m512bh)_mm512_loadu_si512(pairs + 64);
    for (int r = 0; r < M; ++r) {
      int32_t two;
      std::memcpy(&two, x + r * inputs + k, 4);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(two);
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], left, both);
      sums[r][1] = _mm512_dpbf16_ps(sums[r][1], right, both);
    }
  }
  for (int r = 0; r < M; ++r)
    for (int half = 0; half < 2; ++half) _mm512_storeu_ps(acc[r] + half * kLanes, sums[r][half]);
}

void tile_halves(int count, const Weight& weight, int64_t block, const Rows& rows, int64_t row,
                 float acc[kTile][kCols]) {
  switch (count) {
    case 1: return tile_of_halves<1>(weight, block, rows, row, acc);
    case 2: return tile_of_halves<2>(weight, block, rows, row, acc);
    case 3: return tile_of_halves<3>(weight, block, rows, row, acc);
    default: return tile_of_halves<4>(weight, block, rows, row, acc);
  }
}

#endif

template <int BITS>
void tile(int count, const Weight& weight, int64_t block, const Rows& rows, int64_t row,
          float acc[kTile][kCols]) {
  switch (count) {
    case 1: return tile_of<1, BITS>(weight, block, rows, row, acc);
    case 2: return tile_of<2, BITS>(weight, block, rows, row, acc);
    case 3: return tile_of<3, BITS>(weight, block, rows, row, acc);
    default: return tile_of<4, BITS>(weight, block, rows, row, acc);
  }
}

#else

inline float from_half(uint16_t bits) {
  const int exponent = (bits >> 10) & 0x1f;
  const float fraction = static_cast<float>(bits & 0x3ff);
  const float size = exponent == 0 ? std::ldexp(fraction, -24)
                                   : std::ldexp(fraction + 1024.0f, exponent - 25);
  return bits & 0x8000 ? -size : size;
}

// The same where there is no VNNI.
template <int BITS>
void tile(int count, const Weight& weight, int64_t block, const Rows& rows, int64_t row,
          float acc[kTile][kCols]) {
  const int64_t groups = weight.inputs / kGroup;
  std::memset(acc, 0, sizeof(float) * kTile * kCols);
  for (int j = 0; j < kCols; ++j) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t place = block * groups + group;
      const uint8_t* codes = weight.codes + place * (kGroup * kCols * BITS / 8) + j * 4;
      const uint16_t* scales = weight.scales + place * 2 * kCols + j;
      const float d = from_half(scales[0]), m = from_half(scales[kCols]);
      uint8_t q[kGroup];
      for (int k = 0; k < kGroup; ++k) {
        const int step = k / 4;
        const uint8_t byte = codes[(BITS == 4 ? step / 2 : step) * 4 * kCols + k % 4];
        q[k] = BITS == 8 ? byte : (step % 2 ? byte >> 4 : byte & 0x0f);
      }
      for (int r = 0; r < count; ++r) {
        const int8_t* p = rows.codes.data() + (row + r) * weight.inputs + group * kGroup;
        int32_t dot = 0;
        for (int k = 0; k < kGroup; ++k) dot += static_cast<int32_t>(q[k]) * p[k];
        const int64_t at = (row + r) * groups + group;
        acc[r][j] = std::fma(static_cast<float>(dot), d * rows.scales[at], acc[r][j]);
        acc[r][j] = std::fma(m, rows.sums[at], acc[r][j]);
      }
    }
  }
}

#endif

void tile(int count, const Weight& weight, int64_t block, const Rows& rows, int64_t row,
          float acc[kTile][kCols]) {
#if FATHOM_BFLOAT16
  if (weight.bits == 16) return tile_halves(count, weight, block, rows, row, acc);
#endif
  if (weight.bits == 4) return tile<4>(count, weight, block, rows, row, acc);
  return tile<8>(count, weight, block, rows, row, acc);
}

void add_bias(int count, const Weight& weight, int64_t first, float acc[kTile][kCols]) {
  if (weight.bias == nullptr) return;
  for (int r = 0; r < count; ++r)
    for (int j = 0; j < kCols && first + j < weight.outputs; ++j)
      acc[r][j] += weight.bias[first + j];
}

}  // namespace

extern "C" {

// Whether the products of 64 bytes at a time were compiled in.
int fathom_has_vnni() {
#if FATHOM_VNNI
  return 1;
#else
  return 0;
#endif
}

// Whether weights of 16 bits can be multiplied here.
int fathom_has_bfloat16() {
#if FATHOM_BFLOAT16
  return 1;
#else
  return 0;
#endif
}

// out [rows][outputs] = norm(x) weight^T + bias, with RMSNorm where `norm` is given; and then
//   kAdd: + residual.
//   kSiluMul: 16 outputs of gate and the same 16 of up in turns; out has half as many columns,
//   silu(gate) * up.
// x, residual and out are of one type, rows at their strides. Runs in `threads` threads.
void fathom_linear(const Weight* weight, const void* x, int is_bfloat16, int64_t rows,
                   int64_t x_stride, const float* norm, float eps, int epilogue,
                   const void* residual, int64_t residual_stride, void* out, int64_t out_stride,
                   int threads) {
  // An engine calls from one thread, always the same: its buffers are kept.
  static thread_local Rows prepared;
  prepare(*weight, x, is_bfloat16, rows, x_stride, norm, eps, prepared, threads);
  const Rows& in = prepared;
  const bool gated = epilogue == kSiluMul;
  const int64_t blocks = (weight->outputs + kCols - 1) / kCols;
  const int64_t columns = gated ? weight->outputs / 2 : weight->outputs;
  const int64_t most = gated ? kLanes : kCols;  // columns of a block
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * most;
    const int width = static_cast<int>(columns - first < most ? columns - first : most);
    for (int64_t row = 0; row < rows; row += kTile) {
      const int count = static_cast<int>(rows - row < kTile ? rows - row : kTile);
      float acc[kTile][kCols];
      tile(count, *weight, block, in, row, acc);
      add_bias(count, *weight, block * kCols, acc);
      for (int r = 0; r < count; ++r) {
        float* own = acc[r];
        if (gated) {
#pragma omp simd
          for (int j = 0; j < kLanes; ++j) own[j] = silu(own[j]) * own[kLanes + j];
        } else if (epilogue == kAdd) {
          const int64_t at = (row + r) * residual_stride + first;
          for (int j = 0; j < width; ++j) own[j] += load(residual, at + j, is_bfloat16);
        }
        const int64_t at = (row + r) * out_stride + first;
        for (int j = 0; j < width; ++j) store(out, at + j, is_bfloat16, own[j]);
      }
    }
  }
}
}
