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

    // with ``sent`` every instance of another node than its KV's counts as fuller by what sending that is worth, and
    // those of another group do not count; ``free``: only instances whose KV need not wait for room
    int choose(int64_t from, int64_t to, int64_t most, int64_t reading, const Request *sent = nullptr, bool free = false) {
        auto fill = [&](const Instance &one) {
            bool far = sent && one.set.node != instances[sent->prefill].set.node;
            return one.tokens + (far ? int64_t(std::nearbyint(set.affinity * double(sent->prompt + 1))) : 0);
        };
        int best = -1;
        for (int64_t i = from; i < to; i++) {
            const Instance &one = instances[i];
            if (sent && one.set.group != instances[sent->prefill].set.group) continue;
            if (free && !unplaced[size_t(one.set.group)].empty()) continue;
            if (one.sequences >= most || (reading >= 0 && one.to_read >= reading)) continue;
            if (best < 0 || better(one, fill(one), instances[best], fill(instances[best]))) best = int(i);
        }
        if (best >= 0) instances[best].last_used = ++chosen;
        return best;
    }

    static bool better(const Instance &a, int64_t a_tokens, const Instance &b, int64_t b_tokens) {
        if (a_tokens != b_tokens) return a_tokens < b_tokens;
        return a.last_used != b.last_used ? a.last_used < b.last_used : a.set.rank < b.set.rank;
    }

    void spend(Request &r, int64_t number, Stage stage) {
        results[number].stages[stage] += now - r.since;
        r.since = now;
    }

    void send(int who, int64_t number, Stage stage) {
        Request &r = requests[number];
        spend(r, number, stage);
        Instance &one = instances[who];
        one.sequences += 1;
        one.tokens += r.prompt + r.pulls;
        (who < set.prefills ? r.prefill : r.decode) = who;
        if (who >= set.prefills && !r.pulls) one.to_read += r.prompt;
        at(now + one.set.router_s, WORK, number);
    }

    void pump() {
        int64_t all = set.prefills + set.decodes;
        while (!local.empty()) {
            int who = choose(set.prefills, all, set.decode_queue, set.threshold_limits ? set.local_below : -1);
            if (who < 0 && !set.threshold_limits) break;
            int64_t number = local.front();
            local.pop_front();
            if (who < 0) queued.push_back(number);
            else send(who, number, ROUTER_QUEUE);
        }
        bool some = false;
        for (int64_t i = 0; i < set.prefills; i++) some |= unplaced[size_t(instances[i].set.group)].empty();
        while (!queued.empty()) {
            int who = choose(0, set.prefills, set.prefill_queue, -1, nullptr, set.groups > 1 && some);
            if (who < 0) break;
            send(who, queued.front(), ROUTER_QUEUE);
            queued.pop_front();
        }
        for (std::deque<int64_t> &waiting : unplaced) {
            while (!waiting.empty()) {
                int who = choose(set.prefills, all, set.decode_queue, -1, &requests[waiting.front()]);
                if (who < 0) break;
                requests[waiting.front()].pulls = true;
                send(who, waiting.front(), PLACEMENT);
                waiting.pop_front();
            }
        }
    }

    void arrive(int64_t number) {
        Request &r = requests[number];
        if (live >= set.max_requests) {
            Result &result = results[number];
            result.first_s = -1;
            result.total_s = now + set.client_s - result.at_s;
            result.order = ended++;
        } else {
            live += 1;
            r.arrived = r.since = now;
            results[number].stages[TOTAL] = now;
            (r.prompt < set.local_below ? local : queued).push_back(number);
        }
        pump();
    }

    void prefilled(int64_t number) {
        Request &r = requests[number];
        Result &result = results[number];
        double elapsed = now - r.since;
        r.since = r.first_at = now;
        result.stages[PREFILL_QUEUE] = r.told_queue;
        result.stages[PREFILL] = r.told_prefill;
        result.stages[PREFILL_WIRE] = elapsed - r.told_queue - r.told_prefill;
        result.first_s = now + set.client_s - result.at_s;
        if (r.prefill >= 0) {
            Instance &one = instances[r.prefill];
            one.sequences -= 1, one.tokens -= r.prompt;
            r.made = 1;
            if (r.output == 1) finish(number);
        } else {
            Instance &one = instances[r.decode];
            one.to_read -= r.prompt, one.tokens += 1;
            if (r.output == 1) one.sequences -= 1, one.tokens -= r.prompt + 1, finish(number);
        }
        pump();
    }

    void stepped(int who) {
        Instance &one = instances[who];
        std::vector<int64_t> tokens = std::move(told[who].front());
        told[who].pop_front();
        for (int64_t number : tokens) {
            Request &r = requests[number];
            Result &result = results[number];
            // of those made since its first, which the router heard of with the prompt
            int64_t &heard = r.done;
            if (heard == 0) {
                double elapsed = now - r.since, parts = r.wait + r.transfer + r.queue + r.first_step;
                r.since = now;
                result.stages[WAIT] = r.wait, result.stages[TRANSFER] = r.transfer;
                result.stages[QUEUE] = r.queue, result.stages[FIRST_STEP] = r.first_step;
                result.stages[WIRE] = elapsed - parts;
            }
            one.tokens += 1;
            if (++heard == r.output - 1) {
                one.sequences -= 1, one.tokens -= r.prompt + r.output;
                finish(number);
            }
        }
        pump();
    }

    void finish(int64_t number) {
        Request &r = requests[number];
        Result &result = results[number];
        double begun = result.stages[TOTAL];
        result.stages[DECODE] += now - r.since;
        result.stages[TTFT] = r.first_at - begun;
        result.stages[TOTAL] = now - begun;
        result.total_s = now + set.client_s - result.at_s;
        result.order = ended++;
        live -= 1;
        if (now - begun >= set.max_deadline_s) outcome = PAST_DEADLINE;
    }
};
}
