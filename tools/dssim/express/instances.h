// What the machines of prefill and decode instances do (services/dsprefill, services/dsdecode), and their shells
// (processes.py): they read and write requests, and schedule what the others hear of it.
#pragma once

#include "world.h"

namespace express {

struct Instances : World {
    // order in which requests came to decode instances
    std::vector<int64_t> seen;
    int64_t arrived = 0;

    void work(int64_t number) {
        Request &r = requests[number];
        int who = r.decode >= 0 ? r.decode : r.prefill;
        Instance &one = instances[who];
        if (who < set.prefills) {
            r.arrived = now;
            one.reading.push_back(number);
        } else {
            if (!r.pulls) r.arrived = now;
            // a decode instance that has it will soon say that it wants it, and again before a lease has passed
            else if (now - r.sealed > set.lease_s / 2) outcome = PAST_LEASE;
            seen[number] = arrived++;
            r.phase_since = now;
            one.waiting.push_back(number);
            admit(one);
        }
        next_steps(who);
    }

    // steps

    double linear(const Linear &l, int64_t count, int64_t tokens, int64_t squares) const {
        double total = l.base + l.per_token * double(tokens) + l.per_sequence * double(count);
        return l.per_square ? total + l.per_square * double(squares) : total;
    }

    double whole_s(const Instance &one, const std::vector<Run> &runs) const {
        int64_t chunks = 0, rows = 0, squares = 0, batch = 0, context = 0, context_squares = 0;
        bool begun = false;
        for (const Run &run : runs) {
            if (run.end - run.start > 1 || run.start == 0) {
                chunks += 1, rows += run.end - run.start, squares += run.end * run.end - run.start * run.start;
                begun |= run.start > 0;
            } else {
                batch += 1, context += run.end, context_squares += run.end * run.end;
            }
        }
        if (one.set.asks) return ask(&one - instances.data(), chunks, rows, squares, batch, context);
        const Linear &made = batch >= one.set.large_batch ? one.set.decode_large : one.set.decode;
        const Linear &read = one.set.prefill;
        if (!chunks) return linear(made, batch, context, context_squares);
        if (!batch && !begun) return linear(read, chunks, rows, squares);
        double matrices = read.base + read.per_token * double(rows + batch) + read.per_sequence * double(chunks);
        if (batch) matrices = std::max(matrices, made.base + made.per_sequence * double(batch));
        return matrices + read.per_square * double(squares) + made.per_token * double(context);
    }

    bool launch(int who, std::vector<Run> &&runs) {
        if (runs.empty()) return false;
        Instance &one = instances[who];
        double whole = whole_s(one, runs), each = whole / double(one.set.stages);
        double leaves = std::max(now, one.stage_free[0]);
        for (double &free : one.stage_free) leaves = free = std::max(leaves, free) + each;
        one.busy += whole / double(one.set.stages);
        one.steps.push_back({std::move(runs), leaves - now});
        at(leaves, STEP_END, who);
        return true;
    }

    void read(Request &r, int64_t number, int64_t count, std::vector<Run> &runs) {
        if (r.queued < 0) r.queued = now - r.arrived;
        runs.push_back({number, r.done, r.done + count, true});
        r.done += count;
        r.in_step = true;
    }

    void next_steps(int who) {
        Instance &one = instances[who];
        while (int64_t(one.steps.size()) < one.set.stages && outcome == DONE)
            if (!launch(who, who < set.prefills ? next_prefill(one) : next_decode(one))) return;
    }

    // prefill instances

    std::vector<Run> next_prefill(Instance &one) {
        std::vector<Run> runs;
        int64_t room = one.set.max_batch_tokens;
        for (int64_t number : one.reading) {
            Request &r = requests[number];
            if (r.in_step) continue;
            int64_t left = r.prompt - r.done;
            int64_t count = left <= room ? left : left <= one.set.max_batch_tokens ? 0 : room;
            if (int64_t(runs.size()) == one.set.max_batch || !count) break;
            if (!r.blocks) {
                int64_t wanted = blocks_for(r.prompt);
                if (wanted > one.free) break;
                one.free -= r.blocks = wanted;
            }
            room -= count;
            read(r, number, count, runs);
        }
        return runs;
    }

    void prefill_step_end(int who) {
        Instance &one = instances[who];
        Step step = std::move(one.steps.front());
        one.steps.pop_front();
        for (const Run &run : step.runs) {
            Request &r = requests[run.request];
            r.in_step = false;
            if (run.end < r.prompt) continue;
            one.reading.erase(std::find(one.reading.begin(), one.reading.end(), run.request));
            tell_prefilled(r, run.request, one);
            if (r.output == 1) {
                one.free += r.blocks;
            } else {
                one.copies_end = std::max(now, one.copies_end) + over(r.blocks, one.set.seal_bytes_per_s);
                at(one.copies_end, SEALED, run.request);
            }
        }
        next_steps(who);
    }

    // the relay of the owner's node has been asked, and the KV was offered to it
    void grant(Request &r, int64_t number) {
        if (direct(r)) return at(now + set.relay_s, GRANT, number);
        double &link = links[size_t(instances[r.prefill].set.node)];
        r.streamed = link = std::max(now, link) + over(blocks_for(r.prompt), set.network_bytes_per_s);
        at(now + relays_s(r), TICKET, number);
    }

