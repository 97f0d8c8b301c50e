// What the router's machine does (services/dsrouter), and the client.
#pragma once

#include <cmath>

#include "instances.h"

namespace express {

struct Router : Instances {
    std::deque<int64_t> local, queued;
    // by group
    std::vector<std::deque<int64_t>> unplaced;
    int64_t live = 0, ended = 0, chosen = 0;

    void submit(int64_t number) {
        results[number].at_s = now;
        at(now + set.client_s, ARRIVE, number);
        if (number + 1 < set.requests) at(set.begun_s + arrivals[number + 1].at_s, SUBMIT, number + 1);
    }

    // tokens of it that an instance would have to read, as far as the router knows
    int64_t unread(const Instance &one, const Attempt &r) {
        if (!one.index.most) return r.prompt;
        return r.prompt - one.index.found(chain(r, r.prompt - 1), sought(r)) * set.block_size;
    }

    // The instance that reads a prompt; with ``reads`` only one that has less than that to read, and will have.
    int reader(int64_t from, int64_t to, int64_t most, const Attempt &r, int64_t reads, bool free = false) {
        return choose(from, to, most, [&](const Instance &one) -> int64_t {
            // only instances whose KV need not wait for room
            if (free && !unplaced[size_t(one.set.group)].empty()) return -1;
            int64_t more = unread(one, r);
            return reads >= 0 && (more >= reads || one.to_read >= reads) ? -1 : one.tokens + more;
        });
    }

    // The instance of its group that gets a sequence's KV; one of another node than that counts as fuller by what
    // sending it is worth.
    int holder(const Attempt &r) {
        const Instance &from = instances[size_t(r.prefill)];
        return choose(set.prefills, set.prefills + set.decodes, set.decode_queue, [&](const Instance &one) -> int64_t {
            if (one.set.group != from.set.group) return -1;
            bool far = one.set.node != from.set.node;
            return one.tokens + (far ? int64_t(std::nearbyint(set.affinity * double(r.prompt + 1))) : 0);
        });
    }

    // the one whose ``fill`` is least, of those with one
    template <typename Fill> int choose(int64_t from, int64_t to, int64_t most, Fill fill) {
        int best = -1;
        int64_t least = 0;
        for (int64_t i = from; i < to; i++) {
            const Instance &one = instances[size_t(i)];
            int64_t tokens = one.sequences < most ? fill(one) : -1;
            if (tokens >= 0 && (best < 0 || better(one, tokens, instances[size_t(best)], least))) best = int(i), least = tokens;
        }
        if (best >= 0) instances[size_t(best)].last_used = ++chosen;
        return best;
    }

    static bool better(const Instance &a, int64_t a_tokens, const Instance &b, int64_t b_tokens) {
        if (a_tokens != b_tokens) return a_tokens < b_tokens;
        return a.last_used != b.last_used ? a.last_used < b.last_used : a.set.rank < b.set.rank;
    }

    void spend(Attempt &r, Stage stage) {
        results[r.request].stages[stage] += now - r.since;
        r.since = now;
    }

    // It goes to an instance that reads its prompt.
    void send_prompt(int who, int64_t number) {
        Attempt &r = attempts[size_t(number)];
        Instance &one = instances[size_t(who)];
        spend(r, r.first_at < 0 ? ROUTER_QUEUE : RETRY);
        r.unread = unread(one, r);
        bool decodes = who >= set.prefills;
        if (decodes) one.to_read += r.unread;
        if (one.index.most) one.index.note(chain(r, r.prompt - 1), sought(r));
        (decodes ? r.decode : r.prefill) = who;
        add(one, number, decodes ? r.prompt : r.unread);
    }

    // It goes to an instance that is handed its KV.
    void send_kv(int who, int64_t number) {
        Attempt &r = attempts[size_t(number)];
        spend(r, PLACEMENT);
        r.pulls = true;
        r.decode = who;
        add(instances[size_t(who)], number, r.prompt + 1);
    }

    void add(Instance &one, int64_t number, int64_t tokens) {
        attempts[size_t(number)].counted = tokens;
        one.sequences += 1, one.tokens += tokens;
        at(now + one.set.router_s, WORK, number);
    }

    void remove(Instance &one, const Attempt &r) { one.sequences -= 1, one.tokens -= r.counted; }

    void pump() {
        int64_t all = set.prefills + set.decodes;
        while (!local.empty()) {
            int64_t number = local.front(), reads = set.threshold_limits ? set.local_below : -1;
            int who = reader(set.prefills, all, set.decode_queue, attempts[size_t(number)], reads);
            if (who < 0 && !set.threshold_limits) break;
            local.pop_front();
            if (who < 0) queued.push_back(number);
            else send_prompt(who, number);
        }
        bool some = false;
        for (int64_t i = 0; i < set.prefills; i++) some |= unplaced[size_t(instances[i].set.group)].empty();
        while (!queued.empty()) {
            const Attempt &r = attempts[size_t(queued.front())];
            int who = reader(0, set.prefills, set.prefill_queue, r, -1, set.groups > 1 && some);
            if (who < 0) break;
            send_prompt(who, queued.front());
            queued.pop_front();
        }
        for (std::deque<int64_t> &waiting : unplaced) {
            while (!waiting.empty()) {
                int who = holder(attempts[size_t(waiting.front())]);
                if (who < 0) break;
                send_kv(who, waiting.front());
                waiting.pop_front();
            }
        }
    }

