"""How bytes move.

``take`` and ``restore`` run the steps; ``windows`` cut files into what one buffer holds, ``memory`` lends the buffers,
``write`` and ``read`` move them, ``attempt`` commits or cleans up, ``collect`` removes what dead takes left.
"""
