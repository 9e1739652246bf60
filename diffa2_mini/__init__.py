"""DIFFA-2 (arXiv 2601.23161), a diffusion language model that listens, rebuilt in plain PyTorch.

    from diffa2_mini import Diffa2
    print(Diffa2.from_pretrained("toy").ask("clip.wav", "What is said?").text)
"""

__all__ = ["Answer", "Diffa2"]


def __getattr__(name: str):
    """Import the public names when asked for (PEP 562): commands start fast and mind Ctrl-C."""
    if name in __all__:
        from . import listen
        return getattr(listen, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