    // Where it waits: for an instance that decodes it as well, or for one that only reads its prompt.
    std::deque<int64_t> &queue_of(const Attempt &r) {
        int64_t tokens = r.prompt;
        if (set.threshold_limits && tokens >= set.local_below)
            for (int64_t i = 0; i < set.decodes; i++) tokens = std::min(tokens, unread(instances[size_t(set.prefills + i)], r));
        return tokens < set.local_below ? local : queued;
    }

    void arrive(int64_t number) {
        if (live >= set.max_requests) {
            Result &result = results[number];
            result.first_s = -1;
            result.total_s = now + set.client_s - result.at_s;
            end(number, false);
        } else {
            live += 1;
            Attempt &r = attempts.emplace_back();
            r.request = number, r.prompt = arrivals[number].prompt, r.output = arrivals[number].output;
            r.since = now;
            results[number].stages[TOTAL] = now;
            queue_of(r).push_back(int64_t(attempts.size()) - 1);
        }
        pump();
    }

    // A decode instance had no room for it any more: what it has made is read again with its prompt.
    void preempted(int64_t number) {
        Attempt &lost = attempts[size_t(number)];
        Instance &one = instances[size_t(lost.decode)];
        remove(one, lost);
        if (lost.made == 0) one.to_read -= lost.unread;
        if (lost.prefill >= 0) at(now + instances[size_t(lost.prefill)].set.router_s, ABORT, number);
        spend(lost, RETRY);
        Attempt &r = attempts.emplace_back();
        r.request = lost.request, r.prompt = lost.prompt + lost.made, r.output = lost.output - lost.made;
        r.since = now, r.first_at = lost.first_at;
        // it has waited before: it goes first
        queue_of(r).push_front(int64_t(attempts.size()) - 1);
        pump();
    }

    void prefilled(int64_t number) {
        Attempt &r = attempts[size_t(number)];
        Result &result = results[r.request];
        if (r.first_at < 0) {
            double elapsed = now - r.since;
            r.since = r.first_at = now;
            result.stages[PREFILL_QUEUE] = r.told_queue;
            result.stages[PREFILL] = r.told_prefill;
            result.stages[PREFILL_WIRE] = elapsed - r.told_queue - r.told_prefill;
            result.first_s = now + set.client_s - result.at_s;
        } else {
            spend(r, RETRY);
        }
        if (r.prefill >= 0) {
            remove(instances[size_t(r.prefill)], r);
            r.made = 1;
            if (r.output == 1) finish(number);
        } else {
            Instance &one = instances[size_t(r.decode)];
            one.to_read -= r.unread, one.tokens += 1, r.counted += 1;
            if (r.output == 1) remove(one, r), finish(number);
        }
        pump();
    }

    void stepped(int who) {
        Instance &one = instances[size_t(who)];
        std::vector<int64_t> tokens = std::move(told[size_t(who)].front());
        told[size_t(who)].pop_front();
        for (int64_t number : tokens) {
            Attempt &r = attempts[size_t(number)];
            // of those made since its first, which the router heard of with the prompt
            if (r.heard == 0) {
                Result &result = results[r.request];
                double elapsed = now - r.since, parts = r.wait + r.transfer + r.queue + r.first_step;
                r.since = now;
                result.stages[WAIT] += r.wait, result.stages[TRANSFER] += r.transfer;
                result.stages[QUEUE] += r.queue, result.stages[FIRST_STEP] += r.first_step;
                result.stages[WIRE] += elapsed - parts;
            }
            one.tokens += 1, r.counted += 1;
            if (++r.heard == r.output - 1) {
                // the next turn of a conversation begins with this one
                int64_t known = r.prompt + r.output - 1;
                if (one.index.most && set.local_below) one.index.note(chain(r, known), known / set.block_size);
                remove(one, r);
                finish(number);
            }
        }
        pump();
    }

    void end(int64_t request, bool good) {
        results[request].order = ended++;
        missed += !good && request >= set.first;
        if (missed > set.misses) outcome = OUT_OF_REACH;
    }

    void finish(int64_t number) {
        Attempt &r = attempts[size_t(number)];
        Result &result = results[r.request];
        double begun = result.stages[TOTAL];
        result.stages[DECODE] += now - r.since;
        result.stages[TTFT] = r.first_at - begun;
        result.stages[TOTAL] = now - begun;
        result.total_s = now + set.client_s - result.at_s;
        int64_t more = arrivals[r.request].output - 1;
        end(r.request, result.first_s <= set.ttft_s && (!more || (result.total_s - result.first_s) / double(more) <= set.tpot_s));
        live -= 1;
        requests[size_t(r.request)].chain = {};
        if (now - begun >= set.max_deadline_s && outcome == DONE) outcome = PAST_DEADLINE;
    }
};
}
