"""The Hugging Face Hub: ``hf://`` references to repositories, and what of them is fetched.

``huggingface_hub`` is imported where something is asked of it, so that ``--help`` stays quick. Its
cache, ``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE`` and the rest of its settings hold.
"""
