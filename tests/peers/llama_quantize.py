"""Run by itself: a GGUF model quantised by llama.cpp.

python llama_quantize.py MODEL OUT FILE_TYPE
"""

from __future__ import annotations

import ctypes
import sys


def main(model: str, out: str, file_type: str) -> None:
    import llama_cpp

    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype = 1, int(file_type)
    params.allow_requantize = True
    code = llama_cpp.llama_model_quantize(model.encode(), out.encode(), ctypes.byref(params))
    if code:
        sys.exit(f"llama.cpp does not quantise: {code}")


if __name__ == "__main__":
    main(*sys.argv[1:])
