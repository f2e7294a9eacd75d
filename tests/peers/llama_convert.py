"""Run by itself: what llama.cpp's own converter makes of dense weights, class by class.

python llama_convert.py LLAMA_CPP CASES OUT

LLAMA_CPP is a checkout (its own gguf-py is newer than the package's, hence the process of its own);
CASES a file of torch.save with a list of {"class", "config", "tensors"}; OUT receives a list of
{"arch", "tensors", "errors"} or {"error"} in the same order.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch


def main(llama_cpp: str, cases: str, out: str) -> None:
    sys.path[:0] = [llama_cpp, f"{llama_cpp}/gguf-py"]
    with tempfile.TemporaryDirectory() as folder:
        results = [convert(case, Path(folder)) for case in torch.load(cases, weights_only=True)]
    torch.save(results, out)


def convert(case: dict, folder: Path) -> dict:
    import gguf

    try:
        model = open_model(case["class"], case["config"], folder)
        model = getattr(model, "impl", model)
        arch = gguf.MODEL_ARCH_NAMES[model.model_arch]
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    done, errors = {}, {}
    for name, weight in case["tensors"].items():
        found = attempt(model, name, weight)
        if isinstance(found, str):
            errors[name] = found
        else:
            done.update(found)
    return {"arch": arch, "tensors": done, "errors": errors}


def attempt(model: object, name: str, weight: torch.Tensor) -> dict | str:
    try:
        return tensor_of(model, name, weight)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def open_model(name: str, config: dict, folder: Path) -> object:
    import gguf
    from conversion import get_model_class

    (folder / "config.json").write_text(json.dumps(config))
    words = {str(number): number for number in range(config["vocab_size"])}
    tokenizer = {"model": {"vocab": words}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    chosen = get_model_class(name)
    chosen.no_mtp = True  # the folder has no tensors, hence no draft layers among them
    return chosen(folder, gguf.LlamaFileType.ALL_F32, None, eager=True, hparams=dict(config))


def tensor_of(model: object, name: str, weight: torch.Tensor) -> dict:
    from conversion import LazyTorchTensor

    item = model.filter_tensors((name, lambda: weight))
    if item is None:
        return {}
    name, get = item
    block = next((int(part) for part in name.split(".") if part.isdecimal()), None)
    found = list(model.modify_tensors(get().clone(), name, block))
    return {n: LazyTorchTensor.to_eager(t).clone().contiguous() for n, t in found}


if __name__ == "__main__":
    main(*sys.argv[1:])
