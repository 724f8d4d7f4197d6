"""TensorRT and TensorRT-RTX plans, run without torch.

`choice` finds the plan of a bundle that fits this GPU; `engine` runs it. Behind two seams, `cuda` and `plan`, lies all
that needs a GPU; profiles, memory and CUDA graphs are plain Python and are tested without one.
"""
