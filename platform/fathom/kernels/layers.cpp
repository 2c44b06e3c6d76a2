// Decoder layers one after the other, without a word from Python in between.

#include <vector>

#include "kernels.h"

namespace {

struct Buffers {
  std::vector<char> qkv, attended, inner;
};

}  // namespace

extern "C" {

// Runs layers over the rows of a pass, all of which attend by fathom_attend. `hidden` [rows][width]
// is the residual stream, in the type that the pass says, and changed in place.
// pool: of the first of these layers, the next one's `layer_bytes` further on. cos, sin: as for
// fathom_rotate.
void fathom_layers(const Layer* layers, int64_t count, const Pass* pass, void* pool,
                   int64_t layer_bytes, int64_t slots, void* hidden, float eps, float scale,
                   const void* cos, const void* sin, int threads) {
  static thread_local Buffers buffers;
  const int is_bfloat16 = pass->is_bfloat16;
  const int64_t size = is_bfloat16 ? 2 : 4, rows = pass->written, dim = pass->head_dim;
  const int64_t rotated = pass->heads + pass->kv_heads, own = pass->heads * dim;
  for (int64_t index = 0; index < count; ++index) {
    const Layer& layer = layers[index];
    const int64_t width = layer.qkv->inputs, all = layer.qkv->outputs;
    const int64_t inner = layer.down->inputs;
    buffers.qkv.resize(rows * all * size);
    buffers.attended.resize(rows * own * size);
    buffers.inner.resize(rows * inner * size);
    char* qkv = buffers.qkv.data();
    fathom_linear(layer.qkv, hidden, is_bfloat16, rows, width, layer.input_norm, eps, kPlain,
                  nullptr, 0, qkv, all, threads);
    if (layer.qk_norm != nullptr) {
      const char* norms = static_cast<const char*>(layer.qk_norm);
      for (int64_t head = 0; head < rotated; ++head)
        for (int64_t row = 0; row < rows; ++row) {
          char* heads = qkv + (row * all + head * dim) * size;
          fathom_rms_norm(heads, is_bfloat16, 1, dim, dim, norms + head * dim * size, eps, heads);
        }
    }
    fathom_rotate(qkv, is_bfloat16, rows, all, rotated, dim, cos, sin);
    fathom_attend(pass, static_cast<char*>(pool) + index * layer_bytes, slots, qkv, all,
                  qkv + own * size, all, scale, buffers.attended.data(), own, threads);
    fathom_linear(layer.output, buffers.attended.data(), is_bfloat16, rows, own, nullptr, eps, kAdd,
                  hidden, width, hidden, width, threads);
    fathom_linear(layer.gate_up, hidden, is_bfloat16, rows, width, layer.post_norm, eps, kSiluMul,
                  nullptr, 0, buffers.inner.data(), inner, threads);
    fathom_linear(layer.down, buffers.inner.data(), is_bfloat16, rows, inner, nullptr, eps, kAdd,
                  hidden, width, hidden, width, threads);
  }
}
}
