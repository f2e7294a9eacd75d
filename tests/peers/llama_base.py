"""Run by itself: a tiny model's folder as a GGUF file of llama.cpp's own making.

python llama_base.py LLAMA_CPP FOLDER OUT [fuse]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(llama_cpp: str, folder: str, out: str, fuse: str = "") -> None:
    sys.path[:0] = [llama_cpp, f"{llama_cpp}/gguf-py"]
    import gguf
    from conversion import ModelType, get_model_architecture, get_model_class

    where = Path(folder)
    # Not by transformers, which drops words that older models and this converter need.
    hparams = json.loads((where / "config.json").read_text())
    chosen = get_model_class(get_model_architecture(hparams, ModelType.TEXT))

    class WithoutVocabulary(chosen):  # type: ignore[valid-type, misc]
        model_arch = chosen.model_arch

        def set_vocab(self) -> None:
            self._set_vocab_none()
            arch = gguf.MODEL_ARCH_NAMES[self.model_arch]
            key = f"{arch}.vocab_size"
            if key not in self.gguf_writer.kv_data[0]:
                self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    words = {"fuse_qkv": True, "fuse_gate_up_exps": True} if fuse else {}
    kind = gguf.LlamaFileType.ALL_F32
    model = WithoutVocabulary(where, kind, Path(out), eager=True, hparams=hparams, **words)
    model.write()


if __name__ == "__main__":
    main(*sys.argv[1:])
