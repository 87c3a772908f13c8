"""One line in somebody else's trainer: TRL, Liger, verl, Unsloth, transformers.

Nothing is imported from here by the rest of the package, and a module of this package asks for the library it is named
after only when it is imported or used.
"""
