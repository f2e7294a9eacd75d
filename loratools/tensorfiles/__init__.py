"""Containers of tensors: headers, byte ranges and writers that are safe to interrupt.

- ``dtypes``: dtype words, their width in bits, and their torch names
- ``header``: the safetensors header, read with suspicion and written exactly
- ``entries``: whether one entry of that header makes sense
- ``safetensors``: whole safetensors files as memory-mapped torch tensors
- ``sharded``: the ``*.index.json`` that ties shards together
- ``torch_zip``: ``torch.save`` files, without running what is inside
- ``copying``: byte ranges from file to file, in the kernel where it can
- ``atomic``: outputs that appear complete or not at all
- ``destination``: whether an output may go where it was told to go
- ``leftovers``: what killed runs left behind
- ``swapping``: renames that keep one of two contents in place, and syncing to disk
- ``inputs``: opening what was given, and strict JSON
"""
