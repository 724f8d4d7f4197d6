"""`python -m qforge`, the form that `torchrun -m` and `accelerate launch -m` start."""

from qforge.cli import main

main()
