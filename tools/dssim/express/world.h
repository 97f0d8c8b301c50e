// Time, requests and instances: what all parts of the compiled simulation see.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <queue>
#include <vector>

#include "pool.h"
#include "structs.h"

namespace express {

// SHORT_OF_BLOCKS: run it again with ``keeps``, since what pools keep matters now; BEYOND: what only the machines know
enum Outcome { DONE = 0, SHORT_OF_BLOCKS = 1, PAST_DEADLINE = 2, PAST_LEASE = 3, BEYOND = 4, OUT_OF_REACH = 5 };
enum Kind { SUBMIT, ARRIVE, WORK, STEP_END, PREFILLED, SEALED, OFFERED, KV_SEALED, PULL, FETCH, TICKET, GRANT, COPIED, PULLED, FETCHED, RELEASE, STEPPED, PREEMPTED, ABORT };
enum Stage { ROUTER_QUEUE, PREFILL_QUEUE, PREFILL, PREFILL_WIRE, PLACEMENT, WAIT, TRANSFER, QUEUE, FIRST_STEP, WIRE, DECODE, RETRY, TTFT, TOTAL };

struct Event {
    double at;
    int64_t serial;
    Kind kind;
    // an instance, or an attempt; where a request comes, that
    int64_t who;
    bool operator<(const Event &other) const { return at != other.at ? at > other.at : serial > other.serial; }
};

// One attempt at a request. A later one reads what the earlier ones made as part of its prompt.
struct Attempt {
    int64_t request = 0, prompt = 0, output = 0, done = 0, made = 0, heard = 0;
    int prefill = -1, decode = -1;
    bool in_step = false, pulls = false, fresh = true, offered = false, asked = false, granted = false, copied = false;
    // the relay has said that nobody reads the KV of its prefill any more
    bool released = false;
    // blocks there, and at the instance that decodes
    Held there, here;
    // what the instance where it is stands for by the router's count; of that what it has to read
    int64_t counted = 0, unread = 0;
    // its place among all that came to decode instances
    int64_t came = 0;
    // when its KV was ready, and when its stream ends
    double sealed = 0, streamed = 0;
    double arrived = 0, since = 0, queued = -1, phase_since = 0, first_at = -1;
    // what the instance tells the router
    double told_queue = 0, told_prefill = 0, wait = 0, transfer = 0, queue = 0, first_step = 0;
};

struct Run {
    int64_t attempt, start, end;
    bool reads;
};

struct Step {
    std::vector<Run> runs;
    double seconds;
};

struct Instance {
    InstanceSettings set;
    Pool pool;
    // some gave way since a step ended last
    bool gave_way = false;
    // not yet let in, in order; what has something to read, in order; what decodes, in order of arrival
    std::deque<int64_t> waiting;
    std::vector<int64_t> reading, running;
    int64_t inside = 0, pulling = 0;
    std::deque<Step> steps;
    std::vector<double> stage_free;
    double copies_end = 0, busy = 0;
    // the router's view
    int64_t sequences = 0, tokens = 0, last_used = 0, to_read = 0;
    Index index;
    std::vector<int64_t> order;
};

// Events of one time happen in the order in which they were scheduled, as in kernel.py.
struct World {
    Settings set;
    Ask ask;
    const Arrival *arrivals;
    Result *results;
    std::vector<Instance> instances;
    std::vector<Tokens> requests;
    std::deque<Attempt> attempts;
    // what each step's message tells, in order; on the way from each instance
    std::vector<std::deque<std::vector<int64_t>>> told;
    std::priority_queue<Event> heap;
    // when the link of each node is free
    std::vector<double> links;
    double now = 0;
    int64_t serial = 0;
    Outcome outcome = DONE;
    int64_t preemptions = 0, missed = 0;
    // pools only count blocks, though the system keeps some
    bool blind = false;

    void at(double when, Kind kind, int64_t who) { heap.push({std::max(when, now), serial++, kind, who}); }
    // whether its KV is copied within a node; how long relays take to tell each other of it, if not
    bool direct(const Attempt &r) const { return set.direct && near(r); }
    bool near(const Attempt &r) const { return instances[r.prefill].set.node == instances[r.decode].set.node; }
    double relays_s(const Attempt &r) const { return near(r) ? set.relay_s : set.client_s; }
    int64_t blocks_for(int64_t tokens) const { return (tokens + set.block_size - 1) / set.block_size; }
    // digests of its full blocks among so many tokens
    const Digest *chain(const Attempt &r, int64_t tokens) {
        return requests[size_t(r.request)].digests(tokens / set.block_size, set.block_size, set.hashed_tokens);
    }
    // full blocks of what it reads, short of the last token: that one is computed at any rate
    int64_t sought(const Attempt &r) const { return (r.prompt - 1) / set.block_size; }
};
}
