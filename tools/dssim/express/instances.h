// What the machines of prefill and decode instances do (services/dsprefill, services/dsdecode), and their shells
// (processes.py): they read and write requests, and schedule what the others hear of it.
#pragma once

#include "world.h"

namespace express {

struct Instances : World {
    int64_t arrived = 0;

    void work(int64_t number) {
        Attempt &r = attempts[size_t(number)];
        int who = r.decode >= 0 ? r.decode : r.prefill;
        Instance &one = instances[who];
        if (who < set.prefills) {
            r.arrived = now;
            one.reading.push_back(number);
        } else {
            if (!r.pulls) r.arrived = now;
            // a decode instance that has it will soon say that it wants it, and again before a lease has passed
            else if (now - r.sealed > set.lease_s / 2) outcome = PAST_LEASE;
            r.came = arrived++;
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

    void read(Attempt &r, int64_t number, int64_t count, std::vector<Run> &runs) {
        if (r.queued < 0) r.queued = now - r.arrived;
        runs.push_back({number, r.done, r.done + count, true});
        r.done += count;
        r.in_step = true;
    }

    void next_steps(int who) {
        Instance &one = instances[who];
        while (int64_t(one.steps.size()) < one.set.stages && outcome == DONE)
            if (!launch(who, who < set.prefills ? next_prefill(one) : next_decode(one))) break;
        // the machine would let them in with whatever comes next, a heartbeat even
        if (one.gave_way && one.steps.empty() && !one.waiting.empty() && outcome == DONE) outcome = BEYOND;
    }

    // what may be known of a prompt; the instance begins with it
    const Digest *begins(const Instance &one, const Attempt &r) { return one.pool.keeps ? chain(r, r.prompt - 1) : nullptr; }

    // prefill instances

    std::vector<Run> next_prefill(Instance &one) {
        std::vector<Run> runs;
        int64_t room = one.set.max_batch_tokens;
        for (int64_t number : one.reading) {
            Attempt &r = attempts[size_t(number)];
            if (r.in_step) continue;
            bool begun = r.there.count > 0;
            const Digest *begin = begun ? nullptr : begins(one, r);
            int64_t found = one.pool.known(begin, begun ? 0 : sought(r));
            int64_t left = r.prompt - r.done - found * set.block_size;
            int64_t count = left <= room ? left : left <= one.set.max_batch_tokens ? 0 : room;
            if (int64_t(runs.size()) == one.set.max_batch || !count) break;
            if (!begun) {
                int64_t wanted = blocks_for(r.prompt);
                if (one.pool.cost(wanted, begin, found) > one.pool.free()) break;
                one.pool.take(r.there, wanted, begin, found);
                r.done = found * set.block_size;
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
            Attempt &r = attempts[size_t(run.attempt)];
            r.in_step = false;
            if (run.end < r.prompt) continue;
            one.reading.erase(std::find(one.reading.begin(), one.reading.end(), run.attempt));
            if (one.pool.keeps) one.pool.remember(r.there, chain(r, r.prompt), r.prompt / set.block_size);
            tell_prefilled(r, run.attempt, one);
            if (r.output == 1) {
                one.pool.give(r.there);
            } else {
                one.copies_end = std::max(now, one.copies_end) + over(r.there.count, one.set.seal_bytes_per_s);
                at(one.copies_end, SEALED, run.attempt);
            }
        }
        next_steps(who);
    }

    // the relay of the owner's node has been asked, and the KV was offered to it
    void grant(Attempt &r, int64_t number) {
        if (direct(r)) return at(now + set.relay_s, GRANT, number);
        double &link = links[size_t(instances[r.prefill].set.node)];
        r.streamed = link = std::max(now, link) + over(blocks_for(r.prompt), set.network_bytes_per_s);
        at(now + relays_s(r), TICKET, number);
    }

    double over(int64_t blocks, double bytes_per_s) const {
        return bytes_per_s ? double(blocks * set.block_nbytes) / bytes_per_s : 0.0;
    }

    void tell_prefilled(Attempt &r, int64_t number, Instance &one) {
        r.told_queue = r.queued;
        r.told_prefill = now - r.arrived - r.queued;
        at(now + one.set.router_s, PREFILLED, number);
    }

    // decode instances

    void admit(Instance &one) {
        if (one.gave_way && !one.steps.empty()) return;
        while (!one.waiting.empty()) {
            int64_t number = one.waiting.front();
            Attempt &r = attempts[size_t(number)];
            if (one.inside >= one.set.max_batch || (r.pulls && one.pulling >= 8)) return;
            int64_t wanted = blocks_for(r.prompt + 1);
            const Digest *begin = r.pulls ? nullptr : begins(one, r);
            int64_t found = one.pool.known(begin, r.pulls ? 0 : sought(r));
            int64_t cost = one.pool.cost(wanted, begin, found), free = one.pool.free();
            if (cost + one.inside > free && (one.inside || cost > free)) return;
            one.pool.take(r.here, wanted, begin, found);
            r.done = found * set.block_size;
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

    // whether it misses a block for its next token
    bool misses(const Attempt &r) const { return blocks_for(r.prompt + r.made) > r.here.count; }

    // Makes the youngest give way where blocks are too few; false where those that are in a step may end with it.
    bool make_room(Instance &one) {
        int64_t missing = 0, idle = 0;
        for (int64_t number : one.running) {
            const Attempt &r = attempts[size_t(number)];
            if (!r.in_step) missing += misses(r), idle += 1;
        }
        if (missing <= one.pool.free()) return true;
        for (int64_t number : one.reading) idle += !attempts[size_t(number)].in_step;
        for (; missing > one.pool.free(); idle--) {
            if (idle == 1 && !one.steps.empty()) return false;
            missing -= give_way(one);
        }
        return true;
    }

    // The youngest that is in no step goes back to the router; whether it missed a block.
    bool give_way(Instance &one) {
        auto is_idle = [&](int64_t number) { return !attempts[size_t(number)].in_step; };
        auto made = std::find_if(one.running.rbegin(), one.running.rend(), is_idle);
        auto read = std::find_if(one.reading.rbegin(), one.reading.rend(), is_idle);
        bool runs = read == one.reading.rend() ||
                    (made != one.running.rend() && attempts[size_t(*made)].came > attempts[size_t(*read)].came);
        int64_t number = runs ? *made : *read;
        Attempt &r = attempts[size_t(number)];
        bool missed = runs && misses(r);
        at(now + one.set.router_s, PREEMPTED, number);
        if (runs && one.pool.keeps) {
            int64_t known = r.prompt + r.made - 1;
            one.pool.remember(r.here, chain(r, known), known / set.block_size);
        }
        leave(one, r);
        if (runs) one.running.erase(std::next(made).base());
        else one.reading.erase(std::next(read).base());
        one.gave_way = true;
        preemptions += 1;
        // what they keep of it matters from now on
        if (blind) outcome = SHORT_OF_BLOCKS;
        return missed;
    }

    std::vector<Run> next_decode(Instance &one) {
        if (!make_room(one)) return {};
        bool reads = false;
        for (int64_t number : one.reading) reads |= !attempts[size_t(number)].in_step;
        std::vector<Run> runs;
        int64_t share = (int64_t(one.running.size()) + one.set.stages - 1) / one.set.stages;
        if (!(one.set.prefill_priority && reads)) {
            for (int64_t number : one.running) {
                Attempt &r = attempts[size_t(number)];
                if (r.in_step) continue;
                if (int64_t(runs.size()) == share) break;
                if (r.fresh) r.queue = now - r.phase_since;
                r.in_step = true;
                if (misses(r)) one.pool.take(r.here, 1);
                runs.push_back({number, r.prompt + r.made - 1, r.prompt + r.made, false});
            }
        }
        int64_t room = std::max(one.set.max_batch_tokens - int64_t(runs.size()), set.block_size);
        for (int64_t number : one.reading) {
            Attempt &r = attempts[size_t(number)];
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
        one.gave_way = false;
        std::vector<int64_t> tokens;
        bool over = false;
        for (const Run &run : step.runs) {
            Attempt &r = attempts[size_t(run.attempt)];
            r.in_step = false;
            if (run.reads) {
                if (run.end < r.prompt) continue;
                r.made = 1;
                tell_prefilled(r, run.attempt, one);
                one.reading.erase(std::find(one.reading.begin(), one.reading.end(), run.attempt));
                if (one.pool.keeps) one.pool.remember(r.here, chain(r, r.prompt), r.prompt / set.block_size);
                if (r.output == 1) leave(one, r);
                else join(one, run.attempt);
                continue;
            }
            if (r.fresh) r.first_step = step.seconds;
            r.fresh = false;
            r.made += 1;
            tokens.push_back(run.attempt);
            if (r.made < r.output) continue;
            int64_t known = r.prompt + r.made - 1;
            if (one.pool.keeps) one.pool.remember(r.here, chain(r, known), known / set.block_size);
            leave(one, r);
            over = true;
        }
        if (over)
            std::erase_if(one.running, [&](int64_t n) { return attempts[size_t(n)].made == attempts[size_t(n)].output; });
        if (!tokens.empty()) {
            told[who].push_back(std::move(tokens));
            at(now + one.set.router_s, STEPPED, who);
        }
        admit(one);
        next_steps(who);
    }

    void leave(Instance &one, Attempt &r) {
        one.pool.give(r.here);
        one.inside -= 1;
    }

    // its KV is there; sequences decode in the order in which they came
    void join(Instance &one, int64_t number) {
        attempts[size_t(number)].phase_since = now;
        auto place = std::upper_bound(one.running.begin(), one.running.end(), number,
                                      [&](int64_t a, int64_t b) { return attempts[size_t(a)].came < attempts[size_t(b)].came; });
        one.running.insert(place, number);
    }

    void copy(Attempt &r, int64_t number, Instance &one) {
        one.copies_end = std::max(now, one.copies_end) + over(blocks_for(r.prompt), one.set.copy_bytes_per_s);
        at(one.copies_end, COPIED, number);
    }

    void granted(Attempt &r, int64_t number) {
        Instance &one = instances[r.decode];
        r.granted = true;
        if (r.copied) at(now + set.relay_s, PULLED, number);
        else if (!direct(r)) at(r.streamed, COPIED, number);
        else if (!set.early) copy(r, number, one);
        admit(one);
        next_steps(r.decode);
    }

    void copied(Attempt &r, int64_t number) {
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
