// Time, requests and instances: what all parts of the compiled simulation see.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <queue>
#include <vector>

#include "structs.h"

namespace express {

enum Outcome { DONE = 0, SHORT_OF_BLOCKS = 1, PAST_DEADLINE = 2, PAST_LEASE = 3 };
enum Kind { SUBMIT, ARRIVE, WORK, STEP_END, PREFILLED, SEALED, OFFERED, KV_SEALED, PULL, FETCH, TICKET, GRANT, COPIED, PULLED, FETCHED, RELEASE, STEPPED };
enum Stage { ROUTER_QUEUE, PREFILL_QUEUE, PREFILL, PREFILL_WIRE, PLACEMENT, WAIT, TRANSFER, QUEUE, FIRST_STEP, WIRE, DECODE, TTFT, TOTAL };

struct Event {
    double at;
    int64_t serial;
    Kind kind;
    // an instance, or a request
    int64_t who;
    bool operator<(const Event &other) const { return at != other.at ? at > other.at : serial > other.serial; }
};

struct Request {
    int64_t prompt = 0, output = 0, done = 0, made = 0, blocks = 0;
    int prefill = -1, decode = -1;
    bool in_step = false, pulls = false, fresh = true, offered = false, asked = false, granted = false, copied = false;
    // when its KV was ready, and when its stream ends
    double sealed = 0, streamed = 0;
    double arrived = 0, since = 0, queued = -1, phase_since = 0, first_at = -1;
    // what the instance tells the router
    double told_queue = 0, told_prefill = 0, wait = 0, transfer = 0, queue = 0, first_step = 0;
};

struct Run {
    int64_t request, start, end;
    bool reads;
};

struct Step {
    std::vector<Run> runs;
    double seconds;
};

struct Instance {
    InstanceSettings set;
    int64_t free = 0;
    // not yet let in, in order; what has something to read, in order; what decodes, in order of arrival
    std::deque<int64_t> waiting;
    std::vector<int64_t> reading, running;
    int64_t inside = 0, pulling = 0;
    std::deque<Step> steps;
    std::vector<double> stage_free;
    double copies_end = 0, busy = 0;
    // the router's view
    int64_t sequences = 0, tokens = 0, last_used = 0, to_read = 0;
    std::vector<int64_t> order;
};

// Events of one time happen in the order in which they were scheduled, as in kernel.py.
struct World {
    Settings set;
    Ask ask;
    const Arrival *arrivals;
    Result *results;
    std::vector<Instance> instances;
    std::vector<Request> requests;
    // what each step's message tells, in order; on the way from each instance
    std::vector<std::deque<std::vector<int64_t>>> told;
    std::priority_queue<Event> heap;
    // when the link of each node is free
    std::vector<double> links;
    double now = 0;
    int64_t serial = 0;
    Outcome outcome = DONE;

    void at(double when, Kind kind, int64_t who) { heap.push({std::max(when, now), serial++, kind, who}); }
    // whether its KV is copied within a node; how long relays take to tell each other of it, if not
    bool direct(const Request &r) const { return set.direct && near(r); }
    bool near(const Request &r) const { return instances[r.prefill].set.node == instances[r.decode].set.node; }
    double relays_s(const Request &r) const { return near(r) ? set.relay_s : set.client_s; }
    int64_t blocks_for(int64_t tokens) const { return (tokens + set.block_size - 1) / set.block_size; }
};
}
