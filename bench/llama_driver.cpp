// One loaded model of llama.cpp that measures what it is told to, line by line on stdin:
//   prefill TOKENS                 one prompt on an empty cache
//   decode BATCH PROMPT TOKENS     TOKENS greedy steps of BATCH sequences after their prompts
// Each answer is one line of JSON: {"wall_s": .., "cpu_s": ..}. Started as
//   llama_driver run MODEL THREADS      or     llama_driver quantize SOURCE TARGET FILE_TYPE
// or, to measure this machine's memory,      llama_driver bandwidth THREADS MIB
#include <sys/mman.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "llama.h"

namespace {

constexpr int kMaxBatch = 8;
constexpr int kContextPerSequence = 1024;
constexpr int kPromptBatch = 512;

double wall_seconds() {
    using namespace std::chrono;
    return duration<double>(steady_clock::now().time_since_epoch()).count();
}

double cpu_seconds() {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    const auto seconds = [](const timeval& t) { return t.tv_sec + t.tv_usec * 1e-6; };
    return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

void fail(const std::string& what) {
    std::fprintf(stderr, "%s\n", what.c_str());
    std::exit(1);
}

class Stopwatch {
   public:
    void print() const {
        std::printf("{\"wall_s\": %.9f, \"cpu_s\": %.9f}\n", wall_seconds() - wall_,
                    cpu_seconds() - cpu_);
        std::fflush(stdout);
    }

   private:
    double wall_ = wall_seconds();
    double cpu_ = cpu_seconds();
};

class Model {
   public:
    Model(const char* path, int threads) : batch_(llama_batch_init(kPromptBatch, 0, 1)) {
        model_ = llama_model_load_from_file(path, llama_model_default_params());
        if (model_ == nullptr) fail(std::string("cannot load ") + path);
        llama_context_params params = llama_context_default_params();
        params.n_ctx = kMaxBatch * kContextPerSequence;
        params.n_batch = params.n_ubatch = kPromptBatch;
        params.n_seq_max = kMaxBatch;
        params.n_threads = params.n_threads_batch = threads;
        context_ = llama_init_from_model(model_, params);
        if (context_ == nullptr) fail("cannot make a context");
        vocab_size_ = llama_vocab_n_tokens(llama_model_get_vocab(model_));
    }

    void prefill(int tokens) {
        clear();
        const Stopwatch watch;
        prompt(0, tokens);
        greedy(-1);
        watch.print();
    }

    void decode(int batch, int prompt_tokens, int tokens) {
        clear();
        std::vector<llama_token> next;
        for (int s = 0; s < batch; ++s) {
            prompt(s, prompt_tokens);
            next.push_back(greedy(-1));
        }
        const Stopwatch watch;
        for (int step = 0; step < tokens; ++step) {
            batch_.n_tokens = 0;
            for (int s = 0; s < batch; ++s) add(next[s], prompt_tokens + step, s, true);
            run();
            for (int s = 0; s < batch; ++s) next[s] = greedy(s);
        }
        watch.print();
    }

   private:
    void clear() { llama_memory_clear(llama_get_memory(context_), false); }

    void add(llama_token token, int position, int sequence, bool wants_logits) {
        const int i = batch_.n_tokens++;
        batch_.token[i] = token;
        batch_.pos[i] = position;
        batch_.n_seq_id[i] = 1;
        batch_.seq_id[i][0] = sequence;
        batch_.logits[i] = wants_logits;
    }

    void prompt(int sequence, int tokens) {
        for (int begin = 0; begin < tokens; begin += kPromptBatch) {
            const int end = std::min(tokens, begin + kPromptBatch);
            batch_.n_tokens = 0;
            for (int i = begin; i < end; ++i) {
                state_ = state_ * 6364136223846793005u + 1442695040888963407u;
                const auto token = static_cast<llama_token>((state_ >> 33) % vocab_size_);
                add(token, i, sequence, i + 1 == tokens);
            }
            run();
        }
    }

    void run() {
        if (llama_decode(context_, batch_) != 0) fail("llama_decode failed");
    }

    llama_token greedy(int row) const {
        const float* logits = llama_get_logits_ith(context_, row);
        return static_cast<llama_token>(std::max_element(logits, logits + vocab_size_) - logits);
    }

    llama_model* model_;
    llama_context* context_;
    llama_batch batch_;
    int vocab_size_;
    uint64_t state_ = 1;
};

int quantize(const char* source, const char* target, int file_type) {
    llama_model_quantize_params params = llama_model_quantize_default_params();
    params.ftype = static_cast<llama_ftype>(file_type);
    return llama_model_quantize(source, target, &params) == 0 ? 0 : 1;
}

uint64_t sum(const uint64_t* from, int64_t count) {
    uint64_t sums[32] = {};
    for (int64_t i = 0; i + 32 <= count; i += 32) {
        for (int j = 0; j < 32; ++j) sums[j] += from[i + j];
    }
    uint64_t all = 0;
    for (const uint64_t value : sums) all += value;
    return all;
}

// Reads the same memory again and again, in huge pages; the best of some passes.
int bandwidth(int threads, int64_t mib) {
    const int64_t bytes = mib << 20;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("no memory to read");
    madvise(memory, bytes, MADV_HUGEPAGE);
    std::memset(memory, 1, bytes);
    const int64_t share = bytes / 8 / threads;
    double best = 1e9;
    volatile uint64_t sink = 0;
    for (int pass = 0; pass < 15; ++pass) {
        const double begin = wall_seconds();
        std::vector<std::thread> workers;
        for (int i = 0; i < threads; ++i) {
            workers.emplace_back([&, i] {
                sink = sink + sum(static_cast<const uint64_t*>(memory) + i * share, share);
            });
        }
        for (std::thread& worker : workers) worker.join();
        best = std::min(best, wall_seconds() - begin);
    }
    std::printf("{\"bytes_per_s\": %.0f}\n", static_cast<double>(bytes) / best);
    return 0;
}

int serve(const char* path, int threads) {
    Model model(path, threads);
    std::printf("{\"ready\": true}\n");
    std::fflush(stdout);
    std::string line, command;
    while (std::getline(std::cin, line)) {
        std::istringstream words(line);
        int a = 0, b = 0, c = 0;
        words >> command >> a >> b >> c;
        if (command == "prefill") {
            model.prefill(a);
        } else if (command == "decode") {
            model.decode(a, b, c);
        } else {
            fail("unknown command: " + line);
        }
    }
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    const std::string mode = argc > 1 ? argv[1] : "";
    if (mode == "bandwidth" && argc == 4) return bandwidth(std::atoi(argv[2]), std::atoi(argv[3]));
    const auto quiet = [](ggml_log_level level, const char* text, void*) {
        if (level >= GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
    };
    llama_log_set(quiet, nullptr);
    llama_backend_init();
    if (mode == "run" && argc == 4) return serve(argv[2], std::atoi(argv[3]));
    if (mode == "quantize" && argc == 5) return quantize(argv[2], argv[3], std::atoi(argv[4]));
    fail("see the top of llama_driver.cpp for the arguments");
}
