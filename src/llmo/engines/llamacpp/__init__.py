"""llama.cpp behind the contract of engines that generate: a GGUF file in one process, the fastest for one stream."""

from llmo.engines.llamacpp.engine import LlamaCppEngine

__all__ = ["LlamaCppEngine"]
