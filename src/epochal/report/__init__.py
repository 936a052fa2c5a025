"""What a run tells afterwards: its history as rows, and the curves drawn from them.

This room reads rows and files only; it never sees a model.
"""
