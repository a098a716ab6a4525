"""Data: scenes of handwritten numbers that need no download, and image folders with a CSV of labels."""

from mlhead.data.loading import BadSample, Batch, Collate, Sample, evaluation_loader, training_loader
from mlhead.data.scenes import Box, Scenes

__all__ = ["BadSample", "Batch", "Box", "Collate", "Sample", "Scenes", "evaluation_loader", "training_loader"]
