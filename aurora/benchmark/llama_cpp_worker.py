"""Run by the interpreter of .venv-llama, without Aurora: tokens per second of llama.cpp behind a context.

Arguments: GGUF file, tokens of context, tokens to decode, threads. Prints one line of JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
import time


def main(path: str, context: int, num_tokens: int, threads: int) -> None:
    """Read `context` tokens, then decode and time `num_tokens` single ones, greedily."""
    llama_cpp = importlib.import_module("llama_cpp")
    model = llama_cpp.Llama(
        path, n_ctx=context + num_tokens + 8, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False
    )
    model.eval([5 + (7919 * index) % 40000 for index in range(context)])
    token = model.sample(temp=0.0)
    start = time.perf_counter()
    for _ in range(num_tokens):
        model.eval([token])
        token = model.sample(temp=0.0)
    seconds = time.perf_counter() - start
    print(json.dumps({"tokens_s": num_tokens / seconds, "version": llama_cpp.__version__}))


if __name__ == "__main__":
    main(sys.argv[1], *(int(word) for word in sys.argv[2:5]))