    double over(int64_t blocks, double bytes_per_s) const {
        return bytes_per_s ? double(blocks * set.block_nbytes) / bytes_per_s : 0.0;
    }

    void tell_prefilled(Request &r, int64_t number, Instance &one) {
        r.told_queue = r.queued;
        r.told_prefill = now - r.arrived - r.queued;
        at(now + one.set.router_s, PREFILLED, number);
    }

    // decode instances

    void admit(Instance &one) {
        while (!one.waiting.empty()) {
            int64_t number = one.waiting.front();
            Request &r = requests[number];
            if (one.inside >= one.set.max_batch || (r.pulls && one.pulling >= 8)) return;
            int64_t wanted = blocks_for(r.prompt + 1);
            if (wanted + one.inside > one.free && (one.inside || wanted > one.free)) return;
            one.free -= r.blocks = wanted;
            one.waiting.pop_front();
            one.inside += 1;
            if (r.pulls) {
                one.pulling += 1;
                r.wait = now - r.phase_since;
                at(now + set.relay_s, PULL, number);
                if (set.early && direct(r)) copy(r, number, one);
            } else {
                one.reading.push_back(number);
            }
            r.phase_since = now;
        }
    }

    std::vector<Run> next_decode(Instance &one) {
        int64_t missing = 0, idle = 0;
        for (int64_t number : one.running) {
            Request &r = requests[number];
            if (r.in_step) continue;
            missing += std::max<int64_t>(0, blocks_for(r.prompt + r.made) - r.blocks), idle += 1;
        }
        if (missing > one.free) {
            outcome = SHORT_OF_BLOCKS;
            return {};
        }
        bool reads = false;
        for (int64_t number : one.reading) reads |= !requests[number].in_step;
        std::vector<Run> runs;
        int64_t share = (int64_t(one.running.size()) + one.set.stages - 1) / one.set.stages;
        if (!(one.set.prefill_priority && reads)) {
            for (int64_t number : one.running) {
                Request &r = requests[number];
                if (r.in_step) continue;
                if (int64_t(runs.size()) == share) break;
                if (r.fresh) r.queue = now - r.phase_since;
                r.in_step = true;
                int64_t more = std::max<int64_t>(0, blocks_for(r.prompt + r.made) - r.blocks);
                r.blocks += more, one.free -= more;
                runs.push_back({number, r.prompt + r.made - 1, r.prompt + r.made, false});
            }
        }
        int64_t room = std::max(one.set.max_batch_tokens - int64_t(runs.size()), set.block_size);
        for (int64_t number : one.reading) {
            Request &r = requests[number];
            if (r.in_step) continue;
            if (!room) break;
            int64_t count = std::min(r.prompt - r.done, room);
            room -= count;
            read(r, number, count, runs);
        }
        return runs;
    }

    void decode_step_end(int who) {
        Instance &one = instances[who];
        Step step = std::move(one.steps.front());
        one.steps.pop_front();
        std::vector<int64_t> tokens;
        bool over = false;
        for (const Run &run : step.runs) {
            Request &r = requests[run.request];
            r.in_step = false;
            if (run.reads) {
                if (run.end < r.prompt) continue;
                r.made = 1;
                tell_prefilled(r, run.request, one);
                one.reading.erase(std::find(one.reading.begin(), one.reading.end(), run.request));
                if (r.output == 1) leave(one, r);
                else join(one, run.request);
                continue;
            }
            if (r.fresh) r.first_step = step.seconds;
            r.fresh = false;
            r.made += 1;
            tokens.push_back(run.request);
            if (r.made == r.output) leave(one, r), over = true;
        }
        if (over)
            std::erase_if(one.running, [&](int64_t n) { return requests[n].made == requests[n].output; });
        if (!tokens.empty()) {
            told[who].push_back(std::move(tokens));
            at(now + one.set.router_s, STEPPED, who);
        }
        admit(one);
        next_steps(who);
    }

    void leave(Instance &one, Request &r) {
        one.free += r.blocks;
        one.inside -= 1;
    }

    // its KV is there; sequences decode in the order in which they came
    void join(Instance &one, int64_t number) {
        requests[number].phase_since = now;
        requests[number].done = 0;
        auto place = std::upper_bound(one.running.begin(), one.running.end(), number,
                                      [&](int64_t a, int64_t b) { return seen[a] < seen[b]; });
        one.running.insert(place, number);
    }

    void copy(Request &r, int64_t number, Instance &one) {
        one.copies_end = std::max(now, one.copies_end) + over(blocks_for(r.prompt), one.set.copy_bytes_per_s);
        at(one.copies_end, COPIED, number);
    }

    void granted(Request &r, int64_t number) {
        Instance &one = instances[r.decode];
        r.granted = true;
        if (r.copied) at(now + set.relay_s, PULLED, number);
        else if (!direct(r)) at(r.streamed, COPIED, number);
        else if (!set.early) copy(r, number, one);
        admit(one);
        next_steps(r.decode);
    }

    void copied(Request &r, int64_t number) {
        Instance &one = instances[r.decode];
        r.transfer = now - r.phase_since;
        one.pulling -= 1;
        join(one, number);
        r.copied = true;
        if (r.granted) at(now + set.relay_s, PULLED, number);
        admit(one);
        next_steps(r.decode);
    }
};
}
