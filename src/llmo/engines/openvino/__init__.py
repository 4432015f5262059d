"""OpenVINO on the CPU for models that generate: the compiled graph under our own scheduler, cache and sampling."""

from llmo.engines.openvino.engine import OpenVinoEngine

__all__ = ["OpenVinoEngine"]
