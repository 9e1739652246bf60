"""diffa2_mini: DIFFA-2 (arXiv 2601.23161), a diffusion language model that listens, rebuilt small
in plain PyTorch."""
