"""What is in memory: state dicts flattened into leaves and rebuilt from them, and the bytes of their tensors.

``tree`` flattens and rebuilds, ``values`` encodes plain Python values, ``codecs`` holds the kinds of value stored as parts,
``tensors`` moves bytes in and out of tensors, ``stateful`` has the classes that users meet.
"""

# Each registers the kinds of value that it knows: whoever imports anything of this floor can rely on all of them.
from expstate.state import numpy_codecs, numpy_random, packed, pandas_codecs, quantized_codecs, subclass_codecs, torch_codecs

__all__ = ["numpy_codecs", "numpy_random", "packed", "pandas_codecs", "quantized_codecs", "subclass_codecs", "torch_codecs"]
