"""Drawing with matplotlib: the common style and the parts of figures.

Matplotlib is imported where something is drawn, so that whatever only computes
starts without it.
"""
