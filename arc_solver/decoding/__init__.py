"""Prompts in; continuations and their log-probabilities out.

In the order of reading; each imports only from those before it:

    engine         the protocol of engines, and what they answer
    token_tree     a tree of reply ids with log-probabilities
    drafter        drafts for speculative decoding, guessed without a model
    search         read off a tree: the greedy reply, a score, all probable replies
    tree_batch     trees that share a KV cache, and the forward passes over them
    torch_engine   our engine, in PyTorch
    vllm_engine    the same answers from vLLM
    engine_choice  which of the two a run uses
"""

from .torch_engine import TorchEngine

__all__ = ["TorchEngine"]
