// The C interface that native/library.py loads.
#include <exception>

#include "step.h"

namespace {

using namespace ds;

struct Session {
  Session(const Model& model, int element, int threads) : team(threads) {
    if (element == 0) runner = std::make_unique<Step<F32>>(model, team);
    if (element == 1) runner = std::make_unique<Step<Bf16>>(model, team);
    if (element == 2) runner = std::make_unique<Step<F16>>(model, team);
  }
  Team team;
  std::unique_ptr<Runner> runner;
};

}  // namespace

extern "C" {

// Sizes of Norm, Linear, Layer, Model, Batch: Python refuses to go on where its own differ.
void ds_sizes(int32_t* sizes) {
  sizes[0] = sizeof(Norm), sizes[1] = sizeof(Linear), sizes[2] = sizeof(Layer);
  sizes[3] = sizeof(Model), sizes[4] = sizeof(Batch), sizes[5] = sizeof(Pool);
}

void ds_pack(int32_t element, const void* weights, int32_t out, int32_t in, void* panels) {
  if (element == 1)
    pack<Bf16>(static_cast<const uint16_t*>(weights), out, in, static_cast<uint16_t*>(panels));
  else if (element == 2)
    pack<F16>(static_cast<const uint16_t*>(weights), out, in, static_cast<uint16_t*>(panels));
  else
    pack<F32>(static_cast<const float*>(weights), out, in, static_cast<float*>(panels));
}

// `model` and what it points to, but for itself, must outlive the session. Null where there is no memory.
void* ds_open(const Model* model, int32_t element, int32_t threads) {
  try {
    return new Session(*model, element, threads);
  } catch (const std::exception&) {
    return nullptr;
  }
}

// 0, or 1 where there is no memory for the step.
int32_t ds_forward(void* session, const Batch* batch, const Pool* pool) {
  try {
    static_cast<Session*>(session)->runner->forward(*batch, *pool);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

void ds_close(void* session) { delete static_cast<Session*>(session); }
}
