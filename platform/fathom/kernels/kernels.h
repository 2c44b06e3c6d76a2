// What Python calls, and the structures that it fills in; see ``compiled.py``.

#pragma once

#include <cstdint>

// A linear layer's weight; see linear.cpp.
struct Weight {
  const uint8_t* codes;
  const uint16_t* scales;  // half precision, as bits; null for 16 bits
  const float* bias;       // [outputs] or null
  int64_t outputs;
  int64_t inputs;
  int32_t bits;
};

enum Epilogue { kPlain = 0, kAdd = 1, kSiluMul = 2 };

// Rows of one sequence that attend together; see prefill.cpp.
struct Span {
  int32_t row;    // the first
  int32_t count;  // of them
  int32_t start;  // the first one's position
  int32_t table;  // whose they are
};

// A pass over ragged rows, the same for all layers. Every row attends, alone or in a span.
struct Pass {
  const int32_t* tables;     // [sequences][width] blocks
  const int32_t* rows;       // [count] rows that attend alone
  const int32_t* sequences;  // [count] whose they are
  const int32_t* lengths;    // [count] keys that they see
  const Span* spans;         // [span_count]
  const int64_t* slots;      // [written] where each of the batch's rows goes
  int64_t count;
  int64_t span_count;
  int64_t written;
  int64_t width;
  int32_t block_size;
  int32_t kv_heads;
  int32_t heads;
  int32_t head_dim;
  int32_t is_bfloat16;
};

// A layer whose linear layers the kernels run.
struct Layer {
  const float* input_norm;  // [width]
  const Weight* qkv;
  const void* qk_norm;  // [heads + kv_heads][head_dim] in the activations' type, or null
  const Weight* output;
  const float* post_norm;
  const Weight* gate_up;
  const Weight* down;
};

extern "C" {

void fathom_linear(const Weight* weight, const void* x, int is_bfloat16, int64_t rows,
                   int64_t x_stride, const float* norm, float eps, int epilogue,
                   const void* residual, int64_t residual_stride, void* out, int64_t out_stride,
                   int threads);

void fathom_attend(const Pass* pass, void* pool, int64_t slots, const void* q, int64_t q_stride,
                   const void* kv, int64_t kv_stride, float scale, void* out, int64_t out_stride,
                   int threads);

void fathom_attend_spans(const Pass* pass, const void* pool, int64_t slots, const void* q,
                         int64_t q_stride, float scale, void* out, int64_t out_stride,
                         int threads);

void fathom_rotate(void* heads, int is_bfloat16, int64_t rows, int64_t stride, int64_t count,
                   int64_t dim, const void* cos, const void* sin);

void fathom_rms_norm(const void* x, int is_bfloat16, int64_t rows, int64_t stride, int64_t width,
                     const void* weight, float eps, void* out);
}
