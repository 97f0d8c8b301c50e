// A simulated system without its messages: the same waits, steps and copies at the same times as in system.py, where
// every process runs its real machine. What the machines do is written down here a second time, and tests hold the
// two against each other. What is not: deadlines, failures, KV that goes in parts or is kept by relays; a run that
// comes upon a deadline, or nearly loses a handle, says so and is worth nothing.
//
// Order: events of one time happen in the order in which they were scheduled, as in kernel.py, and every handler
// schedules in the order of the machine's actions.

#include "router.h"

namespace express {

struct Simulation : Router {
    int64_t happenings = 0;

    void run() {
        if (set.requests) at(set.begun_s + arrivals[0].at_s, SUBMIT, 0);
        while (ended < set.requests && outcome == DONE && !heap.empty()) {
            Event event = heap.top();
            heap.pop();
            now = event.at;
            happenings += 1;
            happen(event);
        }
    }

    void happen(const Event &event) {
        int64_t who = event.who;
        if (event.kind == STEP_END) return who < set.prefills ? prefill_step_end(int(who)) : decode_step_end(int(who));
        if (event.kind == STEPPED) return stepped(int(who));
        if (event.kind == SUBMIT) return submit(who);
        if (event.kind == ARRIVE) return arrive(who);
        Attempt &r = attempts[size_t(who)];
        switch (event.kind) {
        case WORK: return work(who);
        case PREFILLED: return prefilled(who);
        case SEALED:
            r.sealed = now;
            at(now + set.relay_s, OFFERED, who);
            at(now + instances[r.prefill].set.router_s, KV_SEALED, who);
            return next_steps(r.prefill);
        case KV_SEALED: unplaced[size_t(instances[r.prefill].set.group)].push_back(who); return pump();
        case PULL:
            if (!direct(r)) return at(now + relays_s(r), FETCH, who);
            [[fallthrough]];
        case FETCH:
        case OFFERED:
            (event.kind == OFFERED ? r.offered : r.asked) = true;
            if (r.asked && r.offered) grant(r, who);
            return;
        case TICKET: return at(now + set.relay_s, GRANT, who);
        case GRANT: return granted(r, who);
        case COPIED: return copied(r, who);
        case PULLED:
            if (!direct(r)) return at(now + relays_s(r), FETCHED, who);
            [[fallthrough]];
        case FETCHED: r.released = true; return at(now + set.relay_s, RELEASE, who);
        case RELEASE: instances[r.prefill].pool.give(r.there); return next_steps(r.prefill);
        case PREEMPTED: return preempted(who);
        case ABORT:
            // else its relay would be told to withdraw the KV
            if (!r.released) outcome = BEYOND;
            return;
        default: return;
        }
    }
};
}

extern "C" int64_t simulate(const Settings *set, const InstanceSettings *each, const Arrival *arrivals, const int64_t *hashes,
                            Ask ask, Result *results, double *busy_s, int64_t *happenings, int64_t *preemptions) {
    express::Simulation one;
    one.set = *set, one.ask = ask, one.arrivals = arrivals, one.results = results, one.now = set->begun_s;
    one.requests.resize(size_t(set->requests));
    for (int64_t i = 0; i < set->requests; i++) {
        one.requests[size_t(i)] = {hashes, arrivals[i].hashes, arrivals[i].own, arrivals[i].prompt, {}};
        hashes += arrivals[i].hashes;
    }
    one.unplaced.resize(size_t(set->groups));
    for (int64_t i = 0; i < set->prefills + set->decodes; i++) {
        express::Instance made;
        made.set = each[i];
        made.pool = express::Pool(each[i].blocks, each[i].keeps && set->keeps);
        made.index.most = made.pool.keeps ? each[i].blocks : 0;
        one.blind |= each[i].keeps && !set->keeps;
        made.stage_free.assign(size_t(each[i].stages), 0.0);
        one.instances.push_back(std::move(made));
        one.told.emplace_back();
        one.links.resize(std::max(one.links.size(), size_t(each[i].node) + 1));
    }
    one.run();
    for (size_t i = 0; i < one.instances.size(); i++) busy_s[i] = one.instances[i].busy;
    *happenings = one.happenings;
    *preemptions = one.preemptions;
    return one.outcome;
}
