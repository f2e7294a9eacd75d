"""A few lines that load what is published, for the library of its format."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loratools.publishing.contents import Contents

_AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_SUFFIX_AUTO = {
    "ForCausalLM": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForImageTextToText",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
}


def usage(contents: Contents, repo: str, bases: Sequence[str]) -> str:
    """Return Markdown that shows how to use what is in ``repo``."""
    kind = "peft" if contents.library == "peft" else contents.format
    write = _WRITERS.get((contents.what, kind)) or _WRITERS[contents.what, ""]
    return write(contents, repo, bases[0])


def _code(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _merge_line(repo: str, base: str) -> str:
    line = f"loratools merge hf://{base} hf://{repo} -o merged"
    return "Or merged into the base:\n\n" + _code("sh", line)


def _peft(contents: Contents, repo: str, base: str) -> str:
    auto = _AUTO.get(contents.task or "", "AutoModel")
    code = _code(
        "python",
        "from peft import PeftModel",
        f"from transformers import {auto}",
        "",
        f'base = {auto}.from_pretrained("{base}")',
        f'model = PeftModel.from_pretrained(base, "{repo}")',
    )
    return f"{code}\n\n{_merge_line(repo, base)}"


def _diffusers(contents: Contents, repo: str, base: str) -> str:
    prompt = contents.trigger or "a photo"
    code = _code(
        "python",
        "from diffusers import DiffusionPipeline",
        "",
        f'pipeline = DiffusionPipeline.from_pretrained("{base}")',
        f'pipeline.load_lora_weights("{repo}", weight_name="{contents.weights}")',
        f"image = pipeline({prompt!r}).images[0]",
    )
    return f"{code}\n\n{_merge_line(repo, base)}"


def _llama_adapter(contents: Contents, repo: str, base: str) -> str:
    return _code(
        "sh",
        f"hf download {repo} {contents.weights} --local-dir .",
        f"# base.gguf: {base} in GGUF",
        f"llama-cli -m base.gguf --lora {contents.weights}",
    )


def _mlx_adapter(contents: Contents, repo: str, base: str) -> str:
    code = _code(
        "sh",
        f"hf download {repo} --local-dir adapter",
        f'mlx_lm.generate --model {base} --adapter-path adapter --prompt "Hello"',
    )
    return f"{code}\n\n{_merge_line(repo, base)}"


def _llama_model(contents: Contents, repo: str, base: str) -> str:
    return _code("sh", f"llama-cli --hf-repo {repo} --hf-file {contents.weights}")


def _transformers(contents: Contents, repo: str, base: str) -> str:
    task = contents.task or ""
    auto = next((auto for end, auto in _SUFFIX_AUTO.items() if task.endswith(end)), "AutoModel")
    return _code(
        "python",
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("{repo}")',
    )


def _pipeline(contents: Contents, repo: str, base: str) -> str:
    return _code(
        "python",
        "from diffusers import DiffusionPipeline",
        "",
        f'pipeline = DiffusionPipeline.from_pretrained("{repo}")',
    )


def _download(contents: Contents, repo: str, base: str) -> str:
    return _code("sh", f"loratools pull {repo} -o {repo.rpartition('/')[2]}")


_WRITERS: dict[tuple[str, str], Callable[[Contents, str, str], str]] = {
    ("adapter", "peft"): _peft,
    ("adapter", "gguf"): _llama_adapter,
    ("adapter", "mlx"): _mlx_adapter,
    ("adapter", ""): _diffusers,
    ("model", "gguf"): _llama_model,
    ("model", "transformers"): _transformers,
    ("model", ""): _download,
    ("pipeline", ""): _pipeline,
}
"""What is published and its format → who writes the lines; ``""`` for every other format."""
