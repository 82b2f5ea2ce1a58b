"""What is in memory: state dicts flattened into leaves and rebuilt from them, and the bytes of their tensors.

``tree`` flattens and rebuilds, ``values`` encodes plain Python values, ``codecs`` holds the kinds of value stored as parts,
``tensors`` moves bytes in and out of tensors, ``stateful`` has the classes that users meet.
"""
