"""Checkpoints from and to Hugging Face and LAVIS."""

from trainer.convert.importer import import_checkpoint
from trainer.convert.options import ImportOptions
from trainer.convert.to_hf import write_hf

__all__ = ["ImportOptions", "import_checkpoint", "write_hf"]
