"""The demo world: seeded, procedurally drawn scenes with captions and question-answer pairs.

qforge data demo --out world
"""

from trainer.demo_world.write import attributes_right, scorers_for, write_demo_world

__all__ = ["attributes_right", "scorers_for", "write_demo_world"]
