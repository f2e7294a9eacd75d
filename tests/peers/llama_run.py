"""Run by itself: the logits of a GGUF model with GGUF adapters, by llama.cpp.

python llama_run.py MODEL OUT [ADAPTER ...]

OUT receives, with numpy.save, the logits of a fixed sequence for the model alone and with each
adapter in turn, stacked. A process of its own, because llama.cpp aborts where it is not content.
"""

from __future__ import annotations

import ctypes
import sys

import numpy as np

TOKENS = (1, 5, 9, 2, 7, 3, 30, 21, 4, 11)


def main(path: str, out: str, *adapters: str) -> None:
    import llama_cpp

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        path.encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        sys.exit("the model does not load")
    found = [logits(model, None)]
    for name in adapters:
        adapter = llama_cpp.llama_adapter_lora_init(model, name.encode())
        if not adapter:
            sys.exit(f"the adapter does not load: {name}")
        found.append(logits(model, adapter))
    np.save(out, np.stack(found))


def logits(model: object, adapter: object | None) -> np.ndarray:
    import llama_cpp

    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 64, 1, 1
    params.type_k = params.type_v = 0  # f32, so that only the model's arithmetic differs
    params.flash_attn_type = 0
    context = llama_cpp.llama_init_from_model(model, params)
    if adapter is not None:
        pointers = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        llama_cpp.llama_set_adapters_lora(context, pointers, 1, (ctypes.c_float * 1)(1.0))
    count = len(TOKENS)
    batch = llama_cpp.llama_batch_init(count, 0, 1)
    batch.n_tokens = count
    for place, token in enumerate(TOKENS):
        batch.token[place], batch.pos[place] = token, place
        batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
    if llama_cpp.llama_decode(context, batch):
        sys.exit("decoding failed")
    words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rows = [
        np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, place), (words,)).copy()
        for place in range(count)
    ]
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    return np.stack(rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
