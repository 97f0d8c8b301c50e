// What Python hands over: the model, the batch. Mirrored by native/structs.py, field by field.
#pragma once

#include "single.h"

namespace ds {

struct Norm {
  const float* weight;  // null: no norm here
  const float* bias;    // null: root mean square norm, otherwise LayerNorm
};

struct Expert {
  Linear gate, up, down;
};

// A mixture of experts in the place of an MLP.
struct Experts {
  Linear router;
  Linear shared_gate;  // panels null: no expert that all rows go to
  Expert shared;
  const Expert* each;
  int32_t count, per_token;
  int32_t renormalise;  // the weights of a row's experts add up to one
  int32_t reserved;
};

struct Layer {
  Norm before_attention, after_attention, before_mlp, after_mlp, q_norm, k_norm;
  Linear qkv, attention_out, gate, up, down;  // gate.panels null: plain MLP
  const float* cos;                           // [positions][rotary / 2], or null: no rotary embedding in this layer
  const float* sin;
  const Experts* experts;  // null: an MLP
  int32_t window;  // 0: full attention
  int32_t reserved;
};

enum Activation : int32_t { SILU = 0, GELU_TANH = 1, GELU = 2, RELU = 3, QUICK_GELU = 4 };

struct Model {
  int32_t layers, hidden, mlp, vocab, rotary, activation;
  int32_t parallel;  // attention and MLP both read the layer's input
  float eps, embedding_scale, logit_softcap;
  Shape shape;
  int32_t reserved;
  const void* embedding;             // [vocab][hidden]
  const float* position_embedding;   // [positions][hidden], or null
  Norm final_norm;
  Linear head;
  const Layer* layer;
  // Null where no other rank has a share of the layers; else adds the shares of `count` numbers up, in their place.
  void (*reduce)(float* at, int64_t count);
};

struct Batch {
  int32_t sequences, rows, logit_rows, reserved;
  const int32_t* tokens;       // [rows], sequences one behind the other
  const int32_t* starts;       // [sequences]: position of the first row
  const int32_t* row_ends;     // [sequences]
  const int32_t* tables;       // block tables, one behind the other
  const int32_t* table_starts; // [sequences]
  const int32_t* picked;       // [logit_rows]: rows whose logits are wanted
  float* logits;               // [logit_rows][padded(vocab)]
  const float* hidden_in;      // [rows][hidden], from the stage before; null in the first stage
  float* hidden_out;           // [rows][hidden], for the next stage, in the place of logits; null in the last stage
};

}  // namespace ds
