"""Exports: denoisers, dense or pruned, as ONNX, OpenVINO and `torch.export` files that stock pipelines sample with."""

from .description import ExportDescription
from .exporting import ExportOptions, export_pipeline
from .model import ExportedModel, load_exported

__all__ = ["ExportDescription", "ExportOptions", "ExportedModel", "export_pipeline", "load_exported"]
