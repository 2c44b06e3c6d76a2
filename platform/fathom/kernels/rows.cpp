// Row by row, with the roundings of the torch code that they stand for.

#include <cmath>

#include "kernels.h"
#include "numbers.h"

namespace {

// heads [rows][heads][dim] in place: x cos + roll(x, dim / 2) sin, both products rounded, and their
// sum. cos, sin [rows][dim].
template <typename T>
void rotate(T* heads, int64_t rows, int64_t stride, int64_t count, int64_t dim, const T* cos,
            const T* sin) {
  const int64_t half = dim / 2;
  for (int64_t row = 0; row < rows; ++row) {
    const T* c = cos + row * dim;
    const T* s = sin + row * dim;
    for (int64_t head = 0; head < count; ++head) {
      T* x = heads + row * stride + head * dim;
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        const float low = to_float(x[i]), high = to_float(x[half + i]);
        assign(x[i], rounded<T>(low * to_float(c[i])) + rounded<T>(high * to_float(s[i])));
        assign(x[half + i], rounded<T>(high * to_float(c[half + i])) +
                                rounded<T>(low * to_float(s[half + i])));
      }
    }
  }
}

// out = x / sqrt(mean(x^2) + eps), rounded, times weight.
template <typename T>
void rms_norm(const T* x, int64_t rows, int64_t stride, int64_t width, const T* weight, float eps,
              T* out) {
  for (int64_t row = 0; row < rows; ++row) {
    const T* own = x + row * stride;
    T* target = out + row * width;
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < width; ++i) total += to_float(own[i]) * to_float(own[i]);
    const float factor = 1.0f / std::sqrt(total / static_cast<float>(width) + eps);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i)
      assign(target[i], rounded<T>(to_float(own[i]) * factor) * to_float(weight[i]));
  }
}

}  // namespace

extern "C" {

void fathom_rotate(void* heads, int is_bfloat16, int64_t rows, int64_t stride, int64_t count,
                   int64_t dim, const void* cos, const void* sin) {
  if (is_bfloat16) {
    rotate(static_cast<bfloat16*>(heads), rows, stride, count, dim,
           static_cast<const bfloat16*>(cos), static_cast<const bfloat16*>(sin));
  } else {
    rotate(static_cast<float*>(heads), rows, stride, count, dim, static_cast<const float*>(cos),
           static_cast<const float*>(sin));
  }
}

void fathom_rms_norm(const void* x, int is_bfloat16, int64_t rows, int64_t stride, int64_t width,
                     const void* weight, float eps, void* out) {
  if (is_bfloat16) {
    rms_norm(static_cast<const bfloat16*>(x), rows, stride, width,
             static_cast<const bfloat16*>(weight), eps, static_cast<bfloat16*>(out));
  } else {
    rms_norm(static_cast<const float*>(x), rows, stride, width, static_cast<const float*>(weight),
             eps, static_cast<float*>(out));
  }
}
}
