// KV blocks, some of which are kept for prompts that begin alike (dssched/prefix.py).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace express {

// of a block's tokens, and of all before them; never 0
typedef uint64_t Digest;

inline Digest mixed(Digest digest, uint64_t more) {
    digest = (digest ^ more) + 0x9e3779b97f4a7c15;
    digest = (digest ^ (digest >> 30)) * 0xbf58476d1ce4e5b9;
    digest = (digest ^ (digest >> 27)) * 0x94d049bb133111eb;
    digest ^= digest >> 31;
    return digest ? digest : 1;
}

// Numbers by digest, in one piece of memory: prompts of thousands of blocks are looked up again and again.
struct Table {
    int32_t find(Digest digest) const {
        for (size_t at = digest & mask; slots[at].digest; at = (at + 1) & mask)
            if (slots[at].digest == digest) return slots[at].number;
        return -1;
    }

    void add(Digest digest, int32_t number) {
        if (++count * 2 > slots.size()) grow();
        put({digest, number});
    }

    void remove(Digest digest) {
        size_t at = digest & mask;
        while (slots[at].digest != digest) at = (at + 1) & mask;
        // whoever was put behind it for want of room moves up
        for (size_t next = (at + 1) & mask; slots[next].digest; next = (next + 1) & mask) {
            if (((next - slots[next].digest) & mask) < ((next - at) & mask)) continue;
            slots[at] = slots[next];
            at = next;
        }
        slots[at] = {};
        count--;
    }

private:
    struct Slot {
        Digest digest = 0;
        int32_t number = -1;
    };

    void put(Slot one) {
        size_t at = one.digest & mask;
        while (slots[at].digest) at = (at + 1) & mask;
        slots[at] = one;
    }

    void grow() {
        std::vector<Slot> old(slots.size() * 2);
        old.swap(slots);
        mask = slots.size() - 1;
        for (const Slot &one : old)
            if (one.digest) put(one);
    }

    std::vector<Slot> slots = std::vector<Slot>(64);
    size_t mask = 63, count = 0;
};

// Numbers in the order of their last use.
struct Order {
    int64_t size = 0;

    int32_t oldest() const { return links[0].next - 1; }

    void append(int32_t number) {
        size_t at = size_t(number) + 1;
        if (at >= links.size()) links.resize(at + 1);
        int32_t last = links[0].previous;
        links[at] = {last, 0};
        links[size_t(last)].next = links[0].previous = int32_t(at);
        size++;
    }

    void remove(int32_t number) {
        const Link &one = links[size_t(number) + 1];
        links[size_t(one.previous)].next = one.next;
        links[size_t(one.next)].previous = one.previous;
        size--;
    }

private:
    // a ring, of which place 0 is nobody's: places are numbers and one
    struct Link {
        int32_t previous = 0, next = 0;
    };
    std::vector<Link> links = std::vector<Link>(1);
};

// The tokens of a request, prompt and answer, as prompts.py makes them; digests are made as they are asked for.
struct Tokens {
    // of a prompt, hashed_tokens for each hash; what follows is of this request alone, and answers are made of ones
    const int64_t *hashes = nullptr;
    int64_t hashed = 0, own = 0, prompt = 0;
    std::vector<Digest> chain;

    const Digest *digests(int64_t blocks, int64_t block_size, int64_t hashed_tokens) {
        while (int64_t(chain.size()) < blocks) {
            Digest digest = chain.empty() ? 0 : chain.back();
            int64_t at = int64_t(chain.size()) * block_size, end = at + block_size;
            while (at < end) {
                int64_t token = own, until = prompt;
                if (at >= prompt) token = 1, until = end;
                else if (at / hashed_tokens < hashed) token = hashes[at / hashed_tokens], until = std::min(until, (at / hashed_tokens + 1) * hashed_tokens);
                until = std::min(until, end);
                digest = mixed(mixed(digest, uint64_t(token)), uint64_t(until - at));
                at = until;
            }
            chain.push_back(digest);
        }
        return chain.data();
    }
};

