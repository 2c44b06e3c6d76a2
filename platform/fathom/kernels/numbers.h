// Numbers of both dtypes in memory, single precision in registers.

#pragma once

#include <cstdint>
#include <cstring>

struct bfloat16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(bfloat16 value) {
  const uint32_t wide = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &wide, 4);
  return result;
}

inline void assign(float& target, float value) { target = value; }

inline void assign(bfloat16& target, float value) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  target.bits = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40 : rounded);
}

// What a value is once it has been in memory.
template <typename T>
inline float rounded(float value) {
  T stored;
  assign(stored, value);
  return to_float(stored);
}

// e^x to 2 units in the last place, by a polynomial that compilers can vectorise: 2^n e^r with
// |r| <= ln(2) / 2 (Cephes' expf). NaN stays NaN.
inline float exp_of(float x) {
  const float bounded = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float shifted = bounded * 1.44269504f + 12582912.0f;  // rounds to a whole number
  const float n = shifted - 12582912.0f;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const int32_t power = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &power, 4);
  return y * scale;
}
