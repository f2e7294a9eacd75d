"""References, and which files of a repository they mean, from names alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratools.errors import HubError
from loratools.hub.choosing import choose_adapter, choose_model, may_be_adapter, side_files
from loratools.hub.failures import without_tokens
from loratools.hub.listing import Listing
from loratools.hub.ranges import join_ranges
from loratools.hub.references import (
    Reference,
    is_reference,
    parse_reference,
    parse_repository,
    plain_name,
    repository_of,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://me/lora", ("me/lora", None, "")),
        ("hf://models/me/lora", ("me/lora", None, "")),
        ("hf://me/lora@v1.0", ("me/lora", "v1.0", "")),
        ("hf://me/lora@v1/sub/ink.safetensors", ("me/lora", "v1", "sub/ink.safetensors")),
        ("hf://me/lora@refs/pr/3/ink.safetensors", ("me/lora", "refs/pr/3", "ink.safetensors")),
        ("hf://me/lora@a%2Fb", ("me/lora", "a/b", "")),
        ("hf://me/lora/ink@2.safetensors", ("me/lora", None, "ink@2.safetensors")),
        ("hf://me/lora/", ("me/lora", None, "")),
    ],
)
def test_the_grammar(text: str, expected: tuple[str, str | None, str]) -> None:
    found = parse_reference(text)
    assert (found.repo, found.revision, found.path) == expected
    assert found.text == text


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("hf://gpt2", "namespace/name"),
        ("hf://datasets/me/data", "dataset"),
        ("hf://model/me/lora", "plural"),
        ("hf://me/lo--ra", "repo"),
        ("hf://me/lora@", "revision"),
        ("hf://me/lora/../../secret", ".."),
        ("hf://", "Empty"),
    ],
)
def test_what_is_no_reference_is_refused_by_name(text: str, word: str) -> None:
    with pytest.raises(HubError, match=word) as caught:
        parse_reference(text)
    assert text in caught.value.message
    assert "OWNER/NAME" in str(caught.value.hint)


def test_a_repository_may_be_named_without_the_scheme() -> None:
    assert parse_repository("me/lora").repo == "me/lora"
    assert is_reference("hf://me/lora")
    assert not is_reference("hf/me/lora")
    assert not is_reference(Path("hf://me/lora"))


@pytest.mark.parametrize(
    ("path", "name", "repo"),
    [
        ("cache/models--me--ink/snapshots/0a1b", "ink", "me/ink"),
        ("cache/models--me--ink/snapshots/0a1b/", "ink", "me/ink"),
        ("cache/models--me--ink/snapshots/0a1b/v2/x.safetensors", "x.safetensors", "me/ink"),
        ("loras/ink.safetensors", "ink.safetensors", None),
    ],
)
def test_a_place_in_the_cache_is_called_what_it_is(path: str, name: str, repo: str | None) -> None:
    assert plain_name(path) == name
    assert repository_of(path) == repo


def test_tokens_are_blotted_out() -> None:
    text = "GET http://x with Authorization: Bearer hf_abcDEF123456 failed for hf_zzzzzz99"
    assert "abcDEF" not in without_tokens(text)
    assert "zzzzzz" not in without_tokens(text)
    assert "failed for" in without_tokens(text)


def test_near_ranges_become_one() -> None:
    near, far = 1000, 10**6
    assert join_ranges([(far, far + 2), (0, 2), (near, near + 2)]) == [
        (0, near + 2),
        (far, far + 2),
    ]
    assert join_ranges([]) == []


# ---------------------------------------------------------------------------- choosing


def listing(*names: str, path: str = "") -> Listing:
    return Listing(Reference(f"hf://me/x/{path}", "me/x", None, path), dict.fromkeys(names, 9), "c")


LLAMA = (
    "config.json", "tokenizer.json", "model.safetensors.index.json", "pytorch_model.bin",
    "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "README.md",
    "original/consolidated.00.pth", "onnx/model.onnx", "flax_model.msgpack", "adapter_config.json",
)  # fmt: skip


def test_a_model_is_its_index_and_side_files_without_second_copies() -> None:
    choice = choose_model(listing(*LLAMA))
    assert choice.indexes == ("model.safetensors.index.json",)
    assert set(choice.files) == {
        "model.safetensors.index.json", "config.json", "tokenizer.json", "README.md"
    }  # fmt: skip
    assert set(side_files(listing(*LLAMA))) == {"config.json", "tokenizer.json", "README.md"}
    assert not may_be_adapter(listing("config.json", "model.safetensors"))


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (("model.safetensors", "pytorch_model.bin"), "model.safetensors"),
        (("model.safetensors", "model.safetensors.index.json"), "model.safetensors"),
        (("pytorch_model.bin",), "pytorch_model.bin"),
        (("unusual.safetensors",), "unusual.safetensors"),
    ],
)
def test_the_weights_that_the_folder_reader_would_take(
    names: tuple[str, ...], weights: str
) -> None:
    assert choose_model(listing("config.json", *names)).weights == (weights,)


def test_a_folder_inside_a_repository() -> None:
    names = ("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json")
    choice = choose_model(listing(*names, path="unet"))
    assert choice.root == "unet"
    assert set(choice.files) == set(names[:2])


def test_a_pipeline_without_its_other_copies() -> None:
    names = (
        "model_index.json", "sd_xl_base_1.0.safetensors",
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors", "unet/model.onnx",
        "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.bin",
        "scheduler/scheduler_config.json", "tokenizer/vocab.json",
    )  # fmt: skip
    choice = choose_model(listing(*names))
    assert set(choice.files) == {
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json", "tokenizer/vocab.json",
    }  # fmt: skip
    assert choice.weights == ("unet/diffusion_pytorch_model.safetensors",)


def test_all_parts_of_a_split_file() -> None:
    names = [f"m-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    choice = choose_model(listing(*names, "m-00001-of-00002.gguf", path=names[1]))
    assert choice.files == tuple(names)
    assert choice.root == names[1]


@pytest.mark.parametrize(
    ("names", "path", "files", "root"),
    [
        (
            ("adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "README.md"),
            "",
            {"adapter_model.safetensors", "adapter_config.json"},
            "",
        ),
        (("pytorch_lora_weights.bin", "img.png"), "", {"pytorch_lora_weights.bin"}, ""),
        (("ink.safetensors", "README.md"), "", {"ink.safetensors"}, "ink.safetensors"),
        (
            ("v2/adapter_model.bin", "v2/adapter_config.json"),
            "",
            {"v2/adapter_model.bin", "v2/adapter_config.json"},
            "v2",
        ),
        (("a.safetensors", "b.safetensors"), "b.safetensors", {"b.safetensors"}, "b.safetensors"),
        (
            ("adapter_model.safetensors", "adapter_config.json"),
            "adapter_model.safetensors",
            {"adapter_model.safetensors", "adapter_config.json"},
            "adapter_model.safetensors",
        ),
    ],
)  # fmt: skip
def test_an_adapter_is_its_weights_and_config(
    names: tuple[str, ...], path: str, files: set[str], root: str
) -> None:
    choice = choose_adapter(listing(*names, path=path))
    assert set(choice.files) == files
    assert choice.root == root


@pytest.mark.parametrize(
    ("names", "word"),
    [
        (("a.safetensors", "b.safetensors"), "hf://me/x/a.safetensors"),
        (("v1/adapter_model.safetensors", "v2/adapter_model.safetensors"), "hf://me/x/v1"),
        (("config.json", "model.safetensors"), "looks like a base model"),
        (("README.md",), "adapter_model.safetensors"),
    ],
)
def test_no_adapter_or_several_is_an_error_that_says_what_to_name(
    names: tuple[str, ...], word: str
) -> None:
    with pytest.raises(HubError) as caught:
        choose_adapter(listing(*names))
    assert word in str(caught.value.hint)