// What a sequence holds: blocks in the order of their tokens. Of the first ones, by which number the pool knows them.
struct Held {
    int64_t count = 0;
    std::vector<int32_t> known;
};

struct Pool {
    // whether any block is kept for another sequence; without, blocks are only counted
    bool keeps = false;

    explicit Pool(int64_t blocks = 0, bool keeps = false) : keeps(keeps), unknown(blocks) {}

    int64_t free() const { return unknown + idle.size; }

    // blocks of the longest known beginning
    int64_t known(const Digest *chain, int64_t most) const {
        int64_t found = 0;
        while (keeps && found < most && numbers.find(chain[found]) >= 0) found++;
        return found;
    }

    // how many blocks fewer are free after ``take``
    int64_t cost(int64_t count, const Digest *chain, int64_t found) const {
        int64_t total = count - found;
        for (int64_t i = 0; i < found; i++) total += blocks[size_t(numbers.find(chain[i]))].holders == 0;
        return total;
    }

    void take(Held &held, int64_t count, const Digest *chain = nullptr, int64_t found = 0) {
        for (int64_t i = 0; i < found; i++) {
            int32_t number = numbers.find(chain[i]);
            if (blocks[size_t(number)].holders++ == 0) idle.remove(number);
            held.known.push_back(number);
        }
        held.count += count;
        unknown -= count - found;
        for (; unknown < 0; unknown++) {
            int32_t oldest = idle.oldest();
            idle.remove(oldest);
            numbers.remove(blocks[size_t(oldest)].digest);
            spare.push_back(oldest);
        }
    }

    // the KV of the tokens with this chain lies in what is held
    void remember(Held &held, const Digest *chain, int64_t full) {
        if (!keeps) return;
        full = std::min(full, held.count);
        if (int64_t(held.known.size()) < full) held.known.resize(size_t(full), -1);
        for (int64_t i = 0; i < full; i++) {
            int32_t &number = held.known[size_t(i)];
            if (number >= 0 || numbers.find(chain[i]) >= 0) continue;
            if (spare.empty()) spare.push_back(int32_t(blocks.size())), blocks.emplace_back();
            number = spare.back();
            spare.pop_back();
            blocks[size_t(number)] = {chain[i], 1};
            numbers.add(chain[i], number);
        }
    }

    // the end of a prompt is of less use than its beginning, so it goes first
    void give(Held &held) {
        unknown += held.count - int64_t(held.known.size());
        for (size_t i = held.known.size(); i-- > 0;) {
            int32_t number = held.known[i];
            if (number < 0) unknown++;
            else if (--blocks[size_t(number)].holders == 0) idle.append(number);
        }
        held = {};
    }

private:
    struct Block {
        Digest digest;
        int64_t holders;
    };

    // free, and known by nobody
    int64_t unknown;
    // blocks that are or were known, and numbers of those that are no more
    std::vector<Block> blocks;
    std::vector<int32_t> spare;
    Table numbers;
    // known, and held by nobody
    Order idle;
};

// What the router believes a pool to keep: what it was last to fill.
struct Index {
    int64_t most = 0;

    int64_t found(const Digest *chain, int64_t blocks) const {
        int64_t count = 0;
        while (count < blocks && numbers.find(chain[count]) >= 0) count++;
        return count;
    }

    void note(const Digest *chain, int64_t blocks) {
        for (int64_t i = blocks; i-- > 0;) {
            int32_t number = numbers.find(chain[i]);
            if (number >= 0) order.remove(number);
            else number = fresh(chain[i]);
            order.append(number);
        }
        while (order.size > most) {
            int32_t oldest = order.oldest();
            order.remove(oldest);
            numbers.remove(digests[size_t(oldest)]);
            spare.push_back(oldest);
        }
    }

private:
    int32_t fresh(Digest digest) {
        if (spare.empty()) spare.push_back(int32_t(digests.size())), digests.emplace_back();
        int32_t number = spare.back();
        spare.pop_back();
        digests[size_t(number)] = digest;
        numbers.add(digest, number);
        return number;
    }

    Table numbers;
    std::vector<Digest> digests;
    std::vector<int32_t> spare;
    Order order;
};
}
