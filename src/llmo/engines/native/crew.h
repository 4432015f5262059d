// Threads that stay beside their caller and help with what it runs. Between two runs they sleep. Where nobody waits at
// a barrier, one that comes late holds nobody up, and one that comes when all is done stays out.
#pragma once
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>

constexpr int SPINS = 4000; // turns of waiting before the core is left to others

static inline void rest(int turn) {
    if (turn > SPINS) sched_yield();
    else {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
}

struct Crew {
    int threads; // the caller is the first of them
    pthread_t* thread;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    uint32_t generation, passed; // these count up for ever
    int arrived, inside; // of the helpers: who waits at a barrier, and who is within a run
    bool open, ends;
    void (*work)(void* job, int id);
    void* job;

    // All threads meet here.
    void barrier() {
        uint32_t seen = __atomic_load_n(&passed, __ATOMIC_ACQUIRE);
        if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == threads) {
            __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
            __atomic_store_n(&passed, seen + 1, __ATOMIC_RELEASE);
            return;
        }
        for (int turn = 0; __atomic_load_n(&passed, __ATOMIC_ACQUIRE) == seen; turn++) rest(turn);
    }

    void wake_up() {
        pthread_mutex_lock(&lock);
        __atomic_store_n(&generation, generation + 1, __ATOMIC_RELEASE);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&lock);
    }

    struct Follower {
        Crew* crew;
        int id;
    };

    static void* follow(void* given) {
        Follower me = *(Follower*)given;
        free(given);
        Crew* c = me.crew;
        for (uint32_t seen = 0;;) {
            for (int turn = 0; turn < SPINS && __atomic_load_n(&c->generation, __ATOMIC_ACQUIRE) == seen;) rest(turn++);
            pthread_mutex_lock(&c->lock);
            while (c->generation == seen) pthread_cond_wait(&c->wake, &c->lock);
            seen = c->generation;
            bool enter = c->open;
            c->inside += enter;
            pthread_mutex_unlock(&c->lock);
            if (c->ends) return nullptr;
            if (!enter) continue;
            c->work(c->job, me.id);
            __atomic_fetch_sub(&c->inside, 1, __ATOMIC_RELEASE);
        }
    }

    // Start the others. False where there is no memory or no thread for one of them; `dismiss` all the same.
    bool hire(int count, void (*does)(void*, int), void* with) {
        threads = 1;
        work = does;
        job = with;
        pthread_mutex_init(&lock, nullptr);
        pthread_cond_init(&wake, nullptr);
        thread = (pthread_t*)calloc((size_t)count, sizeof(pthread_t));
        if (!thread) return false;
        for (int i = 1; i < count; i++) {
            Follower* other = (Follower*)malloc(sizeof(Follower));
            if (!other) return false;
            *other = {this, i};
            if (pthread_create(&thread[i], nullptr, follow, other)) {
                free(other);
                return false;
            }
            threads = i + 1;
        }
        return true;
    }

    // Everybody works; the caller's own work must not end before all is done.
    void run() {
        if (threads == 1) return work(job, 0);
        __atomic_store_n(&open, true, __ATOMIC_RELAXED);
        wake_up();
        work(job, 0);
        pthread_mutex_lock(&lock);
        open = false;
        pthread_mutex_unlock(&lock);
        for (int turn = 0; __atomic_load_n(&inside, __ATOMIC_ACQUIRE); turn++) rest(turn);
    }

    void dismiss() {
        ends = true;
        wake_up();
        for (int i = 1; i < threads; i++) pthread_join(thread[i], nullptr);
        free(thread);
    }
};

// Memory for so many, all zero; what `pointer` held is given back. False where there is none.
template <class T> bool room(T*& pointer, int64_t count) {
    free(pointer);
    size_t size = ((size_t)count * sizeof(T) + 63) / 64 * 64;
    pointer = (T*)aligned_alloc(64, size);
    if (pointer) __builtin_memset(pointer, 0, size);
    return pointer;
}
