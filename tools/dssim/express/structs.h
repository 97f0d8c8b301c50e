// What passes between Python and the compiled simulation; fields as in structs.py, in that order.
#pragma once

#include <cstdint>

extern "C" {

struct Linear {
    double base, per_token, per_square, per_sequence;
};

struct InstanceSettings {
    int64_t blocks, max_batch, max_batch_tokens, stages, prefill_priority;
    // whether blocks are kept for prompts that begin alike
    int64_t keeps;
    // whether its times are asked of Python, and not those below
    int64_t asks;
    // place in the order of names; number of its node; KV goes to instances of the same group
    int64_t rank, node, group;
    double router_s, seal_bytes_per_s, copy_bytes_per_s;
    Linear prefill, decode, decode_large;
    int64_t large_batch;
};

// seconds of a step of an instance: chunks, their tokens and squares, sequences and their context
typedef double (*Ask)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);

struct Settings {
    int64_t prefills, decodes, groups, requests, max_requests, prefill_queue, decode_queue;
    // prompts below are read by decode instances; with threshold_limits only while they have less than that to read
    int64_t local_below, threshold_limits, block_size, block_nbytes;
    // whether instances copy before the relay's word; whether any KV stays in its node; tokens that a hash stands for
    int64_t early, direct, hashed_tokens;
    // whether what pools keep matters, as prompts may begin alike; if not, their blocks are only counted
    int64_t keeps;
    // a handle that is not asked for within lease_s is lost
    double begun_s, client_s, relay_s, max_deadline_s, lease_s;
    // what sending KV is worth, in parts of its tokens; of a node's link
    double affinity, network_bytes_per_s;
    // it is over when more than so many requests, from number ``first`` on, have missed an objective
    double ttft_s, tpot_s;
    int64_t first, misses;
};

struct Arrival {
    double at_s;
    int64_t prompt, output;
    // the token of what is its own; and how many of the hashes, which lie one behind the other, are its prompt's
    int64_t own, hashes;
};

struct Result {
    // seconds since the submission; first_s below 0: refused
    double at_s, first_s, total_s;
    // as in the ledger: router queue, prefill queue, prefill, its wire, placement, wait, transfer, queue, first step,
    // its wire, decode, retry; then what the ledger calls ttft_s and total_s
    double stages[14];
    // place in the order of ends
    int64_t order;
};
}
