// The C interface that native/library.py loads. Built once for each element kind: ELEMENT is F32, Bf16 or F16.
#include <exception>

#include "draw.h"
#include "step.h"

namespace {

using namespace ds;

using Element = ELEMENT;

struct Session {
  Session(const Model& model, int threads) : team(threads), step(model, team), drawer(team) {}
  Team team;
  Step<Element> step;
  Drawer drawer;
};

}  // namespace

extern "C" {

// Sizes of Norm, Linear, Layer, Model, Batch, Pool, Draw, Expert, Experts: Python refuses to go on where its own differ.
void ds_sizes(int32_t* sizes) {
  sizes[0] = sizeof(Norm), sizes[1] = sizeof(Linear), sizes[2] = sizeof(Layer);
  sizes[3] = sizeof(Model), sizes[4] = sizeof(Batch), sizes[5] = sizeof(Pool);
  sizes[6] = sizeof(Draw), sizes[7] = sizeof(Expert), sizes[8] = sizeof(Experts);
}

void ds_pack(const void* weights, int32_t out, int32_t in, void* panels) {
  pack<Element>(static_cast<const Element::weight*>(weights), out, in, static_cast<Element::weight*>(panels));
}

// `first` columns are the first group.
void ds_pack_int8(const int8_t* weights, const float* scales, int32_t out, int32_t in, int32_t first, void* panels) {
  pack_int8<Element>(weights, scales, out, in, first, static_cast<uint8_t*>(panels));
}

// `model` and what it points to, but for itself, must outlive the session. Null where there is no memory.
void* ds_open(const Model* model, int32_t threads) {
  try {
    return new Session(*model, threads);
  } catch (const std::exception&) {
    return nullptr;
  }
}

// 0, or 1 where there is no memory for the step.
int32_t ds_forward(void* session, const Batch* batch, const Pool* pool) {
  try {
    static_cast<Session*>(session)->step.forward(*batch, *pool);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// Answers `draws`, one for each of `rows` rows of logits that lie `stride` apart. 1 where there is no memory.
int32_t ds_draw(void* session, const float* logits, int64_t stride, int32_t vocab, int32_t rows, Draw* const* draws) {
  try {
    static_cast<Session*>(session)->drawer.draw(logits, stride, vocab, rows, draws);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

void ds_close(void* session) { delete static_cast<Session*>(session); }

// Threads for single products. Null where there is no memory.
void* ds_team(int32_t threads) {
  try {
    return new Team(threads);
  } catch (const std::exception&) {
    return nullptr;
  }
}

// `x` [rows][in] -> `y` [rows][padded(out)].
void ds_multiply(void* team, const Linear* linear, const Element::active* x, int32_t rows, float* y) {
  Team& all = *static_cast<Team*>(team);
  const size_t width = padded(linear->out);
  const std::function<void()> job = [&] {
    multiply<Element>(all, rows, x, linear->in, *linear,
                      [&](int row, int column, vf sums) { store(y + row * width + column, sums); });
  };
  all.run(job);
}

void ds_team_close(void* team) { delete static_cast<Team*>(team); }
}
