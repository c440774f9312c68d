"""The whole job on a toy model, with a world of checkable questions of its own."""
